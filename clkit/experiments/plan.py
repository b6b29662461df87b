"""What a grid consists of: its rows, and the distinct runs behind them under the hashes of their configurations."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clkit.consolidation import Consolidation
from clkit.data import Stream
from clkit.experiments.parcel import Parcel
from clkit.experiments.statistics import AXES
from clkit.learners import Learner
from clkit.store import describe, digest, source_digest
from clkit.training import ModelFactory, Result, Training

Model = nn.Module | ModelFactory
Measure = Callable[[Result], Mapping[str, Any]]


@dataclass(frozen=True)
class Method:
    """One row of a grid: a learner, a consolidation, and a training or model of its own where the grid's do not fit."""

    learner: Learner
    consolidation: Consolidation | None = None
    training: Training | None = None
    model: Model | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """One run: what is passed to it, and the folder that it is stored in under `key`."""

    key: str
    configuration: dict[str, Any]
    stream: Stream | Parcel
    model: Model
    method: Method
    training: Training
    seed: int
    device: str
    measure: Measure | None
    keep: bool
    folder: Path


def plan(
    streams: Any,
    model: Any,
    methods: Any,
    training: Any,
    seeds: Iterable[int],
    measure: Measure | None,
    keep: bool,
    folder: Path,
    device: str,
    kind: str,
) -> tuple[list[dict[str, Any]], dict[str, Job]]:
    """The rows of the table, still without numbers, and the distinct runs behind them by hash."""
    if not isinstance(methods, Mapping) or not methods:
        raise TypeError("methods: give a mapping of names to learners, for example {'ER': ER(memory=50)}")
    chosen = {name: _method(name, method) for name, method in methods.items()}
    seeds = _seeds(seeds)
    common = {
        "device": kind,
        "measure": describe(measure, "measure"),
        "code": source_digest(),
        "torch": torch.__version__,
    }
    rows: list[dict[str, Any]] = []
    queue: dict[str, Job] = {}
    models, trainings = _named("model", model), _named("training", training or Training())
    for name, source in _named("streams", streams).items():
        made = {seed: _stream(name, source, seed) for seed in seeds}
        described = {seed: describe(stream, "stream") for seed, stream in made.items()}
        for model_name, factory in models.items():
            for training_name, setting in trainings.items():
                for method_name, method in chosen.items():
                    used, train = method.model or factory, method.training or setting
                    parts = {"model": used, "training": train, "method": (method.learner, method.consolidation)}
                    fixed = common | {part: describe(value, part) for part, value in parts.items()}
                    for seed in seeds:
                        configuration = fixed | {"stream": described[seed], "seed": seed}
                        key = digest(configuration)
                        places = (name, model_name, training_name, method_name, seed)
                        rows.append(dict(zip(AXES, places, strict=True)) | {"hash": key})
                        job = Job(key, configuration, made[seed], used, method, train, seed, device, measure, keep,
                                   folder)  # fmt: skip
                        queue.setdefault(key, job)
    return rows, queue


def device_kind(device: str) -> str:
    """What a device is, "cpu" or "cuda" for example; "auto" is the GPU if there is one. Else raises ValueError."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is unknown; use 'cpu', 'cuda' or 'auto'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} was asked for and torch sees no GPU; use 'cpu' or 'auto'")
    return kind


def _named(argument: str, value: Any) -> Mapping[str, Any]:
    """An axis as a mapping; a single value goes by its own name."""
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"{argument}: the mapping is empty; give at least one entry")
        return value
    if isinstance(value, Stream):
        return {value.name: value}
    maker = value.func if isinstance(value, functools.partial) else value
    return {getattr(maker, "__name__", type(maker).__name__): value}


def _method(name: str, method: Any) -> Method:
    if isinstance(method, Learner):
        return Method(method)
    if isinstance(method, tuple) and method and isinstance(method[0], Learner) and len(method) <= 4:
        return Method(*method)
    if isinstance(method, Method):
        return method
    raise TypeError(
        f"methods: {name!r} is {method!r:.80}; give a learner, a tuple (learner, consolidation) or a Method"
    )


def _stream(name: str, source: Any, seed: int) -> Stream:
    stream = source if isinstance(source, Stream) else source(seed) if callable(source) else source
    if not isinstance(stream, Stream):
        raise TypeError(f"streams: {name!r} gives a {type(stream).__name__}; give a Stream or a function of the seed")
    return stream


def _seeds(seeds: Iterable[int]) -> list[int]:
    chosen = list(seeds)
    if not chosen or len(set(chosen)) < len(chosen) or not all(isinstance(s, int) and s >= 0 for s in chosen):
        raise ValueError(f"seeds: {chosen!r}; give distinct whole numbers, at least 0, for example range(3)")
    return chosen
