"""Jobs of a sweep or a study: several at once, each stored as soon as it is computed and never computed twice."""

import functools
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from clkit.experiments import engines
from clkit.store import Records, cache_root, describe, digest, expand, plain, source_digest
from clkit.training import computing, find_device

log = logging.getLogger("clkit.experiments")
DATA = (torch.Tensor, np.ndarray, list, dict)  # arguments of a study that it might change
Record = dict[str, Any]
Compute = Callable[..., tuple[Record, Any]]


class SweepError(RuntimeError):
    """Some runs of a sweep or study failed; `failures` has settings and tracebacks, `table` the runs that finished."""

    def __init__(self, failures: Sequence[tuple[str, str]], table: pd.DataFrame) -> None:
        self.failures, self.table = list(failures), table
        lines = [f"{setting}: {_last(trace):.300}" for setting, trace in failures]
        super().__init__(
            f"{len(failures)} of {len(failures) + len(table)} runs failed; the others are stored\n" + "\n".join(lines)
        )


def _last(trace: str) -> str:
    """The last line of a traceback that begins with the name of an exception."""
    lines = trace.strip().splitlines()
    return next((line for line in reversed(lines) if re.match(r"(  \| )?[A-Za-z_][\w.]*(:|$)", line)), lines[-1])


@dataclass(frozen=True, eq=False)
class Job:
    """A function and its arguments, whose record is stored under the hash of its configuration.

    `compute(**arguments)` gives the record, in which "rows" are the rows of a table, and a tree of tensors, or None;
    with `keep` a record that was stored without tensors is computed again.
    """

    configuration: Record
    what: Any
    compute: Compute
    arguments: Mapping[str, Any]
    records: Records
    keep: bool
    flags: Mapping[str, Any]
    origin: str = engines.HERE

    def __call__(self, token: str | None) -> tuple[Record, Any, bool] | None:
        """Computes the job where it is called: its record, its tensors unless they are stored, and whether they are.

        With a token, the name of a file, the store is used only where it has that file: where it is the caller's. None
        where the same job is another one, for other code or state of modules, another torch or clkit.
        """
        from threadpoolctl import threadpool_limits

        with computing.with_flags(self.flags), joblib.parallel_config("sequential"), threadpool_limits(1):
            if self.origin != engines.HERE and not self._same():
                return None
            if token is None or (self.records.folder / token).exists():
                return self.records.remember(self.configuration, self._computed, tensors=self.keep), None, True
            record, tensors = self._computed()
            return plain({"configuration": self.configuration, **record}), tensors, False

    def _same(self) -> bool:
        try:
            arguments = {name: describe(value, name) for name, value in self.arguments.items()}
            here = _common(self.what, self.configuration["device"], self.flags)
        except Exception:  # a module that was edited after its import, for example
            return False
        return digest(here | {"arguments": arguments}) == digest(self.configuration)

    def _computed(self) -> tuple[Record, Any]:
        made = self.compute(**self.arguments)
        for name, value in self.arguments.items():
            data = isinstance(value, DATA)
            if data and digest(describe(value, name)) != digest(self.configuration["arguments"][name]):
                raise RuntimeError(f"{name}: it was changed in place, for others too; let the function copy it")
        return made


def _common(what: Any, device: str, flags: Mapping[str, Any]) -> Record:
    """What all configurations of a table have."""
    found = {"what": describe(what, "what"), "device": device, "code": source_digest(), "torch": torch.__version__}
    return found | ({"flags": {name: str(value) for name, value in flags.items()}} if flags else {})


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
    clkit's code; points with equal ones are computed once. `jobs` run at once, by default one a core, on a GPU as many
    as fit (`engines.compute`). The table is completed; its `attrs` have the folder, "store", and "seconds" by hash.
    Raises SweepError, once all have run, if some fail.
    """

    records, cluster = opened(store), engines.on_cluster() is not None
    place = find_device(device, here=not cluster)
    flags = computing.flags()
    common = _common(what, place.type, flags)
    values = {id(value): (value, name) for _, arguments in points for name, value in arguments.items()}
    known = {key: describe(*named) for key, named in values.items()}  # once each: streams and models recur
    keyed, queue = [], dict[str, Job]()
    for axes, arguments in points:
        configuration = common | {"arguments": {name: known[id(value)] for name, value in arguments.items()}}
        keyed.append((digest(configuration), axes))
        queue.setdefault(keyed[-1][0], Job(configuration, what, compute, arguments, records, keep, flags))
    found = {key: record for key in queue if (record := records.read(key, tensors=keep)) is not None}
    waiting, failed = [job for key, job in queue.items() if key not in found], dict[str, str]()
    if waiting:
        records.check()
    bar = tqdm(total=len(queue), initial=len(queue) - len(waiting), disable=not progress, unit="run")
    here = tempfile.NamedTemporaryFile(dir=records.folder, prefix=".here-") if cluster and waiting else nullcontext()
    with bar, here as token:
        calls = [functools.partial(job, Path(token.name).name if token else None) for job in waiting]
        for number, (outcome, error) in engines.compute(calls, jobs, place):
            key = digest(waiting[number].configuration)
            if outcome is None and not error:
                log.warning("a worker has other code or other state of what a run uses; it is computed here")
                outcome, error = engines.attempted(calls[number])
            if outcome is None:
                failed[key] = error
                bar.set_postfix(failed=len(failed))
            else:
                found[key], tensors, kept = outcome
                if not kept:
                    records.keep(key, found[key], tensors)
            bar.update()
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
    return Records(expand(store or cache_root() / "runs").absolute())


def stored(store: Path | str | None, key: str) -> Record:
    """The record of a job that has finished; KeyError if there is none."""
    if (record := opened(store).read(key)) is None:
        raise KeyError(f"{key}: {opened(store).folder} holds no such run; pass the store of the sweep, or run it again")
    return record
