"""Finished runs on disk: one JSON file each, with a checksum, under the hash of the run's configuration."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clkit import weights as w
from clkit.weights import Weights, write_atomically

try:
    import fcntl
except ImportError:  # not a POSIX system: two sweeps at once may then compute the same run twice
    fcntl = None

log = logging.getLogger("clkit.experiments")


def cache_folder() -> Path:
    """Where runs are kept unless a call says otherwise: $CLKIT_CACHE, else ~/.cache/clkit."""
    return Path(os.environ.get("CLKIT_CACHE") or Path.home() / ".cache" / "clkit")


def plain(value: Any) -> Any:
    """Turns arrays, tensors, numpy numbers, tuples and paths into what JSON knows; else raises TypeError."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, int | float):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(
        f"{type(value).__name__} {value!r:.60} cannot be stored; give numbers, text, lists, arrays or dicts"
    )


def canonical(value: Any) -> bytes:
    """One spelling for equal JSON values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any) -> str:
    """The hash of a JSON value, 16 hexadecimal digits."""
    return sha256(canonical(value)).hexdigest()[:16]


class Store:
    """A folder of finished runs, `<hash>.json`, and the deployed weights of those kept, `<hash>.safetensors`.

    Files appear by rename and are checked on reading: one that was cut off, edited or renamed is named in the log, set
    aside as `<hash>.damaged` and counts as missing, so that its run is computed again. Several processes may use one
    folder at once.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder is not None else cache_folder() / "runs"

    def path(self, key: str) -> Path:
        """The file of a run."""
        return self.folder / f"{key}.json"

    def read(self, key: str, *, weights: bool = False) -> dict[str, Any] | None:
        """The record under a hash; None if there is no whole one or, with `weights`, none that has its weights too."""
        path = self.path(key)
        try:
            content = json.loads(path.read_bytes())
            record = content["record"]
            if content["checksum"] != sha256(canonical(record)).hexdigest():
                raise ValueError("its checksum does not fit its content")
            if digest(record["configuration"]) != key:
                raise ValueError("it holds another configuration's run")
            if weights and (record["weights"] is None or self._weights_checksum(key) != record["weights"]):
                if record["weights"] is not None:
                    raise ValueError("its weights file is missing or does not fit its checksum")
                return None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s); it is set aside and its run computed again", path, error)
            path.replace(path.with_suffix(".damaged"))
            return None
        return record

    def write(self, key: str, record: Mapping[str, Any], weights: Sequence[Weights] = ()) -> None:
        """Stores a record whose configuration hashes to `key`, with the weights after each task if there are any."""
        if weights:
            flat = {f"{task}/{name}": t for task, part in enumerate(weights) for name, t in part.items()}
            w.save(self._weights_path(key), flat, tasks=len(weights))
        record = {**plain(record), "weights": self._weights_checksum(key) if weights else None}
        content = {"checksum": sha256(canonical(record)).hexdigest(), "record": record}
        write_atomically(self.path(key), lambda place: place.write_text(json.dumps(content)))

    def weights(self, key: str) -> list[Weights]:
        """The deployed weights after each task of a run that a sweep with `keep=True` stored."""
        record = self.read(key, weights=True)
        if record is None:
            raise KeyError(f"{key}: {self.folder} holds no weights of this run; sweep with keep=True")
        flat, header = w.load(self._weights_path(key))
        parts: list[dict[str, Tensor]] = [{} for _ in range(header["tasks"])]
        for name, tensor in flat.items():
            task, _, own = name.partition("/")
            parts[int(task)][own] = tensor
        return list(parts)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Holds the right to compute a run; others wait. What a process left that died with it is cleared away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key}.lock"
        with path.open("w") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            for unfinished in self.folder.glob(f".{key}.*"):
                unfinished.unlink(missing_ok=True)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _weights_path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _weights_checksum(self, key: str) -> str | None:
        path = self._weights_path(key)
        if not path.is_file():
            return None
        with path.open("rb") as file:
            checksum = sha256()
            while block := file.read(1 << 22):
                checksum.update(block)
        return checksum.hexdigest()
