"""SFA: during a task and at its end, average with the weights that the previous task ended with.

The paper merges at fixed intervals. A trigger makes them adaptive, from what can be seen without old data: a frozen
dataclass that looks a number of times a task (`looks`) and says each time whether to merge. Its notes, a tree of
tensors and plain values, come back at the next look of the same task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch

from clkit import checks, normalization
from clkit.consolidation.base import Context, Merged, Progress, scheduled
from clkit.weights import Weights, combine, lerp, norm, sub

StepShare = Annotated[float, checks.Range(0, 1, "low", "a share of a task's steps")]
Interval = Annotated[float, checks.Range(0, 1, "low", "a share of a task's steps, or a trigger such as Drift()")]
Beta = Annotated[float, checks.Range(0, 1, means="0 for the new weights, 1 for the old")]


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


def interval(steps: int, p: float) -> int:
    """How many optimizer steps lie between two merges: p of a task's, rounded, at least one."""
    return max(1, round(p * steps))


def merge_steps(steps: int, p: float, final: bool = True) -> list[int]:
    """The steps of a task after which SFA merges: every `interval`-th, and the last one if `final`."""
    every = interval(steps, p)
    return sorted({*range(every, steps + 1, every), *([steps] if final else [])})


@dataclass(frozen=True)
class SFA:
    """Pulls the weights in training back towards the previous task's, every p-th part of a task and at its end.

    Sequential fine-tuning with averaging, Kleiman et al. 2025 (arXiv 2501.05559). After K, 2K, ... optimizer steps of a
    task and after its last one, theta <- (1 - beta) theta + beta theta_o. theta_o are the weights that the previous
    task ended with, the same for the whole task. beta = 0 is fine-tuning, bit for bit; beta = 1 never leaves theta_o.

    K = 1 with plain gradient descent is L2 regularisation, exactly: rate eta = (1 - beta) lr, strength beta / eta. p =
    1 is one merge a task, WiSE-FT's. Where K does not divide the steps, the last two merges are close together: p a
    little below 1 holds back much more than p = 1 does.

    - `p`: the interval as a share of a task's steps, K = max(1, round(p steps)); or a trigger that decides (`Drift`,
      `Plateau`, `Velocity`, `Cosine`)
    - `beta`: the weight of the old weights. A sequence has one number a task from the second on (the last one repeats).
      "equal" is 1 - 1/k in task k = 2, 3, ...: with p = 1 the mean of all that the tasks were trained to
    - `anchor`: theta_o. "previous" (the paper); over the ends of all earlier tasks, their "uniform" mean or their mean
      weighted by "recency", halving with every task back; or a sequence of weights, newest first, of so many of them.
      Merging with checkpoints j at a beta_j each is beta = sum beta_j with the beta_j as the anchor.
    - `include_base`: the weights before the first task count among those ends
    - `final`: merge after a task's last step; `first`: merge in the first task, too, with the weights before it
    - `optimizer`: "keep" its state and schedule through a merge, or "reset" its state
    - `own`: tensors, by the beginning of their names, that are left as trained: task-specific heads
    - `untouched`: "average" everything; or "keep" as trained every number that no earlier task has moved from where it
      began. Those are a head's rows for new classes, if the loss leaves them out until then
    - `refresh`: re-estimate BatchNorm after a merge on what the learner lets a consolidation see; else its statistics
      are averaged like everything else, counters aside

    The paper leaves open the first task (plain here), the rounding, the optimizer's state (kept; a new optimizer begins
    with each task), heads and BatchNorm. The report at a task's end has the `steps` of its merges, and the `drift` at
    each: how far the weights had come from theta_o, relative to theta_o's length.
    """

    p: float | Trigger = 0.25
    beta: Beta | tuple[Beta, ...] | Literal["equal"] = 0.5
    anchor: Literal["previous", "uniform", "recency"] | tuple[checks.NotNegative, ...] = "previous"
    include_base: bool = False
    final: bool = True
    first: bool = False
    optimizer: Literal["keep", "reset"] = "keep"
    own: tuple[str, ...] = ()
    untouched: Literal["average", "keep"] = "average"
    refresh: bool = False

    def __post_init__(self) -> None:
        checks.fields(self)
        if not callable(self.p):
            object.__setattr__(self, "p", checks.value("p", self.p, Interval))
        if self.beta == ():
            raise ValueError("beta: () is empty; give a number in [0, 1], or one for each task after the first")
        if not isinstance(self.anchor, str) and not (self.anchor and self.anchor[0] > 0):
            raise ValueError(f"anchor: {self.anchor!r}; the newest end needs a weight above 0: after the first task it "
                             "is the only one")  # fmt: skip

    def due(self, progress: Progress) -> bool:
        """At the steps of `merge_steps`, or where the trigger wants to look; not in the first task unless `first`."""
        if progress.task == 0 and not self.first:
            return False
        if callable(self.p):
            return progress.end or (progress.step < progress.steps and self.p.looks(progress))
        divides = progress.step % interval(progress.steps, self.p) == 0
        return self.final or divides if progress.end else divides and progress.step < progress.steps

    def __call__(self, context: Context) -> Merged:
        """Averages with the anchor."""
        progress, memo = context.progress, self._memo(context)
        if callable(self.p):
            wanted, memo["notes"] = self.p(context, Since(*memo["since"]), memo["notes"])
            if not (self.final if progress.end else wanted):
                return Merged(context.current, context.current, memo["report"], memo)
        now, report = {"steps": progress.step, "drift": distance(context, memo["anchor"])}, memo["report"]
        memo["report"] = {name: [*report[name], number] for name, number in now.items()}
        task = progress.task
        beta = task / (task + 1) if isinstance(self.beta, str) else scheduled(self.beta, max(task - 1, 0))
        merged = self._spared(context, lerp(context.current, memo["anchor"], beta))
        if self.refresh:
            merged = normalization.refresh(context.model, merged, context.inputs)
        memo["since"] = (progress.step, merged, memo["anchor"]) if callable(self.p) else None
        kept = {"task": progress.task, "ends": memo["ends"]} if progress.end else memo
        return Merged(merged, merged, memo["report"], kept, fresh=self.optimizer == "reset")

    def _memo(self, context: Context) -> dict[str, Any]:
        """The state of this task: that of the last call, or made anew in the task's first."""
        task, memo = context.progress.task, context.memo
        if memo is not None and memo["task"] == task:
            return dict(memo)
        ends = list(memo["ends"]) if memo is not None else [context.base] if self.include_base else []
        if task:
            ends.append(context.previous)
        anchor = self._anchor(ends or [context.previous])
        kept = [] if self.anchor == "previous" else ends
        since, report = (0, context.previous, anchor), {"steps": [], "drift": []}
        return {"task": task, "ends": kept, "anchor": anchor, "since": since, "report": report, "notes": None}

    def _anchor(self, ends: Sequence[Weights]) -> Weights:
        """The weights to average with, of the ends of tasks so far."""
        newest, count = ends[::-1], len(ends)
        if self.anchor == "previous" or count == 1:
            return newest[0]
        named: dict[Any, Sequence[float]] = {"uniform": [1.0] * count, "recency": [0.5**age for age in range(count)]}
        shares = [float(w) for w in named.get(self.anchor, self.anchor)][:count]
        return combine(newest[: len(shares)], [w / sum(shares) for w in shares])

    def _spared(self, context: Context, merged: Weights) -> Weights:
        """The merged weights with what is not to be averaged as it was trained."""
        if self.untouched == "keep":
            merged = {
                name: torch.where(context.previous[name] == context.base[name], context.current[name], tensor)
                for name, tensor in merged.items()
            }
        own = [name for name in merged if name.startswith(self.own)]
        if self.own and not own:
            raise ValueError(f"own: no tensor's name begins with one of {self.own}, but {list(merged)[:3]} ...")
        return {**merged, **{name: context.current[name].clone() for name in own}}


@dataclass(frozen=True)
class _Looking:
    """Looks evenly, `times` a task."""

    times: checks.Count = 20
    __post_init__ = checks.fields

    def looks(self, progress: Progress) -> bool:
        """At every `times`-th part of the task's steps."""
        return progress.step % max(1, round(progress.steps / self.times)) == 0


@dataclass(frozen=True)
class Drift(_Looking):
    """Merges when the weights have come further than `limit` from the anchor, relative to the anchor's length."""

    limit: checks.Positive = 0.1

    def __call__(self, context: Context, since: Since, notes: Any) -> tuple[bool, Any]:
        """Compares the distance with the limit."""
        return distance(context, since.anchor) > self.limit, None


@dataclass(frozen=True)
class Plateau(_Looking):
    """Merges when the loss has stopped falling: the task is learned, so a merge costs the least of it.

    The mean loss since the last look is compared with that of as many steps before; a fall by less than the share
    `tolerance` counts as none. Both windows lie after the last merge.
    """

    tolerance: checks.Part = 0.05

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
    one before makes the next shorter by `factor`; a slower one makes it longer. Intervals are shares of a task's steps,
    `start` first, between the `shortest` and the `longest`. The rule of AimMerging (arXiv 2509.17348) without its
    forgetting trigger, which needs stored data; that paper leaves the factor to be chosen.
    """

    times: checks.Count = 50
    start: StepShare = 0.25
    shortest: StepShare = 0.05
    longest: StepShare = 0.5
    factor: Annotated[float, checks.Range(1, open="low")] = 1.5

    def __post_init__(self) -> None:
        checks.fields(self)
        if not self.shortest <= self.start <= self.longest:
            ends = f"from {self.shortest!r} to {self.longest!r}"
            raise ValueError(f"start: {self.start!r}; give shortest <= start <= longest, here {ends}")

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

    That is when the cosine between the last step's descent direction and theta - anchor is below `limit`. It is
    positive while training moves on outward, and falls to 0, or below, once the task is learned.
    """

    limit: Annotated[float, checks.Range(-1, 1)] = 0.0

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
