"""What the loop and a consolidation tell each other, and the consolidation that does nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from clkit import alignment
from clkit.weights import Weights


class Progress(NamedTuple):
    """Where training stands: `step` of `steps` optimizer steps of task `task` are done; `end` once, after the last."""

    task: int
    step: int
    steps: int
    end: bool


class Score(NamedTuple):
    """How well weights do on the examples that a consolidation may be judged by."""

    loss: float
    accuracy: float


@dataclass(eq=False)
class Context:
    """All that a consolidation may look at.

    `model` is a scratch copy on the training device, free to be overwritten. `base` are the weights before the first
    task, `previous` those deployed after the last one, `current` those being trained, `history` those trained on each
    earlier task if the consolidation's `uses_history` is true. `inputs` are prepared inputs that the learner lets
    it see; `score` judges weights by labelled examples, held out of replay if the consolidation's `holdout` is above 0
    and the learner has a memory, and is None where the learner has nothing to judge by. `losses` are those of the
    task's steps so far, `gradients` gives the last step's by parameter name. `second_moment` is Adam's, by parameter
    name, if that is the optimizer, and None before its first step; divided by `moment_scale`, 1 - beta2^n after n
    steps, it is free of Adam's bias to zero. `memo` is what the consolidation itself returned last, None at first.
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
    """The two questions that the loop asks, and what a consolidation needs to answer them.

    One that reads Adam's second moments has a true `uses_moments` besides; another optimizer is then refused. One that
    not every network suits has a `check(model, x)`, which raises ValueError: it is called with a scratch copy and one
    prepared input before anything is trained.
    """

    @property
    def holdout(self) -> float | None:
        """The share of a memory to keep from replay, for judging by; None or 0 for none."""
        ...

    @property
    def uses_history(self) -> bool:
        """Whether the weights trained on all earlier tasks are to be kept."""
        ...

    def due(self, progress: Progress) -> bool:
        """Whether to combine weights now."""
        ...

    def __call__(self, context: Context) -> Merged:
        """Combines weights."""
        ...


@dataclass(frozen=True)
class NoConsolidation:
    """Leaves the weights as they were trained: the identity of the family."""

    holdout = 0.0
    uses_history = False

    def due(self, progress: Progress) -> bool:
        """Never."""
        return False

    def __call__(self, context: Context) -> Merged:
        """Trains on from, and deploys, the current weights."""
        return Merged(context.current, context.current)


def share(name: str, value: object, *, of: str) -> float:
    """A number in [0, 1], or a ValueError that says what 0 and 1 would mean."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}: {value!r}; give a number in [0, 1], {of}")
    return value
