"""The way of rows from the host to a GPU, beside what the GPU computes."""

from functools import cache
from typing import Any

import torch
from torch import Tensor


def rows_of(tensors: tuple[Tensor, ...], rows: Any, device: torch.device | str | None) -> list[Tensor]:
    """The rows of each tensor, on a device (default: its own). Nothing waits where the tensors are pinned."""
    numbers = isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.ndim == 1
    place = torch.device(device or "cpu")
    if numbers and place.type == "cuda" and tensors[0].is_pinned():
        return _lane(place)(tensors, rows)
    # ten times as fast as to index, and not for numbers that count from the end
    chosen = [tensor.index_select(0, rows) if numbers else tensor[rows] for tensor in tensors]
    return chosen if device is None else [tensor.to(device, non_blocking=True) for tensor in chosen]


class Lane:
    """Moves rows of pinned tensors to a GPU on a stream of its own, two batches at a time.

    Rows are gathered into pinned memory, which torch takes back once it is copied: a gather into other memory would be
    copied twice, and waited for. The host goes on until the batch before the last has come to its turn.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.turns = [torch.cuda.Event(), torch.cuda.Event()]

    def __call__(self, tensors: tuple[Tensor, ...], rows: Tensor) -> list[Tensor]:
        """The rows (n,) of each tensor, ready for the device's current stream."""
        here = torch.cuda.current_stream(self.device)
        self.turns.reverse()
        self.turns[0].synchronize()
        self.turns[0].record(here)
        moved = []
        with torch.cuda.stream(self.stream):
            for tensor in tensors:
                pinned = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
                torch.index_select(tensor, 0, rows, out=pinned)
                moved.append(pinned.to(self.device, non_blocking=True))
        here.wait_stream(self.stream)
        for tensor in moved:
            tensor.record_stream(here)  # so that its memory is not given away while `here` reads it
        return moved


_lane = cache(Lane)
