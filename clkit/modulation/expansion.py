"""Interpolation along one axis as a matrix."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Interpolation = Literal["bicubic", "bilinear", "nearest"]


def interpolation(small: int, large: int, kind: Interpolation = "bicubic", *, shuffle: int | None = None) -> Tensor:
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
