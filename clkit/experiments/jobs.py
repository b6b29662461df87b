"""Jobs of a sweep or a study: several at once, each stored as soon as it is computed and never computed twice."""

import functools
import io
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cloudpickle
import joblib
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from clkit.store import Records, attempt, cache_root, describe, digest, source_digest
from clkit.training import find_device

Record = dict[str, Any]
Outcome = tuple[str, Record | None, str]
CONTEXT = 2**30  # bytes of a GPU that a process takes for itself
ROOM = 0.8  # share of a GPU's free memory that runs may take: some need more than the first
Compute = Callable[..., tuple[Record, Any]]


class SweepError(RuntimeError):
    """Some runs of a sweep or study failed; `failures` has settings and tracebacks, `table` the runs that finished."""

    def __init__(self, failures: Sequence[tuple[str, str]], table: pd.DataFrame) -> None:
        self.failures, self.table = list(failures), table
        lines = [f"{setting}: {trace.strip().splitlines()[-1]}" for setting, trace in failures]
        super().__init__(
            f"{len(failures)} of {len(failures) + len(table)} runs failed; the others are stored\n" + "\n".join(lines)
        )


@dataclass(frozen=True, eq=False)
class Job:
    """A function and its arguments, whose record is stored under the hash of its configuration.

    `compute(**arguments)` gives the record, in which "rows" are the rows of a table, and a tree of tensors, or None;
    with `keep` a record that was stored without tensors is computed again.
    """

    configuration: Record
    compute: Compute
    arguments: Mapping[str, Any]
    records: Records
    keep: bool

    def finish(self) -> Outcome:
        """Computes the job where it is called and stores it there: its key, its record or else the error as text."""
        from threadpoolctl import threadpool_limits

        key, compute = digest(self.configuration), functools.partial(self.compute, **self.arguments)
        try:
            with threadpool_limits(1):
                return key, self.records.remember(self.configuration, compute, tensors=self.keep), ""
        except Exception:
            return key, None, traceback.format_exc()


def tabulate(
    compute: Compute,
    points: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    what: Any,
    complete: Callable[[pd.DataFrame], pd.DataFrame],
    *,
    store: Path | str | None,
    jobs: int | None,
    device: str = "auto",
    progress: bool,
    keep: bool = False,
) -> pd.DataFrame:
    """The table of `compute(**arguments)` at all points, which are axes and arguments; its last column is the hash.

    A record's hash is of `what`, which says what is computed, of the arguments, the kind of device, torch's version and
    clkit's code; points with equal ones are computed once. `jobs` run at once, by default one a core, on a GPU
    as many as fit (`_outcomes`). The table is completed; its `attrs` have the folder, "store", and "seconds" by hash.
    SweepError, once all have run, if some fail.
    """

    records, place = opened(store), find_device(device)
    common = {"what": describe(what, "what"), "device": place.type, "code": source_digest(), "torch": torch.__version__}
    values = {id(value): (value, name) for _, arguments in points for name, value in arguments.items()}
    known = {key: describe(*named) for key, named in values.items()}  # once each: streams and models recur
    keyed, queue = [], dict[str, Job]()
    for axes, arguments in points:
        configuration = common | {"arguments": {name: known[id(value)] for name, value in arguments.items()}}
        keyed.append((digest(configuration), axes))
        queue.setdefault(keyed[-1][0], Job(configuration, compute, arguments, records, keep))
    waiting = [job for key, job in queue.items() if records.read(key, tensors=keep) is None]
    found, failed = dict[str, Record](), dict[str, str]()
    with tqdm(total=len(queue), initial=len(queue) - len(waiting), disable=not progress, unit="run") as bar:
        for key, record, error in _outcomes(waiting, jobs, place):
            if record is None:
                failed[key] = error
            else:
                found[key] = record
                if records.read(key) is None:  # computed on a machine that does not share this folder
                    attempt(functools.partial(records.write, key, record))
            bar.update()
    found |= {key: stored(store, key) for key in queue if key not in failed and key not in found}
    rows = [{**axes, **row, "hash": key} for key, axes in keyed if key in found for row in found[key]["rows"]]
    columns = dict.fromkeys(name for row in (points[0][0], *rows) for name in row if name != "hash")
    table = pd.DataFrame(rows, columns=[*columns, "hash"])
    table.attrs |= {"store": str(records.folder), "seconds": {key: r["seconds"] for key, r in found.items()}}
    table = complete(table)
    if failed:
        names = {key: ", ".join(f"{name} {value}" for name, value in axes.items()) for key, axes in reversed(keyed)}
        raise SweepError([(names[key], error) for key, error in failed.items()], table)
    return table


def opened(store: Path | str | None) -> Records:
    """The store of runs in a folder, by default $CLKIT_CACHE/runs or ~/.cache/clkit/runs."""
    return Records(store or cache_root() / "runs")


def stored(store: Path | str | None, key: str) -> Record:
    """The record of a job that has finished; KeyError if there is none."""
    if (record := opened(store).read(key)) is None:
        raise KeyError(f"{key}: {opened(store).folder} holds no such run; pass the store of the sweep, or run it again")
    return record


class Parcel:
    """A value, packed for the way to another process, which may not find its modules by itself; never a file.

    Functions of notebooks and scripts go along whole; of modules the folders do, of all that this process imports from.
    Plain tensors on the CPU travel as arrays, which joblib maps into the memory of all processes at once: `seen` has
    the arrays packed before, by the ids of their tensors.
    """

    def __init__(self, value: Any, seen: dict[int, tuple[Tensor, np.ndarray]] | None = None) -> None:
        file = io.BytesIO()
        packer = _Packer(file, {} if seen is None else seen)
        packer.dump(value)
        self.folders = [str(Path(folder).absolute()) for folder in sys.path]  # "" is the working folder
        self.rest, self.arrays = file.getvalue(), packer.arrays

    def open(self) -> Any:
        """The value again; its tensors share the arrays' memory where that may be written to."""
        sys.path += [folder for folder in self.folders if folder not in sys.path]
        return _Unpacker(io.BytesIO(self.rest), self.arrays).load()


class _Packer(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, seen: dict[int, tuple[Tensor, np.ndarray]]) -> None:
        super().__init__(file)
        self.seen = seen
        self.arrays: list[np.ndarray] = []

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not Tensor:
            return None
        try:
            _, array = self.seen.setdefault(id(obj), (obj, obj.numpy()))
        except (TypeError, RuntimeError):  # on a GPU, of a type that numpy does not have, or with a gradient
            return None
        self.arrays.append(array)
        return len(self.arrays) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: list[np.ndarray]) -> None:
        super().__init__(file)
        self.arrays = arrays

    def persistent_load(self, pid: int) -> Tensor:
        return torch.from_numpy(np.require(np.asarray(self.arrays[pid]), requirements="W"))


def _outcomes(waiting: Sequence[Job], jobs: int | None, device: torch.device) -> Iterator[Outcome]:
    """What becomes of jobs, each as soon as it has finished; several run at once.

    On a GPU, unless `jobs` or joblib's configuration says how many, the first runs alone and here. Then as many run as
    fit beside each other if each takes the memory that it took at most, one a core.
    """
    parallel = _parallel(jobs, -1 if device.type == "cpu" else 1)
    if device.type == "cuda" and jobs is None and parallel.n_jobs == 1 < len(waiting):
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
        yield waiting[0].finish()
        most = torch.cuda.max_memory_reserved(device) + CONTEXT
        torch.cuda.empty_cache()
        fitting = int(ROOM * torch.cuda.mem_get_info(device)[0] / most)
        waiting, parallel = waiting[1:], _parallel(max(1, min(fitting, joblib.cpu_count())), 1)
    seen: dict[int, tuple[Tensor, np.ndarray]] = {}
    work = waiting if parallel.n_jobs == 1 else [Parcel(job, seen) for job in waiting]
    yield from parallel(joblib.delayed(_finish)(job) for job in work)


def _parallel(jobs: int | None, default: int) -> Any:
    """The engine: joblib's active backend, with `jobs`, else as many as it is configured for, else `default`.

    One run at a time goes to a worker and comes back as soon as it has finished, where the backend can do that.
    """

    backend, configured = cast(tuple[Any, int | None], joblib.parallel.get_active_backend())
    ready = "generator_unordered" if backend.supports_return_generator else "list"
    options: dict[str, Any] = {"batch_size": 1, "return_as": ready, "mmap_mode": "c"}
    return joblib.Parallel(n_jobs=jobs or (default if configured in (None, 1) else configured), **options)


def _finish(job: "Job | Parcel") -> Outcome:
    return (job.open() if isinstance(job, Parcel) else job).finish()
