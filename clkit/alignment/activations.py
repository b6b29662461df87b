"""How alike the units of two networks are at work: correlations of activations, from one pass of both networks."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clkit.symmetry.points import Ids
from clkit.symmetry.program import Program, trace
from clkit.symmetry.structure import Symmetry, Tap
from clkit.weights import Weights

STATISTICS = ("pearson", "clewi2024")


@dataclass(frozen=True, eq=False)
class Similarities:
    """By group: `matrix[i, j]`, how alike unit i of the reference and unit j of the moving network are.

    `constant` holds, for both networks, which units never vary; their entries are 0.
    """

    matrix: dict[str, NDArray[np.float64]]
    constant: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]


@torch.no_grad()
def similarities(
    symmetry: Symmetry,
    model: nn.Module,
    reference: Weights,
    moving: Weights,
    inputs: Tensor,
    *,
    statistic: str = "pearson",
    batch: int = 32,
) -> Similarities:
    """Compares the units of two networks on `inputs` by Pearson's correlation over all examples and positions.

    Entries are in [-1, 1]; those of a residual stream are means over the places where it is read. Deviations from the
    first batch's means are multiplied in the precision of the activations (float32 at least), batch by batch, and
    added up in double precision.

    `statistic="clewi2024"` is what CLeWI's released code computes: it divides by the number of images where that of
    positions belongs. With c the covariance of two units over HW positions an image, m their means and s their
    deviations, it is (c - (HW - 1) m1 m2) / (d1 d2) with d^2 = s^2 + (HW - 1)^2 m^2: correlation only where HW = 1.
    """
    if len(symmetry.program.inputs) != 1:
        raise ValueError(f"model: it takes {len(symmetry.program.inputs)} tensors; only models of one can be watched")
    device = next(model.parameters(), inputs).device
    nets = [{name: t.to(device) for name, t in w.items()} for w in (reference, moving)]
    moments = [_Moments(tap, group, slots) for tap in symmetry.taps for group, slots in tap.slots.items()]
    watch: dict[str, list[_Moments]] = {}
    for m in moments:
        watch.setdefault(m.tap.node, []).append(m)

    def look(node: str, values: list[Tensor]) -> None:
        for m in watch.get(node, ()):
            m.add(values)

    programs: dict[int, Program] = {}
    for x in inputs.split(batch):
        if len(x) not in programs:
            programs[len(x)] = _program(symmetry, model, x.to(device))
        programs[len(x)].run(nets, x.to(device), look)
    matrix: dict[str, NDArray[np.float64]] = {}
    constant: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
    times: dict[str, int] = {}
    for m in moments:
        found, (a, b) = m.compare(len(inputs) if statistic == "clewi2024" else None)
        c, d = constant.get(m.group, (True, True))
        matrix[m.group], constant[m.group] = matrix.get(m.group, 0.0) + found, (a & c, b & d)
        times[m.group] = times.get(m.group, 0) + 1
    return Similarities({g: total / times[g] for g, total in matrix.items()}, constant)


def _program(symmetry: Symmetry, model: nn.Module, x: Tensor) -> Program:
    """The symmetry's own program, or, if that is bound to another batch size or device, one for this."""
    own = symmetry.program
    return own if own.batch in (None, len(x)) and own.device == x.device else trace(model, x)


class _Moments:
    """Sums over positions of the values of one group's units in two networks, of their squares and products."""

    def __init__(self, tap: Tap, group: str, slots: Ids) -> None:
        self.tap, self.group, self.slots, self.count = tap, group, slots, 0
        self.shift: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.products = torch.zeros(())

    def add(self, values: list[Tensor]) -> None:
        """Takes one batch's values of both networks."""
        now = []
        for k, value in enumerate(values):
            view = self.tap.read(value)
            places, rest = len(self.tap.places), tuple(range(len(self.tap.places), view.ndim))
            if len(self.shift) == k:
                self.shift.append(view.to(torch.promote_types(view.dtype, torch.float32)).mean(rest, keepdim=True))
            rows = torch.empty(view.shape, dtype=self.shift[k].dtype, device=view.device)
            rows = torch.sub(view, self.shift[k], out=rows).flatten(places).flatten(0, -2)
            now.append(self._pick(rows))
        if not self.count:
            self.sums = [v.new_zeros(v.shape[:2], dtype=torch.float64) for v in now]
            self.squares = [s.clone() for s in self.sums]
            self.products = torch.zeros(len(now[0]), now[0].shape[1], now[1].shape[1], dtype=torch.float64)
            self.products = self.products.to(now[0].device)
        self.count += now[0].shape[2]
        for k, rows in enumerate(now):
            self.sums[k] += rows.sum(2)
            self.squares[k] += torch.linalg.vector_norm(rows, dim=2).square()
        self.products += now[0] @ now[1].mT

    def _pick(self, rows: Tensor) -> Tensor:
        """The rows of the group's units, as (lanes, units, positions in the data)."""
        if self.slots.size != len(rows) or (np.diff(self.slots.ravel()) != 1).any():
            rows = rows[torch.from_numpy(self.slots.ravel()).to(rows.device)]
        return rows.unflatten(0, self.slots.shape)

    def compare(self, images: int | None) -> tuple[NDArray[np.float64], list[NDArray[np.bool_]]]:
        """The similarities of all pairs, a mean over lanes, and which units are constant, of either network.

        `images`: their number for the statistic of CLeWI's code, None for Pearson's.
        """
        offsets = [s / self.count for s in self.sums]
        means = [
            self._pick(shift.double().flatten()[:, None])[..., 0] + offset
            for shift, offset in zip(self.shift, offsets, strict=True)
        ]
        spreads = [s / self.count - o.square() for s, o in zip(self.squares, offsets, strict=True)]
        spreads = [torch.where(v > 1e-12 * m.square(), v, 0.0).sqrt() for v, m in zip(spreads, means, strict=True)]
        shared = self.products / self.count - offsets[0][:, :, None] * offsets[1][:, None, :]
        constant = [(s == 0).all(0).cpu().numpy() for s in spreads]
        least = 0.0
        if images:
            n, wide = self.count, self.count / images
            shared = wide * (shared - (wide - 1) * means[0][:, :, None] * means[1][:, None, :])
            spreads = [
                (n / max(n - 1, 1) * wide * (s.square() + (wide - 1) ** 2 * m.square())).sqrt()
                for s, m in zip(spreads, means, strict=True)
            ]
            least = 1e-4
        scale = spreads[0][:, :, None] * spreads[1][:, None, :] + least
        matrix = torch.where(scale > 0, shared / scale, 0.0).clamp(-1, 1)
        return matrix.mean(0).cpu().numpy(), constant
