"""A training step without Python between its kernels: captured once for a shape of the batch, then replayed.

What is captured is the same in every step: forward, loss, backward, clipping and the optimizer's step, over inputs and
labels that are copied to where they were at the capture. The learner's draws, its memory, augmentation and
normalisation stay outside. A shape's first two steps in a task run as they are, on the run's own stream: they are the
warm-up that torch's documentation asks for. The third is captured.

A replay runs no Python. So a step is captured only where that changes nothing, and else runs as it is for the rest of
the run: with `refused`, the reason. The learner is one of clkit's own, with the base's loss and gradients: one of a
user's own may change in any hook what a step reads. Nothing is captured that waits for the device, draws on the host
(`random`, NumPy, torch), or that torch refuses. Nor is what changes an attribute of a module, a hook or the optimizer's
state, or anything within: the second step, which is taken, shows that, and so does the attempt. What has no stable
description (`store.describe`) is refused. After an attempt all is put back to where it was, but for what it alone, not
the second step, changed within an object.

What is still not seen is for `Training(capture=False)`: globals and closures that a module's class changes, hooks of
tensors, and what a forward pass in evaluation mode changes for those in training.

Gradients are the captured step's own tensors, which it writes anew, as a step does that begins with none. Dropout draws
the numbers of the step that is not captured: torch hands seed and offset of its generator to every replay, and moves
the offset on.
"""

import logging
import random
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clkit import store
from clkit.learners import Learner

log = logging.getLogger("clkit.training")
BEFORE = 2  # steps of a shape: the first chooses algorithms and makes the optimizer's state, the second is watched
MOST = 8  # captured steps a task: each holds gradients of its own
HOOKS = ("loss", "adjust_gradients", "replayed", "begin_task", "after_step")
APART = ("_parameters", "_buffers", "_modules", "_flat_weight_refs")  # by identity, and an LSTM's weak references


class Graphs:
    """CUDA graphs of steps on the current stream, which must not be the default one; those of a task share memory."""

    broken: list[torch.cuda.CUDAGraph] = []  # the allocator may look at a graph whose capture did not end

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def watch(self, step: Callable[[], Tensor]) -> tuple[Tensor, str]:
        """Takes a step; returns its loss, and what says that it waited for the device, which no captured step may."""
        with warnings.catch_warnings(record=True) as caught:  # the step before has shown all others
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                loss = step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        said = [str(warning.message) for warning in caught]
        return loss, next((text for text in said if "synchronizing CUDA" in text), "")

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], Any]:
        """Captures a step, which is not taken, and returns what takes it. Raises RuntimeError if torch cannot."""
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[stream.device_index]
        state = generator.clone_state()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                step()
        except BaseException:
            generator.graphsafe_set_state(state)  # the one it has may still be capturing, and would not draw again
            self.broken.append(graph)
            raise
        return graph.replay


CAPTURES: dict[str, Callable[[], Any]] = {"cuda": Graphs}
"""The kinds of device whose steps can be captured, and how."""


def capturable(learner: Learner, device: torch.device) -> bool:
    """Whether a learner's step on a device can be captured but for the network: its loss and gradients are the base's.

    All its code is clkit's own, which changes within a task nothing that the step reads but weights, in place.
    """
    hooks = [getattr(getattr(learner, hook), "__func__", None) for hook in HOOKS]
    code = (*type(learner).__mro__[:-1], *hooks, *filter(callable, vars(learner).values()))
    known = all(getattr(part, "__module__", "").startswith("clkit.") for part in code)
    return device.type in CAPTURES and known and hooks[:2] == [Learner.loss, Learner.adjust_gradients]


@contextmanager
def on_gpu(device: torch.device, deterministic: bool) -> Iterator[None]:
    """On a GPU a stream of the run's own, since none is captured on the default one, and cuDNN's choice of kernels."""
    own, others = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    own.wait_stream(others)
    kernels = torch.backends.cudnn.flags(enabled=True, deterministic=deterministic, benchmark=not deterministic)
    with torch.cuda.stream(own), kernels:
        yield
    others.wait_stream(own)


class Captured:
    """Steps of one run on a device: `update(x, y)` takes one and returns its loss, and so does a call.

    `refused` says why no more steps are captured, "" as long as they are.
    """

    def __init__(self, update: Callable[[Tensor, Tensor], Tensor], model: nn.Module, engine: Callable[[], Any]) -> None:
        self.update, self.model, self.engine = update, model, engine
        self.refused = ""

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Forgets what was captured: for a fresh optimizer."""
        self.optimizer, self.recorder = optimizer, self.engine()
        self.steps: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {}
        self.seen = Counter[Any]()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on prepared inputs and labels; its loss, which the next step may write over."""
        key = (x.shape, x.stride(), x.dtype, y.shape)
        if key not in self.steps and not self.refused:
            self.seen[key] += 1
            if self.seen[key] > BEFORE and len(self.steps) < MOST:
                self._attempt(key, x, y)
        if key in self.steps:
            return self.steps[key](x, y)
        if self.seen[key] != BEFORE or self.refused:
            return self.update(x, y)
        before = self._described()
        loss, why = self.recorder.watch(lambda: self.update(x, y))
        self._refuse(why or self._changed(before))
        return loss

    def _refuse(self, why: str) -> None:
        self.refused = why
        if why:
            log.info("steps run as they are, without a capture: %s", why)

    def _attempt(self, key: Any, x: Tensor, y: Tensor) -> None:
        """Captures the step for inputs and labels such as these; else all is as it was, and `refused` says why."""
        x, y, losses = x.clone(), y.clone(), list[Tensor]()
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        kept = [(held, dict(held)) for held in self._held()]
        draws = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
        before = self._described()
        try:
            for group in self.optimizer.param_groups:
                group["capturable"] = True  # AdamW asks for it, and warns of it in steps that are not captured
            replay = self.recorder.capture(lambda: losses.append(self.update(x, y)))
            if set_ := [name for held, old in kept for name in held | old if held.get(name) is not old.get(name)]:
                raise RuntimeError(f"it sets {set_[0]!r:.60}")
            if why := self._changed(before):
                raise RuntimeError(why)
            if not draws[2].equal(torch.get_rng_state()):
                raise RuntimeError("it draws random numbers on the host")
        except Exception as error:
            self._refuse(f"{type(error).__name__}: {error}")
            self.steps.clear()
            for held, old in kept:
                held.clear()
                held.update(old)
            random.setstate(draws[0])
            np.random.set_state(draws[1])  # noqa: NPY002
            torch.set_rng_state(draws[2])
            for parameter, gradient in gradients:
                parameter.grad = gradient
            return
        finally:
            for group in self.optimizer.param_groups:
                group["capturable"] = False
        loss, gradients = losses[0], [(parameter, parameter.grad) for parameter in self.model.parameters()]

        def step(new_x: Tensor, new_y: Tensor) -> Tensor:
            x.copy_(new_x)
            y.copy_(new_y)
            replay()
            for parameter, gradient in gradients:  # another step may have left its own
                parameter.grad = gradient
            return loss

        self.steps[key] = step

    def _held(self) -> list[dict[Any, Any]]:
        """Where modules and the optimizer keep what Python code may change: attributes and dicts, an entry's state."""
        parts = [part for m in self.model.modules() for part in (vars(m), *vars(m).values())]
        parts = [part for part in parts if type(part) in (dict, OrderedDict)]
        return [*parts, self.optimizer.state, *self.optimizer.state.values()]

    def _described(self) -> Any:
        """What Python code may change within an object, and random generators, as JSON; else why it cannot be told."""
        named = dict(self.model.named_modules())
        known = [*named.values(), *self.model.parameters(), *self.model.buffers()]
        parts: dict[str, Any] = {n: {k: v for k, v in vars(m).items() if k not in APART} for n, m in named.items()}
        parts["random numbers on the host"] = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
        try:
            return store.describe(parts, "model", known)
        except Exception as error:  # of whatever kind, from a class of the user's
            return f"it keeps what cannot be compared: {error}"

    def _changed(self, before: Any) -> str:
        """Where that is no longer what it was, in words; "" if it is."""
        now = self._described()
        return now if isinstance(now, str) else "".join(f"it changes {d}" for d in store.differences(before, now)[:1])
