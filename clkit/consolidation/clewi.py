"""CLeWI: permute the previous network onto the current one, interpolate, re-estimate BatchNorm."""

from dataclasses import dataclass
from difflib import get_close_matches
from statistics import mean
from typing import Any

from clkit import alignment, normalization
from clkit.consolidation.base import Context, Merged, Progress
from clkit.weights import Weights, lerp


@dataclass(frozen=True)
class CLeWI:
    """Moves from the new weights towards the permuted old ones after every task but the first, and stays there.

    Kozal et al. 2024 (arXiv 2404.04002): theta <- (1 - alpha) theta + alpha pi(theta_old), then BatchNorm's statistics
    are estimated anew on the memory. alpha = 0 keeps the new weights, alpha = 1 the old ones.

    - `alpha`: one number; a sequence, one number a merge (the last one repeats); or "search": the position of the
      lowest loss among `points` evenly spaced ones, judged by `holdout` of the memory, which is then kept from replay,
      matching and re-estimation.
    - `align`: how pi is found, by "activations" (the paper), by "weights", or None for no permutation.
    - `statistic`: "pearson", the correlation that the paper describes, or "clewi2024", what its released code computes.
    - `refresh`: re-estimate BatchNorm; without it the running statistics are interpolated like everything else.
    - `points`: positions at which the path is judged for the report; 0 skips it (not with "search").
    - `when`: "always" merges after every task (the paper); "helps" only if that lowers the loss on the held-out part of
      the memory, and otherwise leaves the weights as trained.

    The report has the path's `alphas`, `loss` and `accuracy`, what they were `judged_by`; the matching's `similarity`
    and share of `identity` (means over groups of channels) and the number of `constant` channels, which match nothing;
    whether it `merged`; and `warnings`, the signs that merging does not pay: "no interior maximum along the path",
    "accuracy dropped by merging", "degenerate matching" (there are constant channels). Without a holdout the judge is
    the replayed memory, which the new network has fitted; it favours small alphas, and `judged_by` says so.

    The paper leaves open how alpha is chosen; its own values were picked by test accuracy. Matching and
    re-estimation see the stored inputs without augmentation. The old network's function is kept exactly: all axes on
    one residual stream share one permutation (the released code's do not).
    """

    alpha: float | tuple[float, ...] | str = 0.3
    align: str | None = "activations"
    statistic: str = "pearson"
    refresh: bool = True
    points: int = 11
    when: str = "always"
    holdout: float | None = None
    uses_history = False

    def __post_init__(self) -> None:
        if self.when not in ("always", "helps"):
            raise ValueError(f'when: {self.when!r} is unknown; choose "always" or "helps"')
        judged = self.alpha == "search" or self.when == "helps"
        if isinstance(self.alpha, str):
            if self.alpha != "search":
                raise ValueError(f'alpha: {self.alpha!r} is unknown; give numbers in [0, 1] or "search"')
            if self.points < 3:
                raise ValueError(f'points: {self.points!r} are too few for alpha="search"; give at least 3')
        else:
            alphas = (self.alpha,) if isinstance(self.alpha, int | float) else tuple(self.alpha)
            if not alphas or not all(isinstance(a, int | float) and 0 <= a <= 1 for a in alphas):
                raise ValueError(f"alpha: {self.alpha!r}; give numbers in [0, 1], 0 for the new weights, 1 for the old")
            object.__setattr__(self, "alpha", self.alpha if isinstance(self.alpha, int | float) else alphas)
        if self.align not in (None, "activations", "weights"):
            close = get_close_matches(str(self.align), ("activations", "weights"))
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f'align: {self.align!r} is unknown; choose "activations", "weights" or None{hint}')
        if self.statistic not in alignment.STATISTICS:
            raise ValueError(
                f"statistic: {self.statistic!r} is unknown; choose one of {', '.join(alignment.STATISTICS)}"
            )
        if self.points < 0:
            raise ValueError(f"points: {self.points!r}; give the number of positions to judge, 0 for none")
        if self.holdout is None:
            object.__setattr__(self, "holdout", 0.2 if judged else 0.0)
        if not 0 <= (self.holdout or 0) < 1 or (judged and self.holdout == 0):
            wanted = 'above 0 for alpha="search" and when="helps"'
            raise ValueError(f"holdout: {self.holdout!r}; give a share of the memory in [0, 1), {wanted}")

    def due(self, progress: Progress) -> bool:
        """At the end of every task but the first."""
        return progress.end and progress.task > 0

    def __call__(self, context: Context) -> Merged:
        """Permutes the previous weights onto the current ones, interpolates and re-estimates."""
        old, report = self.aligned(context)

        def at(alpha: float) -> Weights:
            mixed = lerp(context.current, old, alpha)
            return normalization.refresh(context.model, mixed, context.inputs) if self.refresh else mixed

        if context.score is not None and self.points:
            grid = {i / (self.points - 1) for i in range(self.points)} if self.points > 1 else set()
            alphas = sorted(grid if self.alpha == "search" else grid | {self._fixed(context.progress)})
            scores = [context.score(at(alpha)) for alpha in alphas]
            lowest = min(scores, key=lambda score: score.loss)
            highest = max(scores, key=lambda score: (score.accuracy, -score.loss))
            alpha = alphas[scores.index(lowest)] if self.alpha == "search" else self._fixed(context.progress)
            report |= {
                "alphas": alphas,
                "loss": [score.loss for score in scores],
                "accuracy": [score.accuracy for score in scores],
                "judged_by": "held-out memory" if context.held_out else "replayed memory",
            }
            if highest in (scores[0], scores[-1]):
                report["warnings"].append("no interior maximum along the path")
            if scores[alphas.index(alpha)].accuracy < scores[0].accuracy:
                report["warnings"].append("accuracy dropped by merging")
        else:
            alpha = self._fixed(context.progress)
        merged = at(alpha)
        if self.when == "helps" and context.score is not None:
            if context.score(merged).loss >= context.score(context.current).loss:
                return Merged(context.current, context.current, report | {"alpha": 0.0, "merged": False})
        return Merged(merged, merged, report | {"alpha": alpha, "merged": True})

    def aligned(self, context: Context) -> tuple[Weights, dict[str, Any]]:
        """The previous weights, permuted to look like the current ones, and a report on the matching."""
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
            "identity": mean(match.identity.values()) if match.identity else 1.0,
            "constant": sum(match.degenerate.values()),
            "warnings": ["degenerate matching"] if match.degenerate else [],
        }
        return alignment.permute(context.symmetry(), match.permutations, context.previous), report

    def _fixed(self, progress: Progress) -> float:
        if isinstance(self.alpha, tuple):
            return self.alpha[min(progress.task - 1, len(self.alpha) - 1)]
        assert not isinstance(self.alpha, str)
        return self.alpha
