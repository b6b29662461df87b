"""Every consolidation keeps the contract of the family; then what each one is."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import toys
from toys import quick

from clkit import alignment, normalization
from clkit.consolidation import CONSOLIDATIONS, CLeWI, NoConsolidation, Progress
from clkit.data import Stream
from clkit.learners import ER, Learner
from clkit.weights import equal, lerp

SETTINGS = {
    "none": NoConsolidation(),
    "CLeWI": CLeWI(alpha=0.4),
    "CLeWI without alignment": CLeWI(alpha=0.4, align=None, points=0),
    "CLeWI by weights": CLeWI(alpha=0.4, align="weights", refresh=False),
    "CLeWI as released": CLeWI(alpha=0.4, statistic="clewi2024"),
    "CLeWI schedule": CLeWI(alpha=(0.2, 0.3), points=3),
    "CLeWI search": CLeWI(alpha="search", points=5, holdout=0.3),
    "CLeWI if it helps": CLeWI(alpha=0.4, points=0, when="helps", holdout=0.3),
}


@pytest.fixture(scope="module")
def toy() -> Stream:
    return toys.images()


def convnet(stream, consolidation, learner=None, **more):
    return quick(stream, learner or ER(memory=12), consolidation, model=toys.small_convnet, **more)


def test_every_consolidation_is_in_the_contract_suite():
    assert {type(c) for c in SETTINGS.values()} == set(CONSOLIDATIONS.values())


@pytest.mark.parametrize("name", SETTINGS)
class TestContract:
    def test_the_record_makes_the_same_settings_again(self, name):
        assert eval(repr(SETTINGS[name])) == SETTINGS[name]
        assert hash(SETTINGS[name]) == hash(eval(repr(SETTINGS[name])))

    def test_the_first_task_is_that_of_the_base_method(self, toy, name):
        consolidation = SETTINGS[name]
        result = convnet(toys.images(tasks=1), consolidation)
        if not consolidation.holdout:
            assert equal(result.weights[0], convnet(toys.images(tasks=1), None).weights[0])
        assert equal(result.weights[0], result.trained[0]) and result.reports == [{}]

    def test_only_ends_of_tasks_after_the_first_are_due_at_most(self, name):
        due = SETTINGS[name].due
        assert not due(Progress(0, 6, 6, True)) and not due(Progress(2, 6, 6, False))


@dataclass(frozen=True)
class Watched:
    """A consolidation, and whether it left what it was given as it was."""

    inner: object
    holdout = uses_history = property(lambda self: 0.0)

    def due(self, progress):
        return self.inner.due(progress)

    def __call__(self, context):
        given = {name: getattr(context, name) for name in ("base", "previous", "current")}
        before = copy.deepcopy((given, context.inputs))
        merged = self.inner(context)
        assert all(equal(given[name], before[0][name]) for name in given) and torch.equal(context.inputs, before[1])
        assert not {t.data_ptr() for t in merged.train.values()} & {t.data_ptr() for t in context.previous.values()}
        return merged


@pytest.mark.parametrize("name", [n for n, c in SETTINGS.items() if not c.holdout])
def test_what_a_consolidation_is_given_stays_as_it_was(toy, name):
    convnet(toy, Watched(SETTINGS[name]))


class TestCLeWI:
    def test_a_merge_is_permute_interpolate_re_estimate(self, toy):
        """The reference twin, step by step from the weights that the run kept."""
        result = convnet(toy, CLeWI(alpha=0.4))
        net = toys.small_convnet(toy)
        symmetry = alignment.symmetry(net, toy[0].prepare(toy[0].train.x[:2]))
        inputs = result.learner.inputs(toy[2])
        current, previous = result.trained[2], result.weights[1]
        match = alignment.align(symmetry, net, current, previous, inputs)
        old = alignment.permute(symmetry, match.permutations, previous)
        expected = normalization.refresh(net, lerp(current, old, 0.4), inputs)
        assert equal(result.weights[2], expected)

    def test_alpha_0_changes_nothing_but_the_statistics(self, toy):
        result = convnet(toy, CLeWI(alpha=0))
        for t in (1, 2):
            for name, tensor in result.trained[t].items():
                assert torch.equal(tensor, result.weights[t][name]) == ("running" not in name), name

    def test_alpha_0_without_re_estimation_is_no_consolidation(self, toy):
        plain, zero = convnet(toy, None), convnet(toy, CLeWI(alpha=0, refresh=False))
        assert all(equal(a, b) for a, b in zip(plain.weights, zero.weights, strict=True))

    def test_alpha_1_is_the_old_function(self, toy):
        result = convnet(toy, CLeWI(alpha=1, refresh=False))
        net = toys.small_convnet(toy)
        x = toy[0].prepare(toy[0].test.x)
        outputs = [torch.func.functional_call(net.eval(), dict(w), x) for w in result.weights]
        assert torch.allclose(outputs[0], outputs[1], atol=1e-4) and torch.allclose(outputs[0], outputs[2], atol=1e-4)

    def test_mixing_a_network_with_itself_gives_it_back(self, toy):
        result = convnet(toy, None, training=toys.Training(epochs=0, batch=8))
        merged = convnet(
            toy, CLeWI(alpha=0.3, refresh=False), training=toys.Training(epochs=0, batch=8), learner=Learner()
        )
        for name, tensor in result.weights[0].items():
            assert torch.allclose(tensor, merged.weights[2][name], rtol=1e-6, atol=1e-7)

    def test_a_schedule_goes_merge_by_merge_and_its_last_value_repeats(self):
        stream = toys.images(tasks=4)
        result = convnet(stream, CLeWI(alpha=(0.2, 0.3), points=0))
        assert [report["alpha"] for report in result.reports[1:]] == [0.2, 0.3, 0.3]

    def test_search_takes_the_lowest_held_out_loss_of_the_path(self, toy):
        result = convnet(toy, CLeWI(alpha="search", points=5, holdout=0.3))
        for report in result.reports[1:]:
            assert report["alphas"] == [0, 0.25, 0.5, 0.75, 1]
            assert report["alpha"] == report["alphas"][int(np.argmin(report["loss"]))]
            assert report["judged_by"] == "held-out memory"

    def test_the_path_judged_is_the_path_taken(self, toy):
        """A search that lands on alpha and alpha itself, given the same holdout, deploy the same bits."""
        found = convnet(toy, CLeWI(alpha="search", points=5, holdout=0.3))
        alphas = tuple(report["alpha"] for report in found.reports[1:])
        given = convnet(toy, CLeWI(alpha=alphas, points=0, holdout=0.3))
        assert all(equal(a, b) for a, b in zip(found.weights, given.weights, strict=True))

    @pytest.mark.parametrize("alpha", [0.1, 1.0])
    def test_merging_only_if_it_helps_never_raises_the_held_out_loss(self, toy, alpha):
        losses = []

        class Judged(CLeWI):
            def __call__(self, context):
                merged = super().__call__(context)
                scores = [context.score(w).loss for w in (context.current, merged.deploy)]
                losses.append((*scores, merged.report["merged"], merged.deploy is context.current))
                return merged

        convnet(toy, Judged(alpha=alpha, points=0, when="helps", holdout=0.3))
        for current, deployed, merged, same in losses:
            assert deployed < current if merged else same
        assert len(losses) == 2 and {merged for *_, merged, _ in losses} <= {True, False}

    def test_judging_the_path_does_not_change_the_result(self, toy):
        a, b = convnet(toy, CLeWI(alpha=0.4, points=11)), convnet(toy, CLeWI(alpha=0.4, points=0))
        assert all(equal(x, y) for x, y in zip(a.weights, b.weights, strict=True))

    def test_the_old_end_of_the_path_does_not_raise_new_classes(self, toy):
        report = convnet(toy, CLeWI(alpha=1, points=2)).reports[1]
        assert "no interior maximum along the path" in report["warnings"]

    def test_a_report_can_be_written_as_json(self, toy):
        import json

        for report in convnet(toy, CLeWI(alpha=0.4)).reports:
            assert json.loads(json.dumps(report)) == report

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": 1.2}, "alpha: 1.2"),
            ({"alpha": float("nan")}, "alpha: nan"),
            ({"alpha": ()}, "alpha: \\(\\)"),
            ({"alpha": (0.2, -1)}, "alpha"),
            ({"alpha": "serach"}, "'serach' is unknown"),
            ({"align": "activation"}, "did you mean 'activations'"),
            ({"statistic": "spearman"}, "'spearman' is unknown"),
            ({"points": -1}, "points: -1"),
            ({"alpha": "search", "points": 2}, "too few"),
            ({"alpha": "search", "holdout": 0.0}, "holdout: 0.0"),
            ({"holdout": 1.0}, "holdout: 1.0"),
            ({"when": "sometimes"}, "'sometimes' is unknown"),
            ({"when": "helps", "holdout": 0.0}, "holdout: 0.0"),
        ],
    )
    def test_bad_settings_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CLeWI(**settings)

    def test_an_empty_memory_is_named(self, toy):
        class Amnesiac(ER):
            def after_step(self, model, batch):
                pass

        with pytest.raises(ValueError, match="the memory is empty where activations are needed"):
            convnet(toy, CLeWI(), Amnesiac(memory=5))

    def test_bad_arguments_are_met_before_training(self, toy):
        class Never(Learner):
            def loss(self, model, batch):
                raise AssertionError("training started")

        with pytest.raises(ValueError, match="keeps none; use a learner with a memory"):
            convnet(toy, CLeWI(alpha="search"), Never())
