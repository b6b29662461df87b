"""Files that are whole or not there: trees of tensors and JSON values, and records of computations under hashes."""

import glob
import json
import logging
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from hashlib import blake2b, file_digest, sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from clkit.checks import explained

T = TypeVar("T")
_SAID: set[tuple[Path | None, str]] = set()  # warnings of this process, by folder
MARK = "tensor of this file"
SIGNED = b"written by clkit, checksum "  # how the header of a file of ours begins; its checksum follows
CHECKED = b'{\n "checksum": "'  # how a record begins
BLANK = b"0" * 16  # in the checksum's place while it is computed
HOUR = 3600  # seconds after which what nobody has written on is left behind
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
    told = explained(f"{name}: {path} cannot be read", remedy, of=(OSError, MemoryError), kind=Unreadable)
    with regular(path, name, remedy, most) as file, told:
        return file.read()


def read_json(path: os.PathLike[str] | str) -> Any:
    """What a JSON file holds. Raises as `content` does, and ValueError if it is no JSON, or nests without end."""
    found = content(path, remedy="give a JSON file")
    with explained(f"path: {path} is damaged", "write it again", of=(ValueError, RecursionError)):
        return json.loads(found)


def cache_root() -> Path:
    """The folder of what can be made again: $CLKIT_CACHE, else ~/.cache/clkit."""
    return expand(os.environ.get("CLKIT_CACHE") or "~/.cache/clkit")


def canonical(value: Any) -> bytes:
    """One spelling for equal JSON values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any) -> str:
    """The hash of a JSON value, 16 hexadecimal digits."""
    return sha256(canonical(value)).hexdigest()[:16]


def hash_bytes(*parts: Any) -> str:
    """The hash of bytes, or of buffers of them one after another, 16 hexadecimal digits."""
    found = blake2b(digest_size=8)
    for part in parts:
        found.update(part)
    return found.hexdigest()


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
        _make_room(path)
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(4096))  # an empty file fits on a full disk
    return path


def _make_room(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise IsADirectoryError("a folder, a pipe or a device has that name")


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary neighbour of `path` and renames it: a file is whole or it is not there.

    Folders on the way are made, and what writers of the same file left that died over an hour ago is cleared away.
    Raises OSError, which names the path, where it cannot be written.
    """
    path = expand(path)
    remedy = "free its disk or give another place"
    with explained(f"{path} cannot be written", remedy, of=(OSError, SafetensorError), kind=OSError):
        _make_room(path)
        start = f".{path.name}.part-"
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=start, suffix=path.suffix)
        os.close(handle)
        neighbour = Path(name)
        try:
            for left in path.parent.glob(f"{glob.escape(start)}*"):
                with suppress(OSError):  # another process clears it away too, or it is another user's
                    if left.stat().st_mtime < neighbour.stat().st_mtime - HOUR:  # both by the clock of the disk
                        left.unlink()
            write(neighbour)
            neighbour.chmod(0o644)
            neighbour.replace(path)
        finally:
            neighbour.unlink(missing_ok=True)


def attempt(write: Callable[[], object], folder: Path | None = None) -> None:
    """Writes what is at hand and may be needed again; where that fails, the log says so and nothing is lost.

    Of a `folder` the log of a process says it once.
    """
    try:
        write()
    except OSError as error:
        _say("%s; what was computed is used and not kept", error, folder)


def _say(text: str, error: Exception, folder: Path | None) -> None:
    if folder is None or (folder, text) not in _SAID:
        log.warning(text, error)
    _SAID.add((folder, text))


def write_text(path: Path | str, text: str) -> None:
    """Writes a text, by rename."""
    write_atomically(path, lambda place: place.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Writes a JSON value, by rename: one space deeper at every level, and an end of line."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda place: place.write_bytes(text.encode(errors="surrogatepass")))


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors of any shape to a safetensors file under their names, by rename; `header` goes along as JSON.

    A checksum of all its bytes, with zeros in the checksum's place, stands in front of that.
    """
    rows = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = (SIGNED + BLANK).decode() + json.dumps(header, sort_keys=True)

    def write(place: Path) -> None:
        save_file(rows, place, metadata={"clkit": text})
        _sign(place, SIGNED)

    write_atomically(path, write)


def _sign(place: Path, before: bytes) -> None:
    """Puts a file's checksum in the place of the zeros that follow the first of some bytes."""
    with place.open("r+b") as file:
        checksum = file_digest(file, lambda: blake2b(digest_size=8)).hexdigest()
        file.seek(0)
        file.seek(file.read(200).index(before) + len(before))
        file.write(checksum.encode())


def _check_signed(whole: bytes, before: bytes) -> None:
    """Raises ValueError unless bytes are those of a file as it was signed."""
    start = whole.index(before) + len(before)
    end, rest = start + len(BLANK), memoryview(whole)
    if hash_bytes(rest[:start], BLANK, rest[end:]).encode() != rest[start:end]:
        raise ValueError("its checksum does not fit its content")


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads tensors of any shape by name, onto the CPU, and their header; that of a file from elsewhere is empty.

    The tensors own their memory: what becomes of the file later is no matter. Raises ValueError on a file that is no
    safetensors, or one of ours that is damaged in any bit, FileNotFoundError where there is none.
    """
    remedy = "give a whole safetensors file"
    whole = content(path, remedy=remedy)
    with explained(f"path: {path} is no whole safetensors file", remedy):
        tensors = load(whole)
        head = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    if b'"clkit":"' not in head and SIGNED[:16] not in head:  # a flipped bit leaves one of them
        return tensors, {}
    with explained(f"path: {path} is damaged", "write it again"):
        _check_signed(whole, SIGNED)
        text = json.loads(head)["__metadata__"]["clkit"]
        return tensors, dict(json.loads(text[len(SIGNED + BLANK) :]))


def write_tree(path: Path | str, tree: Any) -> None:
    """Writes a tree, by rename. Raises TypeError, naming the place in the tree, on what it cannot hold."""
    packer = _Packer()
    with explained("tree: it holds itself, or a hundred levels", "give a flat one", of=RecursionError, kind=TypeError):
        shape = json.dumps(packer.pack(tree, ""))  # a text of its own: the header's names are sorted, a tree's are not
    save_tensors(path, packer.tensors, {"tree": shape})


def read_tree(path: Path | str, device: torch.device | str = "cpu") -> Any:
    """Reads what `write_tree` wrote. Tensors that were on the CPU are there again, the others on `device`.

    Raises ValueError on a file that is damaged or something else, FileNotFoundError where there is none.
    """
    tensors, header = load_tensors(path)
    remedy = "give one that write_tree wrote"
    with explained(f"path: {path} holds no tree of tensors", remedy):
        made = {}

        def opened(node: dict[str, Any]) -> Any:
            if MARK not in node:
                return node
            name = node[MARK]
            if name not in made:
                tensor = tensors[name].to(device) if "moved" in node else tensors[name]
                if "stride" in node:
                    like = torch.empty_strided(tensor.shape, node["stride"], device="meta")
                    if not dense(like):
                        raise ValueError(f"{name} has gaps or overlaps")
                    tensor = tensor.new_empty_strided(tensor.shape, node["stride"]).copy_(tensor)
                made[name] = tensor
            return made[name].numpy() if "array" in node else made[name]

        return json.loads(header["tree"], object_hook=opened)


def intact(path: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` gives of a file that can be made again; None if there is none.

    One that is damaged, by its ValueError, KeyError or TypeError, is named in the log, set aside under the ending
    `.damaged`, and counts as missing. One that cannot be read, by its OSError, is named and counts as missing.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        _say("%s; it counts as missing", error, path.parent)
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s is damaged (%s); it is set aside and its content computed again", path, error)
        attempt(lambda: path.replace(path.with_suffix(".damaged")), path.parent)
        return None


class _Packer:
    """Takes the tensors out of a tree, each of them once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[tuple, str] = {}
        self.storages: set[int] = set()
        self.alive: list[Tensor] = []

    def pack(self, node: Any, place: str) -> Any:
        """The tree with a reference in place of every tensor. Raises TypeError on what it cannot hold."""
        if isinstance(node, np.ndarray):
            return self.reference(torch.from_numpy(node), place) | {"array": True}
        if isinstance(node, Tensor):
            return self.reference(node.detach().resolve_conj().resolve_neg(), place)
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
            self.alive.append(tensor)  # lest another lie in its place
            rows = tensor.cpu().contiguous()
            storage = rows.untyped_storage().data_ptr()
            self.tensors[name] = rows.clone() if storage in self.storages else rows  # two views of one storage
            self.storages.add(storage)
        moved = {"moved": True} if tensor.device.type != "cpu" else {}
        unusual = unusual_stride(tensor)
        return {MARK: self.names[found]} | moved | ({"stride": unusual} if unusual else {})


def dense(tensor: Tensor) -> bool:
    """Whether the entries fill a block of memory, each its own place, in some order of the axes."""
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).is_contiguous()


def unusual_stride(tensor: Tensor) -> list[int] | None:
    """The strides of a dense copy of a tensor of any shape, if they are not those of its rows one after another."""
    dense = torch.empty_like(tensor, device="meta").stride()  # those of `tensor` unless it has gaps or overlaps
    return list(dense) if dense != torch.empty(tensor.shape, device="meta").stride() else None


def _hold(path: Path, held: ExitStack) -> None:
    with explained(f"{path} cannot be locked", "free its disk or give another place", of=OSError, kind=OSError):
        lock = FileLock(path)
        held.callback(lock.release, force=True)  # beforehand: an interrupt may come as soon as it is had
        lock.acquire()


class Records:
    """A folder of records, `<hash>.json`, and the tensors that belong to some of them, `<hash>.safetensors`.

    A record is a dict of JSON values; its "configuration" hashes to its key. Files appear by rename and are checked on
    reading. One that was cut off, edited or renamed is named in the log and set aside as `<hash>.damaged`. It counts as
    missing, so that it is computed again. Several processes may use one folder at once.

    A folder that cannot be written raises ValueError before anything is computed. Where it fails after that, what is
    computed is given all the same, and the log of a process says so once.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = expand(folder)
        self.checked = False

    def check(self) -> None:
        """Raises ValueError, naming the folder, if it cannot be written; whoever computes for hours asks before."""
        if not self.checked:
            writable(self.path("record"))
        self.checked = True

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
        """Stores a record whose configuration hashes to `key`, with a tree of tensors if there is one. Or OSError."""
        if tensors is not None:
            write_tree(self.path(key, ".safetensors"), {"key": key, "tensors": tensors})
        record = {**plain(record), "tensors": tensors is not None}
        text = json.dumps({"checksum": BLANK.decode(), "record": record}, indent=1)

        def write(place: Path) -> None:
            place.write_text(text)
            _sign(place, CHECKED)

        write_atomically(self.path(key), write)

    def keep(self, key: str, record: Mapping[str, Any], tensors: Any = None) -> None:
        """Writes what is in hand; where that fails, the log says so once of this folder, and nothing is lost."""
        attempt(lambda: self.write(key, record, tensors), self.folder)

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
                self.keep(key, record, tree)
                found = self.read(key) or {**json.loads(json.dumps(record)), "tensors": False}
        return found

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Holds the right to compute a record; others wait. Where no lock can be had, this goes on without one.

        What a process left that died with it is cleared away. The lock's own file goes when all went well. One who
        failed leaves it: those who wait for it and those who come later wait for the same.
        """
        self.check()
        path = self.path(key, ".lock")
        with ExitStack() as held:
            attempt(lambda: _hold(path, held), self.folder)
            with suppress(OSError):
                for unfinished in self.folder.glob(f".{key}.*.part-*"):
                    unfinished.unlink(missing_ok=True)
            yield
            with suppress(OSError):
                path.unlink()

    def _read(self, key: str, tensors: bool) -> tuple[dict[str, Any] | None, Any]:
        def checked(path: Path) -> tuple[dict[str, Any], Any] | None:
            whole = content(path)
            _check_signed(whole, CHECKED)
            record = json.loads(whole)["record"]
            if digest(record["configuration"]) != key:
                raise ValueError("it holds another configuration's record")
            if not tensors or not record["tensors"]:
                return None if tensors else (record, None)
            with explained("its tensors are missing", "make them again", of=FileNotFoundError):
                tree = read_tree(self.path(key, ".safetensors"))
            if not isinstance(tree, dict) or tree["key"] != key:
                raise ValueError("its tensors are another record's")
            return record, tree["tensors"]

        return intact(self.path(key), checked) or (None, None)
