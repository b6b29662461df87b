"""Similarity: how alike the units of networks are, by what they show on inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from clkit import checks
from clkit.alignment.assignment import Matrices, Matrix
from clkit.checks import Count
from clkit.symmetry import Symmetry
from clkit.symmetry.structure import Tap
from clkit.weights import Weights

Statistic = Literal["pearson", "clewi2024"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)


@dataclass(frozen=True, eq=False)
class Similarities:
    """By group: `matrix[i, j]`, how alike unit i of the reference and unit j of the moving network are.

    Entries of a unit that never varies are 0 for Pearson's statistic.
    """

    matrix: dict[str, Matrix]


@checks.arguments
def similarities(
    symmetry: Symmetry,
    model: nn.Module,
    reference: Weights,
    moving: Weights,
    inputs: Tensor,
    *,
    statistic: Statistic = "pearson",
    batch: Count = 32,
) -> Similarities:
    """Compares the units of two networks on `inputs` (N, ...) by Pearson's correlation over examples and positions.

    Entries are in [-1, 1]; those of a residual stream are means over the places where it is read. Positions are
    compared as they stand. Where another axis of an activation moves too (tokens beside channels), this means
    something only if both networks have it in one order: permute one of them as `align` finds.

    Deviations from the first batch's means are multiplied batch by batch, in the precision of the activations (float32
    at least). The products are added up in double precision. Raises ValueError for a model of several inputs.

    `statistic="clewi2024"` is what CLeWI's released code computes: it divides by the number of images where that of
    positions belongs. Let c be the covariance of two units over n positions, HW in each image, m their means, s their
    deviations. It is HW (c - (HW - 1) m1 m2) / (d1 d2 + 1e-4) with d^2 = HW (s^2 + (HW - 1)^2 m^2) n / (n - 1). Only
    where HW = 1 is it a correlation, but for n / (n - 1) and 1e-4.
    """
    moments = [Moments(tap, group) for tap in symmetry.taps for group in tap.slots]
    watch = partial(symmetry.watch, model, inputs=inputs, batch=batch)
    images = len(inputs) if statistic == "clewi2024" else None
    return Similarities(mean(measure(watch, images, [reference, moving], moments)[0, 1]))


Spare = dict[int, Tensor]  # memory for the rows of each network, used again: fresh pages cost more than the numbers
Shown = list[tuple[str, Matrix]]  # groups, each as often as it is seen, and how alike units are there


@torch.no_grad()
def measure(
    watch: Callable[..., None], images: int | None, nets: Sequence[Weights], moments: "Sequence[Moments]"
) -> dict[tuple[int, int], Shown]:
    """What one pass of networks (`watch`) shows of each pair of them; `images`: see `Moments.compare`."""

    spare: Spare = {}

    def look(tap: Tap, values: list[Tensor]) -> None:
        for m in moments:
            if m.tap is tap:
                m.add(values, spare)

    watch(nets=nets, look=look)
    return {(j, k): [(m.group, m.compare(j, k, images)) for m in moments] for j, k in combinations(range(len(nets)), 2)}


def mean(shown: Shown) -> Matrices:
    """For each group, the mean over the places where it is seen."""
    rows = {group: [m for g, m in shown if g == group] for group, _ in shown}
    return {group: np.mean(matrices, axis=0) for group, matrices in rows.items()}


class Moments:
    """Sums over positions of what one group's units show in networks, of its squares, and of products in pairs.

    Summed are deviations from `shift`, the first batch's means, for large means would cancel. `ordered` sorts the
    values of a unit along the other axes that move, so that their order does not count.
    """

    def __init__(self, tap: Tap, group: str, ordered: bool = False) -> None:
        self.tap, self.group, self.slots, self.ordered, self.count = tap, group, tap.slots[group], ordered, 0
        self.shift: list[Tensor] = []
        self.sums: dict[tuple[int, ...], Tensor] = {}

    def add(self, values: list[Tensor], spare: Spare) -> None:
        """Takes one batch's values of all networks."""
        now = []
        for k, value in enumerate(values):
            view = self.tap.read(value)
            dims = len(self.tap.dims)
            if self.ordered:
                view = view.flatten(dims, dims + len(self.tap.others) - 1).sort(dims).values
            rest = tuple(range(dims, view.ndim))
            if len(self.shift) == k:
                self.shift.append(view.to(torch.promote_types(view.dtype, torch.float32)).mean(rest, keepdim=True))
            if k not in spare or spare[k].numel() < view.numel() or spare[k].dtype != self.shift[k].dtype:
                spare[k] = torch.empty(view.numel(), dtype=self.shift[k].dtype, device=view.device)
            rows = spare[k][: view.numel()].view(view.shape)
            rows = torch.sub(view, self.shift[k], out=rows).flatten(dims).flatten(0, -2)
            now.append(self._pick(rows))
        self.count += now[0].shape[2]
        for k, rows in enumerate(now):
            self._sum((k,), rows.sum(2))
            self._sum((k, k), torch.linalg.vector_norm(rows, dim=2).square())
        for j, k in combinations(range(len(now)), 2):
            self._sum((j, k), now[j] @ now[k].mT)

    def _sum(self, name: tuple[int, ...], values: Tensor) -> None:
        self.sums[name] = self.sums[name].add_(values) if name in self.sums else values.double()

    def _pick(self, rows: Tensor) -> Tensor:
        """The rows of the group's units, as (lanes, units, positions in the data)."""
        if self.slots.size != len(rows) or (np.diff(self.slots.ravel()) != 1).any():
            rows = rows[torch.from_numpy(self.slots.ravel()).to(rows.device)]
        return rows.unflatten(0, self.slots.shape)

    def compare(self, j: int, k: int, images: int | None) -> Matrix:
        """How alike the units of two networks are, a mean over lanes.

        `images`: their number for the statistic of CLeWI's code, None for Pearson's, which is 0 for what is constant.
        """
        (a, mean_a, spread_a), (b, mean_b, spread_b) = self._statistics(j), self._statistics(k)
        shared, least = self.sums[j, k] / self.count - a[:, :, None] * b[:, None, :], 0.0
        if images:
            n, wide, least = self.count, self.count / images, 1e-4
            shared = wide * (shared - (wide - 1) * mean_a[:, :, None] * mean_b[:, None, :])
            spread_a, spread_b = (
                (n / max(n - 1, 1) * wide * (s.square() + (wide - 1) ** 2 * m.square())).sqrt()
                for s, m in ((spread_a, mean_a), (spread_b, mean_b))
            )
        scale = spread_a[:, :, None] * spread_b[:, None, :] + least
        return torch.where(scale > 0, shared / scale, 0.0).clamp(-1, 1).mean(0).cpu().numpy()

    def _statistics(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the units of a network: how far their means are from `shift`, the means, and the deviations."""
        offset = self.sums[k,] / self.count
        mean = self._pick(self.shift[k].double().flatten()[:, None])[..., 0] + offset
        variance = self.sums[k, k] / self.count - offset.square()
        return offset, mean, torch.where(variance > 1e-12 * mean.square(), variance, 0.0).sqrt()
