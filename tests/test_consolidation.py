"""Every consolidation keeps the contract of the family; then what each one is."""

import copy
import functools
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import toys
from clkit import alignment, normalization
from clkit.consolidation import (
    CONSOLIDATIONS,
    EMA,
    HCMM,
    SFA,
    CLeWI,
    Cosine,
    Drift,
    Merged,
    Merging,
    NoConsolidation,
    Plateau,
    Progress,
    Velocity,
    WiSEFT,
)
from clkit.data import Stream
from clkit.experiments import sweep
from clkit.learners import ER, Learner
from clkit.merging import MERGES, Merge
from clkit.store import describe
from clkit.training import Result, Training
from clkit.weights import equal, get_weights, is_statistic, lerp, statistics
from toys import quick

pytestmark = pytest.mark.usefixtures("one_symmetry")
SETTINGS = {
    "none": NoConsolidation(),
    "CLeWI": CLeWI(alpha=0.4, points=11),
    "CLeWI without alignment": CLeWI(alpha=0.4, align=None, points=0),
    "CLeWI by weights": CLeWI(alpha=0.4, align="weights", refresh=False),
    "CLeWI as released": CLeWI(alpha=0.4, statistic="clewi2024"),
    "CLeWI schedule": CLeWI(alpha=(0.2, 0.3), points=3),
    "CLeWI search": CLeWI(alpha="search", points=5, holdout=0.3),
    "CLeWI if it helps": CLeWI(alpha=0.4, points=0, when="helps", holdout=0.3),
    "SFA": SFA(p=0.5, beta=0.3),
    "SFA at the end": SFA(p=1.0),
    "SFA from the first task on": SFA(p=0.3, first=True, optimizer="reset"),
    "SFA re-estimated": SFA(p=0.5, refresh=True, own=("linear", "backbone.linear")),
    "SFA equal parts": SFA(p=1.0, beta="equal", untouched="keep"),
    "SFA uniform anchor": SFA(p=0.5, beta=(0.5, 0.7), anchor="uniform", include_base=True),
    "SFA two anchors": SFA(p=0.5, anchor=(0.7, 0.3), final=False),
    "SFA drift": SFA(p=Drift(times=6, limit=0.01)),
    "SFA plateau": SFA(p=Plateau(times=6)),
    "SFA velocity": SFA(p=Velocity(times=6), anchor="recency"),
    "SFA cosine": SFA(p=Cosine(times=6, limit=0.5)),
    "HCMM by Fisher": HCMM(importance="fisher", correction="none"),
    "HCMM by Fisher corrected": HCMM(0.6, "fisher", "sum", "ridge", "both", refresh=True),
    "HCMM plain": HCMM(importance="none", correction="none"),
    "HCMM plain corrected": HCMM(importance="none", correction="steps", loss="cosine", correction_lr=0.01),
    "WiSE-FT": WiSEFT(),
    "WiSE-FT from the base": WiSEFT(alpha=0.7, old="base"),
    "merging": Merging(),
    "merging independent": Merging("task_arithmetic", {"scale": 0.4}, training="independent"),
    "EMA": EMA(0.9),
    "mean of the steps": EMA(None, every=2),
}
FROM_THE_FIRST = {"SFA from the first task on", "EMA", "mean of the steps"}
"""Those that change the first task's weights, too."""
WITHIN = {name for name, c in SETTINGS.items() if isinstance(c, SFA | EMA)}
"""Those that are due within a task."""
DEPLOY_ONLY = {"none", "WiSE-FT", "WiSE-FT from the base", "merging", "EMA", "mean of the steps"}
"""Those that leave training as it is."""


@pytest.fixture(scope="module")
def toy() -> Stream:
    return toys.images()


def convnet(stream, consolidation, learner=None, **more):
    return quick(stream, learner or ER(memory=12), consolidation, model=toys.small_convnet, **more)


@functools.cache
def ran(consolidation, tasks: int = 3) -> Result:
    """A run that several tests read."""
    return convnet(toys.images(tasks), consolidation)


def test_every_consolidation_is_in_the_contract_suite():
    assert {type(c) for c in SETTINGS.values()} == set(CONSOLIDATIONS.values())


@pytest.mark.parametrize("name", SETTINGS)
class TestContract:
    def test_the_record_makes_the_same_settings_again(self, name):
        assert eval(repr(SETTINGS[name])) == SETTINGS[name]
        assert hash(SETTINGS[name]) == hash(eval(repr(SETTINGS[name])))

    def test_the_first_task_is_that_of_the_base_method(self, name):
        consolidation = SETTINGS[name]
        result = ran(consolidation, tasks=1)
        same = equal(result.weights[0], result.trained[0])
        assert same == (name not in FROM_THE_FIRST)
        if not getattr(consolidation, "holdout", 0) and same:
            assert equal(result.weights[0], ran(None, tasks=1).weights[0])

    def test_only_ends_of_tasks_after_the_first_are_due_at_most(self, name):
        due = SETTINGS[name].due
        within = {step for step in range(1, 7) if due(Progress(2, step, 6, False))}
        assert bool(within) == (name in WITHIN and name != "SFA at the end" and "equal parts" not in name)
        assert name in FROM_THE_FIRST or not any(due(Progress(0, step, 6, False)) for step in range(1, 7))

    def test_training_is_left_alone_where_it_is_said_to_be(self, name):
        if getattr(SETTINGS[name], "holdout", 0):
            pytest.skip("training replays less of the memory")
        plain, result = ran(None), ran(SETTINGS[name])
        same = all(equal(a, b) for a, b in zip(plain.trained, result.trained, strict=True))
        assert same == (name in DEPLOY_ONLY)

    def test_it_goes_on_from_a_checkpoint(self, toy, name, tmp_path):
        class Stop(ER):
            def begin_task(self, model, task):
                super().begin_task(model, task)
                if task.index == 2 and not (tmp_path / "again").exists():
                    (tmp_path / "again").touch()
                    raise KeyboardInterrupt

        path = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            convnet(toy, SETTINGS[name], Stop(memory=12), checkpoint=path)
        resumed, whole = convnet(toy, SETTINGS[name], Stop(memory=12), checkpoint=path), ran(SETTINGS[name])
        assert all(equal(a, b) for a, b in zip(resumed.weights, whole.weights, strict=True))
        assert resumed.reports == whole.reports and not equal(whole.weights[1], whole.weights[2])

    def test_variances_stay_positive(self, name):
        for w in ran(SETTINGS[name]).weights:
            assert all((t > 0).all() for n, t in w.items() if n.endswith("running_var"))

    def test_a_report_can_be_written_as_json(self, name):
        for report in ran(SETTINGS[name]).reports:
            assert json.loads(json.dumps(report)) == report


AVERAGES = [
    *(Merging(name, refresh=False) for name, row in MERGES.items() if row.needs is None),
    Merging("task_arithmetic", {"scale": 2.0}, "independent", refresh=False),
    WiSEFT(0.3), WiSEFT(0.6, old="base"), SFA(p=1.0), SFA(p=1.0, anchor=(0.7, 0.3)), SFA(p=1.0, anchor="uniform"),
    SFA(p=1.0, beta="equal", include_base=True, anchor="recency"), CLeWI(0.3, align=None, refresh=False),
]  # fmt: skip


@pytest.mark.parametrize("rule", AVERAGES, ids=repr)
def test_statistics_lie_between_those_that_were_trained_or_deployed(rule):
    result = ran(rule)
    for t, deployed in enumerate(result.weights):
        inputs = [get_weights(toys.small_convnet(toys.images())), *result.trained[: t + 1], *result.weights[:t]]
        for name in statistics(deployed):
            low, high = (end(torch.stack([w[name] for w in inputs]), 0) for end in (torch.amin, torch.amax))
            slack = 1e-6 * (high - low) + 1e-7
            assert (deployed[name] >= low - slack).all() and (deployed[name] <= high + slack).all()


@dataclass(frozen=True)
class Watched:
    """A consolidation, and whether it left what it was given as it was."""

    inner: object
    uses_history = property(lambda self: getattr(self.inner, "uses_history", False))

    def due(self, progress):
        return self.inner.due(progress)

    def __call__(self, context):
        given = {name: getattr(context, name) for name in ("base", "previous", "current")}
        before = copy.deepcopy((given, context.inputs, context.memo))
        merged = self.inner(context)
        assert all(equal(given[name], before[0][name]) for name in given) and torch.equal(context.inputs, before[1])
        assert str(context.memo) == str(before[2])
        return merged


@pytest.mark.parametrize("name", [n for n, c in SETTINGS.items() if not getattr(c, "holdout", 0)])
def test_what_a_consolidation_is_given_stays_as_it_was(toy, name):
    convnet(toy, Watched(SETTINGS[name]))


def trimmed(ws, *, base, share=0.5):
    """A merge of one's own: the mean task vector, shortened."""
    return {n: b + share * sum(w[n] - b for w in ws) / len(ws) for n, b in base.items()}


class TestOpenDoors:
    def test_a_function_merges(self, toy):
        rule = Merging(trimmed, {"share": 0.25})
        settings = "options=(('share', 0.25),), training='sequential', holdout=0.0, refresh=True"
        assert repr(rule) == f"Merging(merge=trimmed, {settings})"
        result, net = convnet(toy, rule), toys.small_convnet(toy)
        base, inputs = get_weights(net), result.inputs
        assert equal(result.weights[0], result.trained[0])
        for t, deployed in list(enumerate(result.weights))[1:]:
            wanted = normalization.refresh(net, trimmed(result.trained[: t + 1], base=base, share=0.25), inputs[t])
            assert all(torch.allclose(deployed[n], w, atol=1e-6) for n, w in wanted.items())

    def test_statistics_are_averaged_where_they_are_not_re_estimated(self, toy):
        result = convnet(toy, Merging("task_arithmetic", {"scale": 2.0}, refresh=False))
        for t, deployed in enumerate(result.weights):
            for name in filter(is_statistic, deployed):
                torch.testing.assert_close(deployed[name], sum(w[name] for w in result.trained[: t + 1]) / (t + 1))

    @pytest.mark.parametrize(("merge", "kept"), [("wise_ft", 0), ("slerp", 0), ("average", 3), (trimmed, 3)])
    def test_no_more_weights_are_kept_than_the_merge_takes(self, toy, merge, kept):
        assert len(quick(toy, None, Merging(merge)).state["history"]) == kept

    def test_a_function_is_given_what_it_needs(self, toy):
        """A score judges the parameters that the merge tries, with the statistics that go with the result."""

        def best(ws, *, score):
            assert not any(map(is_statistic, ws[0]))
            return dict(max(ws, key=score))

        result = convnet(toy, Merging(best))
        assert Merging(best).holdout == 0.2 and len(result.weights) == 3
        kept = {name: w for name, w in result.weights[2].items() if not is_statistic(name)}
        assert any(equal(kept, {name: w[name] for name in kept}) for w in result.trained)

    @pytest.mark.parametrize(
        ("merge", "message"),
        [
            (lambda ws: {}, "have different names"),
            (lambda ws: {n: t.flatten() for n, t in ws[0].items()}, "differ in the shape of"),
            (lambda ws: {n: t / 0 * 0 for n, t in ws[0].items()}, "of what it gave is not a number"),
            (lambda ws: "weights", "a merge gives a mapping"),
        ],
    )
    def test_a_merge_of_ones_own_is_tried_before_anything_is_trained(self, toy, merge, message):
        class Untrained(Learner):
            def loss(self, model, batch):
                raise AssertionError("a step was taken")

        with pytest.raises(ValueError, match=message):
            quick(toy, Untrained(), Merging(merge))

    def test_a_function_without_weights_is_no_merge(self):
        with pytest.raises(ValueError, match="takes no weights"):
            Merging(lambda: {})

    def test_a_row_of_ones_own_merges_by_its_name(self, toy, monkeypatch):
        monkeypatch.setitem(MERGES, "trimmed", Merge(trimmed))
        by_name, by_function = (convnet(toy, Merging(merge)) for merge in ("trimmed", trimmed))
        assert all(equal(a, b) for a, b in zip(by_name.weights, by_function.weights, strict=True))

    def test_an_edited_merge_is_another_run_by_its_name_too(self, toy, monkeypatch, tmp_path):
        def doubled(ws, *, base, share=0.5):
            return trimmed(ws, base=base, share=2 * share)

        def runs():
            methods, more = {"m": (Learner(), Merging("trimmed"))}, {"jobs": 1, "device": "cpu", "progress": False}
            return sweep(toy, toys.small_convnet, methods, training=short, store=tmp_path, **more)["hash"].tolist()

        short = Training(epochs=1)
        more = {"training": short, "checkpoint": tmp_path / "run"}
        monkeypatch.setitem(MERGES, "trimmed", Merge(trimmed))
        first, made = runs(), Merging("trimmed")
        assert runs() == first
        convnet(toy, made, **more)
        monkeypatch.setitem(MERGES, "trimmed", Merge(doubled))
        assert runs() != first and describe(made) != describe(Merging("trimmed"))
        convnet(toy, made, **more)
        with pytest.raises(ValueError, match=r"another run .*consolidation row function: .* there, .* here"):
            convnet(toy, Merging("trimmed"), **more)

    @pytest.mark.parametrize(
        ("options", "message"), [({"shrae": 1}, "'shrae' is unknown; .* did you mean 'share'"), ({}, "lack 'strength'")]
    )
    def test_options_are_checked_before_any_work(self, options, message):
        def lacking(ws, *, strength, share=1):
            return ws[0]

        with pytest.raises(ValueError, match=message):
            Merging(lacking, options)

    def test_a_consolidation_needs_two_methods(self, toy):
        class Halfway:
            def due(self, progress):
                return progress.end

            def __call__(self, context):
                half = lerp(context.previous, context.current, 0.5)
                return Merged(half, half, {"seen": len(context.inputs)}, memo={"task": context.progress.task})

        result = convnet(toy, Halfway())
        assert equal(result.weights[2], lerp(result.weights[1], result.trained[2], 0.5))
        assert result.reports == [{"seen": 12}] * 3


class TestCLeWI:
    def test_the_path_is_judged_where_points_are_given_or_alpha_is_searched(self):
        assert CLeWI(0.3) == CLeWI(0.3, points=0) and "points=0" in repr(CLeWI(0.3))
        assert "points=11" in repr(CLeWI("search")) and CLeWI("search", points=5).points == 5
        assert CLeWI("search") == CLeWI("search", points=0) == eval(repr(CLeWI("search")))

    def test_a_merge_is_permute_interpolate_re_estimate(self, toy):
        """The reference twin, step by step from the weights that the run kept."""
        result = convnet(toy, CLeWI(alpha=0.4))
        net = toys.small_convnet(toy)
        symmetry = alignment.symmetry(net, toy[0].prepare(toy[0].train.x[:2]))
        inputs = result.learner.examples(toy[2]).x
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
        plain, zero = ran(None), convnet(toy, CLeWI(alpha=0, refresh=False))
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
