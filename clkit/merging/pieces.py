"""Task vectors in pieces that stay in the cache: how every merge reads its inputs and writes its one output.

A merge reads each input once or a few times and allocates one network, its result, and a few pieces. Arithmetic is in
float32, or in float64 where an input is: halves are never added up in half precision. Entries of a tensor are taken in
row-major order, tensors in the order of the first weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clkit.weights import Weights, check_finite, check_same

ENTRIES = 2**14  # of a piece on the CPU: five of them and a few temporaries fit into a megabyte
ENTRIES_ELSEWHERE = 2**22  # on an accelerator, where a kernel's start costs more than its traffic


@dataclass(frozen=True)
class Piece:
    """The entries start to stop of the flattened tensor `name`; `ends` with the tensor."""

    name: str
    start: int
    stop: int

    def of(self, flat: Weights) -> Tensor:
        """This piece of flattened weights."""
        return flat[self.name][self.start : self.stop]


class TaskVectors:
    """The task vectors w - base of several weights, read piece by piece as tensors (n, entries).

    Iterating gives (piece, vectors); the vectors' memory is the caller's. Names and shapes are checked at once. A NaN
    or an infinity in an input raises ValueError when its tensor has been read for the first time. `rows` makes pieces
    of whole rows: of 2 and more axes, those along the first; a tensor of 0 or 1 axis is one row.
    """

    def __init__(self, ws: Sequence[Weights], base: Weights, *, rows: bool = False) -> None:
        if not ws:
            raise ValueError("ws: no weights were given; give at least one")
        check_same(base, *ws, names=["base", *(f"ws[{i}]" for i in range(len(ws)))])
        self.ws, self.base, self.rows = ws, base, rows
        self.names = tuple(ws[0])
        self.flat = [{name: w[name].reshape(-1) for name in self.names} for w in ws]
        self.flat_base = {name: base[name].reshape(-1) for name in self.names}
        self.size = sum(t.numel() for t in base.values())
        self.dtype = torch.float32
        for w in (base, *ws):
            for tensor in w.values():
                self.dtype = torch.promote_types(self.dtype, tensor.dtype)
        self.sound: set[str] = set()

    def __len__(self) -> int:
        return len(self.ws)

    def pieces(self, names: Sequence[str] | None = None) -> Iterator[Piece]:
        """Where the pieces of some tensors lie, by default of all."""
        for name in self.names if names is None else names:
            tensor = self.base[name]
            step, size = ENTRIES if tensor.device.type == "cpu" else ENTRIES_ELSEWHERE, tensor.numel()
            if self.rows:
                row = size if tensor.ndim < 2 else tensor[0].numel() if len(tensor) else 0
                step = max(step // row, 1) * row if row else 1
            for start in range(0, size, step):
                yield Piece(name, start, min(start + step, size))

    def read(self, piece: Piece, stride: int = 1) -> Tensor:
        """The task vectors there (n, entries), or every `stride`-th entry of them."""
        base = piece.of(self.flat_base)[::stride]
        vectors = torch.empty(len(self.ws), len(base), dtype=self.dtype, device=base.device)
        if base.dtype == self.dtype and all(flat[piece.name].dtype == self.dtype for flat in self.flat):
            for row, flat in zip(vectors, self.flat, strict=True):
                torch.sub(piece.of(flat)[::stride], base, out=row)
        else:
            base = base.to(self.dtype)
            for row, flat in zip(vectors, self.flat, strict=True):
                row.copy_(piece.of(flat)[::stride]).sub_(base)
        return vectors

    def __iter__(self) -> Iterator[tuple[Piece, Tensor]]:
        return self.of(self.names)

    def of(self, names: Sequence[str]) -> Iterator[tuple[Piece, Tensor]]:
        """Reads some tensors."""
        fresh, signs = not self.sound.issuperset(names), {}
        for piece in self.pieces(names):
            vectors = self.read(piece)
            if fresh:
                sign = vectors.sum() * 0  # 0, or NaN if there is a NaN or an infinity
                signs[sign.device] = signs.get(sign.device, 0) + sign
            yield piece, vectors
        if fresh:
            self.sound.update(names)
            if not all(bool(sign == 0) for sign in signs.values()):
                check_inputs(self.ws, self.base)

    def merge(self, rule: Callable[[Piece, Tensor], Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        """The weights base + scale rule(piece, vectors), where `rule` gives a vector (entries)."""
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
