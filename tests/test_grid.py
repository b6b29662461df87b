"""Any learner goes with any consolidation: laws over all pairs, and over all learners."""

import functools
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest

import test_consolidation
import test_learners
import toys
from clkit.consolidation import Merged
from clkit.data import Examples, Stream
from clkit.learners import PerTask
from clkit.training import Result, Training
from clkit.weights import combine, equal, lerp
from toys import quick

pytestmark = pytest.mark.usefixtures("one_symmetry")
LEARNERS = test_learners.SETTINGS
FINE_TUNE_FIRST = {
    "fine-tuning",
    "joint",
    "data buffer",
    "data buffer half",
    "memory only",
    "ER herding",
    "ER-ACE",
    "A-GEM",
    "GEM",
    "L2",
    "decoupled L2",
    "EWC",
    "EWC true labels",
    "online EWC",
    "SI",
    "MAS",
    "LwF",
}
"""The learners whose rule leaves the first task to plain fine-tuning; the others replay from its first steps on."""
ONE_TASK_A_CLASS = {"iCaRL"}
"""The learners that refuse streams whose tasks share classes."""


@dataclass(frozen=True)
class Averaged:
    """Deploys the mean of the previous and the current weights, and trains on as if nothing had happened."""

    def due(self, progress):
        return progress.end

    def __call__(self, context):
        return Merged(context.current, lerp(context.previous, context.current, 0.5))


@dataclass(frozen=True)
class Independent:
    """Trains every task from the base weights and deploys the mean of what came of them."""

    uses_history = True

    def due(self, progress):
        return progress.end

    def __call__(self, context):
        tasks = [*context.history, context.current]
        return Merged(context.base, combine(tasks, [1 / len(tasks)] * len(tasks)))


def brief(consolidation):
    """The same, judging few positions on its path: most of the time of these runs would go there."""
    return replace(consolidation, points=3) if getattr(consolidation, "points", 0) > 3 else consolidation


CONSOLIDATIONS = {name: brief(c) for name, c in test_consolidation.SETTINGS.items()}
CONSOLIDATIONS |= {"averaged": Averaged(), "independent": Independent()}


def grid_run(learner: str, consolidation: str, stream: Stream | None = None) -> Result:
    settings = LEARNERS[learner], CONSOLIDATIONS[consolidation]
    return quick(stream or toys.images(3, 16), *settings, model=toys.small_convnet, training=Training(1, 8, 0.05))


cached_run = functools.cache(grid_run)


@pytest.mark.parametrize("consolidation", CONSOLIDATIONS)
@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_with_every_consolidation(learner, consolidation):
    rule, merge = LEARNERS[learner], CONSOLIDATIONS[consolidation]
    if getattr(merge, "holdout", 0) and not rule.remembers:
        with pytest.raises(ValueError, match=f"holdout: .* {re.escape(repr(rule))} keeps none"):
            grid_run(learner, consolidation)
        return
    if isinstance(rule, PerTask) and getattr(merge, "correction", "none") != "none":
        with pytest.raises(ValueError, match=r'projection: no linear layer .* or use correction="none"'):
            grid_run(learner, consolidation)  # the network is frozen
        return
    first, again = cached_run(learner, consolidation), grid_run(learner, consolidation)
    assert (first.config["learner"], first.config["consolidation"]) == (repr(rule), repr(merge))
    assert np.array_equal(first.accuracy, again.accuracy) and np.array_equal(first.losses, again.losses)
    assert np.isfinite(first.losses).all() and first.reports == again.reports
    for part in ("weights", "trained"):
        assert all(equal(a, b) for a, b in zip(getattr(first, part), getattr(again, part), strict=True))


@pytest.mark.parametrize("learner", LEARNERS)
class TestLearner:
    def test_a_deploy_only_consolidation_leaves_training_bit_identical(self, learner):
        plain, deployed = cached_run(learner, "none"), cached_run(learner, "averaged")
        assert all(np.array_equal(a, b) for a, b in zip(plain.training_loss, deployed.training_loss, strict=True))
        assert all(equal(a, b) for a, b in zip(plain.trained, deployed.trained, strict=True))
        assert not any(equal(a, b) for a, b in zip(plain.weights, deployed.weights, strict=True))

    def test_the_first_task_does_not_depend_on_what_is_made_of_it_later(self, learner):
        plain, independent = cached_run(learner, "none"), cached_run(learner, "independent")
        assert equal(plain.trained[0], independent.trained[0]) and equal(plain.weights[0], independent.weights[0])

    def test_the_first_task_is_fine_tuning_where_the_rule_says_so(self, learner):
        first, fine_tuned = (cached_run(name, "none").trained[0] for name in (learner, "fine-tuning"))
        assert equal(first, fine_tuned) == (learner in FINE_TUNE_FIRST)

    @pytest.mark.parametrize("scenario", ["domain", "task"])
    def test_it_runs_in_the_other_scenarios(self, learner, scenario):
        if scenario == "domain" and learner in ONE_TASK_A_CLASS:
            with pytest.raises(ValueError, match="stream: some classes come in more than one task"):
                grid_run(learner, "none", scenario_of(scenario))
            return
        result = grid_run(learner, "CLeWI without alignment", scenario_of(scenario))
        assert ((result.accuracy >= 0) & (result.accuracy <= 1)).all() and np.isfinite(result.losses).all()
        assert scenario == "domain" or np.array_equal(result.accuracy, result.masked)


@functools.cache
def scenario_of(scenario: str) -> Stream:
    """The toy pictures with the task given, or with the same two classes in every task."""
    stream = toys.images(3, 16)
    if scenario == "task":
        return replace(stream, scenario="task")

    def halved(part: Examples) -> Examples:
        return Examples(part.x, part.y % 2)

    tasks = (replace(task, classes=(0, 1), train=halved(task.train), test=halved(task.test)) for task in stream)
    return Stream("domains", tuple(tasks), ("even", "odd"), "domain")
