"""Weights are values: mappings from a name to a floating tensor, and the algebra on them.

The algebra is pure, unless a result is to be written into `out`. `set_weights` writes into a model. This is the one
place that checks keys and shapes, and that closes the traps of `state_dict`. Integer counters (BatchNorm's
`num_batches_tracked`) are dropped. A tensor that a model holds under several names (tied weights, a module registered
twice) appears once, under its first name.

Sums are made in float32, or in float64 where an input is, and have the dtype of the first weights: halves are rounded
once, at the end. A number that is finite before it is rounded and infinite afterwards raises ValueError.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clkit.modules import unwrapped

Weights = Mapping[str, Tensor]
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PIECE = 2**18  # entries of a running sum on the CPU: a megabyte, which stays in the cache


def is_statistic(name: str) -> bool:
    """Whether an entry is a running mean or variance, as BatchNorm has, and no parameter: its name's last part says."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def statistics(weights: Weights) -> dict[str, Tensor]:
    """The running statistics among weights; not copied."""
    return {name: tensor for name, tensor in weights.items() if is_statistic(name)}


def floating(name: str, tensor: Any) -> bool:
    """Whether an entry belongs to weights: a floating tensor does, a counter does not.

    Raises ValueError for what would have to belong and cannot: complex, quantised and sparse tensors, and those that
    have no numbers yet.
    """
    if isinstance(tensor, Tensor) and not is_lazy(tensor) and not tensor.is_meta:
        if tensor.dtype in FLOATING and tensor.layout == torch.strided:
            return True
        if not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized):
            return False
    kind = getattr(tensor, "dtype", type(tensor).__name__)
    remedy = "give dense real ones, a complex one as two, one on the meta device with its numbers"
    raise ValueError(f"{name}: {kind} is no dense tensor of real numbers in 16 bits or more; {remedy}")


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own floating parameters and buffers by name, in their shapes, not copied, one entry per storage.

    Names are those of the model without wrappers. A buffer that holds an infinity and is no statistic is a mask, not a
    weight, and is left out; so is what a module keeps as extra state. Raises ValueError that names what `floating`
    refuses, so that nothing acts on a part of a network.
    """
    seen, live, buffers = set(), {}, {}
    own = nn.Module.state_dict(unwrapped(model), keep_vars=True)  # all of it, whatever a network makes of this method
    for name, tensor in own.items():
        if name.endswith("_extra_state") or not floating(name, tensor):
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if place not in seen:
            seen.add(place)
            live[name] = tensor.detach()
            if not isinstance(tensor, nn.Parameter) and not is_statistic(name):
                buffers[name] = tensor.isinf().any()
    return {name: tensor for name, tensor in live.items() if name not in buffers or not buffers[name]}


def get_weights(model: nn.Module, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Copies the model's floating parameters and buffers out of it, by name and in their shapes.

    Later training does not change the copies. `device` places the copies (default: where the model is).
    """
    return {name: tensor.to(device, copy=True) for name, tensor in live_tensors(model).items()}


@torch.no_grad()
def set_weights(model: nn.Module, weights: Weights) -> None:
    """Writes `weights` into the model in place, so that optimizers keep their references.

    Every name and shape must match `get_weights(model)`; a ValueError is raised before anything is written.
    """
    live = live_tensors(model)
    check_same(live, weights, names=("the model", "weights"))
    for name, tensor in live.items():
        tensor.copy_(weights[name])


def check_same(*ws: Weights, names: Sequence[str] | None = None) -> None:
    """Raises ValueError unless all weights have the same names and shapes, in any order."""
    if not ws or not all(isinstance(w, Mapping) for w in ws):
        raise ValueError(f"weights: {[type(w) for w in ws]} were given; pass at least one mapping of names to tensors")
    first, label = ws[0], names or [f"weights {i}" for i in range(len(ws))]
    for i, other in enumerate(ws[1:], 1):
        if first.keys() != other.keys():
            missing, extra = sorted(first.keys() - other.keys())[:3], sorted(other.keys() - first.keys())[:3]
            names = f"missing {missing}, unexpected {extra}; give weights of the same architecture"
            raise ValueError(f"{label[i]} and {label[0]} have different names: {names}")
        for name, tensor in first.items():
            if tensor.shape != other[name].shape:
                shapes = f"{tuple(other[name].shape)} and {tuple(tensor.shape)}; give the same architecture and classes"
                raise ValueError(f"{label[i]} and {label[0]} differ in the shape of {name!r}: {shapes}")


def equal(a: Weights, b: Weights) -> bool:
    """Whether two weights have the same names and, tensor by tensor, the same bits."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def finite(weights: Weights) -> bool:
    """Whether weights are free of NaN and infinities; they are read once, and a device is waited for once."""
    sums: dict[torch.device, Any] = {}
    for tensor in weights.values():
        sums[tensor.device] = sums.get(tensor.device, 0) + tensor.sum(dtype=wide(tensor)) * 0
    return all(s == 0 for s in sums.values()) or all(t.isfinite().all() for t in weights.values())  # sums overflow


def check_finite(weights: Weights, name: str = "weights") -> None:
    """Raises ValueError that names the first tensor with a NaN or an infinity in it."""
    if finite(weights):
        return
    bad = next(key for key, tensor in weights.items() if not tensor.isfinite().all())
    raise ValueError(f"{name}: {bad!r} holds a NaN or an infinity; training diverged, try a smaller lr or clip")


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums over tensors: float64 where one of them has it, else float32."""
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in tensors] else torch.float32


def map_weights(fn: Callable[[Tensor], Tensor], w: Weights) -> dict[str, Tensor]:
    """Applies `fn` tensor by tensor; names stay, shapes and dtypes are what it gives."""
    return {name: fn(tensor) for name, tensor in w.items()}


@torch.no_grad()
def lerp(a: Weights, b: Weights, t: float, *, out: Weights | None = None) -> dict[str, Tensor]:
    """Goes straight from `a` (t = 0, bitwise) to `b` (t = 1, bitwise): a + t (b - a).

    With `out`, weights of the same names and shapes, the result is written there and nothing is allocated: for paths
    with many points.
    """
    check_same(a, b)
    result, rounded = _output(a, out), {}
    for name, total in result.items():
        x, y = a[name], b[name]
        dtype = wide(x, y)
        if t == 0 or t == 1:
            total.copy_(y if t else x)
        elif total.dtype == x.dtype == y.dtype == dtype:
            torch.lerp(x, y, t, out=total)
        else:
            total.copy_(x.to(dtype).lerp(y.to(dtype), t))
        if total.dtype != dtype:
            rounded[name] = total
    check_range(rounded, (a, b))
    return result


@torch.no_grad()
def combine(ws: Sequence[Weights], coefficients: Iterable[float], *, out: Weights | None = None) -> dict[str, Tensor]:
    """Adds up weights times coefficients: sum_i c_i w_i.

    On the CPU piece by piece, so that the running sum stays in the cache and every input is read from memory once.
    `out` is as in `lerp`; it must not share memory with any but the first of the weights. Raises ValueError unless
    there is a coefficient for each of the weights and these have the same names and shapes.
    """
    cs = list(coefficients)
    if len(cs) != len(ws):
        raise ValueError(f"coefficients: {len(cs)} for {len(ws)} weights; give one for each")
    check_same(*ws)
    result, rounded = _output(ws[0], out), {}
    for name, total in result.items():
        parts = [w[name] for w in ws]
        dtype = wide(*parts)
        if total.device.type == "cpu" and all(part.is_contiguous() for part in (total, *parts)):
            for piece in zip(*(part.view(-1).split(PIECE) for part in (total, *parts)), strict=True):
                _add_up(piece[0], piece[1:], cs, dtype)
        else:
            _add_up(total, parts, cs, dtype)
        if total.dtype != dtype:
            rounded[name] = total
    check_range(rounded, ws)
    return result


def _output(like: Weights, out: Weights | None) -> dict[str, Tensor]:
    """Where to write a result of these names and shapes."""
    if out is None:
        return {name: torch.empty_like(tensor) for name, tensor in like.items()}
    check_same(like, out, names=("a", "out"))
    return {name: out[name] for name in like}


def _add_up(total: Tensor, terms: Sequence[Tensor], coefficients: Sequence[float], dtype: torch.dtype) -> None:
    """Writes the sum of terms times coefficients, made in `dtype`, into `total`."""
    into = total if total.dtype == dtype else torch.empty_like(total, dtype=dtype)
    torch.mul(terms[0].to(dtype), coefficients[0], out=into)
    for term, c in zip(terms[1:], coefficients[1:], strict=True):
        into.add_(term, alpha=c)
    if into is not total:
        total.copy_(into)


def check_range(result: Weights, ws: Sequence[Weights]) -> None:
    """Raises ValueError that names a tensor of a result with a NaN or an infinity where no input has one."""
    if finite(result):
        return
    for name, tensor in result.items():
        if not tensor.isfinite().all() and all(w[name].isfinite().all() for w in ws):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: too large for {dtype}; give weights of a wider dtype, or take a shorter step")


def add(a: Weights, b: Weights, scale: float = 1.0) -> dict[str, Tensor]:
    """Moves from `a` along `b`: a + scale b. With a task vector, in the same shapes, it is task arithmetic."""
    return combine([a, b], [1.0, scale])


def sub(a: Weights, b: Weights) -> dict[str, Tensor]:
    """The vector that leads from `b` to `a`, in their shapes: a - b. Of current and base weights, the task vector."""
    return combine([a, b], [1.0, -1.0])


def scale(a: Weights, factor: float) -> dict[str, Tensor]:
    """Multiplies every tensor by `factor`; names and shapes stay."""
    return combine([a], [factor])


def dot(a: Weights, b: Weights) -> float:
    """The inner product of two weights, seen as one long vector each, added up in double precision."""
    check_same(a, b)
    if not a:
        return 0.0
    products = [(x.double() * b[name].double()).sum() for name, x in a.items()]
    return float(torch.stack(products).sum())


def norm(a: Weights) -> float:
    """The Euclidean length of weights, seen as one long vector."""
    return dot(a, a) ** 0.5
