"""Grids of runs, and of any function of a seed: stored one by one, several at once, as one tidy table."""

import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clkit import checks
from clkit import training as loop
from clkit.consolidation import NoConsolidation
from clkit.data import Stream
from clkit.experiments import engines
from clkit.experiments.jobs import Record, opened, stored, tabulate
from clkit.experiments.methods import SWEPT, Method, Model, Named, combinations, with_settings, word
from clkit.experiments.statistics import AXES
from clkit.learners import Learner
from clkit.store import plain
from clkit.training import Result, Training, find_device
from clkit.training.trial import check_arguments
from clkit.weights import Weights

Streams = Stream | Mapping[str, Stream | Callable[[int], Stream]] | Callable[[int], Stream]
Methods = Mapping[str, Learner | tuple | Method]
Measure = Callable[[Result], Mapping[str, Any]]


def sweep(
    streams: Streams,
    model: Model | Mapping[str, Model],
    methods: Methods,
    *,
    training: Training | Mapping[str, Training] | None = None,
    seeds: Iterable[int] = (0,),
    measure: Measure | None = None,
    keep: bool = False,
    store: Path | str | None = None,
    jobs: int | None = None,
    device: str = "auto",
    progress: bool = True,
) -> pd.DataFrame:
    """Runs every method on every stream, model, training and seed, and returns one row a run.

    ```python
    methods = grid(ER, memory=(50, 100)) | grid(CLeWI, "ER + CLeWI α={alpha}", alpha=(0.1, 0.3), learner=ER(50))
    table = sweep(stream, models.convnet, methods, training=Training(epochs=10), seeds=range(5))
    table.groupby("alpha").acc.mean()
    ```

    - `streams`: a stream, or a mapping of names to streams; in place of a stream a function of the seed that makes one
      (another order of the classes for every seed, say)
    - `model`: a factory `model(stream, seed=seed)`, a module (then all seeds start from its weights), or a mapping
    - `methods`: names to a learner, to a tuple (learner, consolidation, training, model) cut off anywhere after the
      learner, or to a `Method`; `grid` makes such mappings
    - `measure`: a function of the `Result` of a run, called where it ran; what it returns (numbers, text, lists) makes
      further columns. Only here are all weights of the run at hand.
    - `keep`: store the weights deployed after each task too; `stored_weights` reads them
    - `store`: the folder of finished runs, by default `$CLKIT_CACHE/runs` or `~/.cache/clkit/runs`
    - `jobs`: how many runs at once, by default one a core. On a GPU the first run is alone, to see what memory it
      takes; then as many run as fit, one a core at most. Give a number where others take much more. Inside
      `joblib.parallel_config("dask")` or `("ray")` the runs go to that cluster, and a stream once to each worker. Give
      workers one thread each, since a process computes one run at a time. Where they do not share the store's disk,
      what they compute comes back and is stored here, only later.

    The table has the columns stream, model, training, method, seed; acc, forgetting and what else `Result.summary`
    has; what `measure` adds; what the methods are set to, as `with_settings` says; and hash. `table.attrs["seconds"]`
    has the duration of every run by hash.

    A finished run is stored at once under the hash of its configuration and never computed twice: not in the same
    grid, not after an interruption, not by two sweeps at the same time. The configuration is what the result depends
    on. Of what is passed: the stream's content, the settings (not the names) of model, learner, consolidation and
    training, the seed and the measure. Of the rest: the kind of device, torch's version and clkit's code (of floors 0
    to 3, without comments), so that after an edit of the package runs are computed afresh. Runs compute with one thread
    each, so results do not depend on `jobs`.

    A run that fails does not stop the others, nor does one that kills its worker, for want of memory say: it is tried
    once more, alone, in the end. After the last one a SweepError names those that failed. Bad arguments raise before
    any run.
    """
    parts = sources, models, trainings, chosen = _parts(streams, model, training or Training(), methods)
    seeds = _seeds(seeds)
    made = {(name, seed): _stream(name, source, seed) for name, source in sources.items() for seed in seeds}
    for title, method in chosen.items():
        remedy = "give a learner, (learner, consolidation, training, model), or a Method"
        with checks.explained(f"methods: {title!r} is none", remedy, of=TypeError, kind=TypeError):
            net, recipe = method.model or next(iter(models.values())), method.training or next(iter(trainings.values()))
            rule = method.consolidation or NoConsolidation()
            check_arguments(net, method.learner, rule, recipe)
    points = []
    for stream, net, recipe, title, seed in itertools.product(*parts, seeds):
        method = chosen[title]
        arguments = {"stream": made[stream, seed], "model": method.model or models[net], "seed": seed}
        arguments |= {"training": method.training or trainings[recipe]}
        arguments |= {"learner": method.learner, "consolidation": method.consolidation}
        points.append((dict(zip(AXES, (stream, net, recipe, title, seed), strict=True)), arguments))
    device = str(find_device(device, here=engines.on_cluster() is None))  # the same for all workers
    compute = partial(_run, measure=measure, keep=keep, device=device)
    options: dict[str, Any] = {"store": store, "jobs": jobs, "device": device, "progress": progress, "keep": keep}
    return tabulate(compute, points, ["run", measure], lambda table: with_settings(table, *parts), **options)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods compared on streams and models, over seeds: the arguments of `sweep`, to be named, stored and run.

    ```python
    whole = Comparison({"digits": stream}, {"perceptron": models.mlp}, methods, Training(epochs=16), range(5))
    table = page.table(whole, "frontier")
    ```
    """

    streams: Mapping[str, Callable[[int], Stream]]
    models: Mapping[str, Model]
    methods: Mapping[str, Method]
    training: Training
    seeds: Sequence[int]
    measure: Measure | None = None

    def run(self, **options: Any) -> pd.DataFrame:
        """One row a run, with its settings; `options` are those of `sweep`."""
        made = {"training": self.training, "seeds": self.seeds, "measure": self.measure, "progress": False}
        return sweep(self.streams, self.models, self.methods, **made | options)

    def matrices(self, **options: Any) -> pd.DataFrame:
        """`run`, and the accuracy matrix of each run in a column of that name: row t after learning task t."""
        table = self.run(**options)
        return table.assign(matrix=[stored(table.attrs["store"], key)["accuracy"] for key in table.hash])

    def complete(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table of this comparison's runs that was kept without settings, with them."""
        return with_settings(table, *_parts(self.streams, self.models, self.training, self.methods))

    @property
    def config(self) -> dict[str, Any]:
        """What is compared, in words: names of streams and models, settings of methods, training and seeds."""
        streams, models, _, methods = _parts(self.streams, self.models, self.training, self.methods)
        words = {
            name: [repr(part) for part in (m.learner, m.consolidation, m.training) if part is not None]
            + ([loop.label(m.model)] if m.model is not None else [])
            for name, m in methods.items()
        }
        chosen = {"streams": list(streams), "models": list(models), "methods": words}
        return chosen | {"training": repr(self.training), "seeds": list(self.seeds)}


@dataclass(frozen=True, eq=False)
class Study:
    """A function of a seed over every combination of `axes` and `seeds`, to be named, stored and run; see `study`."""

    one_seed: Callable[..., Any]
    seeds: Sequence[int]
    axes: Mapping[str, Any]

    def run(self, *, store: Path | str | None = None, jobs: int | None = None, progress: bool = False) -> pd.DataFrame:
        """The table: swept axes, seed, and what the function gave. `store`, `jobs`, errors: those of `sweep`."""
        swept = [axis for axis, value in self.axes.items() if isinstance(value, SWEPT)]
        points = [
            ({axis: _label(axis, labels[axis]) for axis in swept} | {"seed": seed}, {**values, "seed": seed})
            for labels, values in combinations(self.axes)
            for seed in _seeds(self.seeds)
        ]
        compute = partial(_point, self.one_seed, {*swept, "seed", "hash"}, find_device("auto").type)
        options: dict[str, Any] = {"store": store, "jobs": jobs, "progress": progress}
        return tabulate(compute, points, ["study", self.one_seed], lambda t: t.drop(columns="hash"), **options)

    def complete(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table as it is: what it was set to is in its axes."""
        return table

    @property
    def config(self) -> dict[str, Any]:
        """What is studied: the function's name, seeds, all its arguments, the swept ones with all their values."""
        parameters = inspect.signature(self.one_seed).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "seed"}
        return {"study": word(self.one_seed), "seeds": list(self.seeds), **defaults, **self.axes}


def study(one_seed: Callable[..., Any], seeds: Iterable[int] = (0,), **axes: Any) -> Study:
    """Plans to call `one_seed(seed=..., **point)` for every combination of axes and every seed.

    ```python
    def merged(seed: int, p: float, head: str = "shared") -> dict[str, float]: ...

    jumps = page.table(study(merged, range(5), p=(0.1, 0.25)), "jumps")     # columns p, seed, ...
    study(merged, range(5), p=0.25).run()                                   # columns seed, ...
    ```

    `axes` are read as by `grid`: lists, tuples, ranges, arrays and mappings (of names to values) are swept and become
    columns, a mapping's by its names; other values are fixed. `one_seed` gives a row, a list of rows or a table, of
    numbers, words and lists. Every call is stored as soon as it has returned, and what was computed once is read. The
    key is the hash of the function's code, its arguments and what every run of `sweep` depends on. Calls run several
    at once, with one thread each.
    """
    return Study(one_seed, _seeds(seeds), axes)


def accuracies(table: pd.DataFrame, store: Path | str | None = None) -> pd.DataFrame:
    """Spreads a table of runs out into one row for each (after_task, task), counted from 0.

    `accuracy` is the test accuracy on `task` after learning `after_task`, `masked` the same with logits masked to the
    task's classes, `loss` the mean test loss; after_task -1 is before any training, where only `accuracy` is known.
    Axes and settings of the table come first. The runs are read from `store`, by default the one that the table came
    from; KeyError where it does not hold them.
    """

    rows = []
    for row in table.to_dict(orient="records"):
        record = stored(store or table.attrs.get("store"), str(row["hash"]))
        lead = {name: value for name, value in row.items() if name not in record["rows"][0] and name != "hash"}
        nothing = [float("nan")] * len(record["initial"])
        parts = [record["initial"], *record["accuracy"]], [nothing, *record["masked"]], [nothing, *record["losses"]]
        for after, (accuracy, masked, loss) in enumerate(zip(*parts, strict=True), -1):
            for task, values in enumerate(zip(accuracy, masked, loss, strict=True)):
                numbers = dict(zip(("accuracy", "masked", "loss"), values, strict=True))
                rows.append({**lead, "after_task": after, "task": task, **numbers})
    return pd.DataFrame(rows)


def stored_weights(key: str, store: Path | str | None = None) -> list[Weights]:
    """The deployed weights after each task of the run with this hash; KeyError unless a sweep kept them by `keep`."""
    try:
        return opened(store).tensors(key)
    except KeyError as error:
        raise KeyError(f"{error.args[0]}; sweep with keep=True") from None


def _run(*, measure: Measure | None, keep: bool, **arguments: Any) -> tuple[Record, list[Weights] | None]:
    """A run's record and, with `keep`, its deployed weights; the arguments are those of `training.run`."""
    result = loop.run(**arguments, progress=False, keep=keep or measure is not None)
    measured, summary = dict(measure(result)) if measure is not None else {}, result.summary()
    if clash := measured.keys() & {*AXES, *summary, "hash"}:
        raise ValueError(f"measure: {sorted(clash)} are columns of every table; return other names")
    facts = {n: getattr(result, n) for n in ("config", "accuracy", "masked", "losses", "initial", "seconds")}
    return {"rows": [summary | measured], **facts}, result.weights if keep else None


def _point(one_seed: Callable[..., Any], axes: set[str], kind: str, /, **arguments: Any) -> tuple[Record, None]:
    if (here := find_device("auto").type) != kind:
        raise RuntimeError(
            f"a worker computes on {here} and the caller on {kind}; start the study where both are alike"
        )
    begun, made = time.perf_counter(), one_seed(**arguments)
    if hasattr(made, "columns"):
        made = made.to_dict(orient="records")
    rows = [dict(row) for row in ([made] if isinstance(made, Mapping) else made)]
    names = {name for row in rows for name in row}
    if clash := sorted({name for name in names if name in axes or not isinstance(name, str)}, key=repr):
        raise ValueError(f"{word(one_seed)}: {clash} are axes of the study or no texts; return other names")
    return {"rows": rows, "seconds": time.perf_counter() - begun}, None


def _label(axis: str, label: Any) -> Any:
    if isinstance(label, bool | int | float | str | np.generic | None):
        return plain(label)
    raise TypeError(f"{axis}: {label!r:.80} cannot stand in a column; give a mapping of names to such values")


def _named(argument: str, value: Any) -> Mapping[str, Any]:
    """An axis as a mapping; a single value goes by its own name."""
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"{argument}: the mapping is empty; give at least one entry")
        return value
    if isinstance(value, Stream):
        return {value.name: value}
    return {word(value): value}


def _parts(streams: Any, model: Any, training: Any, methods: Any) -> tuple[Named, Named, Named, dict[str, Method]]:
    """The parts of a grid of runs, each by name."""
    if not isinstance(methods, Mapping) or not methods:
        raise TypeError("methods: give a mapping of names to learners, for example {'ER': ER(memory=50)}")
    chosen = {name: _method(method) for name, method in methods.items()}
    return _named("streams", streams), _named("model", model), _named("training", training), chosen


def _method(method: Any) -> Method:
    return method if isinstance(method, Method) else Method(*(method if isinstance(method, tuple) else (method,)))


def _stream(name: str, source: Any, seed: int) -> Stream:
    stream = source if isinstance(source, Stream) else source(seed) if callable(source) else source
    if not isinstance(stream, Stream):
        raise TypeError(f"streams: {name!r} gives a {type(stream).__name__}; give a Stream or a function of the seed")
    return stream


def _seeds(seeds: Iterable[int]) -> list[int]:
    chosen = checks.value("seeds", seeds if hasattr(seeds, "ndim") else list(seeds), tuple[checks.Index, ...])
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds: {list(chosen)!r}; give distinct whole numbers, at least 0, for example range(3)")
    return list(chosen)
