"""Records of finished computations: one JSON file each, with a checksum, under the hash of its configuration."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from clkit.store.files import digest, intact, plain, read_tree, write_json, write_tree

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes at once may then compute the same record twice
    fcntl = None


class Records:
    """A folder of records, `<hash>.json`, and the tensors that belong to some of them, `<hash>.safetensors`.

    A record is a dict of JSON values; its "configuration" hashes to its key. Files appear by rename and are checked on
    reading. One that was cut off, edited or renamed is named in the log and set aside as `<hash>.damaged`. It counts as
    missing, so that it is computed again. Several processes may use one folder at once.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()

    def path(self, key: str) -> Path:
        """The file of a record."""
        return self.folder / f"{key}.json"

    def read(self, key: str, *, tensors: bool = False) -> dict[str, Any] | None:
        """The record under a hash; None if there is no whole one or, with `tensors`, none with whole tensors."""
        return self._read(key, tensors)[0]

    def tensors(self, key: str) -> Any:
        """The tree of tensors that was written with a record. Raises KeyError if there is none."""
        record, tree = self._read(key, True)
        if record is None:
            raise KeyError(f"{key}: {self.folder} holds no tensors of this record; compute it again and keep them")
        return tree

    def write(self, key: str, record: Mapping[str, Any], tensors: Any = None) -> None:
        """Stores a record whose configuration hashes to `key`, with a tree of tensors if there is one."""
        if tensors is not None:
            write_tree(self._tree(key), {"key": key, "tensors": tensors})
        record = {**plain(record), "tensors": tensors is not None}
        write_json(self.path(key), {"checksum": digest(record), "record": record})

    def remember(
        self, configuration: Any, make: Callable[[], tuple[Mapping[str, Any], Any]], *, tensors: bool = False
    ) -> dict[str, Any]:
        """The record of a configuration: read or, while other processes wait, made now.

        `make` gives the record without its configuration, and a tree of tensors or None. With `tensors` a record that
        was stored without any is made again.
        """
        key = digest(configuration)
        with self.lock(key):
            if (found := self.read(key, tensors=tensors)) is None:
                record, tree = make()
                self.write(key, {"configuration": configuration, **record}, tree)
                found = self.read(key)
                assert found is not None
        return found

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Holds the right to compute a record; others wait. What a process left that died with it is cleared away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key}.lock"
        with _locked(path):
            for unfinished in self.folder.glob(f".{key}.*"):
                unfinished.unlink(missing_ok=True)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _tree(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str, tensors: bool) -> tuple[dict[str, Any] | None, Any]:
        def checked(path: Path) -> tuple[dict[str, Any], Any] | None:
            content = json.loads(path.read_bytes())
            record = content["record"]
            if content["checksum"] != digest(record) or digest(record["configuration"]) != key:
                raise ValueError("its checksum does not fit its content, or it holds another configuration's record")
            if not tensors or not record["tensors"]:
                return None if tensors else (record, None)
            if not self._tree(key).is_file():
                raise ValueError("its tensors are missing")
            tree = read_tree(self._tree(key))
            if tree["key"] != key:
                raise ValueError("its tensors are another record's")
            return record, tree["tensors"]

        return intact(self.path(key), checked) or (None, None)


def _locked(path: Path) -> IO[str]:
    """The file, open and locked; who held it before may have deleted the one that was waited for."""
    while True:
        file = path.open("w")
        if fcntl is None:
            return file
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
