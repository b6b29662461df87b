"""What the loop and a consolidation tell each other, and the consolidation that does nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

from torch import Tensor, nn

from clkit import alignment, checks
from clkit.evaluation import Score
from clkit.weights import Weights

Alpha = Annotated[float, checks.Range(0, 1, means="0 for the old weights, 1 for the new")]


class Progress(NamedTuple):
    """Where training stands: `step` of `steps` optimizer steps of task `task` are done; `end` once, after the last."""

    task: int
    step: int
    steps: int
    end: bool


class Context:
    """All that a consolidation may look at, by attribute.

    What takes work is made when it is first asked for, by a function in `later` under the attribute's name; the other
    attributes are given. Raises AttributeError for one that is neither, and for one that is first asked for when the
    consolidation has returned.

    - `model`: a scratch copy on the training device, in evaluation mode, free to be overwritten
    - `base`: the weights before the first task; `previous`: those deployed after the last one; `current`: those being
      trained; `history`: those trained on each earlier task, if the consolidation's `uses_history` is true
    - `inputs` (N, ...): prepared inputs that the learner lets it see
    - `score`: judges weights by labelled examples, None where the learner has none. `held_out` says whether these are
      kept from replay: the share `holdout` of the learner's memory, if it has one
    - `progress`, and `losses` (step,), the loss of every step of the task so far
    - `gradients()`: those of the last step, by parameter name
    - `second_moment`: Adam's running mean of squared gradients, by parameter name; None for another optimizer and
      before the first step. Divided by `moment_scale`, 1 - beta2^n after n steps, it is free of Adam's bias to zero
    - `symmetry()`: the permutation symmetry of the model
    - `memo`: what the consolidation itself returned last, None at first
    """

    model: nn.Module
    base: Weights
    previous: Weights
    current: Weights
    history: Sequence[Weights]
    inputs: Tensor
    progress: Progress
    score: Callable[[Weights], Score] | None
    held_out: bool
    losses: Tensor
    gradients: Callable[[], Weights]
    second_moment: Weights | None
    moment_scale: Mapping[str, float]
    symmetry: Callable[[], alignment.Symmetry]
    memo: Any

    def __init__(self, later: dict[str, Callable[[], Any]] | None = None, **given: Any) -> None:
        vars(self).update(given, later=later or {})

    def __getattr__(self, name: str) -> Any:
        if name not in vars(self).get("later", ()):
            what = ", ".join(Context.__annotations__)
            raise AttributeError(f"context: {name!r} is not there; ask for one of {what}, during the call")
        vars(self)[name] = found = self.later[name]()
        return found


def scheduled(weight: float | tuple[float, ...], merge: int) -> float:
    """The weight of the merge that is number `merge`, from 0: of several, one a merge, the last one repeats."""
    return weight[min(merge, len(weight) - 1)] if isinstance(weight, tuple) else weight


class Merged(NamedTuple):
    """What a consolidation returns: weights to train on from, weights to deploy, and what to report about them.

    `deploy` counts at the end of a task alone, and the last report of a task is its report. `memo`, a tree of tensors
    and plain values, is handed back at the next call: the only state that a consolidation has. `fresh` makes the
    optimizer forget its state.
    """

    train: Weights
    deploy: Weights
    report: Mapping[str, Any] = {}
    memo: Any = None
    fresh: bool = False


class Consolidation(Protocol):
    """The two questions that the loop asks. What a consolidation needs to answer them it may say besides:

    - `holdout`: the share of the learner's memory to keep from replay, for judging by
    - `uses_history`: true, if the weights trained on all earlier tasks are to be kept
    - `uses_moments`: true, if it reads Adam's second moments; another optimizer is then refused
    - `uses_symmetry`: true, if it permutes units; a network that has no symmetry to be found is then refused
    - `check(model, x)`: raises ValueError for a network that it does not suit; called with a scratch copy and two
      prepared inputs before anything is trained
    """

    def due(self, progress: Progress) -> bool:
        """Whether to combine weights now."""
        ...

    def __call__(self, context: Context) -> Merged:
        """Combines weights."""
        ...


@dataclass(frozen=True)
class NoConsolidation:
    """Leaves the weights as they were trained: the identity of the family."""

    def due(self, progress: Progress) -> bool:
        """Never."""
        return False

    def __call__(self, context: Context) -> Merged:
        """Trains on from, and deploys, the current weights."""
        return Merged(context.current, context.current)
