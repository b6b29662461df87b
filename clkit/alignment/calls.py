"""One operation at work, as the rules see it."""

from dataclasses import dataclass
from typing import Any

import torch

from clkit.alignment.labels import Label
from clkit.alignment.points import Ids, Points


@dataclass(frozen=True, eq=False)
class Call:
    """One operation at work: where points are tied, its name for reports, its result's shape, its arguments."""

    points: Points
    why: str
    shape: Any
    arguments: dict[str, Any]
    constants: dict[Label, Ids]
    fibre: Ids | None = None  # for the weight of a grouped convolution: points (groups, inputs of a group)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def labels(self, *names: str) -> list[Label]:
        """The labels among the named arguments."""
        return [a for name in names if isinstance(a := self.arguments.get(name), Label)]

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """A dimension argument, counted from the front."""
        return self[name] % len(self[of].dims)


def is_shape(value: Any) -> bool:
    """Is it the shape of one tensor (and not a list of shapes)?"""
    return isinstance(value, torch.Size)
