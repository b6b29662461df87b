"""Permutations as data: one row of numbers for each group, and what they do to weights."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clkit.alignment.points import Ids
from clkit.weights import Weights

if TYPE_CHECKING:
    from clkit.alignment.structure import Axis, Symmetry

Permutations = Mapping[str, Tensor]
"""For each group, which unit comes to each place: place i takes what was at `permutations[group][i]`."""


def identity(symmetry: "Symmetry") -> dict[str, Tensor]:
    """The permutations that leave everything where it is."""
    return {name: torch.arange(group.units) for name, group in symmetry.groups.items()}


def random_permutations(symmetry: "Symmetry", generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Draws an element of the symmetry uniformly: blocks change places, and their members within them."""
    drawn: dict[str, Tensor] = {}

    def draw(name: str) -> Tensor:
        if name not in drawn:
            group = symmetry.groups[name]
            block = draw(group.within) if group.within else torch.zeros(1, dtype=torch.int64)
            inner = [torch.randperm(group.size, generator=generator) for _ in range(group.blocks)]
            drawn[name] = (block[:, None] * group.size + torch.stack(inner)).flatten()
        return drawn[name]

    return {name: draw(name) for name in symmetry.groups}


def compose(first: Permutations, then: Permutations) -> dict[str, Tensor]:
    """One element for two: permuting by the result is permuting by `first`, then by `then`."""
    if first.keys() != then.keys():
        raise ValueError(
            f"first and then: groups differ ({sorted(first.keys() ^ then.keys())[:3]}); use one symmetry's permutations"
        )
    return {name: first[name][then[name]] for name in first}


def invert(permutations: Permutations) -> dict[str, Tensor]:
    """The element that undoes `permutations`."""
    return {name: torch.argsort(p) for name, p in permutations.items()}


def permute(symmetry: "Symmetry", permutations: Permutations, weights: Weights) -> dict[str, Tensor]:
    """Moves units to the places that `permutations` gives them; values are copied bitwise, the function stays.

    Groups that `permutations` leaves out stay as they are. Raises KeyError for an unknown group, ValueError for
    something that is no permutation of a group, or weights that do not fit the symmetry.
    """
    check_weights(symmetry, weights, "weights")
    element = merge(symmetry, permutations)
    return {name: move(symmetry, element, name, tensor) for name, tensor in weights.items()}


def check_weights(symmetry: "Symmetry", weights: Weights, what: str) -> None:
    """Raises ValueError unless the weights have the names and shapes that the symmetry was derived for."""
    if weights.keys() != symmetry.axes.keys():
        odd = sorted(weights.keys() ^ symmetry.axes.keys())[:3]
        raise ValueError(f"{what}: names differ from the symmetry's at {odd}; take them from the same model")
    for name, axes in symmetry.axes.items():
        shape = tuple(axis.group.shape[-1] for axis in axes)
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"{what}: {name!r} has shape {tuple(weights[name].shape)}, the symmetry was derived for {shape}; "
                "derive it again from a model of this architecture"
            )


@dataclass(frozen=True, eq=False)
class Element:
    """The permutations of all groups as one: group k's units are numbered from `starts[k]`."""

    whole: Ids
    starts: Ids


def merge(symmetry: "Symmetry", permutations: Permutations) -> Element:
    """Puts permutations into one array; raises KeyError or ValueError for what is no element of the symmetry."""
    for name in permutations:
        if name not in symmetry.groups:
            close = difflib.get_close_matches(name, symmetry.groups, 3) or list(symmetry.groups)[:3]
            raise KeyError(f"permutations: the symmetry has no group {name!r}; it has {', '.join(close)}, ...")
    starts = np.cumsum([0, *(g.units for g in symmetry.groups.values())])
    whole = np.arange(starts[-1])
    for k, (name, group) in enumerate(symmetry.groups.items()):
        p = permutations[name].cpu().numpy() if name in permutations else np.arange(group.units)
        if p.shape != (group.units,) or not np.array_equal(np.sort(p), np.arange(group.units)):
            raise ValueError(
                f"permutations: {name!r} must hold every number below {group.units} once; got {p.tolist()[:8]} ..."
            )
        outer = permutations.get(group.within or "")
        blocks = np.arange(group.blocks) if outer is None else outer.cpu().numpy()
        if not np.array_equal(p // group.size, np.repeat(blocks, group.size)):
            raise ValueError(f"permutations: {name!r} must move in blocks of {group.size}, as {group.within!r} does")
        whole[starts[k] : starts[k + 1]] = starts[k] + p
    return Element(whole, starts)


def move(symmetry: "Symmetry", element: Element, name: str, tensor: Tensor, but: int | None = None) -> Tensor:
    """Moves what lies on the axes of one weight, all of them or all but one."""
    out = tensor
    for dim, axis in enumerate(symmetry.axes[name]):
        source = None if dim == but else _sources(axis, element)
        if source is None:
            continue
        index = torch.from_numpy(source).to(tensor.device)
        if index.ndim == 1:
            out = out.index_select(dim, index)
        else:  # the inputs of a grouped convolution: each group of rows has an order of its own
            rows = index.repeat_interleave(len(out) // len(index), 0)
            out = out.take_along_dim(rows.reshape(*rows.shape, *(1,) * (out.ndim - 2)), 1)
    return out.clone() if out is tensor else out


def _sources(axis: "Axis", element: Element) -> Ids | None:
    """For every position of an axis, the position whose content comes there; None if all stand still."""
    group, index, lane = axis.group.ravel(), axis.index.ravel(), axis.lane.ravel()
    live = np.flatnonzero(group >= 0)
    unit = element.starts[group[live]] + index[live]
    if np.array_equal(element.whole[unit], unit):
        return None
    have, want = (lane[live] * len(element.whole) + u for u in (unit, element.whole[unit]))
    order = np.argsort(have)
    source = np.arange(len(group))
    source[live] = live[order[np.searchsorted(have[order], want)]]
    return source.reshape(axis.group.shape) % axis.group.shape[-1]
