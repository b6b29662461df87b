"""An unfinished computation on disk: its state as a tree in one file, which is whole or not there.

A tree is a tensor, an array, None, a bool, a number, a text, or a list or a dict (with texts as keys) of trees. It
comes back bit for bit: in its order, with dtypes and memory layouts, and two places that held one tensor hold one
again. The file is safetensors; the tree's shape and its plain values go along as JSON, and a checksum covers both.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clkit import weights

MARK = "tensor of this file"


def write(path: Path | str, tree: Any) -> None:
    """Writes a tree to a file, by rename. Raises TypeError, naming the place in the tree, on what it cannot hold."""
    packer = _Packer()
    shape = json.dumps(packer.pack(tree, ""))
    weights.save(path, packer.tensors, tree=shape, checksum=_checksum(shape, packer.tensors))


def read(path: Path | str, device: torch.device | str = "cpu") -> Any:
    """Reads what `write` wrote. Tensors that were on the CPU are there again, the others on `device`.

    Raises ValueError on a file that is damaged or something else; the file stays as it is.
    """
    try:
        tensors, header = weights.load(path)
        if header["checksum"] != _checksum(header["tree"], tensors):
            raise ValueError("its checksum does not fit its content")
        return _unpack(json.loads(header["tree"]), tensors, device, {})
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(
            f"checkpoint: {path} is damaged or no checkpoint ({error}); put a whole copy in its place, or delete it to "
            "begin anew"
        ) from error


def _spread(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values by name, those of a dict within by its name, a space and theirs."""
    spread: dict[str, Any] = {}
    for name, value in identity.items():
        spread |= {f"{name} {n}": v for n, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return spread


class Checkpoint:
    """The file of one computation's state. `identity`, plain values by name, tells it apart from all others."""

    def __init__(self, path: Path | str, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = Path(path).expanduser(), dict(identity)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def save(self, state: Any) -> None:
        """Writes a state over the last one."""
        write(self.path, {"identity": self.identity, "state": state})

    def load(self, device: torch.device | str = "cpu") -> Any:
        """The state saved last, None if there is no file. Raises ValueError on that of another computation."""
        if not self.path.exists():
            return None
        found = read(self.path, device)
        if not isinstance(found, dict) or found.keys() != {"identity", "state"}:
            raise ValueError(f"checkpoint: {self.path} holds something else; give another path")
        theirs, ours = (_spread(identity) for identity in (found["identity"], self.identity))
        differ = [name for name in ours if theirs.get(name) != ours[name]]
        if differ:
            details = "; ".join(f"{name}: {theirs.get(name)!s:.200} there, {ours[name]!s:.200} here" for name in differ)
            raise ValueError(
                f"checkpoint: {self.path} is of another run ({details}); give another path, the settings it was made "
                "with, or delete it to begin anew"
            )
        return found["state"]


def model_state(model: nn.Module) -> dict[str, Any]:
    """Everything that a model trains on from: parameters, all buffers, and which parameters are frozen."""
    return {
        "state": model.state_dict(),
        "buffers": dict(model.named_buffers()),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }


@torch.no_grad()
def restore_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Writes what `model_state` gave into a model of the same kind, in place."""
    model.load_state_dict(state["state"])
    for name, buffer in model.named_buffers():
        buffer.copy_(state["buffers"][name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in state["frozen"])


def random_state(device: torch.device, *generators: torch.Generator) -> dict[str, Any]:
    """The states of generators, and of torch's global ones on the CPU and on `device`."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"own": [g.get_state() for g in generators], "cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random(state: Mapping[str, Any], device: torch.device, *generators: torch.Generator) -> None:
    """Sets the generators to what `random_state` gave."""
    for generator, own in zip(generators, state["own"], strict=True):
        generator.set_state(own)
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


class _Packer:
    """Takes the tensors out of a tree, each of them once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[tuple, str] = {}
        self.storages: set[int] = set()

    def pack(self, node: Any, place: str) -> Any:
        """The tree with a reference in place of every tensor."""
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
            f"checkpoint: {place} is {node!r:.60} ({type(node).__name__}) and cannot be stored; give tensors, arrays, "
            "numbers, texts, and lists or dicts of them"
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
        dense = torch.empty_like(tensor, device="meta").stride()  # those of `tensor` unless it has gaps or overlaps
        usual = torch.empty(tensor.shape, device="meta").stride()
        return {MARK: self.names[found]} | moved | ({"stride": dense} if dense != usual else {})


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


def _checksum(shape: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(shape.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
