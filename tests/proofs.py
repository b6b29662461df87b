"""Random weights for a model, and what a random element of its derived symmetry does to its function."""

import csv
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from clkit import alignment
from clkit.modules import called
from clkit.symmetry.program import arguments
from clkit.weights import live_tensors

EXPECTED = ("input", "output", "kernel position")


@torch.no_grad()
def randomise(model: nn.Module, gain: float = 1.5, seed: int = 0) -> nn.Module:
    """Random everything, at scales that keep activations alive: heads, layer scales, positions, statistics too."""
    g = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=g)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise.abs())
        elif tensor.ndim > 1 and name.endswith("weight"):
            tensor.copy_(noise * (gain / tensor[0].numel()) ** 0.5)
        elif name.endswith("weight") or "scale" in name:
            tensor.copy_(1 + 0.3 * noise)
        else:
            tensor.copy_(0.3 * noise)
    return model


class Doubled(TorchFunctionMode):
    """Computes in float64 what a model computes in float32 whatever its weights: norms, softmax, rotary angles."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        if func is torch._grouped_mm:  # it has no kernel for float64
            rows = args[0].tensor_split(kwargs["offs"][:-1].long().cpu())
            return torch.cat([x @ w for x, w in zip(rows, args[1], strict=True)])
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def measure(model: nn.Module, example: Any, *dtypes: str) -> dict[str, Any]:
    """Derives a model's symmetry on an example and moves its weights by a random element, in each of the dtypes.

    It gives a table's row. The seconds are the processor's, of the derivation.
    """
    started = time.process_time()
    symmetry = alignment.symmetry(model, example)
    seconds = time.process_time() - started
    reasons = {why: n for why, n in symmetry.frozen.items() if why not in EXPECTED}
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "share_moved": symmetry.share,
        "groups": len(symmetry.groups),
        "frozen_by": "; ".join(f"{why}: {n}" for why, n in list(reasons.items())[:3]),
    }
    for name in dtypes:
        with Doubled() if name == "float64" else nullcontext():
            row[f"change_{name}"] = symmetry.verify(model, example, dtype=getattr(torch, name)).change
    assert not symmetry.groups or _half_moved(symmetry, model, example) > 1e-4  # else its outputs would show nothing
    return row | {"seconds": seconds}


def _half_moved(symmetry: alignment.Symmetry, model: nn.Module, example: Any) -> float:
    """How much the outputs change where only every second weight moves."""
    weights, elements = live_tensors(model), alignment.random_permutations(symmetry, torch.Generator().manual_seed(0))
    moved = alignment.permute(symmetry, elements, weights)
    half = {name: (weights, moved)[k % 2][name] for k, name in enumerate(weights)}
    args, named = arguments(example)
    with torch.no_grad():
        pairs = zip(*(tree_leaves(called(model, w, args, named)) for w in (weights, half)), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs if isinstance(a, torch.Tensor))


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as a table, numbers to four digits."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
