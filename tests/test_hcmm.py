"""HCMM: the merge by importance, Adam's moments as importance, and the correction of the features."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toys
from clkit import curvature, merging, models, normalization, store
from clkit.consolidation import HCMM, Context, Progress, importance_merge
from clkit.consolidation.hcmm import carried, descend, feature_loss, one_pass, projections, shares
from clkit.curvature import ridge
from clkit.learners import ER, Learner
from clkit.representation import activations
from clkit.tangent import Linearized
from clkit.training import Training
from clkit.weights import equal, get_weights, lerp, set_weights
from toys import quick

ADAM = Training(epochs=2, batch=8, lr=0.01, optimizer="adamw")
SMALL = partial(models.mlp, hidden=(7, 5))
RAW = HCMM(importance="raw", correction="none")
CORRECTIONS = [
    HCMM(importance="raw", correction="ridge"),
    HCMM(importance="raw", correction="ridge", target="both"),
    HCMM(importance="raw", correction="ridge", ridge=0.1),
    HCMM(importance="raw", correction="steps", correction_lr=1e-3),
    HCMM(importance="raw", correction="steps", target="both"),
    HCMM(importance="raw", correction="steps", loss="cosine", correction_lr=1e-3),
    HCMM(importance="raw", correction="steps", loss="cosine", target="both"),
    HCMM(importance="raw", correction="steps", loss="absolute"),
    HCMM(importance="raw", correction="pass", loss="absolute", correction_lr=1e-3),
]


@pytest.fixture(scope="module")
def toy():
    return toys.stream()


def train(stream, consolidation, learner=None, **more):
    return quick(stream, learner, consolidation, **{"model": SMALL, "training": ADAM} | more)


def seen(stream, consolidation, learner=None, **more):
    """A run, the contexts that its consolidation was given, and what that returned."""
    contexts, returned = [], []

    class Spy(HCMM):
        def __call__(self, context):
            moments = context.second_moment or {}
            copied = {n: t.clone() for n, t in moments.items()} or None
            known = {"inputs": context.inputs, "moment_scale": context.moment_scale, "second_moment": copied}
            contexts.append(Context(**vars(context) | known))
            returned.append(super().__call__(context))
            places = [{t.data_ptr() for t in tree.values()} for tree in (moments, returned[-1].memo or {})]
            assert not places[0] & places[1], "the optimizer's own tensors are kept"
            return returned[-1]

    return train(stream, Spy(**vars(consolidation)), learner, **more), contexts, returned


def near(a, b, **tolerance):
    return a.keys() == b.keys() and all(torch.allclose(t, b[n], **tolerance) for n, t in a.items())


def drawn(seed, positive=False):
    g = torch.Generator().manual_seed(seed)
    made = {"a": torch.randn(4, 3, generator=g), "b": torch.randn(5, generator=g)}
    return {n: t.abs() + 1e-3 for n, t in made.items()} if positive else made


ALPHA = st.floats(0, 1)
SEED = st.integers(0, 10**6)
quickly = settings(max_examples=25, deadline=None)


class TestMerge:
    @quickly
    @given(SEED, ALPHA, st.floats(1e-3, 1e3))
    def test_proportional_importances_make_a_straight_line(self, seed, alpha, c):
        old, new, f = drawn(seed), drawn(seed + 1), drawn(seed + 2, True)
        scaled = {n: c * t for n, t in f.items()}
        merged = importance_merge(old, new, scaled, f, alpha)
        assert near(merged, lerp(old, new, alpha / (alpha + (1 - alpha) * c)), rtol=1e-5, atol=1e-6)
        assert near(importance_merge(old, new, f, f, alpha), lerp(old, new, alpha), rtol=1e-6, atol=1e-6)
        assert near(carried(f, f, alpha, "ema"), f) and equal(
            carried(f, f, alpha, "sum"), {n: 2 * t for n, t in f.items()}
        )

    @quickly
    @given(SEED)
    def test_the_ends_are_the_two_networks_bitwise(self, seed):
        old, new, f, g = drawn(seed), drawn(seed + 1), drawn(seed + 2, True), drawn(seed + 3, True)
        f["a"][0] = g["a"][:2] = 0
        assert equal(importance_merge(old, new, f, g, 0), old) and equal(importance_merge(old, new, f, g, 1), new)

    @quickly
    @given(SEED, ALPHA)
    def test_every_number_lies_between_its_two(self, seed, alpha):
        old, new = drawn(seed), drawn(seed + 1)
        merged = importance_merge(old, new, drawn(seed + 2, True), drawn(seed + 3, True), alpha)
        for name, tensor in merged.items():
            low, high = torch.minimum(old[name], new[name]), torch.maximum(old[name], new[name])
            assert ((low <= tensor) & (tensor <= high)).all()

    @quickly
    @given(SEED, ALPHA, st.integers(-120, 60), st.floats(0.01, 100))
    def test_the_unit_of_the_importances_does_not_matter(self, seed, alpha, power, k):
        old, new, f, g = drawn(seed), drawn(seed + 1), drawn(seed + 2, True), drawn(seed + 3, True)
        merged = importance_merge(old, new, f, g, alpha)
        for factor in (2.0**power, k):
            scaled = [{n: t.double() * factor for n, t in known.items()} for known in (f, g)]
            assert near(importance_merge(old, new, *scaled, alpha), merged, rtol=1e-6, atol=1e-7)
            for way in ("ema", "sum"):
                kept = {n: factor * t.double() for n, t in carried(f, g, alpha, way).items()}
                assert near(carried(*scaled, alpha, way), kept, rtol=1e-5)

    def test_importances_too_small_for_their_products_count(self):
        tiny = {"a": torch.full((2,), 1e-44)}
        w = shares(tiny, {"a": 3 * tiny["a"]}, 0.5)["a"]
        assert torch.allclose(w, 3 * torch.ones(2, dtype=torch.float64) / 4, rtol=0.1)

    @quickly
    @given(SEED, st.floats(0.01, 0.99))
    def test_no_importance(self, seed, alpha):
        old, new, f = drawn(seed), drawn(seed + 1), drawn(seed + 2, True)
        zero = {n: torch.zeros_like(t) for n, t in f.items()}
        for none in (zero, {}):
            assert equal(importance_merge(old, new, f, none, alpha), old)
            assert equal(importance_merge(old, new, none, f, alpha), new)
            assert near(importance_merge(old, new, none, none, alpha), lerp(old, new, alpha), rtol=1e-6, atol=1e-6)

    @quickly
    @given(SEED, ALPHA)
    def test_one_network_twice_and_two_the_other_way_round(self, seed, alpha):
        old, new, f, g = drawn(seed), drawn(seed + 1), drawn(seed + 2, True), drawn(seed + 3, True)
        assert equal(importance_merge(old, old, f, g, alpha), old)
        swapped = importance_merge(new, old, g, f, 1 - alpha)
        assert near(swapped, importance_merge(old, new, f, g, alpha), rtol=1e-5, atol=1e-6)

    @quickly
    @given(SEED, ALPHA)
    def test_it_minimises_the_two_weighted_distances(self, seed, alpha):
        old, new, f, g = ({n: t.double() for n, t in drawn(seed + i, i > 1).items()} for i in range(4))
        for name, theta in importance_merge(old, new, f, g, alpha).items():
            slope = (1 - alpha) * f[name] * (theta - old[name]) + alpha * g[name] * (theta - new[name])
            assert slope.abs().max() < 1e-12

    @quickly
    @given(SEED, st.floats(0.05, 0.95))
    def test_a_sequence_of_merges_is_one_fisher_merge(self, seed, alpha):
        """The reference twin: what EMA and sum mean after several tasks."""
        ws, fs = [drawn(seed + i) for i in range(4)], [drawn(seed + 10 + i, True) for i in range(4)]
        fading = [(1 - alpha) ** 3, *(alpha * (1 - alpha) ** (3 - i) for i in range(1, 4))]
        for way, a, coefficients in (("ema", alpha, fading), ("sum", 0.5, [1.0] * 4)):
            merged, kept = ws[0], fs[0]
            for w, f in zip(ws[1:], fs[1:], strict=True):
                merged, kept = importance_merge(merged, w, kept, f, a), carried(kept, f, a, way)
            twin = merging.fisher_merge(ws, importances=fs, coefficients=coefficients)
            assert near(merged, twin, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"alpha": 1.5}, "alpha: 1.5"),
            ({"new": {"c": torch.ones(5)}}, "new: 'c' of shape \\(5,\\) does not fit the weights"),
            ({"old": {"b": torch.ones(4)}}, "old: 'b' of shape \\(4,\\)"),
            ({"old": {"b": -torch.ones(5)}}, "old: 'b' has negative entries"),
            ({"new": {"b": torch.full((5,), torch.nan)}}, "new: 'b' holds a NaN"),
            ({"current": {"a": torch.ones(5)}}, "current and previous have different names"),
        ],
    )
    def test_bad_arguments_are_named(self, change, message):
        good = {"previous": drawn(0), "current": drawn(1), "old": drawn(2, True), "new": drawn(3, True), "alpha": 0.5}
        with pytest.raises(ValueError, match=message):
            importance_merge(**good | change)


class Linear(Learner):
    """A loss with the gradient 3 in every parameter, whatever the data."""

    def loss(self, model, batch):
        return sum(3 * p.sum() for p in model.parameters())


class Watching(Learner):
    """Keeps the gradients of every step."""

    def start(self, setting):
        super().start(setting)
        self.steps = []

    def after_step(self, model, batch):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters()})


class TestImportance:
    def test_moments_of_a_constant_gradient(self, toy):
        for kind, expected in (
            ("raw", lambda n: 9 * (1 - 0.999**n)),
            ("corrected", lambda n: 9),
            ("normalised", lambda n: 1),
        ):
            result, _, returned = seen(toy, HCMM(importance=kind, correction="none"), Linear())
            n = len(result.training_loss[0])
            for tensor in returned[0].memo.values():
                assert torch.allclose(tensor, torch.full_like(tensor, expected(n)), rtol=1e-4)

    @pytest.mark.parametrize("way", ["ema", "sum"])
    def test_moments_are_adams_by_hand(self, toy, way):
        result, contexts, returned = seen(toy, replace(RAW, accumulate=way), Watching())
        steps = np.cumsum([len(losses) for losses in result.training_loss])
        kept = None
        for t, (begin, end) in enumerate(zip([0, *steps[:-1]], steps, strict=True)):
            v = {n: torch.zeros_like(g) for n, g in result.learner.steps[0].items()}
            for gradients in result.learner.steps[begin:end]:
                v = {n: 0.999 * v[n] + 0.001 * g.square() for n, g in gradients.items()}
            assert near(contexts[t].second_moment, v, rtol=1e-4, atol=1e-12)
            assert contexts[t].moment_scale == {n: pytest.approx(1 - 0.999 ** (end - begin)) for n in v}
            if kept is not None:
                merged = importance_merge(result.weights[t - 1], result.trained[t], kept, v, RAW.alpha)
                assert near(merged, result.weights[t], rtol=1e-4, atol=1e-6)
            a, b = (0.6, 0.4) if way == "ema" else (1, 1)
            kept = v if kept is None else {n: a * kept[n] + b * v[n] for n in v}
            assert near(returned[t].memo, kept, rtol=1e-4, atol=1e-12)

    def test_the_bias_matters_only_where_tasks_have_unequal_steps(self, toy):
        short = replace(toy, tasks=(toy[0], replace(toy[1], train=toy[1].train[torch.arange(8)]), toy[2]))
        for stream, same in ((toy, True), (short, False)):
            raw, corrected = (
                train(stream, HCMM(importance=kind, correction="none")).weights for kind in ("raw", "corrected")
            )
            assert near(raw[1], corrected[1], rtol=1e-4, atol=1e-5) == same

    def test_moment_scale_is_empty_without_adam(self, toy):
        _, contexts, _ = seen(toy, HCMM(importance="none", correction="none"), training=toys.QUICK)
        assert len(contexts) == 2 and all(c.second_moment is None and c.moment_scale == {} for c in contexts)

    def test_fisher_is_that_of_the_new_network_on_what_the_learner_shows(self, toy):
        result, contexts, returned = seen(toy, HCMM(importance="fisher", correction="none"), training=toys.QUICK)
        fs = []
        for t, context in enumerate(contexts):
            net = SMALL(toy)
            set_weights(net, result.trained[t])
            fs.append(curvature.fisher(net, context.inputs, labels="exact"))
        assert equal(returned[0].memo, fs[0]) and equal(returned[1].memo, carried(fs[0], fs[1], 0.4, "ema"))
        assert equal(result.weights[1], importance_merge(result.weights[0], result.trained[1], fs[0], fs[1], 0.4))

    def test_without_importance_it_is_a_straight_line(self, toy):
        result = train(toy, HCMM(0.3, "none", correction="none"), training=toys.QUICK)
        for t in (1, 2):
            assert near(result.weights[t], lerp(result.weights[t - 1], result.trained[t], 0.3), rtol=1e-6)
            assert result.reports[t] == {"share": 0.3}

    @pytest.mark.parametrize("alpha", [0, 1])
    def test_the_ends_of_alpha(self, toy, alpha):
        result = train(toy, HCMM(alpha, "raw", correction="none"))
        for t in (1, 2):
            assert equal(result.weights[t], result.weights[0] if alpha == 0 else result.trained[t])
        if alpha:
            assert all(equal(a, b) for a, b in zip(result.weights, train(toy, None).weights, strict=True))

    def test_rows_of_a_head_stay_with_the_tasks_that_trained_them(self, toy):
        result = train(toy, RAW, training=replace(ADAM, labels="task"))
        first, second, new = (w["linear.weight"] for w in (*result.weights[:2], result.trained[1]))
        assert torch.equal(second[:2], first[:2]) and torch.equal(second[2:4], new[2:4])
        assert not torch.equal(first[:2], new[:2] + 1) and not torch.equal(first[2:4], new[2:4])

    @pytest.mark.parametrize("kind", ["raw", "corrected", "normalised", "fisher"])
    def test_frozen_tensors_keep_their_bits_and_statistics_go_by_alpha(self, kind):
        def frozen_head(stream, *, seed):
            net = toys.small_convnet(stream, seed=seed)
            net.get_submodule("linear").requires_grad_(False)
            return net

        stream = toys.images(2)
        result, _, returned = seen(stream, HCMM(importance=kind, correction="none"), model=frozen_head)
        start = get_weights(frozen_head(stream, seed=0))
        assert torch.equal(result.weights[1]["linear.weight"], start["linear.weight"])
        assert set(returned[0].memo) == {n for n in start if "running" not in n and not n.startswith("linear.")}
        for name in (n for n in start if "running" in n):
            mean = torch.lerp(result.weights[0][name], result.trained[1][name], 0.4)
            assert torch.allclose(result.weights[1][name], mean, rtol=1e-6)

    def test_statistics_can_be_re_estimated(self):
        stream = toys.images(2)
        options = {"model": toys.small_convnet, "learner": ER(12)}
        result = train(stream, replace(RAW, refresh=True), **options)
        plain = train(stream, RAW, **options)
        inputs = result.learner.examples(stream[1]).x
        assert equal(result.weights[1], normalization.refresh(toys.small_convnet(stream), plain.weights[1], inputs))
        corrected = train(stream, HCMM(correction="ridge", ridge=0.1, refresh=True), **options).weights[1]
        assert equal(corrected, normalization.refresh(toys.small_convnet(stream), corrected, inputs))

    @pytest.mark.parametrize("kind", ["raw", "corrected", "normalised"])
    def test_another_optimizer_is_refused_before_any_work(self, toy, kind):
        def never(stream, *, seed):
            raise AssertionError("work started")

        with pytest.raises(ValueError, match=r"optimizer: 'sgd' keeps no second moments.*optimizer=\"adamw\""):
            train(toy, HCMM(importance=kind), model=never, training=toys.QUICK)
        with pytest.raises(
            ValueError, match=r'importance: .* for at least one step, or use importance="fisher" or "none"'
        ):
            train(toy, HCMM(importance=kind), training=replace(ADAM, epochs=0))


class TestMemory:
    @pytest.mark.parametrize("consolidation", [RAW, HCMM(accumulate="sum"), HCMM(importance="fisher", target="both")])
    def test_the_same_bytes_after_every_task_and_no_earlier_data(self, consolidation, tmp_path):
        stream = toys.stream(5)
        _, contexts, returned = seen(stream, consolidation)
        assert not hasattr(consolidation, "uses_history") and not hasattr(consolidation, "holdout")
        sizes = set()
        for t, (context, merged) in enumerate(zip(contexts, returned, strict=True)):
            assert context.history == () and torch.equal(context.inputs, stream[t].prepare(stream[t].train.x))
            assert merged.train is merged.deploy and not merged.fresh
            assert merged.memo.keys() == dict(SMALL(stream).named_parameters()).keys()
            store.write_tree(tmp_path / "memo", merged.memo)
            sizes.add((tmp_path / "memo").stat().st_size)
        assert len(contexts) == 5 and len(sizes) == 1

    def test_a_single_task_is_left_as_it_was_trained(self):
        stream = toys.stream(1)
        result = train(stream, HCMM())
        assert equal(result.weights[0], train(stream, None).weights[0]) and result.reports == [{}]

    @pytest.mark.parametrize("consolidation", [HCMM(), HCMM(importance="raw", accumulate="sum", correction="ridge")])
    def test_it_goes_on_from_a_checkpoint_with_adam(self, toy, consolidation, tmp_path):
        class Stop(Learner):
            def begin_task(self, model, task):
                if task.index == 2 and not (tmp_path / "again").exists():
                    (tmp_path / "again").touch()
                    raise KeyboardInterrupt

        path = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            train(toy, consolidation, Stop(), checkpoint=path)
        resumed, whole = train(toy, consolidation, Stop(), checkpoint=path), train(toy, consolidation)
        assert all(equal(a, b) for a, b in zip(resumed.weights, whole.weights, strict=True))
        assert resumed.reports == whole.reports

    @pytest.mark.parametrize("consolidation", [HCMM(), HCMM(importance="fisher", correction="steps", loss="cosine")])
    def test_the_same_seed_gives_the_same_bits(self, toy, consolidation):
        first, second = train(toy, consolidation), train(toy, consolidation)
        assert all(equal(a, b) for a, b in zip(first.weights, second.weights, strict=True))


def made(stream, model, previous, current, importances=False):
    """A context made by hand, on the data of the second task, with random importances or none."""
    inputs = stream[1].prepare(stream[1].train.x)
    g = torch.Generator().manual_seed(1)
    old, new = ({n: torch.rand(p.shape, generator=g) for n, p in model.named_parameters()} for _ in range(2))
    old, new = (old, new) if importances else (None, None)
    more = {"score": None, "symmetry": None, "memo": old, "second_moment": new, "moment_scale": {}}
    more |= {"history": (), "held_out": False, "losses": torch.zeros(0), "gradients": dict}
    more |= {"model": model, "base": previous, "previous": previous, "current": current, "inputs": inputs}
    return Context(progress=Progress(1, 4, 4, True), **more)


def moved(weights, names=None, by=0.1):
    g = torch.Generator().manual_seed(5)
    noise = {n: by * torch.randn(t.shape, generator=g) for n, t in weights.items()}
    return {n: t + noise[n] if (n in names if names else "running" not in n) else t for n, t in weights.items()}


def at(model, weights, x, layer):
    """The outputs of a layer for a network's weights."""
    net = copy.deepcopy(model)
    set_weights(net, weights)
    return activations(net, x, [layer])[layer]


def rows(model, weights, x, layer):
    """The same as rows of features, in double precision."""
    out = at(model, weights, x, layer)
    return (out.movedim(1, -1) if out.ndim == 4 else out).flatten(0, -2).double()


NETWORKS = {
    "mlp": (toys.stream, SMALL, "linear2"),
    "convnet": (toys.images, toys.small_convnet, "conv3"),
    "tokens": (toys.tokens, toys.small_reader, "1"),
    "linearised mlp": (toys.stream, lambda s: Linearized(SMALL(s)), "linear2"),
    "linearised convnet": (toys.images, lambda s: Linearized(toys.small_convnet(s)), "conv3"),
}


class TestCorrection:
    def test_ridge_is_least_squares_with_rows_appended(self):
        g = torch.Generator().manual_seed(0)
        x, y = (torch.randn(20, width, generator=g, dtype=torch.float64) for width in (6, 4))
        x[:, 5] = x[:, 0] + x[:, 1]
        for strength in (1e-6, 0.1, 1.0, 100.0):
            penalty = (strength * np.linalg.eigvalsh(x.T @ x).mean()) ** 0.5 * np.eye(6)
            rows, values = np.vstack([x, penalty]), np.vstack([y, np.zeros((6, 4))])
            assert np.allclose(ridge(x, y, strength), np.linalg.lstsq(rows, values)[0], rtol=1e-6, atol=1e-9)
        assert not ridge(torch.zeros_like(x), y, 1.0).any()

    @pytest.mark.parametrize("loss", ["squared", "cosine"])
    def test_steps_lower_the_loss_and_reach_least_squares(self, loss):
        g = torch.Generator().manual_seed(0)
        x, features, target = (torch.randn(20, width, generator=g, dtype=torch.float64) for width in (6, 4, 4))
        losses = []
        for steps in (0, 1, 5, 20, 60):
            move = descend(x, features, [(1.0, target)], loss, lr=0.01, steps=steps)
            losses.append(float(feature_loss(features + x @ move, [(1.0, target)], loss)))
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[1] < losses[0]
        if loss == "squared":
            move = descend(x, features, [(1.0, target)], loss, lr=0.05, steps=400)
            assert torch.allclose(move, ridge(x, target - features, 1e-12), atol=1e-3)

    def test_the_mismatch_is_a_mean(self):
        f, a, b = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2, 2), torch.tensor([[6.0, 8.0], [1.0, 0.0]])
        assert float(feature_loss(f, [(0.25, a), (0.75, b)], "squared")) == pytest.approx(0.25 * 26 / 4 + 0.75 * 27 / 4)
        assert float(feature_loss(f, [(1.0, b)], "cosine")) == pytest.approx(0.5)
        assert float(feature_loss(f, [(0.5, a), (0.5, b)], "absolute")) == pytest.approx(0.5 * 8 / 4 + 0.5 * 9 / 4)

    @pytest.mark.parametrize(("loss", "torchs"), [("absolute", "l1_loss"), ("squared", "mse_loss")])
    def test_a_pass_is_the_released_loop_over_a_linear_layer(self, loss, torchs, monkeypatch):
        """The reference twin: a layer of torch's, its optimizer, its clipping; batches of 8, the last of 4."""
        monkeypatch.setattr("clkit.consolidation.hcmm.PASS_BATCH", 8)
        g = torch.Generator().manual_seed(0)
        x, target = (torch.randn(20, width, generator=g, dtype=torch.float64) for width in (6, 4))
        layer = torch.nn.Linear(6, 4, bias=False).double()
        weight, features = layer.weight.detach().T.clone(), layer(x).detach() + 0.3
        with torch.random.fork_rng([]):
            torch.manual_seed(5)
            move = one_pass(x, features, [(1.0, target)], loss, weight, lr=0.01)
            torch.manual_seed(5)
            order = torch.randperm(20)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        for rows in (order[:8], order[8:16], order[16:]):
            optimizer.zero_grad()
            getattr(torch.nn.functional, torchs)(layer(x[rows]) + 0.3, target[rows]).backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
        assert torch.allclose(weight + move, layer.weight.T, atol=1e-12) and move.abs().max() > 0.02

    @pytest.mark.parametrize("network", NETWORKS)
    @pytest.mark.parametrize("consolidation", CORRECTIONS)
    def test_it_moves_the_projection_alone_and_brings_the_features_closer(self, network, consolidation):
        """The mismatch reported is that of the networks, read anew."""
        data, make, layer = NETWORKS[network]
        stream = data()
        net = make(stream)
        previous = get_weights(net)
        context = made(stream, copy.deepcopy(net), previous, moved(previous), importances=True)
        merged = consolidation(context)
        plain = replace(consolidation, correction="none", loss="squared")(context).deploy
        assert {n for n in plain if not torch.equal(plain[n], merged.deploy[n])} == {f"{layer}.weight"}
        parents = [(1.0, previous)]
        if consolidation.target == "both":
            parents = [(0.6, previous), (0.4, context.current)]
        targets = [(part, rows(net, w, context.inputs, layer)) for part, w in parents]
        features = [rows(net, w, context.inputs, layer) for w in (plain, merged.deploy)]
        found = [float(feature_loss(f, targets, consolidation.loss)) for f in features]
        assert merged.report["mismatch"] == pytest.approx(found, rel=1e-3) and found[1] < found[0]

    @pytest.mark.parametrize("consolidation", CORRECTIONS)
    @pytest.mark.parametrize("network", NETWORKS)
    def test_networks_that_are_the_same_stay_so(self, network, consolidation):
        data, make, _ = NETWORKS[network]
        stream = data()
        net = make(stream)
        weights = moved(get_weights(net))
        merged = consolidation(made(stream, net, weights, dict(weights), importances=True))
        decayed = consolidation.correction == "pass"  # by AdamW, a step's worth, and what Adam makes of that later
        for name, w in merged.deploy.items():
            assert torch.allclose(w, weights[name], rtol=0, atol=2e-3 if decayed else 0)
        assert merged.report["mismatch"] == pytest.approx([0, 0], abs=0.1 if decayed else 1e-12)

    def test_a_weaker_penalty_moves_more(self, toy):
        net = SMALL(toy)
        previous = get_weights(net)
        context = made(toy, net, previous, moved(previous))
        found = [
            HCMM(0.5, "none", correction="ridge", ridge=r)(context).report["mismatch"][1]
            for r in (1e6, 100.0, 1.0, 0.01)
        ]
        assert found == sorted(found, reverse=True)

    @pytest.mark.parametrize("consolidation", [c for c in CORRECTIONS if c.target == "previous"])
    def test_many_rows_are_thinned_evenly(self, consolidation, monkeypatch):
        """Of 24 pictures of 9 places every fifth or so; the mismatch over all of them falls, too."""
        stream = toys.images()
        net = toys.small_convnet(stream)
        previous = get_weights(net)
        context = made(stream, copy.deepcopy(net), previous, moved(previous), importances=True)
        plain = replace(consolidation, correction="none", loss="squared")(context).deploy
        every = consolidation(context).report["mismatch"]
        monkeypatch.setattr("clkit.consolidation.hcmm.ROWS", 45)
        merged = consolidation(context)
        assert merged.report["mismatch"][0] != every[0] == pytest.approx(merged.report["mismatch"][0], rel=0.3)
        target, *features = (rows(net, w, context.inputs, "conv3") for w in (previous, plain, merged.deploy))
        before, after = (float(feature_loss(f, [(1.0, target)], consolidation.loss)) for f in features)
        assert after < before == pytest.approx(every[0], rel=1e-3)

    @pytest.mark.parametrize("network", NETWORKS)
    def test_a_projection_that_alone_has_moved_is_brought_back(self, network):
        data, make, layer = NETWORKS[network]
        stream = data()
        net = make(stream)
        previous = get_weights(net)
        current = moved(previous, [f"{layer}.weight"])
        merged = HCMM(1.0, "none", correction="ridge", ridge=1e-9)(made(stream, net, previous, current)).deploy
        x = stream[1].prepare(stream[1].train.x)
        old, new, back = (at(net, w, x, layer) for w in (previous, current, merged))
        assert (back - old).abs().max() < 1e-3 * (new - old).abs().max()

    def test_a_straight_merge_of_linearised_networks_needs_no_correction_toward_both(self, toy):
        """Their features are mixed like their weights, by fact 7 of a linearised model."""
        net = Linearized(SMALL(toy))
        previous = get_weights(net)
        context = made(toy, net, moved(previous, by=0.2), moved(previous, by=-0.3))
        consolidation = HCMM(0.3, "none", correction="ridge", target="both", ridge=1e-3)
        plain = replace(consolidation, correction="none")(context).deploy
        assert near(consolidation(context).deploy, plain, rtol=1e-4, atol=1e-5)

    def test_the_head_sees_what_the_correction_saw(self, toy):
        """In a run, with the first stage: theta_0 and the frozen head keep their bits, features come closer."""

        def network(stream, *, seed):
            net = SMALL(stream, seed=seed)
            net.get_submodule("linear").requires_grad_(False)
            return Linearized(net)

        result = train(toy, HCMM(), model=network)
        start = get_weights(network(toy, seed=0))
        assert equal(get_weights(result.model.network), start)
        for weights in result.weights:
            assert torch.equal(weights["linear.weight"], start["linear.weight"])
        for report in result.reports[1:]:
            assert 0 < report["mismatch"][1] < report["mismatch"][0] and 0 < report["share"] < 1
        assert result.weights[2].keys() == start.keys() and np.isfinite(result.losses).all()

    def test_linearised_networks_have_a_fisher_information(self, toy):
        result = train(toy, HCMM(importance="fisher"), model=lambda s, *, seed: Linearized(SMALL(s, seed=seed)))
        assert not equal(result.weights[1], result.trained[1])

    def test_what_can_be_corrected(self, toy):
        net = SMALL(toy)
        x = toy[0].prepare(toy[0].train.x[:1])
        found, last = projections(net, x)
        assert list(found) == ["linear1.weight", "linear2.weight", "linear.weight"] and last == "linear2.weight"
        net.get_submodule("linear2").requires_grad_(False)
        assert projections(net, x)[1] == "linear1.weight"
        assert projections(Linearized(net), x)[1] == "linear1.weight"
        shared = nn.Linear(6, 6)
        twice = nn.Sequential(nn.Linear(6, 6), shared, nn.ReLU(), shared, nn.Linear(6, 2))
        assert projections(twice, x) == ({"0.weight": twice[0], "4.weight": twice[4]}, "0.weight")
        grouped = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, groups=2), nn.Conv2d(2, 3, 1))
        assert projections(grouped, torch.zeros(1, 2, 3, 3))[1] == "0.weight"

    @pytest.mark.parametrize("projection", ["linear1.weight", "*1.weight"])
    def test_a_projection_by_name(self, toy, projection):
        a, b = (train(toy, HCMM(correction=c, projection=projection)).weights[1] for c in ("ridge", "none"))
        assert {n for n in a if not torch.equal(a[n], b[n])} == {"linear1.weight"}

    @pytest.mark.parametrize(
        ("model", "projection", "message"),
        [
            (SMALL, "linaer1.weight", "'linaer1.weight' fits no weight; name one of .*'linear1.weight'"),
            (SMALL, "linear?.weight", r"fits \['linear1.weight', 'linear2.weight'\]; name one"),
            (partial(models.mlp, hidden=()), None, r"comes before the head; name one of \['linear.weight'\], or use"),
        ],
    )
    def test_a_projection_that_is_not_there_is_named_before_training(self, toy, model, projection, message):
        class Unused(Learner):
            def begin_task(self, model, task):
                raise AssertionError("training began")

        with pytest.raises(ValueError, match=message):
            train(toy, HCMM(projection=projection), Unused(), model=model)

    def test_an_empty_memory_is_named(self, toy):
        class Amnesiac(ER):
            def after_step(self, model, batch):
                pass

        with pytest.raises(ValueError, match="the memory is empty where features are needed"):
            train(toy, HCMM(), Amnesiac(memory=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.2}, "alpha: 1.2"),
        ({"alpha": -0.1}, "0 for the old weights, 1 for the new"),
        ({"alpha": float("nan")}, "alpha: nan"),
        ({"importance": "adam"}, "'adam' is unknown; choose one of corrected, raw, normalised, fisher, none"),
        ({"accumulate": "mean"}, "'mean' is unknown; choose one of ema, sum"),
        ({"correction": "sgd"}, "'sgd' is unknown; choose one of steps, pass, ridge, none"),
        ({"target": "current"}, "'current' is unknown; choose one of previous, both"),
        ({"loss": "l1", "correction": "steps"}, "'l1' is unknown; choose one of squared, absolute, cosine"),
        ({"loss": "cosine", "correction": "ridge"}, 'loss: "cosine" has no closed form; use correction="steps"'),
        ({"ridge": 0}, "ridge: 0"),
        ({"correction_lr": -1.0}, "correction_lr: -1.0"),
        ({"correction_steps": 0}, "correction_steps: 0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HCMM(**options)
