"""When to merge within a task, from what can be seen without old data: SFA's interval made adaptive.

A trigger is a frozen dataclass that looks a number of times a task (`looks`) and says each time whether to merge; its
notes, a tree of tensors and plain values, come back at the next look of the same task. The paper fixes the interval.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from clkit.consolidation.base import Context, Progress
from clkit.weights import Weights, norm, sub


class Since(NamedTuple):
    """Where the task's last merge left off, or its start: the step, the weights, and the anchor they are pulled to."""

    step: int
    weights: Weights
    anchor: Weights


class Trigger(Protocol):
    """When it looks, and whether it wants a merge now."""

    def looks(self, progress: Progress) -> bool:
        """Whether to look after this step."""
        ...

    def __call__(self, context: Context, since: Since, notes: Any) -> tuple[bool, Any]:
        """Whether to merge now, and the notes for the next look; `notes` is None at the task's first."""
        ...


def parameters(context: Context, weights: Weights) -> Weights:
    """The parameters among weights: without BatchNorm's statistics, whose scale says nothing of a distance."""
    names = dict(context.model.named_parameters())
    return {name: tensor for name, tensor in weights.items() if name in names}


def distance(context: Context, anchor: Weights) -> float:
    """||theta - anchor|| / ||anchor|| over the parameters."""
    start = parameters(context, anchor)
    length = norm(start)
    moved = norm(sub(parameters(context, context.current), start))
    return moved / length if length else float(moved > 0)


@dataclass(frozen=True)
class _Looking:
    """Looks evenly, `times` a task."""

    times: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.times, int) or self.times < 1:
            raise ValueError(f"times: {self.times!r}; give the number of looks a task, at least 1")

    def looks(self, progress: Progress) -> bool:
        """At every `times`-th part of the task's steps."""
        return progress.step % max(1, round(progress.steps / self.times)) == 0


@dataclass(frozen=True)
class Drift(_Looking):
    """Merges when the weights have come further than `limit` from the anchor, relative to the anchor's length."""

    limit: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.limit > 0:
            raise ValueError(f"limit: {self.limit!r}; give a relative distance above 0")

    def __call__(self, context: Context, since: Since, notes: Any) -> tuple[bool, Any]:
        """Compares the distance with the limit."""
        return distance(context, since.anchor) > self.limit, None


@dataclass(frozen=True)
class Plateau(_Looking):
    """Merges when the loss has stopped falling: the task is learned, so a merge costs the least of it.

    The mean loss since the last look is compared with that of as many steps before; a fall by less than the share
    `tolerance` counts as none. Both windows lie after the last merge.
    """

    tolerance: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance: {self.tolerance!r}; give the smallest share of a fall that counts, in [0, 1)")

    def __call__(self, context: Context, since: Since, notes: Any) -> tuple[bool, Any]:
        """Compares the loss of two windows of steps."""
        step, window = context.progress.step, max(1, round(context.progress.steps / self.times))
        if step - since.step < 2 * window:
            return False, None
        before, after = context.losses[step - 2 * window : step].unflatten(0, (2, window)).mean(1).tolist()
        return after > (1 - self.tolerance) * before, None


@dataclass(frozen=True)
class Velocity(_Looking):
    """Merges at intervals that shrink while the weights move faster and grow while they slow down.

    The speed of an interval is the distance that the parameters came in it over its steps. An interval faster than the
    one before makes the next shorter by `factor`, a slower one makes it longer, between the `shortest` and the
    `longest`, shares of a task's steps; `start` is the first. The rule of AimMerging (arXiv 2509.17348) without its
    forgetting trigger, which needs stored data; that paper leaves the factor to be chosen.
    """

    times: int = 50
    start: float = 0.25
    shortest: float = 0.05
    longest: float = 0.5
    factor: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shortest <= self.start <= self.longest <= 1:
            raise ValueError(
                f"start: {self.start!r}, with shortest {self.shortest!r} and longest {self.longest!r}; give "
                "0 < shortest <= start <= longest <= 1"
            )
        if not self.factor > 1:
            raise ValueError(f"factor: {self.factor!r}; give a number above 1")

    def __call__(self, context: Context, since: Since, notes: Any) -> tuple[bool, Any]:
        """Merges at the end of an interval and sets the next one's length."""
        notes = notes or {"interval": self.start, "speed": None}
        taken = context.progress.step - since.step
        if taken < max(1, round(notes["interval"] * context.progress.steps)):
            return False, notes
        speed = norm(sub(parameters(context, context.current), parameters(context, since.weights))) / taken
        last = notes["speed"]
        change = 1.0 if last is None else 1 / self.factor if speed > last else self.factor
        return True, {"interval": min(max(notes["interval"] * change, self.shortest), self.longest), "speed": speed}


@dataclass(frozen=True)
class Cosine(_Looking):
    """Merges when the gradient no longer drives the weights away from the anchor.

    The cosine between the last step's descent direction and theta - anchor is positive while training moves on outward
    and falls to 0, or below, once the task is learned; a merge is due when it is below `limit`.
    """

    limit: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.limit <= 1:
            raise ValueError(f"limit: {self.limit!r}; give a cosine in [-1, 1]")

    def __call__(self, context: Context, since: Since, notes: Any) -> tuple[bool, Any]:
        """Compares the cosine with the limit."""
        gradients = context.gradients()
        moved = {n: context.current[n] - since.anchor[n] for n in gradients if n in context.current}
        parts = [torch.stack([-(gradients[n] * m).sum(), gradients[n].square().sum(), m.square().sum()]) for n, m in
                 moved.items()]  # fmt: skip
        if not parts:
            return False, None
        inner, a, b = torch.stack(parts).double().sum(0).tolist()
        return bool(a and b) and inner / (a * b) ** 0.5 < self.limit, None
