"""SFA, its merge steps, anchors and triggers, and the consolidations that only deploy."""

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from clkit import merging
from clkit.consolidation import (
    EMA,
    SFA,
    Cosine,
    Drift,
    Merging,
    Plateau,
    Progress,
    Velocity,
    WiSEFT,
    merge_steps,
)
from clkit.consolidation.sfa import Since, distance
from clkit.learners import ER, Learner
from clkit.training import Training
from clkit.weights import add, combine, equal, lerp, norm, sub
from toys import QUICK, quick

EPOCHS = Training(epochs=3, batch=8, lr=0.05, momentum=0.9)


@pytest.fixture(scope="module")
def toy():
    return toys.stream()


@pytest.fixture(scope="module")
def plain(toy):
    return quick(toy, training=EPOCHS)


def sfa(stream, training=EPOCHS, learner=None, **options):
    return quick(stream, learner, SFA(**options), training=training)


def same(a, b):
    return all(equal(x, y) for x, y in zip(a, b, strict=True))


def near(a, b, tolerance=1e-6):
    return norm(sub(a, b)) <= tolerance * (1 + norm(a))


class TestMergeSteps:
    @pytest.mark.parametrize(
        ("p", "steps"),
        [(0.25, [100, 200, 300, 400]), (0.5, [200, 400]), (0.75, [300, 400]), (0.96, [384, 400]), (1, [400])],
    )
    def test_the_papers_grid(self, p, steps):
        assert merge_steps(400, p) == steps

    @settings(deadline=None)
    @given(steps=st.integers(1, 500), p=st.floats(0.001, 1), final=st.booleans())
    def test_laws(self, steps, p, final):
        found = merge_steps(steps, p, final)
        every = max(1, round(p * steps))
        assert found == sorted(set(found)) and all(s % every == 0 or s == steps for s in found)
        assert len([s for s in found if s % every == 0]) == steps // every
        assert (steps in found) == (final or steps % every == 0)

    @settings(deadline=None)
    @given(steps=st.integers(1, 60), p=st.floats(0.01, 1), final=st.booleans(), task=st.integers(1, 3))
    def test_the_loop_is_told_just_these(self, steps, p, final, task):
        rule = SFA(p=p, final=final)
        due = [step for step in range(1, steps + 1) if rule.due(Progress(task, step, steps, False))]
        due += [steps] if rule.due(Progress(task, steps, steps, True)) else []
        assert due == merge_steps(steps, p, final)

    def test_a_run_merges_at_these_steps(self, toy):
        result = sfa(toy, p=0.4)
        steps = len(result.training_loss[1])
        assert [r.get("steps") for r in result.reports] == [None, merge_steps(steps, 0.4), merge_steps(steps, 0.4)]
        without = sfa(toy, p=0.4, final=False)
        assert without.reports[1]["steps"] == merge_steps(steps, 0.4, False) != merge_steps(steps, 0.4)


class TestSFA:
    def test_p_1_is_wise_ft_bit_for_bit(self):
        """One task after the first: the same training, the same half way between."""
        stream = toys.stream(tasks=2)
        averaged, wise = (quick(stream, None, rule, training=EPOCHS) for rule in (SFA(p=1, beta=0.5), WiSEFT(0.5)))
        assert same(averaged.trained, wise.trained) and same(averaged.weights, wise.weights)
        for name, w in averaged.weights[1].items():
            halves = (averaged.weights[0][name] + averaged.trained[1][name]) / 2
            assert torch.allclose(w, halves, rtol=1e-6, atol=1e-7)

    def test_beta_0_is_fine_tuning_bit_for_bit(self, toy, plain):
        result = sfa(toy, p=0.2, beta=0)
        assert same(result.weights, plain.weights) and same(result.trained, plain.trained)

    def test_beta_1_never_leaves_the_first_task(self, toy):
        result = sfa(toy, p=0.4, beta=1)
        assert equal(result.weights[2], result.weights[0]) and not equal(result.trained[2], result.weights[0])

    def test_a_merge_goes_a_part_of_the_way_back(self, toy):
        """||theta - theta_o|| = (1 - beta) ||theta* - theta_o||, at every merge, with the same theta_o for a task."""
        seen = []

        class Spy(SFA):
            def __call__(self, context):
                merged = super().__call__(context)
                anchor = context.previous
                gone, left = norm(sub(context.current, anchor)), norm(sub(merged.train, anchor))
                seen.append((context.progress.task, digest(anchor), gone, left))
                return merged

        result = quick(toy, None, Spy(p=0.3, beta=0.3), training=EPOCHS)
        assert all(left == pytest.approx(0.7 * gone, rel=1e-5) for *_, gone, left in seen)
        anchors = {task: {d for t, d, *_ in seen if t == task} for task in (1, 2)}
        assert anchors == {1: {digest(result.weights[0])}, 2: {digest(result.weights[1])}}
        assert len(seen) == 2 * len(result.reports[1]["steps"]) > 4

    def test_the_drift_reported_is_the_distance_before_a_merge(self, toy):
        result = sfa(toy, p=1)
        gone = norm(sub(result.trained[1], result.weights[0])) / norm(result.weights[0])
        assert result.reports[1]["drift"] == [pytest.approx(gone)]

    def test_the_chain_at_p_1_is_task_arithmetic(self, toy):
        """theta_N - theta_1 = (1 - beta) sum_k tau_k, with tau_k from where task k began."""
        result = sfa(toy, p=1, beta=0.3)
        vectors = [sub(result.trained[k], result.weights[k - 1]) for k in (1, 2)]
        assert near(result.weights[2], add(result.weights[0], combine(vectors, [1, 1]), 0.7))

    def test_the_chain_weighs_ends_by_halves(self, toy):
        """beta = 1/2 at p = 1: the ends weigh 1/2, 1/4, ..., backwards."""
        result = sfa(toy, p=1)
        assert near(result.weights[2], combine(result.trained, [0.25, 0.25, 0.5]))

    def test_beta_equal_is_the_mean_of_the_ends(self):
        result = sfa(toys.stream(tasks=4), p=1, beta="equal")
        assert near(result.weights[3], combine(result.trained, [0.25] * 4))

    def test_a_beta_for_each_task(self, toy):
        result = sfa(toy, p=1, beta=(0.2, 0.6))
        assert equal(result.weights[1], lerp(result.trained[1], result.weights[0], 0.2))
        assert equal(result.weights[2], lerp(result.trained[2], result.weights[1], 0.6))

    @pytest.mark.parametrize(
        ("options", "shares"),
        [
            ({"anchor": "uniform"}, [1 / 2, 1 / 2]),
            ({"anchor": "uniform", "include_base": True}, [1 / 3, 1 / 3, 1 / 3]),
            ({"anchor": "recency"}, [1 / 3, 2 / 3]),
            ({"anchor": (3, 1, 5)}, [1 / 4, 3 / 4]),
            ({"anchor": (1,)}, [0, 1]),
            ({"anchor": "uniform", "first": True}, [1 / 2, 1 / 2]),
            ({"anchor": "uniform", "first": True, "include_base": True}, [1 / 3, 1 / 3, 1 / 3]),
        ],
    )
    def test_anchors_of_several_ends(self, toy, options, shares):
        """The anchor of the third task, found from beta = 1: what is merged is the anchor itself."""
        result = sfa(toy, p=1, beta=(0.5, 1.0), **options)
        ends = [result.weights[0], result.weights[1]]
        if len(shares) == 3:
            ends.insert(0, {n: t for n, t in base(toy).items()})
        assert near(result.weights[2], combine(ends, shares))

    def test_checkpoints_at_a_beta_each(self, toy):
        """theta <- (1 - sum beta_j) theta* + sum beta_j theta_j is beta = sum beta_j with the beta_j as the anchor."""
        result = sfa(toy, p=1, beta=0.6, anchor=(0.4, 0.2))
        parts = [result.weights[0], result.weights[1], result.trained[2]]
        assert near(result.weights[2], combine(parts, [0.2, 0.4, 0.4]))

    def test_first_merges_with_the_weights_before_any_training(self, toy):
        result = sfa(toy, p=1, first=True)
        assert equal(result.weights[0], lerp(result.trained[0], base(toy), 0.5))

    @pytest.mark.parametrize("optimizer", ["keep", "reset"])
    def test_the_optimizers_state(self, toy, optimizer):
        """Kept moments are what they were before the merge, bit for bit; reset ones are those of the steps since."""
        moments = []

        class Watching(Learner):
            def after_step(self, model, batch):
                moments.append([p.grad.clone() for p in model.parameters()])

        class Spy(SFA):
            def __call__(self, context):
                given.append(context.second_moment)
                return super().__call__(context)

        given = []
        adam = replace(EPOCHS, optimizer="adamw", momentum=0.0, lr=0.01)
        quick(toy, Watching(), Spy(p=0.5, optimizer=optimizer), training=adam)
        steps = len(moments) // 3
        second = [torch.zeros_like(g) for g in moments[0]]
        at = len(merge_steps(steps, 0.5)) - 1
        for step in range(steps, 2 * steps):
            if optimizer == "reset" and step - steps in merge_steps(steps, 0.5):
                second = [torch.zeros_like(g) for g in moments[0]]
            second = [0.999 * v + 0.001 * g * g for v, g in zip(second, moments[step], strict=True)]
        assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(given[at].values(), second, strict=True))

    def test_own_tensors_stay_as_trained(self, toy):
        result = sfa(toy, p=1, own=("linear2", "linear."))
        old, new, merged = result.weights[0], result.trained[1], result.weights[1]
        for name in merged:
            kept = name.startswith(("linear2", "linear."))
            expected = new[name] if kept else lerp(new, old, 0.5)[name]
            assert torch.equal(merged[name], expected)

    def test_a_name_that_no_tensor_has_is_refused(self, toy):
        with pytest.raises(ValueError, match=r"own: no tensor's name begins with one of \('haed',\)"):
            sfa(toy, own=("haed",))

    def test_untouched_rows_of_the_head_stay_as_trained(self, toy):
        """With the classes seen so far in the loss, a class's row begins to move with its task."""
        seen = replace(EPOCHS, labels="seen")
        result = sfa(toy, p=1, training=seen, untouched="keep")
        old, new, merged = (w["linear.weight"] for w in (result.weights[0], result.trained[1], result.weights[1]))
        assert torch.equal(old[2:4], base(toy)["linear.weight"][2:4])
        moved = old[:2] != base(toy)["linear.weight"][:2]
        assert torch.equal(merged[2:4], new[2:4]) and moved.float().mean() > 0.5
        assert torch.equal(merged[:2], torch.where(moved, torch.lerp(new[:2], old[:2], 0.5), new[:2]))
        halved = sfa(toy, p=1, training=seen).weights[1]["linear.weight"]
        assert torch.equal(halved[2:4], torch.lerp(new[2:4], old[2:4], 0.5))

    def test_batch_norm_is_averaged_or_re_estimated(self):
        stream = toys.images()
        runs = {
            r: quick(stream, None, SFA(p=1, refresh=r), model=toys.small_convnet, training=QUICK) for r in (False, True)
        }
        for name, tensor in runs[False].weights[1].items():
            mean = torch.lerp(runs[False].trained[1][name], runs[False].weights[0][name], 0.5)
            assert torch.equal(tensor, mean)
            assert torch.equal(runs[True].weights[1][name], mean) == ("running" not in name)

    @settings(max_examples=8, deadline=None)
    @given(p=st.floats(0.05, 1), beta=st.floats(0, 1))
    def test_merging_with_oneself_changes_nothing(self, toy, p, beta):
        still = replace(EPOCHS, epochs=0)
        result = sfa(toy, p=p, beta=beta, training=still)
        assert near(result.weights[2], base(toy), 1e-7)

    def test_replay_and_merging_go_together(self, toy):
        assert sfa(toy, learner=ER(8), p=0.5).summary()["acc"] > 0.5

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"p": 0}, "p: 0"),
            ({"p": 1.5}, "p: 1.5"),
            ({"p": "drift"}, r"p: 'drift'; .* Drift\(\)"),
            ({"beta": -0.1}, "beta: -0.1"),
            ({"beta": (0.5, 2)}, r"beta: \(0.5, 2\)"),
            ({"beta": ()}, "beta: "),
            ({"beta": "even"}, "'even' is unknown"),
            ({"beta": float("nan")}, "beta: nan"),
            ({"anchor": "latest"}, "'latest' is unknown"),
            ({"anchor": (0, 1)}, "newest end needs a weight"),
            ({"anchor": (1, -1)}, "anchor"),
            ({"optimizer": "drop"}, "'drop' is unknown"),
            ({"untouched": "skip"}, "'skip' is unknown"),
        ],
    )
    def test_bad_settings_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            SFA(**options)


def base(stream):
    from clkit import models
    from clkit.weights import get_weights

    return get_weights(models.mlp(stream, seed=0))


def digest(weights):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in weights.values())).hexdigest()


class Wanting:
    """What a trigger may look at, made by hand."""

    def __init__(self, step=10, steps=100, losses=None, current=2.0, gradient=-1.0):
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.current = {"weight": torch.tensor([[current]])}
        self.progress = Progress(1, step, steps, False)
        self.losses = torch.tensor(losses or [])
        self.gradients = lambda: {"weight": torch.tensor([[gradient]])}


def since(step=0, start=1.0, anchor=1.0):
    return Since(step, {"weight": torch.tensor([[start]])}, {"weight": torch.tensor([[anchor]])})


class TestTriggers:
    def test_drift_compares_the_relative_distance(self):
        assert distance(Wanting(current=1.5), since().anchor) == pytest.approx(0.5)
        assert distance(Wanting(current=-1), since(anchor=-2.0).anchor) == pytest.approx(0.5)
        for limit, wanted in ((0.4, True), (0.6, False)):
            assert Drift(limit=limit)(Wanting(current=1.5), since(), None)[0] == wanted

    def test_drift_leaves_statistics_out(self, toy):
        result = quick(toys.images(), None, SFA(p=1), model=toys.small_convnet, training=QUICK)
        names = [n for n in result.weights[0] if "running" not in n]
        old, new = ({n: w[n] for n in names} for w in (result.weights[0], result.trained[1]))
        assert result.reports[1]["drift"] == [pytest.approx(norm(sub(new, old)) / norm(old))]

    def test_plateau_waits_until_the_loss_stops_falling(self):
        rule = Plateau(times=10, tolerance=0.1)
        falling, flat = [2.0] * 10 + [1.0] * 10, [1.0] * 10 + [0.95] * 10
        assert not rule(Wanting(step=20, losses=falling), since(), None)[0]
        assert rule(Wanting(step=20, losses=flat), since(), None)[0]
        assert not rule(Wanting(step=20, losses=flat), since(step=10), None)[0], "a window lies before the merge"
        assert not rule(Wanting(step=10, losses=[1.0] * 10), since(), None)[0]

    def test_velocity_shortens_a_faster_interval(self):
        rule = Velocity(times=100, start=0.1, shortest=0.05, longest=0.4, factor=2)
        assert not rule(Wanting(step=9), since(), None)[0]
        wanted, notes = rule(Wanting(step=10, current=2.0), since(), None)
        assert wanted and notes == {"interval": 0.1, "speed": pytest.approx(0.1)}
        faster = rule(Wanting(step=20, current=4.0), since(10, start=2.0), notes)
        slower = rule(Wanting(step=20, current=2.5), since(10, start=2.0), notes)
        assert faster[0] and faster[1]["interval"] == 0.05 and slower[0] and slower[1]["interval"] == 0.2
        assert rule(Wanting(step=15, current=9.0), since(10, start=2.0), faster[1])[1]["interval"] == 0.05, "clamped"

    def test_cosine_waits_while_the_gradient_leads_away(self):
        rule = Cosine(limit=0.0)
        assert not rule(Wanting(current=2.0, gradient=-1.0), since(), None)[0]
        assert rule(Wanting(current=2.0, gradient=1.0), since(), None)[0]
        assert not rule(Wanting(current=2.0, gradient=0.0), since(), None)[0]

    def test_cosine_wants_nothing_where_no_step_was_taken(self, toy):
        result = sfa(toy, Training(epochs=0), p=Cosine(), final=False)
        assert [r.get("steps") for r in result.reports] == [None, [], []]

    @pytest.mark.parametrize("rule", [Drift(10, 0.02), Plateau(10, 0.3), Velocity(50), Cosine(10, 0.3)])
    def test_in_a_run_it_merges_where_it_looks_and_at_the_end(self, toy, rule):
        result = sfa(toy, p=rule)
        steps = len(result.training_loss[1])
        merged = result.reports[1]["steps"]
        assert merged[-1] == steps and len(set(merged)) == len(merged) > 1
        assert all(rule.looks(Progress(1, step, steps, False)) for step in merged[:-1])

    def test_one_that_never_wants_merges_at_the_end_alone(self, toy, plain):
        result = sfa(toy, p=Drift(limit=1e9))
        assert same(result.weights, sfa(toy, p=1).weights)
        assert same(sfa(toy, p=Drift(limit=1e9), final=False).weights, plain.weights)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Drift(limit=0), "limit: 0"),
            (lambda: Drift(times=0), "times: 0"),
            (lambda: Plateau(tolerance=1), "tolerance: 1"),
            (lambda: Velocity(start=0.9), "start: 0.9"),
            (lambda: Velocity(factor=1), "factor: 1"),
            (lambda: Cosine(limit=2), "limit: 2"),
        ],
    )
    def test_bad_settings_are_named(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


class TestWatching:
    def test_it_changes_nothing_and_tells_both_sides_of_every_merge(self, toy):
        unseen = sfa(toy, p=0.5)
        result = quick(toy, None, SFA(p=0.5), training=EPOCHS, watch=2)
        assert same(unseen.weights, result.weights) and unseen.watched == []
        table = result.trajectory()
        total = sum(map(len, result.training_loss))
        assert table.step.is_monotonic_increasing and table.step.max() == total
        counts = table[table.task == 0].groupby("when").size().to_dict()
        assert counts["before"] == counts["after"] == sum(len(r.get("steps", [])) for r in result.reports)
        last = table[(table.learning == 1) & (table.when == "after")].accuracy.tail(3)
        assert last.tolist() == result.accuracy[1].tolist()
        before = [look for look in result.watched if look["when"] == "before"]
        assert any((look["accuracy"] != result.accuracy[1]).any() for look in before)

    def test_merges_alone(self, toy):
        result = quick(toy, None, SFA(p=0.5), training=EPOCHS, watch=0)
        assert {look["when"] for look in result.watched[1:]} == {"before", "after"}

    def test_a_negative_number_is_named(self, toy):
        with pytest.raises(ValueError, match="watch: -1"):
            quick(toy, watch=-1)


class TestDeployed:
    def test_wise_ft_weighs_the_new(self, toy, plain):
        result = quick(toy, None, WiSEFT(0.3), training=EPOCHS)
        assert same(result.trained, plain.trained)
        assert near(result.weights[1], lerp(plain.trained[0], plain.trained[1], 0.3))
        assert near(result.weights[2], lerp(result.weights[1], plain.trained[2], 0.3))
        old = quick(toy, None, WiSEFT(0.3, old="base"), training=EPOCHS)
        assert near(old.weights[2], lerp(base(toy), plain.trained[2], 0.3))

    def test_merging_is_the_merge_of_what_was_trained(self, toy, plain):
        options = {"scale": 0.4}
        result = quick(toy, None, Merging("task_arithmetic", options), training=EPOCHS)
        assert same(result.trained, plain.trained) and equal(result.weights[0], plain.trained[0])
        expected = merging.task_arithmetic(plain.trained, base=base(toy), scale=0.4)
        assert equal(result.weights[2], expected)

    def test_independent_training_starts_from_the_base_each_time(self, toy):
        result = quick(toy, None, Merging(training="independent"), training=EPOCHS)
        assert equal(result.weights[2], merging.average(result.trained))
        alone = replace(toy, tasks=(replace(toy[1], index=0),))
        start = quick(alone, training=replace(EPOCHS, epochs=0)).model
        first = quick(toy, None, Merging(training="independent"), model=start, training=replace(EPOCHS, epochs=0))
        assert all(equal(w, first.weights[0]) for w in first.trained)

    def test_ema_against_a_loop(self, toy):
        steps = []

        class Watching(Learner):
            def after_step(self, model, batch):
                steps.append({n: t.clone() for n, t in model.state_dict().items()})

        result = quick(toy, Watching(), EMA(0.8), training=EPOCHS)
        mean = steps[0]
        for w in steps[1:]:
            mean = combine([mean, w], [0.8, 0.2])
        assert near(result.weights[2], mean)
        uniform = quick(toy, None, EMA(None, every=2), training=EPOCHS)
        last = steps[-len(result.training_loss[2]) :]
        assert near(uniform.weights[2], merging.average(last[1::2]))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: WiSEFT(1.2), "alpha: 1.2"),
            (lambda: WiSEFT(old="first"), "'first' is unknown"),
            (lambda: Merging("averge"), "'average'"),
            (lambda: Merging(training="joint"), "'joint' is unknown"),
            (lambda: Merging(holdout=1.0), "holdout: 1.0"),
            (lambda: EMA(1.0), "decay: 1.0"),
            (lambda: EMA(every=0), "every: 0"),
        ],
    )
    def test_bad_settings_are_named(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()
