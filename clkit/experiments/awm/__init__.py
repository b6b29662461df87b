"""The experiments of adaptive weight modulation, AWM (arXiv 2311.15276), at a laptop's scale and at the paper's."""

from clkit.experiments.awm.backbones import BACKBONES, Recipe, pretrained, pretrained_accuracy

__all__ = ["BACKBONES", "Recipe", "pretrained", "pretrained_accuracy"]
