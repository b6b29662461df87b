"""Grids of runs: methods x settings x seeds, stored one by one, in parallel, as one table."""

import functools
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clkit import training as loop
from clkit.data import Stream
from clkit.experiments.parcel import Parcel
from clkit.experiments.plan import Job, Measure, Method, Model, device_kind, plan
from clkit.experiments.statistics import AXES
from clkit.learners import Learner
from clkit.store import Records, cache_root
from clkit.training import Training
from clkit.weights import Weights

if TYPE_CHECKING:
    import pandas as pd


class SweepError(RuntimeError):
    """Some runs of a grid failed; `failures` has their settings and tracebacks, `table` the runs that finished."""

    def __init__(self, failures: Sequence[tuple[str, str]], table: "pd.DataFrame") -> None:
        self.failures, self.table = list(failures), table
        lines = [f"{setting}: {trace.strip().splitlines()[-1]}" for setting, trace in failures]
        super().__init__(
            f"{len(failures)} of {len(failures) + len(table)} runs failed; the others are stored\n" + "\n".join(lines)
        )


def sweep(
    streams: Stream | Mapping[str, Stream | Callable[[int], Stream]] | Callable[[int], Stream],
    model: Model | Mapping[str, Model],
    methods: Mapping[str, Learner | tuple | Method],
    *,
    training: Training | Mapping[str, Training] | None = None,
    seeds: Iterable[int] = (0,),
    measure: Measure | None = None,
    keep: bool = False,
    store: Path | str | None = None,
    jobs: int | None = None,
    device: str = "auto",
    progress: bool = True,
) -> "pd.DataFrame":
    """Runs every method on every stream, model, training and seed, and returns one row a run.

    - `streams`: a stream, or a mapping of names to streams; in place of a stream a function of the seed that makes one
      (another order of the classes for every seed, say)
    - `model`: a factory `model(stream, seed=seed)`, a module (then all seeds start from its weights), or a mapping
    - `methods`: names to a learner, to a tuple (learner, consolidation, training, model) cut off anywhere after the
      learner, or to a `Method`
    - `measure`: a function of the `Result` of a run, called where it ran; what it returns (numbers, text, lists) makes
      further columns. Only here are all weights of the run at hand.
    - `keep`: store the weights deployed after each task too; `stored_weights` reads them
    - `store`: the folder of finished runs, by default `$CLKIT_CACHE/runs` or `~/.cache/clkit/runs`
    - `jobs`: how many runs at once, by default one a core on the CPU and one on a GPU. Inside
      `joblib.parallel_config("dask")` or `("ray")` the runs go to that cluster. Give its workers one thread each, and
      its machines the store's disk to share: without that, the weights of `keep` stay where they were computed.

    The table has the columns stream, model, training, method, seed; acc, forgetting and what else `Result.summary`
    has; what `measure` adds; and hash. `table.attrs["seconds"]` has the duration of every run by hash.

    A finished run is stored at once under the hash of its configuration and never computed twice: not in the same
    grid, not after an interruption, not by two sweeps at the same time. The configuration is what the result depends
    on: the stream's content, the settings (not the names) of model, learner, consolidation and training, the seed, the
    kind of device, the measure, torch's version and clkit's code (of floors 0 to 3, without comments): after an edit
    of the package runs are computed afresh. Runs compute with one thread each, so results do not depend on `jobs`.

    A run that fails does not stop the others; after the last one a SweepError names it. Bad arguments raise before
    any run.
    """
    import joblib
    from tqdm.auto import tqdm

    archive = Records(store or cache_root() / "runs")
    kind = device_kind(device)
    rows, queue = plan(streams, model, methods, training, seeds, measure, keep, archive.folder, device, kind)
    failed: dict[str, str] = {}
    waiting = [job for job in queue.values() if archive.read(job.key, tensors=keep) is None]
    parallel = _parallel(jobs, -1 if kind == "cpu" else 1)
    if parallel.n_jobs != 1:
        packed = functools.cache(Parcel)
        waiting = [replace(job, stream=packed(job.stream)) for job in waiting]
    with tqdm(total=len(queue), initial=len(queue) - len(waiting), disable=not progress, unit="run") as bar:
        for key, record, error in parallel(joblib.delayed(_execute)(job) for job in waiting):
            if record is None:
                failed[key] = error
            elif archive.read(key) is None:  # computed on a machine that does not share this folder
                archive.write(key, record)
            bar.update()
    table = _table([row for row in rows if row["hash"] not in failed], archive)
    if failed:
        settings = {row["hash"]: ", ".join(f"{axis} {row[axis]}" for axis in AXES) for row in reversed(rows)}
        raise SweepError([(settings[key], error) for key, error in failed.items()], table)
    return table


@dataclass(frozen=True, eq=False)
class Grid:
    """Methods compared on streams and models, over seeds: everything that `sweep` needs."""

    streams: Mapping[str, Callable[[int], Stream]]
    models: Mapping[str, Model]
    methods: Mapping[str, Method]
    training: Training
    seeds: Sequence[int]
    measure: Measure | None = None

    def run(self, **options: Any) -> "pd.DataFrame":
        """One row a run; `options` are those of `sweep`."""
        made = {"training": self.training, "seeds": self.seeds, "measure": self.measure, "progress": False}
        return sweep(self.streams, self.models, self.methods, **made | options)

    def matrices(self, **options: Any) -> "pd.DataFrame":
        """`run`, and the accuracy matrix of each run in a column of that name: row t after learning task t."""
        table = self.run(**options)
        archive = Records(table.attrs["store"])
        return table.assign(matrix=[_stored(archive, key)["accuracy"] for key in table.hash])

    @property
    def config(self) -> dict[str, Any]:
        """What is compared, in words: names of streams and models, settings of methods, training and seeds."""
        methods = {
            name: [repr(part) for part in (m.learner, m.consolidation, m.training) if part is not None]
            + ([loop.label(m.model)] if m.model is not None else [])
            for name, m in self.methods.items()
        }
        chosen = {"streams": list(self.streams), "models": list(self.models), "methods": methods}
        return chosen | {"training": repr(self.training), "seeds": list(self.seeds)}


def accuracies(table: "pd.DataFrame", store: Path | str | None = None) -> "pd.DataFrame":
    """Spreads a table of runs out into one row for each (after_task, task), counted from 0.

    `accuracy` is the test accuracy on `task` after learning `after_task`, `masked` the same with logits masked to the
    task's classes, `loss` the mean test loss; after_task -1 is before any training, where only `accuracy` is known.
    The runs are read from `store`, by default the one that the table came from.
    """
    import pandas as pd

    archive = Records(store or table.attrs.get("store") or cache_root() / "runs")
    axes = [axis for axis in AXES if axis in table]
    rows = []
    for row in table.to_dict(orient="records"):
        record = _stored(archive, str(row["hash"]))
        lead = {axis: row[axis] for axis in axes}
        nothing = [float("nan")] * len(record["initial"])
        parts = [record["initial"], *record["accuracy"]], [nothing, *record["masked"]], [nothing, *record["losses"]]
        for after, (accuracy, masked, loss) in enumerate(zip(*parts, strict=True), -1):
            for task, values in enumerate(zip(accuracy, masked, loss, strict=True)):
                numbers = dict(zip(("accuracy", "masked", "loss"), values, strict=True))
                rows.append({**lead, "after_task": after, "task": task, **numbers})
    return pd.DataFrame(rows)


def stored_weights(key: str, store: Path | str | None = None) -> list[Weights]:
    """The deployed weights after each task of the run with this hash, from a sweep with `keep=True`."""
    try:
        return Records(store or cache_root() / "runs").tensors(key)
    except KeyError as error:
        raise KeyError(f"{error.args[0]}; sweep with keep=True") from None


def _stored(archive: Records, key: str) -> dict[str, Any]:
    record = archive.read(key)
    if record is None:
        raise KeyError(f"{key}: {archive.folder} holds no such run; pass the store of the sweep, or run it again")
    return record


def _parallel(jobs: int | None, default: int) -> Any:
    """The engine: joblib's active backend, with `jobs`, else as many as it is configured for, else `default`.

    One run at a time goes to a worker and comes back as soon as it has finished, where the backend can do that.
    """
    import joblib

    backend, configured = cast(tuple[Any, int | None], joblib.parallel.get_active_backend())
    ready = "generator_unordered" if backend.supports_return_generator else "list"
    options: dict[str, Any] = {"batch_size": 1, "return_as": ready, "mmap_mode": "c"}
    return joblib.Parallel(n_jobs=jobs or (default if configured in (None, 1) else configured), **options)


def _execute(job: Job) -> tuple[str, dict[str, Any] | None, str]:
    """Computes a run where it is called and stores it there; gives its hash, its record or else the error as text."""
    from threadpoolctl import threadpool_limits

    archive = Records(job.folder)
    with archive.lock(job.key):
        finished = archive.read(job.key, tensors=job.keep)
        if finished is not None:
            return job.key, finished, ""
        try:
            with threadpool_limits(1):
                result = loop.run(
                    job.stream.open() if isinstance(job.stream, Parcel) else job.stream,
                    job.model,
                    job.method.learner,
                    job.method.consolidation,
                    job.training,
                    seed=job.seed,
                    device=job.device,
                    progress=False,
                    keep=job.keep or job.measure is not None,
                )
                measured = dict(job.measure(result)) if job.measure is not None else {}
            summary = result.summary()
            clash = measured.keys() & {*AXES, *summary, "hash"}
            if clash:
                raise ValueError(f"measure: {sorted(clash)} are columns of every table; return other names")
            record = {
                "configuration": job.configuration,
                "config": result.config,
                "summary": summary,
                "measured": measured,
                "accuracy": result.accuracy,
                "masked": result.masked,
                "losses": result.losses,
                "initial": result.initial,
                "seconds": result.seconds,
            }
            archive.write(job.key, record, result.weights if job.keep else None)
        except Exception:
            return job.key, None, traceback.format_exc()
    return job.key, record, ""


def _table(rows: list[dict[str, Any]], archive: Records) -> "pd.DataFrame":
    """The rows with their runs' numbers, all of them read back from the store, and the hash last."""
    import pandas as pd

    records = {key: _stored(archive, key) for key in dict.fromkeys(row["hash"] for row in rows)}
    full = []
    for row in rows:
        record = records[row["hash"]]
        full.append({axis: row[axis] for axis in AXES} | record["summary"] | record["measured"] | {"hash": row["hash"]})
    columns = dict.fromkeys(column for row in full for column in row)
    table = pd.DataFrame(full, columns=[column for column in columns if column != "hash"] + ["hash"])
    table.attrs["store"] = str(archive.folder)
    table.attrs["seconds"] = {key: record["seconds"] for key, record in records.items()}
    return table
