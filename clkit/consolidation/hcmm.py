"""HCMM: after a task, merge by what Adam's second moments say of each weight, then correct the features."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clkit import curvature, normalization
from clkit.consolidation.base import Context, Merged, Progress, share
from clkit.consolidation.correction import correct, projection
from clkit.weights import Weights, check_same, set_weights

MOMENTS = ("corrected", "raw", "normalised")
CHOICES = {
    "importance": (*MOMENTS, "fisher", "none"),
    "accumulate": ("ema", "sum"),
    "correction": ("steps", "ridge", "none"),
    "target": ("previous", "both"),
    "loss": ("squared", "cosine"),
}


def shares(old: Weights, new: Weights, alpha: float) -> dict[str, Tensor]:
    """How far every number goes from its previous value (0) to its current one (1): w = alpha F / F_total.

    F_total = (1 - alpha) F_old + alpha F, with the importances `old` and `new` by name; one without a name is 0
    throughout, and where F_total is 0 w is alpha. In double precision, so that no importance is too small.
    """
    found = {}
    for name, before, after in _pairs(old, new):
        part = alpha * after.double()
        total = (1 - alpha) * before.double() + part
        found[name] = torch.where(total > 0, part / total.where(total > 0, 1), alpha)
    return found


def importance_merge(
    previous: Weights, current: Weights, old: Weights, new: Weights, alpha: float
) -> dict[str, Tensor]:
    """Goes from the previous weights to the current ones, in every number as far as its importance says.

    ((1 - alpha) F_old theta_old + alpha F theta) / ((1 - alpha) F_old + alpha F), computed as theta_old + w (theta -
    theta_old) with w of `shares`, which is alpha where both importances are 0 and for names that have none: nothing is
    divided by zero, alpha = 0 gives the previous weights and alpha = 1 the current ones, bitwise. alpha weights the NEW
    weights. `old` and `new` hold importances, at least 0, of tensors of the weights, in a common unit.
    """
    share("alpha", alpha, of="0 for the old weights, 1 for the new")
    check_same(previous, current, names=("previous", "current"))
    for label, known in (("old", old), ("new", new)):
        for name, tensor in known.items():
            if name not in previous or tensor.shape != previous[name].shape:
                raise ValueError(
                    f"{label}: {name!r} of shape {tuple(tensor.shape)} is no tensor of the weights; give importances "
                    "of the same architecture"
                )
            if (tensor < 0).any():
                raise ValueError(f"{label}: {name!r} has negative entries; give squares or magnitudes")
    return _step(previous, current, shares(old, new, alpha), alpha)


def carried(old: Weights, new: Weights, alpha: float, accumulate: str) -> dict[str, Tensor]:
    """The importance that is kept: (1 - alpha) F_old + alpha F for "ema", F_old + F for "sum"."""
    a, b = (1 - alpha, alpha) if accumulate == "ema" else (1.0, 1.0)
    return {name: a * before + b * after for name, before, after in _pairs(old, new)}


@dataclass(frozen=True)
class HCMM:
    """Merges the previous and the current weights by importance after every task, then corrects the features.

    Holistic continual model merging (arXiv 2509.23592), its two stages after training; the one before, fine-tuning in
    the tangent space, is a `run` on a `tangent.Linearized` model. Training goes on from what is deployed. Kept between
    two tasks are the weights and one importance for each trained number: the same bytes after every task, and no data.

    Merging: theta <- ((1 - alpha) F_old theta_old + alpha F theta) / ((1 - alpha) F_old + alpha F), number by number,
    where alpha weights the NEW weights: 0 keeps the old ones, 1 the new ones. See `importance_merge`.

    - `importance`, F: Adam's second moments at the task's last step, which need `Training(optimizer="adamw")`, "raw"
      (the released code), "corrected" for Adam's bias to zero, or "normalised" to a mean of 1 over all numbers; the
      exact diagonal "fisher" information of the new network, all classes competing, as a mean over what the learner
      lets a consolidation see, for logits (N, C); or "none": theta <- (1 - alpha) theta_old + alpha theta (what the
      released code does in the domain-incremental setting). Raw moments grow with a task's steps, as 1 - 0.999^n.
    - `accumulate`: F_old of the next task is (1 - alpha) F_old + alpha F, "ema" (released), in which the first task's
      share fades as (1 - alpha)^(T-1); or F_old + F, "sum": the precisions of a Laplace approximation, with which
      alpha = 0.5 gives the importance-weighted mean of all that the tasks were trained to

    Every trained parameter is merged by its importance, the head, if it is trained, too: its rows for classes that a
    loss leaves out have second moments of 0 and stay with the tasks that trained them. What has no importance in either
    network, BatchNorm's statistics and frozen tensors, goes by alpha; frozen tensors keep their bits (the paper's head
    is frozen, its network without BatchNorm). `refresh` re-estimates BatchNorm's statistics on what the learner lets a
    consolidation see.

    Correction: one weight matrix moves so that its layer's outputs on those inputs, the features, come closer to the
    parents'. It changes nothing else, the layer's bias and the importances among them.

    - `correction`: "steps", `correction_steps` of Adam at a constant `correction_lr` (released); "ridge", least squares
      in closed form, with `ridge` times the mean eigenvalue of the layer's Gram matrix as the penalty on the change; or
      "none"
    - `target`: the features of the "previous" network, as released, which takes back a part of the new task; or of
      "both" parents, the current one's weighing alpha
    - `loss`: the "squared" difference (released), or the "cosine" for a head that normalises, which takes "steps"
    - `projection`: the weight's name, or a pattern (`*.proj.weight`) that fits one linear layer or convolution; None is
      the last one before the head. For a linearised model the features are linearised, and affine in the weight.

    The released code takes a pass in random batches at a rate of 1e-7, which moves weights of 1e-2 by about 1e-6; here
    every step sees all inputs (of more than 8,192 rows of features, as many evenly spaced ones), and nothing is drawn.
    The report has the mean `share` of the new weights over the numbers with an importance, and the `mismatch` before
    and after the correction.

    Raises ValueError for other settings than these, before training for a network without such a projection, and at the
    end of a task where there is nothing to work on: no second moments, no inputs.
    """

    alpha: float = 0.4
    importance: str = "corrected"
    accumulate: str = "ema"
    correction: str = "steps"
    target: str = "previous"
    loss: str = "squared"
    ridge: float = 100.0
    correction_steps: int = 10
    correction_lr: float = 1e-4
    projection: str | None = None
    refresh: bool = False
    holdout = 0.0
    uses_history = False

    def __post_init__(self) -> None:
        share("alpha", self.alpha, of="0 for the old weights, 1 for the new")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        if self.loss == "cosine" and self.correction == "ridge":
            raise ValueError('loss: "cosine" has no closed form; use correction="steps", or loss="squared"')
        for name in ("ridge", "correction_lr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name}: {value!r}; give a number above 0")
        if not isinstance(self.correction_steps, int) or self.correction_steps < 1:
            raise ValueError(f"correction_steps: {self.correction_steps!r}; give a number of steps, at least 1")

    @property
    def uses_moments(self) -> bool:
        """Whether it reads Adam's second moments."""
        return self.importance in MOMENTS

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Raises ValueError unless the network has the projection that is to be corrected, if one is."""
        if self.correction != "none":
            projection(model, x, self.projection)

    def due(self, progress: Progress) -> bool:
        """At the end of every task; of the first only to keep its importance."""
        return progress.end and (progress.task > 0 or self.importance != "none")

    def __call__(self, context: Context) -> Merged:
        """Merges, corrects, and takes the importance along."""
        new = self._measured(context)
        if not context.progress.task:
            return Merged(context.current, context.current, memo=new)
        old = context.memo or {}
        w = shares(old, new, self.alpha)
        count = sum(part.numel() for part in w.values())
        report: dict[str, Any] = {"share": float(sum(part.sum() for part in w.values())) / count if w else self.alpha}
        merged = self._settled(context, _step(context.previous, context.current, w, self.alpha))
        if self.correction != "none":
            corrected, report["mismatch"] = self._corrected(context, merged)
            merged = self._settled(context, corrected)
        return Merged(merged, merged, report, carried(old, new, self.alpha, self.accumulate) or None)

    def _measured(self, context: Context) -> dict[str, Tensor]:
        """The importance of every trained number for the task just learned."""
        if self.importance == "none":
            return {}
        if self.importance == "fisher":
            set_weights(context.model, context.current)
            return curvature.fisher(context.model, context.inputs, labels="exact")
        if context.second_moment is None:
            raise ValueError(
                f'importance: "{self.importance}" needs Adam\'s second moments and there are none; train with '
                'Training(optimizer="adamw") for at least one step, or use importance="fisher" or "none"'
            )
        if self.importance == "corrected":
            return {name: v / context.moment_scale[name] for name, v in context.second_moment.items()}
        moments = {name: v.clone() for name, v in context.second_moment.items()}
        if self.importance == "normalised":
            mean = curvature.diagonal_trace(moments) / sum(v.numel() for v in moments.values())
            moments = {name: v / mean if mean else v for name, v in moments.items()}
        return moments

    def _settled(self, context: Context, merged: Weights) -> Weights:
        return normalization.refresh(context.model, merged, context.inputs) if self.refresh else merged

    def _corrected(self, context: Context, merged: Weights) -> tuple[Weights, list[float]]:
        """The merged weights with the projection's moved, and the mismatch before and after."""
        parents = [(1.0, context.previous)]
        if self.target == "both":
            parents = [(1 - self.alpha, context.previous), (self.alpha, context.current)]
        return correct(
            context.model,
            merged,
            parents,
            context.inputs,
            by=self.correction,
            loss=self.loss,
            strength=self.ridge,
            steps=self.correction_steps,
            lr=self.correction_lr,
            name=self.projection,
        )


def _pairs(old: Weights, new: Weights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The importances of two networks by name, zeros where one has none."""
    for name, like in {**old, **new}.items():
        yield name, old.get(name, torch.zeros_like(like)), new.get(name, torch.zeros_like(like))


def _step(previous: Weights, current: Weights, w: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """From the previous weights to the current ones by w, and by alpha where a name has none."""
    return {
        name: torch.lerp(tensor, current[name], w[name].to(tensor.dtype) if name in w else alpha)
        for name, tensor in previous.items()
    }
