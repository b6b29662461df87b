"""Files that appear by rename and are checked when they are read: tensors, JSON values, and trees of both.

A tree is a tensor, an array, None, a bool, a number, a text, or a list or a dict (with texts as keys) of trees. It
comes back bit for bit: in its order, with dtypes and memory layouts, and two places that held one tensor hold one
again. Tensors are safetensors, never pickles; a header of JSON goes along, and a checksum covers both.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
MARK = "tensor of this file"
log = logging.getLogger("clkit.store")


def cache_root() -> Path:
    """The folder of what can be made again: $CLKIT_CACHE, else ~/.cache/clkit."""
    return Path(os.environ.get("CLKIT_CACHE") or "~/.cache/clkit").expanduser()


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


def plain(value: Any) -> Any:
    """Turns arrays, tensors, numpy's numbers, tuples and paths into what JSON knows; else raises TypeError."""
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


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary neighbour of `path` and renames it: a file is whole or it is not there."""
    path = Path(path)
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


def write_text(path: Path | str, text: str) -> None:
    """Writes a text, by rename."""
    write_atomically(path, lambda place: place.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Writes a JSON value, by rename: one space deeper at every level, and an end of line."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors of any shape to a safetensors file under their names, by rename; `header` goes along as JSON."""
    from safetensors.torch import save_file

    rows = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = json.loads(json.dumps(header))
    text = json.dumps({**header, "checksum": _checksum(header, rows)}, sort_keys=True)
    write_atomically(path, lambda place: save_file(rows, place, metadata={"clkit": text}))


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads tensors of any shape by name, onto the CPU, and their header; that of a file from elsewhere is empty.

    Raises ValueError on a file that is damaged or no safetensors, FileNotFoundError where there is none.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"path: {path} is not a file; give one that weights.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(json.loads((file.metadata() or {}).get("clkit", "{}")))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, TypeError) as error:
        raise ValueError(f"path: {path} is not a whole safetensors file ({error}); write it again") from error
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
    try:
        return _unpack(json.loads(header["tree"]), tensors, device, {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"path: {path} holds no tree of tensors ({error!r}); give one that write_tree wrote"
        ) from error


def intact(path: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` gives of a file that can be made again; None if there is none.

    One that is damaged, by its ValueError, KeyError or TypeError, is named in the log, set aside under the ending
    `.damaged`, and counts as missing.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); it is set aside and its content computed again", path, error)
        path.replace(path.with_suffix(".damaged"))
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
        raise TypeError(
            f"{place} is {node!r:.60} ({type(node).__name__}) and cannot be stored; give tensors, arrays, numbers, "
            "texts, and lists or dicts of them"
        )

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


def _unpack(node: Any, tensors: Mapping[str, Tensor], device: torch.device | str, made: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(item, tensors, device, made) for item in node]
    if not isinstance(node, dict):
        return node
    if MARK not in node:
        return {key: _unpack(item, tensors, device, made) for key, item in node.items()}
    name = node[MARK]
    if name not in made:
        tensor = tensors[name].to(device) if "moved" in node else tensors[name]
        if "stride" in node:
            tensor = tensor.new_empty_strided(tensor.shape, node["stride"]).copy_(tensor)
        made[name] = tensor
    return made[name].numpy() if "array" in node else made[name]


def _checksum(header: Any, tensors: Mapping[str, Tensor]) -> str:
    return digest([header, {name: hash_tensor(tensor) for name, tensor in tensors.items()}])
