"""What all merges share: what goes in and comes out, and task vectors in pieces that stay in the cache.

A merge reads each input once or a few times and allocates one network, its result, and a few pieces. Arithmetic is in
float32, or in float64 where an input is: halves are never added up in half precision. Entries of a tensor are taken in
row-major order, tensors in the order of the first weights.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import torch
from torch import Tensor

from clkit import checks
from clkit.weights import Weights, check_finite, check_range, check_same, combine, finite, floating, is_statistic

ENTRIES = 2**15  # of a piece on the CPU: five of them and a few temporaries fit into a megabyte
ENTRIES_ELSEWHERE = 2**22  # on an accelerator, where a kernel's start costs more than its traffic

Density = Annotated[float, checks.Range(0, 1, "low", "the share of entries that are kept")]
Scale = Annotated[float, checks.Range(means="1, 1 / n, or one tuned on held-out data")]
Seed = Annotated[int, checks.Range(0, 2**63 - 1)]


def on_parameters(
    *, number: int | None = None, statistics: bool = False
) -> Callable[[Callable[..., dict[str, Tensor]]], Callable[..., dict[str, Tensor]]]:
    """Makes a function f(ws, **options) of parameters a merge, which can be given all the weights of networks.

    Counters are dropped. Running statistics are averaged: the plain mean of those of `ws`. With `statistics` the
    function is given them as well, and averages them itself, weighted as it weighs the networks. A tensor that is not
    finite and equal in all inputs, such as a mask of -inf, is taken over. A `score` among the options judges all these
    together. The result has the dtypes of the base or, without one, of the first weights. Options are checked against
    their annotations. What is a merge already stays as it is.

    The merge raises ValueError for no weights, or not `number` of them, and for inputs or a result that do not agree in
    names and shapes or are not finite.
    """

    def decorate(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        if getattr(checks.innermost(function), "on_parameters", False):
            return function
        checked = checks.arguments(function)

        @wraps(checked)
        def merge(ws: Sequence[Weights], **options: Any) -> dict[str, Tensor]:
            ws = checks.value("ws", ws, Sequence[Mapping])
            if not ws or number not in (None, len(ws)):
                raise ValueError(f"ws: {len(ws)} weights were given; give {number or 'at least one'}")
            given = {f"ws[{i}]": w for i, w in enumerate(ws)}
            given |= {"base": options["base"]} if options.get("base") is not None else {}
            given = {label: _floating(label, w) for label, w in given.items()}
            check_same(*given.values(), names=list(given))
            constants: Weights = {}
            while True:
                try:
                    return _merged(checked, given, options, constants, statistics)
                except Exception:
                    if constants or not (constants := _constants([*given.values()])):
                        raise

        merge.on_parameters = True  # type: ignore[attr-defined]
        return merge

    return decorate


def _merged(
    function: Callable, given: Mapping[str, Weights], options: Mapping, constants: Weights, statistics: bool
) -> dict[str, Tensor]:
    """Lets the function merge what is neither constant nor to be averaged, and adds the rest."""
    number = len(given.keys() - {"base"})
    whole = list(given.values())[:number]
    like = given.get("base", whole[0])
    averaged = [name for name in whole[0] if is_statistic(name) and name not in constants and not statistics]
    place = {name: torch.empty_like(like[name]) for name in averaged}
    rest = combine([{n: w[n] for n in averaged} for w in whole], [1 / number] * number, out=place)
    rest |= constants
    parts = {label: {name: t for name, t in w.items() if name not in rest} for label, w in given.items()}
    ws = [parts.pop(f"ws[{i}]") for i in range(number)]
    asked = {"score": lambda w: options["score"]({**w, **rest})} if "score" in options else {}
    held = [t for w in given.values() for t in w.values() if not t.is_inference()]
    versions = [t._version for t in held]
    merged = function(ws, **{**options, **parts, **asked})
    label = getattr(checks.innermost(function), "__qualname__", "the merge")
    if versions != [t._version for t in held]:
        raise ValueError(f"{label}: it changed its inputs, which other tasks are merged from; give new tensors")
    tensors = merged.values() if isinstance(merged, Mapping) else [merged]
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors) or not isinstance(merged, Mapping):
        raise ValueError(f"{label}: it gave {merged!r:.80}; a merge gives a mapping of names to floating tensors")
    check_same(ws[0], merged, names=("ws[0]", f"what {label} gave"))
    result = {name: (merged if name in merged else rest)[name].detach() for name in whole[0]}
    result = {name: tensor.to(like[name].dtype) for name, tensor in result.items()}
    moved = {name: tensor for name, tensor in result.items() if name not in constants}
    if not finite(moved):
        check_inputs(whole, given.get("base"))
        for name, tensor in moved.items():
            if tensor.isnan().any():
                raise ValueError(f"{label}: {name!r} of what it gave is not a number; mend the merge, or its options")
        check_range(moved, whole)
    return result


def _floating(label: str, w: Weights) -> Weights:
    """The floating tensors of weights, without the history of a gradient."""
    if not isinstance(w, Mapping):
        raise ValueError(f"{label}: {type(w).__name__} is no mapping of names to tensors; give get_weights(model)")
    return {name: tensor.detach() for name, tensor in w.items() if floating(f"{label}: {name!r}", tensor)}


def _constants(inputs: Sequence[Weights]) -> dict[str, Tensor]:
    """Copies of tensors that are not finite and equal in all inputs; a single input may hold no NaN in them."""

    def constant(first: Tensor, *others: Tensor) -> bool:
        same = all(torch.isclose(first, t.to(first), rtol=0, atol=0, equal_nan=True).all() for t in others)
        return same and not first.isfinite().all() and (bool(others) or not first.isnan().any())

    return {name: tensor.clone() for name, tensor in inputs[0].items() if constant(*(w[name] for w in inputs))}


@dataclass(frozen=True)
class Piece:
    """The entries start to stop of the flattened tensor `name`."""

    name: str
    start: int
    stop: int

    def of(self, flat: Weights) -> Tensor:
        """This piece (entries) of flattened weights."""
        return flat[self.name][self.start : self.stop]


EntryRule = Callable[[Piece, Tensor], Tensor]


class TaskVectors:
    """The task vectors w - base of n weights, read piece by piece as tensors (n, entries).

    Iterating gives (piece, vectors); the vectors' memory is the caller's. `rows` makes pieces of whole rows: of 2 and
    more axes, those along the first; a tensor of 0 or 1 axis is one row.

    Raises ValueError at once for names or shapes that differ, and for a NaN or an infinity in an input.
    """

    def __init__(self, ws: Sequence[Weights], base: Weights, *, rows: bool = False) -> None:
        check_same(base, *ws, names=["base", *(f"ws[{i}]" for i in range(len(ws)))])
        self.ws, self.base, self.rows = ws, base, rows
        self.names = tuple(ws[0])
        self.flat = [{name: w[name].reshape(-1) for name in self.names} for w in ws]
        self.flat_base = {name: base[name].reshape(-1) for name in self.names}
        self.dtype = torch.float32
        for w in (base, *ws):
            for tensor in w.values():
                self.dtype = torch.promote_types(self.dtype, tensor.dtype)
        check_inputs(ws, base)

    def __len__(self) -> int:
        return len(self.ws)

    def groups(self, whole: bool) -> list[tuple[str, ...]]:
        """The names of tensors that are measured together: all if `whole`, else each alone."""
        return [self.names] if whole else [(name,) for name in self.names]

    def size(self, names: Sequence[str]) -> int:
        """How many entries some tensors have together."""
        return sum(self.base[name].numel() for name in names)

    def pieces(self, names: Sequence[str]) -> Iterator[Piece]:
        """Where the pieces of some tensors lie."""
        for name in names:
            tensor = self.base[name]
            step, size = ENTRIES if tensor.device.type == "cpu" else ENTRIES_ELSEWHERE, tensor.numel()
            if self.rows:
                row = size if tensor.ndim < 2 else tensor[0].numel() if len(tensor) else 0
                step = max(step // row, 1) * row if row else 1
            for start in range(0, size, step):
                yield Piece(name, start, min(start + step, size))

    def read(self, piece: Piece, i: int | None = None) -> Tensor:
        """The task vectors there (n, entries), or that of task i (entries)."""
        base = piece.of(self.flat_base).to(self.dtype)
        if i is not None:
            return piece.of(self.flat[i]).to(self.dtype) - base
        vectors = torch.empty(len(self.ws), len(base), dtype=self.dtype, device=base.device)
        for row, flat in zip(vectors, self.flat, strict=True):
            torch.sub(piece.of(flat), base, out=row)
        return vectors

    def __iter__(self) -> Iterator[tuple[Piece, Tensor]]:
        for piece in self.pieces(self.names):
            yield piece, self.read(piece)

    def merge(self, rule: EntryRule, scale: float = 1.0) -> dict[str, Tensor]:
        """The weights base + scale rule(piece, vectors), where `rule` takes (n, entries) and gives (entries)."""
        merged = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in self.base.items()}
        flat = {name: tensor.view(-1) for name, tensor in merged.items()}
        for piece, vectors in self:
            base = piece.of(self.flat_base).to(self.dtype)
            piece.of(flat).copy_(base.add(rule(piece, vectors), alpha=scale))
        return {name: merged[name] for name in self.names}


def check_inputs(ws: Sequence[Weights], base: Weights | None = None) -> None:
    """Raises ValueError that names the input and the tensor with a NaN or an infinity in it."""
    for i, w in enumerate(ws):
        check_finite(w, f"ws[{i}]")
    if base is not None:
        check_finite(base, "base")


def count(density: float, size: int) -> int:
    """How many of `size` entries a density keeps: density x size, rounded up, so that no tensor is emptied."""
    return min(size, math.ceil(round(density * size, 6)))


def largest(
    vectors: TaskVectors, keep: Callable[[int], int], whole: bool, of: Callable[[Piece, int], Tensor] | None = None
) -> EntryRule:
    """Finds which values are among each task's largest: a function of a piece and its values (n, entries), same shape.

    Values are the magnitudes of entries, or what `of` gives for a piece and a task's number (entries). Of `size` values
    `keep(size)` are kept, exactly; of those that tie with the smallest one kept, the first in order. They compete with
    the values of all tensors if `whole`, else with those of their own tensor. The function must be given all values
    once, in order. All values of one task are held at once.

    Raises ValueError where `of` gives a NaN.
    """
    found: dict[str, _Threshold] = {}
    of = of or (lambda piece, i: vectors.read(piece, i).abs())
    for names in vectors.groups(whole):
        found |= dict.fromkeys(names, _threshold(vectors, names, keep(vectors.size(names)), of))
    return lambda piece, values: found[piece.name](values)


class _Threshold:
    """Says which values of each task are kept: those above `value`, and of those equal to it the first `quota`."""

    def __init__(self, value: Tensor, quota: Tensor, tied: Tensor) -> None:
        self.value, self.quota, self.seen = value.unsqueeze(1), quota.unsqueeze(1), torch.zeros_like(quota).unsqueeze(1)
        self.ties = not torch.equal(quota, tied)

    def __call__(self, values: Tensor) -> Tensor:
        threshold = self.value.to(values.device)
        if not self.ties:
            return values >= threshold
        kept, equal = values > threshold, values == threshold
        if equal.any():
            order = equal.cumsum(1) + self.seen.to(values.device)
            self.seen = order[:, -1:]
            kept |= equal & (order <= self.quota.to(values.device))
        return kept


def _threshold(
    vectors: TaskVectors, names: tuple[str, ...], keep: int, of: Callable[[Piece, int], Tensor]
) -> _Threshold:
    """Finds each task's smallest value kept, by selection in a copy of its values."""
    n, size = len(vectors), vectors.size(names)
    if not 0 < keep < size:
        none = torch.zeros(n, dtype=torch.long)
        return _Threshold(torch.full((n,), -math.inf if keep else math.inf, dtype=vectors.dtype), none, none)
    store = torch.empty(size, dtype=vectors.dtype, device=vectors.base[names[0]].device)
    value, above, tied = [], [], []
    for i in range(n):
        at = 0
        for piece in vectors.pieces(names):
            store[at : (at := at + piece.stop - piece.start)] = of(piece, i)
        if store.sum().isnan():
            raise ValueError(f"ws: what {names[:3]} are ranked by is not a number; give shorter task vectors")
        value.append(smallest(store, size - keep).clone())
        above.append((store > value[i]).count_nonzero())
        tied.append((store == value[i]).count_nonzero())
    return _Threshold(torch.stack(value), keep - torch.stack(above), torch.stack(tied))


def smallest(values: Tensor, k: int) -> Tensor:
    """Selects the value with `k` values before it when they are sorted (size), which come out in another order."""
    if values.device.type != "cpu":
        return values.kthvalue(k + 1).values
    values.numpy().partition(k)  # in place and many at a time, where torch would copy them with an index each
    return values[k]


def ascending(values: Tensor) -> Tensor:
    """The order of values of at least 0 along the last axis (..., row), smallest first; equal ones stay in order."""
    if values.device.type != "cpu" or values.dtype == torch.float64:
        return values.argsort(dim=-1, stable=True)
    keys = values.view(torch.int32).long() << 32 | torch.arange(values.shape[-1])
    keys.numpy().sort(axis=-1)  # integers many at a time: the bits of a value, ordered as it is, above its place
    return keys & 0xFFFFFFFF


class Draws:
    """Uniform numbers in [0, 1) for the entries of each task, in order, on the CPU: all devices draw the same.

    Each task has a stream of its own, so its mask does not depend on how many others there are.
    """

    def __init__(self, seed: int, tasks: int) -> None:
        seeds = torch.randint(2**62, (tasks,), generator=torch.Generator().manual_seed(seed))
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def drop(self, vectors: Tensor, kept: Tensor | float) -> Tensor:
        """Keeps each of the next entries (n, entries) with probability `kept`, divided by it, and zeros the others.

        In place. `kept` is one number, or one for each entry, same shape.
        """
        drawn = torch.stack([torch.rand(vectors.shape[1], generator=g) for g in self.generators])
        below = drawn < (kept.cpu() if isinstance(kept, Tensor) else kept)
        return vectors.mul_(below.to(vectors.device)).div_(kept)
