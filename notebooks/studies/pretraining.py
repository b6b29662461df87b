"""Networks that are trained before a stream begins, made when first asked for and kept in the cache."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clkit.data import Stream
from clkit.experiments.identity import source_digest
from clkit.experiments.store import Store, cache_folder, digest, plain
from clkit.training import ModelFactory, Training, describe, run
from clkit.weights import set_weights


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
    configuration = {
        "data": stream.fingerprint,
        "model": describe(recipe.build),
        "initial weights": describe(model),
        "training": plain(asdict(recipe.training)),
        "seed": seed,
        "code": source_digest(),
        "torch": torch.__version__,
    }
    store, key = Store(folder or cache_folder() / "backbones"), digest(configuration)
    with store.lock(key):
        record = store.read(key, weights=True)
        if record is None:
            result = run(stream, recipe.build, None, None, recipe.training, seed=seed, device="cpu", progress=False)
            record = {
                "configuration": configuration,
                "accuracy": float(result.accuracy[0, 0]),
                "seconds": round(result.seconds, 1),
            }
            store.write(key, record, result.weights)
        set_weights(model, store.weights(key)[0])
    return model, record
