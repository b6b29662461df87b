"""Files that are whole or not there: trees of tensors and JSON values, and records of computations under hashes."""

import json
import logging
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clkit.checks import explained

T = TypeVar("T")
MARK = "tensor of this file"
log = logging.getLogger("clkit.store")


def expand(path: os.PathLike[str] | str) -> Path:
    """A path as people write it, with its ~ and its variables ($HOME) replaced; every path from outside goes here."""
    return Path(os.path.expanduser(os.path.expandvars(path)))  # noqa: PTH111  # Path's own raises for "~nobody"


class Unreadable(OSError, ValueError):
    """A file that cannot be read here and now: a permission, a disk or a handle is missing, whatever it holds."""


def regular(
    path: os.PathLike[str] | str, name: str = "path", remedy: str = "give a file", most: float = math.inf
) -> BinaryIO:
    """Opens a file from outside for reading, as bytes; links are followed. Every file from outside goes through here.

    Raises, with `name` for the argument, the path and a `remedy`:

    - TypeError on what is no path, FileNotFoundError where there is nothing
    - ValueError on a folder, a pipe, a device or a socket, none of which is waited for or read, and on a
      file of more than `most` bytes
    - Unreadable, a ValueError as well, where the system refuses
    """
    with explained(f"{name}: {path!r} is no path", remedy, of=TypeError, kind=TypeError):
        place = expand(path)
    what = f"{name}: {place} cannot be read"

    def opener(place: str, flags: int) -> int:
        file = os.open(place, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for one who writes
        state = os.fstat(file)
        kind = stat.filemode(state.st_mode)[0]
        if kind == "-" and state.st_size <= most:
            return file
        os.close(file)
        large = f"it has {state.st_size:,} bytes, the limit is {most:,}"
        raise ValueError({"-": large, "d": "it is a folder"}.get(kind, "it is a pipe, a device or a socket"))

    try:
        return open(place, "rb", opener=opener)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{what} (there is no such file); {remedy}") from error
    except OSError as error:
        raise Unreadable(f"{what} ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{what} ({error}); {remedy}") from error


def content(
    path: os.PathLike[str] | str, name: str = "path", remedy: str = "give a file", most: float = math.inf
) -> bytes:
    """The bytes of a file from outside, which `regular` opens; raises what that does, and Unreadable on a fault."""
    with regular(path, name, remedy, most) as file:
        try:
            return file.read()
        except (OSError, MemoryError) as error:
            raise Unreadable(f"{name}: {expand(path)} cannot be read ({error}); {remedy}") from error


def cache_root() -> Path:
    """The folder of what can be made again: $CLKIT_CACHE, else ~/.cache/clkit."""
    return expand(os.environ.get("CLKIT_CACHE") or "~/.cache/clkit")


def canonical(value: Any) -> bytes:
    """One spelling for equal JSON values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any) -> str:
    """The hash of a JSON value, 16 hexadecimal digits."""
    return sha256(canonical(value)).hexdigest()[:16]


def hash_bytes(content: Any) -> str:
    """The hash of bytes, or of a buffer of them, 16 hexadecimal digits."""
    return blake2b(content, digest_size=8).hexdigest()


def hash_tensor(tensor: Tensor) -> str:
    """The dtype, the shape and a hash of the entries, of a tensor of any shape; device and memory layout do not count.

    Raises RuntimeError on a tensor without entries of its own, a sparse one for example.
    """
    rows = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    entries = hash_bytes(rows.flatten().view(torch.uint8).numpy().data)
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {entries}"


def plain(value: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """Turns arrays, tensors, numpy's numbers, tuples and paths into what JSON knows.

    What is none of these is what `other` gives for it; without that, raises TypeError.
    """
    if hasattr(value, "tolist"):
        return plain(value.tolist(), other)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(key): plain(item, other) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item, other) for item in value]
    if other is not None:
        return other(value)
    kind = type(value).__name__
    raise TypeError(f"{kind} {value!r:.60} cannot be stored; give numbers, text, lists, arrays or dicts")


def writable(path: Path | str) -> Path:
    """The path, expanded, of a file to be written; its folder is made and tried, and no file is left there.

    Raises ValueError, naming the path, if it cannot be written.
    """
    path = expand(path)
    with explained(f"path: {path} cannot be written", "give a file in a folder that can be", of=OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError("a folder has that name")
    return path


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary neighbour of `path` and renames it: a file is whole or it is not there.

    Folders on the way are made. Raises OSError, which names the path, where it cannot be written.
    """
    path = expand(path)
    remedy = "free its disk or give another place"
    with explained(f"{path} cannot be written", remedy, of=(OSError, SafetensorError), kind=OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        neighbour = Path(name)
        try:
            write(neighbour)
            neighbour.chmod(0o644)
            neighbour.replace(path)
        finally:
            neighbour.unlink(missing_ok=True)


def attempt(write: Callable[[], object]) -> None:
    """Writes what is at hand and may be needed again; where that fails, the log says so and nothing is lost."""
    try:
        write()
    except OSError as error:
        log.warning("%s; what was computed is used and not kept", error)


def write_text(path: Path | str, text: str) -> None:
    """Writes a text, by rename."""
    write_atomically(path, lambda place: place.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Writes a JSON value, by rename: one space deeper at every level, and an end of line."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors of any shape to a safetensors file under their names, by rename; `header` goes along as JSON."""
    rows = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = json.loads(json.dumps(header))
    text = json.dumps({**header, "checksum": _checksum(header, rows)}, sort_keys=True)
    write_atomically(path, lambda place: save_file(rows, place, metadata={"clkit": text}))


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads tensors of any shape by name, onto the CPU, and their header; that of a file from elsewhere is empty.

    Raises ValueError on a file that is damaged or no safetensors, FileNotFoundError where there is none.
    """
    path = expand(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} is not a file; give one that clkit wrote")
    damage = (SafetensorError, ValueError, TypeError)
    told = explained(f"path: {path} is not a whole safetensors file", "write it again", of=damage)
    with told, safe_open(path, framework="pt") as file:
        header = dict(json.loads((file.metadata() or {}).get("clkit", "{}")))
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    checksum = header.pop("checksum", None)
    if checksum is not None and checksum != _checksum(header, tensors):
        raise ValueError(f"path: {path} is damaged, its checksum does not fit its content; write it again")
    return tensors, header


def write_tree(path: Path | str, tree: Any) -> None:
    """Writes a tree, by rename. Raises TypeError, naming the place in the tree, on what it cannot hold."""
    packer = _Packer()
    shape = json.dumps(packer.pack(tree, ""))  # a text of its own: the header's names are sorted, a tree's are not
    save_tensors(path, packer.tensors, {"tree": shape})


def read_tree(path: Path | str, device: torch.device | str = "cpu") -> Any:
    """Reads what `write_tree` wrote. Tensors that were on the CPU are there again, the others on `device`.

    Raises ValueError on a file that is damaged or something else, FileNotFoundError where there is none.
    """
    tensors, header = load_tensors(path)
    remedy = "give one that write_tree wrote"
    with explained(f"path: {path} holds no tree of tensors", remedy, of=(ValueError, KeyError, TypeError)):
        made = {}

        def opened(node: dict[str, Any]) -> Any:
            if (name := node.get(MARK)) is None:
                return node
            if name not in made:
                tensor = tensors[name].to(device) if "moved" in node else tensors[name]
                if "stride" in node:
                    tensor = tensor.new_empty_strided(tensor.shape, node["stride"]).copy_(tensor)
                made[name] = tensor
            return made[name].numpy() if "array" in node else made[name]

        return json.loads(header["tree"], object_hook=opened)


def intact(path: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` gives of a file that can be made again; None if there is none.

    One that is damaged, by its ValueError, KeyError or TypeError, is named in the log, set aside under the ending
    `.damaged`, and counts as missing.
    """
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); it is set aside and its content computed again", path, error)
        attempt(lambda: path.replace(path.with_suffix(".damaged")))
        return None


class _Packer:
    """Takes the tensors out of a tree, each of them once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[tuple, str] = {}
        self.storages: set[int] = set()

    def pack(self, node: Any, place: str) -> Any:
        """The tree with a reference in place of every tensor. Raises TypeError on what it cannot hold."""
        if isinstance(node, np.ndarray):
            return self.reference(torch.from_numpy(node), place) | {"array": True}
        if isinstance(node, Tensor):
            return self.reference(node.detach(), place)
        if isinstance(node, Mapping) and all(isinstance(key, str) for key in node) and MARK not in node:
            return {key: self.pack(item, f"{place}/{key}") for key, item in node.items()}
        if isinstance(node, list | tuple):
            return [self.pack(item, f"{place}/{i}") for i, item in enumerate(node)]
        if isinstance(node, np.generic):
            return node.item()
        if node is None or isinstance(node, bool | int | float | str):
            return node
        kind, remedy = type(node).__name__, "give tensors, arrays, numbers, texts, and lists or dicts of them"
        raise TypeError(f"{place} is {node!r:.60} ({kind}) and cannot be stored; {remedy}")

    def reference(self, tensor: Tensor, place: str) -> dict[str, Any]:
        """What stands for a tensor: its name in the file, where it belongs, and its strides if they are unusual."""
        found = (tensor.device, tensor.data_ptr() or place, tensor.dtype, tensor.shape, tensor.stride())
        if found not in self.names:
            self.names[found] = name = f"{len(self.tensors)}{place}"
            rows = tensor.cpu().contiguous()
            storage = rows.untyped_storage().data_ptr()
            self.tensors[name] = rows.clone() if storage in self.storages else rows  # two views of one storage
            self.storages.add(storage)
        moved = {"moved": True} if tensor.device.type != "cpu" else {}
        unusual = unusual_stride(tensor)
        return {MARK: self.names[found]} | moved | ({"stride": unusual} if unusual else {})


def unusual_stride(tensor: Tensor) -> list[int] | None:
    """The strides of a dense copy of a tensor of any shape, if they are not those of its rows one after another."""
    dense = torch.empty_like(tensor, device="meta").stride()  # those of `tensor` unless it has gaps or overlaps
    return list(dense) if dense != torch.empty(tensor.shape, device="meta").stride() else None


def _checksum(header: Any, tensors: Mapping[str, Tensor]) -> str:
    return digest([header, {name: hash_tensor(tensor) for name, tensor in tensors.items()}])


class Records:
    """A folder of records, `<hash>.json`, and the tensors that belong to some of them, `<hash>.safetensors`.

    A record is a dict of JSON values; its "configuration" hashes to its key. Files appear by rename and are checked on
    reading. One that was cut off, edited or renamed is named in the log and set aside as `<hash>.damaged`. It counts as
    missing, so that it is computed again. Several processes may use one folder at once.

    A folder that cannot be written raises ValueError before anything is computed. Where a write fails after
    it, what was computed is given all the same, with a warning in the log.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = expand(folder)

    def path(self, key: str, suffix: str = ".json") -> Path:
        """The file of a record; that of its tensors ends in ".safetensors"."""
        return self.folder / f"{key}{suffix}"

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
            write_tree(self.path(key, ".safetensors"), {"key": key, "tensors": tensors})
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
        if (found := self.read(key, tensors=tensors)) is not None:
            return found
        with self.lock(key):
            if (found := self.read(key, tensors=tensors)) is None:
                made, tree = make()
                record = plain({"configuration": configuration, **made})
                attempt(lambda: self.write(key, record, tree))
                found = self.read(key) or {**json.loads(json.dumps(record)), "tensors": False}
        return found

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Holds the right to compute a record; others wait. What a process left that died with it is cleared away."""
        path = writable(self.path(key, ".lock"))
        with FileLock(path):
            for unfinished in self.folder.glob(f".{key}.*"):
                unfinished.unlink(missing_ok=True)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _read(self, key: str, tensors: bool) -> tuple[dict[str, Any] | None, Any]:
        def checked(path: Path) -> tuple[dict[str, Any], Any] | None:
            content = json.loads(path.read_bytes())
            record = content["record"]
            if content["checksum"] != digest(record) or digest(record["configuration"]) != key:
                raise ValueError("its checksum does not fit its content, or it holds another configuration's record")
            if not tensors or not record["tensors"]:
                return None if tensors else (record, None)
            place = self.path(key, ".safetensors")
            if not place.is_file():
                raise ValueError("its tensors are missing")
            tree = read_tree(place)
            if tree["key"] != key:
                raise ValueError("its tensors are another record's")
            return record, tree["tensors"]

        return intact(self.path(key), checked) or (None, None)
