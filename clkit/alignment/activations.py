"""How alike the units of two networks are at work: correlations of activations, from one pass of both networks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clkit.alignment.points import Ids
from clkit.alignment.program import Program, trace
from clkit.alignment.symmetry import Symmetry
from clkit.alignment.taps import Tap
from clkit.weights import Weights

STATISTICS = ("pearson", "clewi2024")


@torch.no_grad()
def similarities(
    symmetry: Symmetry,
    model: nn.Module,
    reference: Weights,
    moving: Weights,
    inputs: Tensor,
    *,
    statistic: str = "pearson",
    batch: int = 128,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, tuple[Ids, Ids]]]:
    """How alike the units of two networks are: by group, entry (i, j) for unit i of the reference, j of the moving.

    Pearson correlations over all examples and positions, in [-1, 1], 0 for a unit that is constant in either network
    (their numbers come second); a mean over all places where the group is read. Sums are kept in double precision,
    about the first batch's means.
    """
    device = next(model.parameters(), inputs).device
    nets = [{name: t.to(device) for name, t in w.items()} for w in (reference, moving)]
    watched: dict[str, list[_Moments]] = {}
    for tap in symmetry.taps:
        watched.setdefault(tap.node, []).extend(_Moments(tap, slots, g) for g, slots in tap.slots.items())
    for x in inputs.split(batch):
        program = _program(symmetry, model, x)
        program.run(nets[0], x.to(device), {n: _each(ms, "first") for n, ms in watched.items()})
        program.run(nets[1], x.to(device), {n: _each(ms, "second") for n, ms in watched.items()})
    sums: dict[str, Any] = {}
    constant: dict[str, int] = {}
    for moments in (m for ms in watched.values() for m in ms):
        matrix, still = moments.compare(statistic, len(inputs))
        total, times = sums.get(moments.group, (0, 0))
        sums[moments.group] = total + matrix, times + 1
        constant[moments.group] = min(still, constant.get(moments.group, still))
    return {g: total / times for g, (total, times) in sums.items()}, constant


def _program(symmetry: Symmetry, model: nn.Module, x: Tensor) -> Program:
    """The symmetry's own program, or, if that runs on one batch size only, one for this size."""
    fits = symmetry.program.batch in (None, len(x))
    return symmetry.program if fits else trace(model, x)


def _each(moments: list["_Moments"], which: str) -> Any:
    def watch(value: Tensor) -> None:
        matrix = moments[0].tap.read(value)
        for m in moments:
            getattr(m, which)(matrix if m.tap is moments[0].tap else m.tap.read(value))

    return watch


class _Moments:
    """Sums over positions of the units' values in two networks, their squares and products."""

    def __init__(self, tap: Tap, slots: Ids, group: str) -> None:
        self.tap, self.slots, self.group = tap, slots, group
        self.count = 0
        self.shift: list[Tensor | None] = [None, None]
        self.sums: list[Any] = [0, 0]
        self.squares: list[Any] = [0, 0]
        self.products: Any = 0
        self.waiting: Tensor | None = None

    def first(self, matrix: Tensor) -> None:
        """Takes the reference's values and keeps them until the moving network's come."""
        self.waiting = self._take(matrix, 0)
        self.count += self.waiting.shape[1]

    def second(self, matrix: Tensor) -> None:
        """Takes the moving network's values of the same batch."""
        assert self.waiting is not None
        self.products = self.products + self.waiting.mT @ self._take(matrix, 1)
        self.waiting = None

    def _take(self, matrix: Tensor, side: int) -> Tensor:
        lanes, units = self.slots.shape
        if not np.array_equal(self.slots.ravel(), np.arange(matrix.shape[1])):
            matrix = matrix[:, torch.from_numpy(self.slots.ravel()).to(matrix.device)]
        values = matrix.to(torch.float64).unflatten(1, (lanes, units)).movedim(1, 0)
        shift = self.shift[side]
        if shift is None:
            shift = self.shift[side] = values.mean(1, keepdim=True)
        values = values - shift
        self.sums[side] = self.sums[side] + values.sum(1)
        self.squares[side] = self.squares[side] + values.square().sum(1)
        return values

    def compare(self, statistic: str, images: int) -> tuple[NDArray[np.float64], int]:
        """The similarity of all pairs of units, and the number of units that are constant in either network."""
        n = self.count
        means, spreads = [], []
        offsets = [s / n for s in self.sums]
        for side in (0, 1):
            shift = self.shift[side]
            assert shift is not None
            means.append(shift[:, 0] + offsets[side])
            variance = self.squares[side] / n - offsets[side].square()
            spreads.append(torch.where(variance > 1e-12 * means[side].square(), variance, 0.0).sqrt())
        covariance = self.products / n - offsets[0][:, :, None] * offsets[1][:, None, :]
        still = int(sum((s == 0).any(0).sum() for s in spreads))
        if statistic == "clewi2024":
            covariance, spreads = _by_images(covariance, means, spreads, n, images)
        scale = spreads[0][:, :, None] * spreads[1][:, None, :] + (1e-4 if statistic == "clewi2024" else 0.0)
        matrix = torch.where(scale > 0, covariance / scale, 0.0)
        return matrix.clamp(-1, 1).mean(0).cpu().numpy(), still


def _by_images(
    covariance: Tensor, means: list[Tensor], spreads: list[Tensor], n: int, images: int
) -> tuple[Tensor, list[Tensor]]:
    """Covariance and deviations as CLeWI's released code finds them: sums over positions divided by images."""
    wide = n / images
    outer = means[0][:, :, None] * means[1][:, None, :]
    deviations = [
        (n / (n - 1) * wide * (s.square() + (wide - 1) ** 2 * m.square())).sqrt()
        for s, m in zip(spreads, means, strict=True)
    ]
    return wide * (covariance - (wide - 1) * outer), deviations
