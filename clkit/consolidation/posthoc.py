"""Consolidations that deploy a merge and leave training alone: WiSE-FT, every merge of the table, averages on the way.

Training goes on from the current weights, bit for bit as without a consolidation, or, for independent fine-tuning,
from the base in every task.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from clkit import checks, curvature
from clkit.consolidation.base import Context, Merged, Progress
from clkit.merging import MERGES, merge
from clkit.weights import Weights, lerp, set_weights


@dataclass(frozen=True)
class WiSEFT:
    """Deploys a point on the line from the old weights (alpha = 0) to the trained ones (alpha = 1), after every task.

    Wortsman et al. 2022 (arXiv 2109.01903): (1 - alpha) theta_old + alpha theta; alpha weights the NEW weights. `old`
    are the "previous" deployed weights, or, as in the paper, those before the "first" task ("base"). Training goes on
    from the trained weights; where it is to go on from the merged ones, that is SFA with p = 1 and beta = 1 - alpha
    (CoMA, arXiv 2312.08977), and the two agree bit for bit in the second task. The first task is deployed as trained.
    """

    alpha: Annotated[float, checks.Range(0, 1, means="0 for the old weights, 1 for the new")] = 0.5
    old: Literal["previous", "base"] = "previous"
    __post_init__ = checks.fields

    def due(self, progress: Progress) -> bool:
        """At the end of every task but the first."""
        return progress.end and progress.task > 0

    def __call__(self, context: Context) -> Merged:
        """Interpolates for deployment."""
        old = context.previous if self.old == "previous" else context.base
        return Merged(context.current, lerp(context.current, old, 1 - self.alpha), {"alpha": self.alpha})


@dataclass(frozen=True)
class Merging:
    """Deploys, after every task, a merge of the weights trained on all tasks so far: any row of `merging.MERGES`.

    - `merge`: the row's name; `options`: what the function takes, a mapping
    - `training`: "sequential", every task goes on from the last one's trained weights, or "independent", from the
      weights before the first task (Ilharco et al., arXiv 2212.04089, and most merging papers)

    A merge of two weights takes those deployed after the last task and the current ones, in this order, a merge of one
    the current ones; all others take the weights trained on every task so far, in order, and task vectors start from
    the weights before the first task. Fisher information (for labels drawn from the network) and Gram matrices are
    measured once, at a task's end, on what the learner lets a consolidation see. `greedy_soup` is judged by accuracy on
    the `holdout` of the memory (a fifth, if None), which is kept from replay.

    After the first task, with nothing to merge, the trained weights are deployed. Bytes kept grow with the tasks.
    """

    merge: str = "average"
    options: Mapping[str, Any] = field(default_factory=dict)
    training: str = "sequential"
    holdout: float | None = None
    uses_history = True

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            merge(self.merge, [])
        if self.training not in ("sequential", "independent"):
            raise ValueError(f'training: {self.training!r} is unknown; choose "sequential" or "independent"')
        object.__setattr__(self, "options", tuple(sorted(dict(self.options).items())))
        judged = MERGES[self.merge].needs == "score"
        if self.holdout is None:
            object.__setattr__(self, "holdout", 0.2 if judged else 0.0)
        if not 0 <= (self.holdout or 0) < 1 or (judged and self.holdout == 0):
            raise ValueError(
                f"holdout: {self.holdout!r}; give a share of the memory in [0, 1), above 0 for {self.merge}"
            )

    def due(self, progress: Progress) -> bool:
        """At the end of every task."""
        return progress.end

    def __call__(self, context: Context) -> Merged:
        """Merges for deployment."""
        row, memo = MERGES[self.merge], [*(context.memo or []), *self._measured(context)]
        train = context.base if self.training == "independent" else context.current
        if not context.progress.task:
            return Merged(train, context.current, memo=memo)
        every = [*context.history, context.current]
        ws = {1: [context.current], 2: [context.previous, context.current]}.get(row.arity or 0, every)
        options = dict(self.options)
        if row.needs == "score":
            options["score"] = lambda w: self._accuracy(context, w)
        elif row.needs:
            options[row.needs] = memo[-len(ws) :]
        return Merged(train, row(ws, base=context.base, **options), {"merged": len(ws)}, memo)

    def _measured(self, context: Context) -> list[Weights]:
        """What the merge needs to know of the task just learned, if anything."""
        needs = MERGES[self.merge].needs
        if needs == "grams":
            return [curvature.grams(context.model, context.current, context.inputs)]
        if needs != "importances":
            return []
        set_weights(context.model, context.current)
        return [curvature.fisher(context.model, context.inputs, generator=None)]

    @staticmethod
    def _accuracy(context: Context, weights: Weights) -> float:
        assert context.score is not None
        return context.score(weights).accuracy


@dataclass(frozen=True)
class EMA:
    """Deploys an average of the weights along the way: w <- decay w + (1 - decay) theta after every `every`-th step.

    Polyak averaging with forgetting; `decay` None is the plain mean of all steps of the task, a soup of its checkpoints
    (arXiv 2203.05482 averages the ends of several runs instead). The average goes on through the tasks, the mean begins
    anew in each. Training is not touched.
    """

    decay: checks.Part | None = 0.99
    every: checks.Count = 1
    __post_init__ = checks.fields

    def due(self, progress: Progress) -> bool:
        """At every `every`-th step, and at the end of every task."""
        return progress.end or progress.step % self.every == 0

    def __call__(self, context: Context) -> Merged:
        """Takes the current weights into the average; deploys it at the end."""
        task, memo = context.progress.task, context.memo
        if memo is None or (self.decay is None and memo["task"] != task):
            memo = {"task": task, "count": 0, "mean": context.current}
        if not context.progress.end:
            count = memo["count"] + 1
            new = 1 / count if self.decay is None else 1 - self.decay
            mean = lerp(memo["mean"], context.current, new) if memo["count"] else context.current
            memo = {"task": task, "count": count, "mean": mean}
        return Merged(context.current, memo["mean"], {"averaged": memo["count"]}, memo)
