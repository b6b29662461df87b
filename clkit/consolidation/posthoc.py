"""Consolidations that deploy a merge and leave training alone: WiSE-FT, any merge, averages on the way.

Training goes on from the current weights, bit for bit as without a consolidation, or, for independent fine-tuning,
from the base in every task.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clkit import checks, curvature, normalization
from clkit.consolidation.base import Alpha, Context, Merged, Progress
from clkit.merging import MERGES, Merge
from clkit.weights import get_weights, lerp, set_weights


@dataclass(frozen=True)
class WiSEFT:
    """Deploys a point on the line from the old weights (alpha = 0) to the trained ones (alpha = 1), after every task.

    Wortsman et al. 2022 (arXiv 2109.01903): (1 - alpha) theta_old + alpha theta; alpha weights the NEW weights. `old`
    are the "previous" deployed weights, or, as in the paper, the "base", those before the first task. Training goes on
    from the trained weights. Where it is to go on from the merged ones, use SFA with p = 1 and beta = 1 - alpha. That
    is CoMA (arXiv 2312.08977), and the two agree bit for bit in the second task. The first task is deployed as trained.
    """

    alpha: Alpha = 0.5
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
    """Deploys, after every task, a merge of the weights trained on all tasks so far.

    - `merge`: the name of a row of `merging.MERGES`, or a function of your own, as `merging.Merge` describes it
    - `options`: what the function takes, a mapping
    - `training`: in "sequential", every task goes on from the last one's trained weights; in "independent", from the
      weights before the first task (Ilharco et al., arXiv 2212.04089, and most merging papers)
    - `holdout`: the share of the memory that is kept from replay, for a merge that needs a `score`, such as
      "greedy_soup": its accuracy there. None is a fifth for such a merge, else nothing
    - `refresh`: re-estimate BatchNorm after a merge on what the learner lets a consolidation see, if that is two inputs
      or more; else its statistics are averaged

    A merge of one takes the current weights. A merge of two takes those deployed after the last task, then the current
    ones. All others take the weights trained on every task so far, in order. Task vectors start from the weights before
    the first task. Fisher information and Gram matrices are measured once, at a task's end, on what the learner lets a
    consolidation see. Fisher's labels are drawn from the network.

    After the first task, with nothing to merge, the trained weights are deployed. Bytes kept grow with the tasks, but
    for a merge of one or two. Raises ValueError for a name that is not known, and for options that the merge does not
    take or lacks.
    """

    merge: str | Callable[..., dict[str, Tensor]] = "average"
    options: Mapping[str, Any] | Iterable[tuple[str, Any]] = field(default_factory=dict)
    training: Literal["sequential", "independent"] = "sequential"
    holdout: checks.Part | None = None
    refresh: bool = True
    row: Merge = field(init=False, repr=False, compare=False)
    uses_history = property(lambda self: self.row.arity not in (1, 2))

    def __post_init__(self) -> None:
        checks.fields(self)
        with checks.explained(f"options: {self.options!r:.80} are no names with values", "give a mapping"):
            options = dict(self.options)
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        row = Merge(self.merge) if callable(self.merge) else MERGES[checks.choice("merge", self.merge, MERGES)]
        object.__setattr__(self, "row", row)  # here, not when it is asked for: what is in a name belongs to the run
        row.check(options)
        if self.needs not in (None, "score", "importances", "grams"):
            raise ValueError(f"options: {options!r} lack {self.needs!r}, which the merge needs; give it a value")
        if self.holdout is None:
            object.__setattr__(self, "holdout", 0.2 if self.needs == "score" else 0.0)
        if self.needs == "score" and not self.holdout:
            raise ValueError(f"holdout: {self.holdout!r}; give a share above 0, by which the merge is judged")

    def __repr__(self) -> str:
        merge = repr(self.merge) if isinstance(self.merge, str) else getattr(self.merge, "__qualname__", self.merge)
        given = {name: getattr(self, name) for name in ("options", "training", "holdout", "refresh")}
        return f"Merging({merge=!s}, {', '.join(f'{name}={value!r}' for name, value in given.items())})"

    @property
    def needs(self) -> str | None:
        """What the merge cannot work without and the options lack."""
        return None if self.row.needs in dict(self.options) else self.row.needs

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Tries the Fisher information of the inputs, if the merge goes by it, and a merge of your own on copies."""
        if self.needs == "importances":
            curvature.fisher(model, x, generator=torch.Generator(x.device).manual_seed(0))
        if callable(self.merge) and not self.needs:
            start = get_weights(model)
            self.row([start] * (self.row.arity or 2), base=start, **dict(self.options))

    def due(self, progress: Progress) -> bool:
        """At the end of every task."""
        return progress.end

    def __call__(self, context: Context) -> Merged:
        """Merges for deployment."""
        memo = [*(context.memo or [])]
        if self.needs == "grams":
            memo.append(curvature.grams(context.model, context.current, context.inputs))
        elif self.needs == "importances":
            set_weights(context.model, context.current)
            memo.append(curvature.fisher(context.model, context.inputs))
        train = context.base if self.training == "independent" else context.current
        if not context.progress.task:
            return Merged(train, context.current, memo=memo)
        every = [*context.history, context.current]
        ws = {1: [context.current], 2: [context.previous, context.current]}.get(self.row.arity or 0, every)
        options = dict(self.options)
        if self.needs == "score":
            score = context.score
            assert score is not None
            options["score"] = lambda weights: score(weights).accuracy
        elif self.needs:
            options[self.needs] = memo[-len(ws) :]
        merged = self.row(ws, base=context.base, **options)
        if self.refresh and normalization.batchnorms(context.model) and len(context.inputs) > 1:
            merged = normalization.refresh(context.model, merged, context.inputs)
        return Merged(train, merged, {"merged": len(ws)}, memo)


@dataclass(frozen=True)
class EMA:
    """Deploys an average of the weights along the way: w <- decay w + (1 - decay) theta after every `every`-th step.

    Polyak averaging with forgetting. The average goes on through the tasks. With `decay` None it is the plain mean of
    all steps of a task, and begins anew in each: a soup of checkpoints (arXiv 2203.05482 averages the ends of several
    runs instead). Training is not touched.
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
