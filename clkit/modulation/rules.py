"""How a task's small tensors make a layer's weight: modulation, a mask, a low-rank addition, or a copy of its own.

Every rule has `start(weight, generator)`, the tensors that training begins with (none: the layer stays as it is);
`effective(weight, tensors)`, the weight that the layer computes with; `pack` and `unpack`, between those tensors and
what is stored of them. Weights are (outputs, inputs, ...): (O, I) of a linear layer, (O, I, kh, kw) of a convolution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from clkit import checks

Interpolation = Literal["bicubic", "bilinear", "nearest"]
Tensors = Mapping[str, Tensor]


def interpolation_matrix(
    small: int, large: int, kind: Interpolation = "bicubic", *, shuffle: int | None = None
) -> Tensor:
    """The matrix (large, small) that takes values along an axis of `small` entries to one of `large`, in float64.

    It is what `torch.nn.functional.interpolate` does along an axis, without aligned corners or antialiasing, and over
    two axes along each. Its rows sum to 1. `shuffle` is a seed of a random order of the large axis, the same for axes
    of equal size.
    """
    options = {} if kind == "nearest" else {"align_corners": False}
    columns = torch.eye(small, dtype=torch.float64)[:, None, :, None]
    matrix = interpolate(columns, size=(large, 1), mode=kind, **options)[:, 0, :, 0].T
    if shuffle is not None:
        matrix = matrix[torch.randperm(large, generator=torch.Generator().manual_seed(shuffle))]
    return matrix.contiguous()


class _Rule:
    """What rules share unless they say otherwise: tensors are stored as they are trained, and nothing is prepared."""

    def matrices(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """What `effective` needs besides the task's tensors, for a weight of this shape, by names to share it by."""
        return {}

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors as they are stored: as they are."""
        return dict(tensors)

    def unpack(self, packed: Tensors, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a weight from what was stored of them: as they are."""
        return dict(packed)


@dataclass(frozen=True)
class Modulation(_Rule):
    """Multiplies a weight, entry by entry, by gains that a small tensor M expands to: W' = W (1 - G(M)).

    Adaptive weight modulation, Sverdlov & Ullman 2023 (arXiv 2311.15276). G interpolates M over its two channel axes to
    those of W, for each kernel position by itself.

    - `m1`, `m2`: in `mode` "factor", what the authors' code means, the factors by which M is smaller than W along
      outputs and inputs: larger is leaner. M is (O // m1, I // m2, kh, kw). An axis that is shorter than its factor
      (I = 1 in a depthwise convolution) stays whole, and the other is divided by m1 m2. A layer whose quotient is 0 is
      left as it is. In `mode` "grid", the wording of the paper's summary, they are the sizes of M's axes, at most
      those of W: larger is richer.
    - `interpolation`: "bicubic" as in the paper (torch's: a = -0.75, borders clamped, `align_corners` off, no
      antialiasing; it overshoots, so that gains may leave the range of 1 - M), "bilinear", or "nearest", an earlier
      variant of the code
    - `init`: "zero" begins at the backbone exactly; "kaiming", the released one, draws M from a normal distribution
      of variance 2 / fan-out, and does not
    - `layout`: "clean", or "reviewed", which does as the released code: it reads M in memory as (kh, kw, I's, O's) and
      writes the result back in the order (kh, kw, O, I). They agree for square 1x1 kernels alone, and "reviewed" has
      entries that no weight depends on.
    - `shuffle`: a seed of random orders of the channels, in which neighbours along an axis are none in the network;
      None for its own order
    - `store`: M's type in a stored task; "int8" rounds to 127 steps each way of its largest entry

    The paper does not say what the residual form leaves open: M is a residual, so that zero is the backbone.
    """

    m1: checks.Count = 4
    m2: checks.Count = 4
    mode: Literal["factor", "grid"] = "factor"
    interpolation: Interpolation = "bicubic"
    init: Literal["zero", "kaiming"] = "zero"
    layout: Literal["clean", "reviewed"] = "clean"
    shuffle: int | None = None
    store: Literal["float32", "float16", "int8"] = "float32"
    __post_init__ = checks.fields

    def shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of M for a weight of this shape; None where the layer is left as it is."""
        outputs, inputs, *kernel = shape
        if self.mode == "grid":
            return (min(self.m1, outputs), min(self.m2, inputs), *kernel)
        if outputs < self.m1:
            small = outputs, inputs // (self.m1 * self.m2)
        elif inputs < self.m2:
            small = outputs // (self.m1 * self.m2), inputs
        else:
            small = outputs // self.m1, inputs // self.m2
        return (*small, *kernel) if all(small) else None

    def matrices(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """The interpolation (large, small) along both channel axes of a weight of this shape, by sizes: "small-large".

        An axis that stays as it is has none.
        """
        sizes = {(a, b) for a, b in self._axes(shape) if a != b or self.shuffle is not None}
        return {f"{a}-{b}": interpolation_matrix(a, b, self.interpolation, shuffle=self.shuffle) for a, b in sizes}

    def expand(self, m: Tensor, shape: Sequence[int], matrices: Tensors | None = None) -> Tensor:
        """G(M), of a weight's shape, from M; linear in M. `matrices` are those of this shape, if they are at hand."""
        outputs, inputs, *kernel = shape
        matrices = self.matrices(shape) if matrices is None else matrices
        (rows_in, _), (columns_in, _) = self._axes(shape)
        rows, columns = (
            None if matrix is None else matrix.to(m)
            for matrix in (matrices.get(f"{rows_in}-{outputs}"), matrices.get(f"{columns_in}-{inputs}"))
        )
        positions = prod(kernel)
        if self.layout == "reviewed":
            grid = m.reshape(positions, rows_in, columns_in)
            grid = grid if rows is None else rows @ grid
            return (grid if columns is None else grid @ columns.T).reshape(shape)
        grid = m if rows is None else rows @ m.reshape(rows_in, -1)
        if columns is not None:
            grid = grid.reshape(outputs, columns_in, positions)
            grid = grid[..., 0] @ columns.T if positions == 1 else columns @ grid
        return grid.reshape(shape)

    def start(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """M, zero or drawn; nothing where the layer is left as it is."""
        small = self.shape(weight.shape)
        if small is None:
            return {}
        m = torch.zeros(small)
        if self.init == "kaiming":
            nn.init.kaiming_normal_(m, mode="fan_out", nonlinearity="relu", generator=generator)
        return {"m": m}

    def effective(self, weight: Tensor, tensors: Tensors, matrices: Tensors | None = None) -> Tensor:
        """W (1 - G(M))."""
        return torch.addcmul(weight, weight, self.expand(tensors["m"], weight.shape, matrices), value=-1)

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """M as it is stored."""
        m = tensors["m"]
        if self.store == "int8":
            step = (m.abs().amax() / 127).clamp(min=torch.finfo(m.dtype).tiny)
            return {"m": (m / step).round().to(torch.int8), "step": step}
        return {"m": m.to(getattr(torch, self.store))}

    def unpack(self, packed: Tensors, weight: Tensor) -> dict[str, Tensor]:
        """M from what was stored of it."""
        m = packed["m"].to(weight.dtype)
        return {"m": m * packed["step"] if self.store == "int8" else m}

    def _axes(self, shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size in M and in the weight of the two axes that are interpolated."""
        small = self.shape(shape)
        if small is None:
            raise ValueError(f"shape: {tuple(shape)} is left as it is by {self!r}; there is nothing to expand")
        a, b = small[:2] if self.layout == "clean" else (small[1], small[0])
        return (a, shape[0]), (b, shape[1])


@dataclass(frozen=True)
class Mask(_Rule):
    """Keeps the entries of a weight whose score is above a threshold and drops the others: W' = W (R > threshold).

    Piggyback, Mallya et al. 2018 (arXiv 1801.06519): real scores R are trained as if the mask were R itself (the
    straight-through estimator), and one bit each is stored. All entries are kept in the beginning.
    """

    init: checks.Positive = 1e-2
    threshold: checks.Positive = 5e-3

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.threshold >= self.init:
            raise ValueError(f"threshold: {self.threshold!r}; give a number between 0 and init = {self.init!r}")

    def start(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The scores, all alike."""
        return {"score": torch.full(weight.shape, self.init)}

    def effective(self, weight: Tensor, tensors: Tensors, matrices: Tensors | None = None) -> Tensor:
        """W (R > threshold), whose gradient by R is that by the mask."""
        score = tensors["score"]
        return weight * ((score > self.threshold).to(weight.dtype) + (score - score.detach()))

    def pack(self, tensors: Tensors) -> dict[str, Tensor]:
        """The mask, eight entries a byte."""
        bits = (tensors["score"] > self.threshold).flatten()
        bits = nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
        return {"mask": (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)}

    def unpack(self, packed: Tensors, weight: Tensor) -> dict[str, Tensor]:
        """Scores with the mask that was stored: `init` where it keeps, 0 where it drops."""
        mask = packed["mask"]
        bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
        return {"score": bits.flatten()[: weight.numel()].view(weight.shape).to(weight.dtype) * self.init}


@dataclass(frozen=True)
class LowRank(_Rule):
    """Adds a product of two thin matrices to a weight: W' = W + U V, with U (O, rank) and V (rank, inputs).

    LoRA, Hu et al. 2021 (arXiv 2106.09685), without its scale; a kernel is one row of I kh kw inputs. U begins at zero,
    V as a linear layer of so many inputs, so that training begins at the backbone.
    """

    rank: checks.Count = 4
    __post_init__ = checks.fields

    def start(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """U, all zeros, and V, drawn; of at most the weight's own rank."""
        outputs, inputs = len(weight), weight[0].numel()
        rank = min(self.rank, outputs, inputs)
        v = torch.empty(rank, inputs)
        nn.init.kaiming_uniform_(v, a=5**0.5, generator=generator)
        return {"u": torch.zeros(outputs, rank), "v": v}

    def effective(self, weight: Tensor, tensors: Tensors, matrices: Tensors | None = None) -> Tensor:
        """W + U V."""
        return weight + (tensors["u"] @ tensors["v"]).view(weight.shape)


@dataclass(frozen=True)
class Own(_Rule):
    """Gives every task all parameters as a copy of its own: a network a task, fine-tuned from the backbone."""

    def start(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The backbone's."""
        return {"own": weight.clone()}

    def effective(self, weight: Tensor, tensors: Tensors, matrices: Tensors | None = None) -> Tensor:
        """The copy."""
        return tensors["own"]


Rule = Modulation | Mask | LowRank | Own
RULES: dict[str, type[Rule]] = {kind.__name__: kind for kind in (Modulation, Mask, LowRank, Own)}
