"""How a run computes: where, with how many threads, in which memory format and precision, and a light step."""

import functools
import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from clkit import checks
from clkit.data import Stream
from clkit.modules import TURN
from clkit.training.capture import CAPTURES


def find_device(device: torch.device | str, here: bool = True) -> torch.device:
    """The device meant: "auto" is the first GPU if there is one, else the CPU.

    Raises ValueError if it is unknown, or not there although it is to be used `here`.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with checks.explained(f"device: {device!r} is unknown to torch", 'use "cpu", "cuda" or "auto"', of=RuntimeError):
        place = torch.device(device)
    if here and place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device: {str(device)!r} was asked for and torch sees no GPU; use "cpu" or "auto"')
    return place


FLAGS = {  # of torch, on which numbers depend: how each is asked for and set, and what it is by default
    "dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    "matmul": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    "deterministic": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
    "grad": (torch.is_grad_enabled, torch.set_grad_enabled, True),
    "device": (torch.get_default_device, torch.set_default_device, torch.device("cpu")),
}


def flags() -> dict[str, Any]:
    """Those of torch's flags that are not at their default."""
    return {name: ask() for name, (ask, _, default) in FLAGS.items() if ask() != default}


@contextmanager
def with_flags(chosen: Mapping[str, Any]) -> Iterator[None]:
    """Sets torch's flags to those chosen and the default, and gives them back as they were, whatever was set within."""
    before = flags()
    _set(chosen)
    try:
        yield
    finally:
        _set(before)


def _set(chosen: Mapping[str, Any]) -> None:
    for name, (ask, put, default) in FLAGS.items():
        if ask() != (value := chosen.get(name, default)):
            put(value)


@contextmanager
def alone(threads: int, seed: int) -> Iterator[None]:
    """Lets no other run compute in this process, seeds numpy's and Python's generators, and sets torch's threads.

    All that, and torch's flags, are given back as they were.
    """
    with TURN, with_flags(flags()):
        before = torch.get_num_threads(), np.random.get_state(), random.getstate()  # noqa: NPY002
        torch.set_num_threads(threads)
        np.random.seed(seed % 2**32)  # noqa: NPY002  # a factory or a learner of one's own may draw from it
        random.seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            random.setstate(before[2])


@contextmanager
def reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators, which dropout draws from, and gives them back as they were."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        if cuda:
            torch.manual_seed(seed)
        else:  # torch.manual_seed would queue a call, with its stack in words, for a GPU that may come: a third of EMA
            torch.default_generator.manual_seed(seed)
        yield


def layout(model: nn.Module, stream: Stream, channels_last: bool | None) -> torch.memory_format | None:
    """The memory format to try for a step's inputs; None for theirs as it is.

    It is channels-last for images where that is asked for, and unless it is refused where a network convolves: windows
    that overlap, as those of a transformer's patches do not.
    """
    convolves = any(isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in model.modules())
    asked = convolves if channels_last is None else channels_last
    return torch.channels_last if asked and len(stream.shape) == 3 else None


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Lays a model's weights of convolutions out in place, on a GPU; those that share memory stay, and share it.

    A CPU's libraries lay weights out for themselves, and `view` takes them as they were made.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.layout == torch.strided]
    owners = Counter(t.untyped_storage().data_ptr() for t in tensors)
    for parameter in model.parameters():
        if parameter.ndim == 4 and owners[parameter.untyped_storage().data_ptr()] == 1:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """What makes the context of a step: bfloat16 where it is asked for, by "auto" on a GPU that has it."""
    bfloat16 = precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    again = device.type in CAPTURES  # a replay casts weights anew
    halved = functools.partial(torch.autocast, device.type, torch.bfloat16, cache_enabled=not again)
    return halved if bfloat16 else nullcontext


def descend(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer's step, without torch's wrapper for profilers and hooks: a third of it on a small network.

    Gradients are first laid out as their parameters are, which torch's fused steps on a CPU do not check.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and (gradient.is_sparse or gradient.stride() != parameter.stride()):
                parameter.grad = torch.empty_like(parameter).copy_(gradient.to_dense())
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)
