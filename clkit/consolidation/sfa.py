"""SFA: during a task and at its end, average with the weights that the previous task ended with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clkit import normalization
from clkit.consolidation.base import Context, Merged, Progress, share
from clkit.consolidation.triggers import Since, Trigger, distance
from clkit.weights import Weights, combine, lerp

ANCHORS = ("previous", "uniform", "recency")


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

    Sequential fine-tuning with averaging, Kleiman et al. 2025 (arXiv 2501.05559): after K, 2K, ... optimizer steps of a
    task and after its last one, theta <- (1 - beta) theta + beta theta_o, where theta_o are the weights that the
    previous task ended with, the same for the whole task. beta = 0 is fine-tuning, bit for bit; beta = 1 never leaves
    theta_o. K = 1 with plain gradient descent is L2 regularisation, exactly: rate eta = (1 - beta) lr, strength
    beta / eta. p = 1 is one merge a task, WiSE-FT's. Where K does not divide the steps, the last two merges are close
    together, and p a little below 1 holds back much more than p = 1 does.

    - `p`: the interval as a share of a task's steps, K = max(1, round(p steps)); or a trigger that decides (`Drift`,
      `Plateau`, `Velocity`, `Cosine`)
    - `beta`: the weight of the old weights; a sequence, one number a task from the second on (the last one repeats); or
      "equal": 1 - 1/k in task k = 2, 3, ..., at which p = 1 is the mean of all that the tasks were trained to
    - `anchor`: theta_o. "previous" (the paper); over the ends of all earlier tasks, their "uniform" mean or their mean
      weighted by "recency", halving with every task back; or a sequence of weights, newest first, of so many of them.
      Merging with checkpoints j at a beta_j each is beta = sum beta_j with the beta_j as the anchor.
    - `include_base`: the weights before the first task count among those ends
    - `final`: merge after a task's last step; `first`: merge in the first task, too, with the weights before it
    - `optimizer`: "keep" its state and schedule through a merge, or "reset" its state
    - `own`: tensors, by the beginning of their names, that are left as trained: task-specific heads
    - `untouched`: "average" everything; or "keep" as trained every number that no task so far has moved from where it
      was before the first task (rows of a head for classes that are new, if the loss leaves them out until then)
    - `refresh`: re-estimate BatchNorm after a merge on what the learner lets a consolidation see; else its statistics
      are averaged like everything else, counters aside

    The paper leaves open the first task (plain here), the rounding, the optimizer's state (kept; a new optimizer begins
    with each task), heads and BatchNorm. The report at a task's end has the `steps` of its merges, and the `drift` at
    each: how far the weights had come from theta_o, relative to theta_o's length.
    """

    p: float | Trigger = 0.25
    beta: float | tuple[float, ...] | str = 0.5
    anchor: str | tuple[float, ...] = "previous"
    include_base: bool = False
    final: bool = True
    first: bool = False
    optimizer: str = "keep"
    own: tuple[str, ...] = ()
    untouched: str = "average"
    refresh: bool = False
    holdout = 0.0
    uses_history = False

    def __post_init__(self) -> None:
        if isinstance(self.p, int | float) and not 0 < self.p <= 1:
            raise ValueError(f"p: {self.p!r}; give the interval between merges as a share of a task's steps, in (0, 1]")
        if not isinstance(self.p, int | float) and not callable(self.p):
            raise ValueError(f"p: {self.p!r}; give a number in (0, 1] or a trigger, for example Drift(0.1)")
        if isinstance(self.beta, str):
            if self.beta != "equal":
                raise ValueError(f'beta: {self.beta!r} is unknown; give numbers in [0, 1] or "equal"')
        else:
            betas = (self.beta,) if isinstance(self.beta, int | float) else tuple(self.beta)
            if not betas:
                raise ValueError("beta: () is empty; give a number in [0, 1] for each task after the first")
            for beta in betas:
                share("beta", beta, of="0 for the new weights, 1 for the old")
            object.__setattr__(self, "beta", self.beta if isinstance(self.beta, int | float) else betas)
        if isinstance(self.anchor, str):
            if self.anchor not in ANCHORS:
                raise ValueError(f"anchor: {self.anchor!r} is unknown; choose one of {', '.join(ANCHORS)} or weights")
        else:
            object.__setattr__(self, "anchor", tuple(self.anchor))
            if not all(w >= 0 for w in self.anchor) or not 0 < sum(self.anchor) < float("inf"):
                raise ValueError(f"anchor: {self.anchor!r}; give weights of the latest ends, newest first, at least 0")
            if self.anchor[0] == 0:
                raise ValueError(f"anchor: {self.anchor!r}; the newest end needs a weight above 0: after the first "
                                 "task it is the only one")  # fmt: skip
        for name, known in (("optimizer", ("keep", "reset")), ("untouched", ("average", "keep"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        object.__setattr__(self, "own", tuple(self.own))

    def due(self, progress: Progress) -> bool:
        """At the steps of `merge_steps`, or where the trigger wants to look; not in the first task unless `first`."""
        if progress.task == 0 and not self.first:
            return False
        if not isinstance(self.p, int | float):
            return progress.end or (progress.step < progress.steps and self.p.looks(progress))
        divides = progress.step % interval(progress.steps, self.p) == 0
        return self.final or divides if progress.end else divides and progress.step < progress.steps

    def __call__(self, context: Context) -> Merged:
        """Averages with the anchor."""
        progress, memo = context.progress, self._memo(context)
        if not isinstance(self.p, int | float):
            wanted, memo["notes"] = self.p(context, Since(*memo["since"]), memo["notes"])
            if not (self.final if progress.end else wanted):
                return Merged(context.current, context.current, self._report(memo), memo)
        memo["steps"] = [*memo["steps"], progress.step]
        memo["drift"] = [*memo["drift"], distance(context, memo["anchor"])]
        merged = self._spared(context, lerp(context.current, memo["anchor"], self._beta(progress.task)))
        if self.refresh:
            merged = normalization.refresh(context.model, merged, context.inputs)
        memo["since"] = (progress.step, merged, memo["anchor"]) if callable(self.p) else None
        kept = {"task": progress.task, "ends": memo["ends"]} if progress.end else memo
        return Merged(merged, merged, self._report(memo), kept, fresh=self.optimizer == "reset")

    def _beta(self, task: int) -> float:
        if self.beta == "equal":
            return task / (task + 1)
        if isinstance(self.beta, tuple):
            return self.beta[min(max(task - 1, 0), len(self.beta) - 1)]
        assert not isinstance(self.beta, str)
        return self.beta

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
        since = (0, context.previous, anchor)
        return {"task": task, "ends": kept, "anchor": anchor, "since": since, "steps": [], "drift": [], "notes": None}

    def _anchor(self, ends: Sequence[Weights]) -> Weights:
        newest = ends[::-1]
        if self.anchor == "previous" or len(ends) == 1:
            return newest[0]
        if self.anchor == "uniform":
            shares = [1.0] * len(ends)
        elif self.anchor == "recency":
            shares = [0.5**age for age in range(len(ends))]
        else:
            shares = [float(w) for w in self.anchor[: len(ends)]]
        return combine(newest[: len(shares)], [w / sum(shares) for w in shares])

    def _spared(self, context: Context, merged: Weights) -> Weights:
        """The merged weights with what is not to be averaged as it was trained."""
        if self.untouched == "keep":
            merged = {
                name: torch.where(context.previous[name] == context.base[name], context.current[name], tensor)
                for name, tensor in merged.items()
            }
        if not self.own:
            return merged
        if not any(name.startswith(self.own) for name in merged):
            raise ValueError(
                f"own: no tensor's name begins with one of {self.own}; the model has {list(merged)[:3]} ..."
            )
        return {n: context.current[n].clone() if n.startswith(self.own) else t for n, t in merged.items()}

    @staticmethod
    def _report(memo: dict[str, Any]) -> dict[str, Any]:
        return {"steps": list(memo["steps"]), "drift": list(memo["drift"])}
