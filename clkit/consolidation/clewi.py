"""CLeWI: permute the previous network onto the current one, interpolate, re-estimate BatchNorm."""

from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from clkit import alignment, checks, normalization
from clkit.consolidation.base import Context, Merged, Progress, scheduled
from clkit.weights import Weights, lerp


@dataclass(frozen=True)
class CLeWI:
    """Moves from the new weights towards the permuted old ones after every task but the first, and stays there.

    Kozal et al. 2024 (arXiv 2404.04002): theta <- (1 - alpha) theta + alpha pi(theta_old), then BatchNorm's statistics
    are estimated anew on the memory. alpha = 0 keeps the new weights, alpha = 1 the old ones.

    - `alpha`: one number; a sequence, one number a merge (the last one repeats); or "search": of evenly spaced
      positions on the path, the one with the lowest loss on the held-out part of the memory
    - `align`: how pi is found, by "activations" (the paper), by "weights", or None for no permutation
    - `statistic`: "pearson", the correlation that the paper describes, or "clewi2024", what its released code computes
    - `refresh`: re-estimate BatchNorm; without it the running statistics are interpolated like everything else
    - `points`: at so many positions the path is judged for the report, at a forward pass each; 0 judges none, but for
      "search", which then has 11
    - `when`: "always" merges after every task (the paper); "helps" only if that lowers the loss on the held-out part of
      the memory, and otherwise leaves the weights as trained
    - `holdout`: the share of the memory that is kept from replay, matching and re-estimation, for judging by. None is a
      fifth where "search" or "helps" need it, else nothing

    The report has whether it `merged` and at which `alpha`. It has the matching's `similarity` and share of `identity`,
    means over groups of channels, and the number of `constant` channels, which match nothing. With `points` it has the
    path's `alphas`, `loss` and `accuracy`, and what they were `judged_by`. Without a holdout that is the replayed
    memory, which the new network has fitted: it favours small alphas. `warnings` are signs that merging does not pay:
    "no interior maximum along the path", "accuracy dropped by merging", "degenerate matching" (constant channels).

    The paper leaves open how alpha is chosen; its own values were picked by test accuracy. Matching and
    re-estimation see the stored inputs without augmentation. The old network's function is kept exactly: all axes on
    one residual stream share one permutation (the released code's do not).
    """

    alpha: checks.Share | tuple[checks.Share, ...] | Literal["search"] = 0.3
    align: Literal["activations", "weights"] | None = "activations"
    statistic: Literal["pearson", "clewi2024"] = "pearson"
    refresh: bool = True
    points: checks.Index = 0
    when: Literal["always", "helps"] = "always"
    holdout: checks.Part | None = None

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.alpha == ():
            raise ValueError("alpha: () is empty; give a number in [0, 1], or one for each merge")
        searches, judged = self.alpha == "search", self.alpha == "search" or self.when == "helps"
        if searches and self.points in (1, 2):
            raise ValueError(f'points: {self.points!r} are too few for alpha="search"; give at least 3')
        object.__setattr__(self, "points", self.points or (11 if searches else 0))
        if self.holdout is None:
            object.__setattr__(self, "holdout", 0.2 if judged else 0.0)
        if judged and self.holdout == 0:
            raise ValueError('holdout: 0.0; give a share above 0, by which alpha="search" and when="helps" judge')

    @property
    def uses_symmetry(self) -> bool:
        """Whether it permutes units."""
        return self.align is not None

    def due(self, progress: Progress) -> bool:
        """At the end of every task but the first."""
        return progress.end and progress.task > 0

    def __call__(self, context: Context) -> Merged:
        """Permutes the previous weights onto the current ones, interpolates and re-estimates."""
        old, report = self.aligned(context)

        def at(alpha: float) -> Weights:
            mixed = lerp(context.current, old, alpha)
            return normalization.refresh(context.model, mixed, context.inputs) if self.refresh else mixed

        if self.alpha == "search" and context.score is None:
            raise ValueError('alpha: "search" has no labelled examples to judge by; use a learner with a memory')
        alpha = 0.0 if isinstance(self.alpha, str) else scheduled(self.alpha, context.progress.task - 1)
        if self.points and context.score is not None:
            grid = {i / (self.points - 1) for i in range(self.points)} if self.points > 1 else set()
            alphas = sorted(grid if self.alpha == "search" else grid | {alpha})
            scores = [context.score(at(alpha)) for alpha in alphas]
            if self.alpha == "search":
                alpha = alphas[scores.index(min(scores, key=lambda score: score.loss))]
            report |= {
                "alphas": alphas,
                "loss": [score.loss for score in scores],
                "accuracy": [score.accuracy for score in scores],
                "judged_by": "held-out memory" if context.held_out else "replayed memory",
            }
            if max(scores, key=lambda score: (score.accuracy, -score.loss)) in (scores[0], scores[-1]):
                report["warnings"].append("no interior maximum along the path")
            if scores[alphas.index(alpha)].accuracy < scores[0].accuracy:
                report["warnings"].append("accuracy dropped by merging")
        merged = at(alpha)
        if self.when == "helps" and context.score is not None:
            if context.score(merged).loss >= context.score(context.current).loss:
                return Merged(context.current, context.current, report | {"alpha": 0.0, "merged": False})
        return Merged(merged, merged, report | {"alpha": alpha, "merged": True})

    def aligned(self, context: Context) -> tuple[Weights, dict[str, Any]]:
        """The previous weights, permuted to look like the current ones, and a report on the matching.

        Raises ValueError for an empty memory.
        """
        if (self.align == "activations" or self.refresh) and not len(context.inputs):
            raise ValueError("inputs: the memory is empty where activations are needed; offer it examples first")
        if self.align is None:
            return context.previous, {"warnings": []}
        match = alignment.align(
            context.symmetry(),
            context.model,
            context.current,
            context.previous,
            context.inputs if self.align == "activations" else None,
            by=self.align,
            statistic=self.statistic,
        )
        report = {
            "similarity": mean(match.similarity.values()) if match.similarity else 1.0,
            "identity": mean(match.unmoved.values()) if match.unmoved else 1.0,
            "constant": sum(match.degenerate.values()),
            "warnings": ["degenerate matching"] if match.degenerate else [],
        }
        return alignment.permute(context.symmetry(), match.permutations, context.previous), report
