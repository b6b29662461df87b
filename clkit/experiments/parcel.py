"""Sending streams to other processes without copies: tensors travel as arrays, which joblib maps into their memory."""

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clkit.data import Stream


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.arrays: list[np.ndarray] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.arrays.append(obj.cpu().numpy())
        return len(self.arrays) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: list[np.ndarray]) -> None:
        super().__init__(file)
        self.arrays = arrays

    def persistent_load(self, pid: int) -> Tensor:
        return torch.from_numpy(np.require(np.asarray(self.arrays[pid]), requirements="W"))


class Parcel:
    """A stream, packed for the way to another process of this program; never a file."""

    def __init__(self, stream: Stream) -> None:
        file = io.BytesIO()
        packer = _Packer(file)
        packer.dump(stream)
        self.rest, self.arrays = file.getvalue(), packer.arrays

    def open(self) -> Stream:
        """The stream again, on the CPU; its tensors share the arrays' memory where that may be written to."""
        return _Unpacker(io.BytesIO(self.rest), self.arrays).load()
