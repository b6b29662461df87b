"""Networks that are trained before a stream begins, made when first asked for and kept in the cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clkit.data import Stream
from clkit.store import Records, cache_root, describe, digest, source_digest
from clkit.training import ModelFactory, Training, run
from clkit.weights import Weights, set_weights


@dataclass(frozen=True)
class Recipe:
    """How a network is made: the factory, its training, and its data, a stream of one task, as a function of a seed."""

    build: ModelFactory
    training: Training
    source: Callable[[int], Stream]


def restored(recipe: Recipe, seed: int, folder: Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a recipe, read from `folder` or trained now, and its record: accuracy, seconds, configuration.

    It is the caller's own, on the CPU and in training mode. What is kept, by default in `backbones/` of the cache,
    belongs to the data, the architecture, the training, the seed, clkit's code and torch's version. A file that was cut
    off or changed is named in the log, set aside, and made anew.
    """
    stream = recipe.source(seed)
    model = recipe.build(stream, seed=seed)
    parts = {"stream": stream, "model": recipe.build, "initial weights": model, "training": recipe.training}
    configuration = {name: describe(part, name) for name, part in parts.items()}
    configuration |= {"seed": seed, "code": source_digest(), "torch": torch.__version__}

    def make() -> tuple[dict[str, Any], list[Weights]]:
        result = run(stream, recipe.build, None, None, recipe.training, seed=seed, device="cpu", progress=False)
        return {"accuracy": float(result.accuracy[0, 0]), "seconds": round(result.seconds, 1)}, result.weights

    records = Records(folder or cache_root() / "backbones")
    record = records.remember(configuration, make, tensors=True)
    set_weights(model, records.tensors(digest(configuration))[0])
    return model, record
