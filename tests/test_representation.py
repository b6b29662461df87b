"""Features of any layer, similarity indices against their definitions, and tables of what merging does to units."""

import gc
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toys
from clkit import alignment, models, normalization
from clkit import representation as R
from clkit import weights as W
from clkit.data import Examples, Stream, Task
from clkit.tangent import Linearized

PICTURES, VECTORS, TOKENS = toys.images(), toys.stream(), toys.tokens()


def blank(side):
    part = Examples(torch.zeros(3, 1, side, side, dtype=torch.uint8), torch.arange(3))
    return Stream("blank", (Task(0, "all", (0, 1, 2), part, part),), ("a", "b", "c"))


FACTORIES = {
    "mlp": (partial(models.mlp, hidden=(7, 5)), VECTORS, "linear2"),
    "convnet": (toys.small_convnet, PICTURES, "norm2"),
    "resnet18": (partial(models.resnet18, width=2), blank(8), "stage2.1.conv1"),
    "vit": (partial(models.vit, patch=3, dim=8, heads=2), PICTURES, "block1"),
    "gpt": (partial(models.gpt, width=8, heads=2), TOKENS, "block2.attention"),
    "torchvision": (partial(models.torchvision, name="mobilenet_v3_small"), blank(32), "features.0.1"),
}
every_factory = pytest.mark.parametrize("name", FACTORIES)


def case(name, seed=0, rows=9):
    """A network, inputs and the name of a layer within."""
    make, stream, layer = FACTORIES[name]
    g = torch.Generator().manual_seed(seed)
    if stream is TOKENS:
        x = torch.randint(8, (rows, 5), generator=g)
    else:
        x = torch.randn(rows, *stream.shape, generator=g)
    return make(stream, seed=seed), x, layer


def features_of(seed, rows=12, width=5):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def wavy(seed, rows=12, width=5):
    """Features that vary, and with a mean."""
    return features_of(seed, rows, width) @ features_of(seed + 100, width, width) + 3


def rotation(seed, width=5):
    return torch.linalg.qr(features_of(seed, width, width))[0]


class TestFeatures:
    @every_factory
    def test_a_layer_is_what_a_forward_pass_gives_there(self, name):
        model, x, layer = case(name)
        seen = []
        hook = model.get_submodule(layer).register_forward_hook(lambda *args: seen.append(args[2].detach().clone()))
        with torch.no_grad():
            model.eval()(x)
        hook.remove()
        model.train()
        found = R.features(model, x, layer, batch=4)
        torch.testing.assert_close(found, seen[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(R.features(model, x), models.features(model, x), rtol=1e-4, atol=1e-5)

    @every_factory
    def test_the_model_stays_as_it_was(self, name):
        model, x, layer = case(name)
        next(iter(model.children())).eval()
        modes, before, rows = [m.training for m in model.modules()], W.get_weights(model), x.clone()
        R.features(model, x, layer, weights=W.scale(before, 0.5))
        R.activations(model, x)
        assert [m.training for m in model.modules()] == modes
        assert W.equal(W.get_weights(model), before) and torch.equal(x, rows)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    @every_factory
    def test_of_a_linearised_model_at_its_point_they_are_the_networks(self, name):
        model, x, layer = case(name)
        lin = Linearized(model)
        for place in (None, layer):
            found = R.features(lin, x, place)
            torch.testing.assert_close(found, R.features(model, x, place), rtol=1e-4, atol=1e-5)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in lin.network.modules())

    @pytest.mark.parametrize("name", ["mlp", "convnet", "vit"])
    def test_of_linearised_models_they_are_affine_in_the_weights(self, name):
        model, x, layer = case(name)
        lin = Linearized(model)
        g = torch.Generator().manual_seed(0)
        a, b = (
            W.map_weights(lambda t: t + 0.1 * torch.randn(t.shape, generator=g), W.get_weights(model)) for _ in range(2)
        )
        for place in (None, layer):
            ends = [R.features(lin, x, place, weights=w) for w in (a, b)]
            middle = R.features(lin, x, place, weights=W.lerp(a, b, 0.3))
            torch.testing.assert_close(middle, ends[0].lerp(ends[1], 0.3), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(ends[0], ends[1], atol=1e-2)

    def test_other_weights(self):
        model, x, layer = case("convnet")
        other = case("convnet", seed=1)[0]
        found = R.features(model, x, layer, weights=W.get_weights(other))
        torch.testing.assert_close(found, R.features(other, x, layer))

    def test_activations_come_in_the_order_of_the_pass(self):
        model, x, _ = case("convnet")
        found = R.activations(model, x)
        assert list(found) == ["conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "linear"]
        torch.testing.assert_close(found["linear"], model.eval()(x).detach())
        assert list(R.activations(model, x, ["linear", "relu1"])) == ["relu1", "linear"]

    def test_layers_that_work_in_place_do_not_change_what_was_seen(self):
        net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        assert (R.features(net, x, "0") < 0).any()

    def test_a_shared_layer_counts_as_it_ran_last(self):
        layer = nn.Linear(3, 3)
        net = nn.Sequential(layer, nn.Tanh(), layer)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(R.features(net, x, "0"), net(x).detach())

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (
                lambda m, x: R.features(m, x, "norm9"),
                ValueError,
                "layer: 'norm9' is unknown.*mean .*'norm1'",
            ),
            (lambda m, x: R.features(m, x[:0]), ValueError, "x: there are no rows"),
            (lambda m, x: R.features(m, x, batch=0), ValueError, "batch: 0"),
            (lambda m, x: R.features(m, x, weights={}), ValueError, "different names"),
            (
                lambda m, x: R.features(nn.ModuleDict({"a": m, "b": nn.Linear(1, 1)}), x, "c"),
                ValueError,
                "'c' is unknown",
            ),
            (lambda m, x: R.features(nn.ReLU(), x), ValueError, "no nn.Linear"),
            (lambda m, x: R.features(Linearized(nn.Conv2d(1, 2, 3)), x), ValueError, "no nn.Linear"),
            (lambda m, x: R.activations(nn.LSTM(6, 3), x[:, 0], [""]), TypeError, "puts out a tuple"),
        ],
    )
    def test_bad_input_names_itself(self, call, error, message):
        model, x, _ = case("convnet")
        with pytest.raises(error, match=message):
            call(model, x)

    def test_a_layer_that_does_not_run(self):
        net = nn.Sequential(nn.Linear(6, 3))
        net[0].spare = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"'0\.spare' does not run"):
            R.features(net, torch.zeros(2, 6), "0.spare")


def naive_hsic(k, l, unbiased):
    """Sums over all pairs, triples and quadruples of different examples, as the estimators are defined."""
    n = len(k)
    if not unbiased:
        h = torch.eye(n).double() - 1 / n
        return torch.trace(k @ h @ l @ h) / (n - 1) ** 2

    def mean(size, term):
        rows = list(permutations(range(n), size))
        return sum(term(*r) for r in rows) / len(rows)

    two = mean(2, lambda i, j: k[i, j] * l[i, j])
    four = mean(4, lambda i, j, q, r: k[i, j] * l[q, r])
    three = mean(3, lambda i, j, q: k[i, j] * l[i, q])
    return two + four - 2 * three


def naive_gram(f, kernel, bandwidth):
    if kernel == "linear":
        return f @ f.T
    apart = [[float((a - b).norm()) for b in f] for a in f]
    middle = torch.tensor([apart[i][j] for i in range(len(f)) for j in range(i + 1, len(f))]).median()
    return torch.tensor([[np.exp(-(d**2) / (2 * (bandwidth * float(middle)) ** 2)) for d in row] for row in apart])


KINDS = [("linear", 1.0), ("rbf", 0.5), ("rbf", 2.0)]
every_kind = pytest.mark.parametrize(("kernel", "bandwidth"), KINDS)
either = pytest.mark.parametrize("unbiased", [False, True])


class TestCKA:
    @either
    @every_kind
    def test_it_is_the_naive_definition(self, kernel, bandwidth, unbiased):
        a, b = wavy(0, rows=6, width=3), wavy(1, rows=6, width=4)
        k, l = (naive_gram(f, kernel, bandwidth).double() for f in (a, b))
        of = partial(naive_hsic, unbiased=unbiased)
        expected = of(k, l) / (of(k, k) * of(l, l)).sqrt()
        found = R.cka(a, b, kernel=kernel, bandwidth=bandwidth, unbiased=unbiased)
        assert found == pytest.approx(float(expected), rel=1e-6)
        torch.testing.assert_close(R.hsic(k, l, unbiased=unbiased), of(k, l))

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100), kind=st.sampled_from(KINDS), unbiased=st.booleans())
    def test_rotations_scales_and_shifts_change_nothing(self, seed, scale, kind, unbiased):
        a, b = wavy(seed), wavy(seed + 1)
        options = {"kernel": kind[0], "bandwidth": kind[1], "unbiased": unbiased}
        plain = R.cka(a, b, **options)
        assert R.cka(scale * a @ rotation(seed) + 7, b, **options) == pytest.approx(plain, abs=1e-8)
        assert R.cka(b, a, **options) == pytest.approx(plain, abs=1e-12)
        assert R.cka(a, scale * a @ rotation(seed), **options) == pytest.approx(1, abs=1e-8)
        assert (-1e-9 <= plain or unbiased) and plain < 1

    @settings(max_examples=30, deadline=None)
    @given(st.integers(4, 9), st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(0, 99))
    def test_the_linear_one_needs_no_kernels(self, rows, width, other, unbiased, seed):
        """It is that of the kernels, whichever of examples and features are more."""
        a, b = wavy(seed, rows, width), wavy(seed + 1, rows, other)
        k, l = (naive_gram(f - f.mean(0), "linear", 1.0) for f in (a, b))
        cross, one, two = (float(R.hsic(p, q, unbiased=unbiased)) for p, q in ((k, l), (k, k), (l, l)))
        found = R.cka(a, b, unbiased=unbiased)
        if min(one, two) > 1e-9 * max(float(k.square().sum()), float(l.square().sum())):
            assert found == pytest.approx(cross / (one * two) ** 0.5, rel=1e-6, abs=1e-6)

    def test_memory_of_the_linear_one_is_that_of_its_features(self):
        for a, b in ((features_of(0, 900, 7), features_of(1, 900, 3)), (features_of(0, 7, 900), features_of(1, 7, 3))):
            with toys.Sizes() as sizes:
                assert R.cka(a, b) > 0 and R.cka(a, b, unbiased=True) < 1
            assert sizes.largest == 7 * 900

    def test_an_invertible_map_changes_it(self):
        a = features_of(0)
        assert R.cka(a, a * torch.tensor([10, 1, 1, 1, 0.1])) < 0.9

    @every_kind
    def test_independent_features_are_at_zero_in_expectation_without_bias_alone(self, kernel, bandwidth):
        pairs = [(features_of(2 * s, 10, 20), features_of(2 * s + 1, 10, 20)) for s in range(300)]
        options = {"kernel": kernel, "bandwidth": bandwidth}
        found = np.array([[R.cka(a, b, unbiased=u, **options) for u in (True, False)] for a, b in pairs])
        error = found[:, 0].std() / np.sqrt(len(pairs))
        assert abs(found[:, 0].mean()) < 4 * error and found[:, 1].mean() > 0.4

    @every_kind
    def test_one_batch_is_the_whole(self, kernel, bandwidth):
        a, b = wavy(0), wavy(1)
        whole = R.cka(a, b, kernel=kernel, bandwidth=bandwidth, unbiased=True)
        assert R.cka_in_batches([(a, b)], kernel=kernel, bandwidth=bandwidth) == pytest.approx(whole, rel=1e-12)

    def test_batches_average_their_three_criteria(self):
        a, b = wavy(0, rows=18, width=3), wavy(1, rows=18, width=3)
        found = R.cka_in_batches(iter(list(zip(a.split(6), b.split(6), strict=True))))
        grams = [[f @ f.T for f in part.split(6)] for part in (a, b)]
        xy, xx, yy = (
            sum(naive_hsic(k, l, True) for k, l in zip(grams[i], grams[j], strict=True)) / 3
            for i, j in ((0, 1), (0, 0), (1, 1))
        )
        assert found == pytest.approx(float(xy / (xx * yy).sqrt()), rel=1e-9)

    def test_many_batches_tend_to_the_whole(self):
        a = wavy(0, rows=2000)
        b = a + 4 * features_of(3, 2000)
        whole = R.cka(a, b, unbiased=True)
        assert R.cka_in_batches(zip(a.split(20), b.split(20), strict=True)) == pytest.approx(whole, abs=0.02)

    def test_a_constant_is_like_nothing(self):
        a, flat = wavy(0), torch.full((12, 5), 0.1)
        for kernel in ("linear", "rbf"):
            for unbiased in (False, True):
                assert np.isnan(R.cka(a, flat, kernel=kernel, unbiased=unbiased))

    def test_single_precision_far_from_zero(self):
        a, b = features_of(0), features_of(1)
        far = R.cka((a + 1000).float(), (b - 1000).float())
        assert far == pytest.approx(R.cka(a, b), abs=1e-3)

    @pytest.mark.parametrize("kernel", ["linear", "rbf"])
    def test_by_layer_is_pair_by_pair(self, kernel):
        first, x, _ = case("convnet", rows=20)
        second, layers = case("convnet", seed=1)[0], ["norm1", "conv3", "linear"]
        table = R.cka_by_layer(first, second, x, layers, ["relu2", "linear"], kernel=kernel, batch=10)
        assert list(table.index) == layers and list(table.columns) == ["relu2", "linear"]
        for i in layers:
            for j in table.columns:
                a, b = (R.features(m, x, layer) for m, layer in ((first, i), (second, j)))
                pair = R.cka_in_batches(zip(a.split(10), b.split(10), strict=True), kernel=kernel)
                assert table.loc[i, j] == pytest.approx(pair, rel=1e-6)
        own = R.cka_by_layer(first, first, x, layers, batch=10)
        np.testing.assert_allclose(np.diag(own), 1)
        np.testing.assert_allclose(own, own.T)

    def test_other_architectures_compare(self):
        first, second = case("convnet")[0], case("vit")[0]
        x = case("vit", rows=16)[1]
        assert R.cka_by_layer(first, second, x, ["norm1"], ["block1", "norm"]).shape == (1, 2)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda a: R.cka(a, a, kernel="rfb"), "kernel: 'rfb'"),
            (lambda a: R.cka(a, a[:-1]), "12 and 11 examples"),
            (lambda a: R.cka(a[:3], a[:3], unbiased=True), "3 examples are too few; give 4"),
            (lambda a: R.cka(a, a, bandwidth=0), "bandwidth: 0"),
            (lambda a: R.cka_in_batches([]), "pairs: there are none"),
            (lambda a: R.cka_in_batches([(a[:3], a[:3])]), "3 examples are too few"),
            (lambda a: R.cka_by_layer(nn.Linear(5, 2), nn.Linear(5, 2), a, ["fc"]), "'fc' is unknown"),
            (lambda a: R.cka_by_layer(nn.Linear(5, 2), nn.Linear(5, 2), a[:3], [""]), "3 examples"),
            (
                lambda a: R.cka_by_layer(nn.Linear(5, 2), nn.Linear(5, 2), a, [""], batch=4),
                "batch: 4; give",
            ),
        ],
    )
    def test_bad_input_names_itself(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(features_of(0))


class TestMismatch:
    def test_distances_by_hand(self):
        a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        b = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
        found = R.distances(a, b)
        assert found["l1"].tolist() == [3.5, 1.5, 0, 0.5]
        assert found["l2"].tolist() == pytest.approx([12.5**0.5, 2.5**0.5, 0, 0.5**0.5])
        assert found["cosine"].tolist() == [1, 1, 0, 1]

    @given(seed=st.integers(0, 1000))
    @settings(max_examples=20, deadline=None)
    def test_distances_are_distances(self, seed):
        a, b, c = (features_of(seed + i) for i in range(3))
        for name in ("l1", "l2"):
            ab, bc, ac = (R.distances(*pair)[name] for pair in ((a, b), (b, c), (a, c)))
            assert (ab > 0).all() and (ac <= ab + bc + 1e-12).all()
            assert torch.equal(ab, R.distances(b, a)[name]) and not R.distances(a, a)[name].any()
        assert (R.distances(a, b)["l1"] <= R.distances(a, b)["l2"] + 1e-12).all()
        torch.testing.assert_close(R.distances(a, b)["cosine"], R.distances(3 * a, 0.2 * b)["cosine"])

    def test_classes_add_up_to_all(self):
        a, b, y = features_of(0), features_of(1), torch.tensor([2, 5, 2, 2] * 3)
        table = R.mismatch(a, b, y)
        assert list(table.columns) == ["class", "examples", "l1", "l2", "cosine"]
        assert table["class"].tolist() == ["all", 2, 5] and table.examples.tolist() == [12, 9, 3]
        for name in ("l1", "l2", "cosine"):
            whole, *parts = table[name]
            assert whole == pytest.approx((9 * parts[0] + 3 * parts[1]) / 12)
        torch.testing.assert_close(table.l1[2], float((a - b)[y == 5].abs().mean()))
        assert len(R.mismatch(a, b)) == 1

    def test_images_count_as_flat(self):
        a, b = (torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(s)) for s in range(2))
        assert R.mismatch(a, b).equals(R.mismatch(a.flatten(1), b.flatten(1)))

    def test_bad_input_names_itself(self):
        with pytest.raises(ValueError, match=r"\(12, 5\) and \(12, 4\)"):
            R.mismatch(features_of(0), features_of(0)[:, :4])
        with pytest.raises(ValueError, match="labels"):
            R.mismatch(features_of(0), features_of(1), torch.zeros(3))


class TestEmbedding:
    @pytest.fixture
    def clouds(self):
        """Three models: the second is the first moved a little, the third moved far."""
        y = torch.arange(24) % 3
        a = features_of(0, 24, 6) + 5 * torch.eye(3, 6).double()[y]
        return {"before": a, "merged": a + 0.1 * features_of(1, 24, 6), "far": a + 40}, y

    @pytest.mark.parametrize("method", ["tsne", "pca"])
    def test_the_table_is_tidy_and_repeats_itself(self, clouds, method):
        fs, y = clouds
        found, again = (R.embed(fs, y, [0, 2], method=method, perplexity=5) for _ in range(2))
        points = found.points
        assert list(points.columns) == ["model", "class", "example", "x", "y"] and points.equals(again.points)
        assert len(points) == 48 and set(points["class"]) == {0, 2} and np.isfinite(points[["x", "y"]]).all(axis=None)
        for name in fs:
            own = points[points.model == name]
            assert own.example.tolist() == [i for i in range(24) if i % 3 != 1]
            assert own["class"].tolist() == y[own.example.tolist()].tolist()

    @pytest.mark.parametrize("method", ["tsne", "pca"])
    def test_what_is_near_stays_near(self, clouds, method):
        fs, y = clouds
        points = R.embed(fs, y, method=method, perplexity=5).points
        at = {name: points[points.model == name][["x", "y"]].to_numpy() for name in fs}
        near, far = (np.linalg.norm(at["before"] - at[name], axis=1).mean() for name in ("merged", "far"))
        assert near < 0.2 * far

    def test_principal_components_are_those_of_all_features_stacked(self, clouds):
        fs, y = clouds
        points = R.embed(fs, y, method="pca").points
        rows = torch.cat(list(fs.values()))
        u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        np.testing.assert_allclose(np.abs(points[["x", "y"]]), (u[:, :2] * s[:2]).abs().numpy(), rtol=1e-6, atol=1e-8)

    def test_the_numbers_are_those_of_the_full_space(self, clouds):
        fs, y = clouds
        table = R.embed(fs, y, [1], method="pca").agreement
        assert table[["first", "second", "class"]].to_numpy().tolist() == [
            [a, b, c] for a, b in (("before", "merged"), ("before", "far"), ("merged", "far")) for c in ("all", 1)
        ]
        row = table.iloc[1]
        a, b = (fs[name][y == 1] for name in ("before", "merged"))
        assert row.cka == R.cka(a, b, unbiased=True) and row.l1 == R.mismatch(a, b).l1[0] and row.examples == 8
        assert table.cka[2] == pytest.approx(1) and table.l1[2] == pytest.approx(40)

    def test_one_model_has_no_pairs_and_few_examples_no_cka(self, clouds):
        fs, y = clouds
        assert R.embed({"before": fs["before"]}, y, method="pca").agreement.empty
        few = R.embed({name: f[:6] for name, f in fs.items()}, y[:6], method="pca").agreement
        assert few.cka.isna().tolist() == [False, True, True, True] * 3

    def test_few_points_lower_the_perplexity(self, clouds):
        fs, y = clouds
        assert len(R.embed({"before": fs["before"][:4]}, y[:4]).points) == 4

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda f, y: R.embed(f, y, method="umap"), "method: 'umap'"),
            (lambda f, y: R.embed({}, y), "features: there are none"),
            (lambda f, y: R.embed(f | {"other": f["far"][:, :3]}, y), "features: shapes"),
            (lambda f, y: R.embed(f, y[:5]), "5 labels"),
            (lambda f, y: R.embed(f, y, [7]), "classes: 7 has no example"),
            (lambda f, y: R.embed({"far": f["far"][:3]}, y[:3]), "3 points are too few"),
        ],
    )
    def test_bad_input_names_itself(self, clouds, call, message):
        with pytest.raises(ValueError, match=message):
            call(*clouds)


class TestUnits:
    @every_factory
    def test_variances_against_one_pass_by_hand(self, name):
        model, x, layer = case(name, rows=8)
        a, b, c = (W.get_weights(case(name, seed=s)[0]) for s in (1, 2, 3))
        row = R.variance_ratio(model, c, (a, b), x, [layer], batch=3).iloc[0]

        def spread(w):
            f = R.features(model, x, layer, weights=w).double()
            axis = 1 if f.ndim == 4 else -1
            return float(f.movedim(axis, 0).flatten(1).var(1, correction=0).mean())

        assert row.merged == pytest.approx(spread(c), rel=1e-5)
        assert row.ratio == pytest.approx(spread(c) / np.mean([spread(a), spread(b)]), rel=1e-5)

    def test_parents_keep_all_of_it(self):
        model, x, _ = case("convnet", rows=16)
        w = W.get_weights(model)
        table = R.variance_ratio(model, w, (w, w), x)
        assert list(table.layer) == ["conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "linear"]
        np.testing.assert_allclose(table.ratio, 1)

    def test_averages_collapse_and_are_repaired(self):
        stream = PICTURES
        x = torch.randn(200, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        model = models.convnet(stream, widths=(16, 32, 32))
        a, b = (W.get_weights(models.convnet(stream, widths=(16, 32, 32), seed=s)) for s in (1, 2))
        a, b = (normalization.refresh(model, w, x) for w in (a, b))
        table = R.collapse(model, a, b, x, layers=["norm1", "norm2", "norm3"]).set_index(["variant", "layer"]).ratio
        merged, repaired = table["merged"], table["repaired"]
        assert merged["norm3"] < 0.6 and (merged < 0.95).all()
        np.testing.assert_allclose(repaired, 1, atol=0.02)
        assert (table["refreshed"] - 1).abs().max() < (merged - 1).abs().max()
        at = W.lerp(a, b, 0.5)
        by_hand = normalization.repair(model, at, ends=(a, b), t=0.5, inputs=x)
        np.testing.assert_array_equal(R.variance_ratio(model, by_hand, (a, b), x, ["norm2"]).ratio, repaired["norm2"])

    def test_dead_parents_have_no_ratio(self):
        net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))
        w = W.get_weights(net)
        dead = w | {"0.weight": torch.zeros(3, 6), "0.bias": torch.full((3,), 0.1)}
        table = R.variance_ratio(net, w, (dead, dead), torch.randn(5, 6))
        assert np.isnan(table.ratio[0]) and table.merged[0] > 0

    @every_factory
    def test_correlations_are_pearsons(self, name):
        model, x, layer = case(name, rows=8)
        a, b = (W.get_weights(case(name, seed=s)[0]) for s in (1, 2))
        found = R.correlations(model, a, b, x, layer, batch=3)
        rows = []
        for w in (a, b):
            f = R.features(model, x, layer, weights=w).double()
            rows.append(f.movedim(1 if f.ndim == 4 else -1, 0).flatten(1))
        units = len(rows[0])
        expected = torch.corrcoef(torch.cat(rows))[:units, units:]
        alive = expected.isfinite()
        torch.testing.assert_close(found[alive], expected[alive], rtol=1e-5, atol=1e-5)
        assert not found[~alive].any() and alive.any()

    def test_matching_finds_a_permutation(self):
        model, x, _ = case("convnet", rows=30)
        a = normalization.refresh(model, W.get_weights(model), x)
        symmetry = alignment.symmetry(model, x[:2])
        b = alignment.permute(symmetry, alignment.random_permutations(symmetry, torch.Generator().manual_seed(3)), a)
        table = R.matched(model, a, b, x, "norm2")
        assert list(table.columns) == ["kind", "rank", "unit", "partner", "correlation"]
        plain, paired = (table[table.kind == kind] for kind in ("as they are", "matched"))
        np.testing.assert_allclose(paired.correlation, 1, atol=1e-5)
        assert (plain.unit == plain.partner).all() and sorted(paired.partner) == list(range(6))
        assert plain.correlation.sum() < paired.correlation.sum() - 0.5

    def test_matching_is_the_best_of_all_pairings(self):
        model, x, _ = case("mlp", rows=20)
        a, b = (W.get_weights(case("mlp", seed=s)[0]) for s in (1, 2))
        matrix = R.correlations(model, a, b, x)
        best = max(sum(float(matrix[i, j]) for i, j in enumerate(p)) for p in permutations(range(5)))
        table = R.matched(model, a, b, x)
        paired = table[table.kind == "matched"]
        assert paired.correlation.sum() == pytest.approx(best)
        for kind in ("as they are", "matched"):
            found = table[table.kind == kind]
            assert (found.correlation.diff().dropna() <= 0).all() and found["rank"].tolist() == list(range(5))
        for row in paired.itertuples():
            assert row.correlation == float(matrix[row.unit, row.partner])

    def test_with_itself_every_unit_that_lives_is_at_one(self):
        model, x, _ = case("mlp", rows=20)
        w = dict(W.get_weights(model))
        w["linear1.weight"][2] = 0
        diagonal = R.correlations(model, w, w, x, "linear1").diagonal()
        torch.testing.assert_close(diagonal, torch.tensor([1, 1, 0, 1, 1, 1, 1]).double())

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda m, w, x: R.variance_ratio(m, w, (), x), "parents: there are none"),
            (lambda m, w, x: R.variance_ratio(m, w, (w,), x[:1]), "1 examples"),
            (lambda m, w, x: R.variance_ratio(m, w, ({},), x), "different names"),
            (lambda m, w, x: R.variance_ratio(m, w, (w,), x, ["nrom1"]), "'nrom1' is unknown"),
            (lambda m, w, x: R.correlations(m, w, w, x[:1]), "1 examples"),
            (lambda m, w, x: R.matched(m, w, w, x, "fc"), "'fc' is unknown"),
            (lambda m, w, x: R.collapse(m, w, w, x, 2.0), "t: 2.0"),
        ],
    )
    def test_bad_input_names_itself(self, call, message):
        model, x, _ = case("convnet")
        with pytest.raises(ValueError, match=message):
            call(model, W.get_weights(model), x)


def kept(use, model, rows):
    """The bytes of all tensors made since and alive when the last batch goes through a model."""
    x = case("convnet", rows=rows)[1]
    found = []

    def look(*_):
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        held.pop(x.untyped_storage().data_ptr(), None)
        found.append(sum(held.values()))

    hook = model.conv1.register_forward_hook(look)
    gc.freeze()  # what is there already does not count
    try:
        use(model, x)
    finally:
        gc.unfreeze()
        hook.remove()
    return found[-1]


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: R.cka_by_layer(m, m, x, ["conv1", "norm3"], batch=16),
        lambda m, x: R.correlations(m, W.get_weights(m), W.get_weights(m), x, "conv1", batch=16),
        lambda m, x: R.variance_ratio(m, W.get_weights(m), [W.get_weights(m)], x, batch=16),
        lambda m, x: R.cka_in_batches((R.features(m, part), R.features(m, part)) for part in x.split(16)),
    ],
    ids=["cka_by_layer", "correlations", "variance_ratio", "cka_in_batches"],
)
def test_what_is_kept_does_not_grow_with_the_rows(use):
    model = case("convnet")[0]
    few, many = (kept(use, model, rows) for rows in (32, 96))
    assert many <= few + 1000


def test_what_is_kept_is_measured():
    model = case("convnet")[0]
    few, many = (kept(lambda m, x: R.features(m, x, "conv1", batch=16), model, rows) for rows in (32, 96))
    assert many - few == 64 * 4 * 36 * 4
