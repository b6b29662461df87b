"""Matching: planted permutations come back, similarities are correlations, assignments are optimal."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from clkit import alignment, models
from clkit.weights import combine, dot, equal, get_weights, lerp
from test_alignment import NETS, example, stream
from test_alignment_zoo import SMALL, randomise

SEEDS = st.integers(0, 2**31 - 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(net: nn.Module, x: Tensor, by: str = "activations") -> None:
    """Aligning a permuted copy to the original gives back the original, bit by bit."""
    randomise(net)
    symmetry, weights = alignment.symmetry(net, x[:2]), get_weights(net)
    moved = alignment.permute(
        symmetry, alignment.random_permutations(symmetry, torch.Generator().manual_seed(1)), weights
    )
    result = alignment.align(symmetry, net, weights, moved, x if by == "activations" else None, by=by)
    back = alignment.permute(symmetry, result.permutations, moved)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    for t in (0.3, 0.5):
        assert all(torch.allclose(m, weights[n], rtol=1e-6) for n, m in lerp(weights, back, t).items())


@pytest.mark.parametrize("by", ["activations", "weights"])
@pytest.mark.parametrize("name", NETS)
def test_planted_permutations_of_our_models(name, by):
    planted(NETS[name](), example(name, 40), by)


@pytest.mark.parametrize(
    "name", ["convnext", "densenet", "mobilenet_v2", "resnext", "squeezenet", "swin", "vgg", "vit"]
)
def test_planted_permutations_of_small_torchvision_models(name):
    build, size = SMALL[name]
    planted(build(), noise(40, 3, size, size))


FULL = {
    "resnet18": lambda: models.resnet18(stream(3, 32, 32)),
    "mobilenet_v2": zoo.mobilenet_v2,
    "vgg11_bn": zoo.vgg11_bn,
    "densenet121": zoo.densenet121,
    "convnext_tiny": zoo.convnext_tiny,
    "vit": lambda: zoo.VisionTransformer(32, 4, 6, 6, 192, 768),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_planted_permutations_of_full_models(name):
    planted(FULL[name](), noise(48, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit"])
def test_planted_permutations_of_full_models_by_weights(name):
    planted(FULL[name](), noise(2, 3, 32, 32), "weights")


class Convolutions(nn.Module):
    """Two 1x1 convolutions; the first one's output is what matching sees."""

    def __init__(self, activation=F.relu, seed: int = 0):
        super().__init__()
        self.first, self.second, self.activation = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), activation
        randomise(self, seed=seed)

    def seen(self, x: Tensor) -> Tensor:
        return self.activation(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.seen(x)).mean((2, 3))


def compare(a: nn.Module, b: nn.Module, x: Tensor, **options) -> np.ndarray:
    symmetry = alignment.symmetry(a, x[:2])
    return alignment.similarities(symmetry, a, get_weights(a), get_weights(b), x, **options).matrix["first"]


def channels(net: Convolutions, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(net).double().seen(x.double()).movedim(1, 0).flatten(1).numpy()


class TestSimilarity:
    @pytest.fixture
    def pair(self):
        return Convolutions(seed=1), Convolutions(seed=2)

    x = noise(20, 3, 4, 5)

    def test_it_is_pearsons_correlation(self, pair):
        found = compare(*pair, self.x, batch=7)
        expected = np.corrcoef(channels(pair[0], self.x), channels(pair[1], self.x))[:6, 6:]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.abs(found).max() <= 1

    def test_a_network_is_like_itself(self, pair):
        found = compare(pair[0], pair[0], self.x)
        np.testing.assert_allclose(found.diagonal(), 1, atol=1e-6)
        np.testing.assert_allclose(found, found.T, atol=1e-6)
        double = compare(copy.deepcopy(pair[0]).double(), pair[0].double(), self.x.double())
        np.testing.assert_allclose(double.diagonal(), 1, atol=1e-14)

    @settings(max_examples=5, deadline=None)
    @given(seed=SEEDS, batch=st.integers(1, 25))
    def test_batches_order_and_duplicates_do_not_matter(self, seed, batch):
        pair = Convolutions(seed=1), Convolutions(seed=2)
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        once = compare(*pair, self.x)
        np.testing.assert_allclose(compare(*pair, self.x[order], batch=batch), once, atol=1e-6)
        np.testing.assert_allclose(compare(*pair, torch.cat([self.x, self.x])), once, atol=1e-6)

    def test_larger_images_of_the_same_do_not_matter(self, pair):
        large = self.x.repeat_interleave(3, 2).repeat_interleave(2, 3)
        np.testing.assert_allclose(compare(*pair, large), compare(*pair, self.x), atol=1e-6)

    @settings(max_examples=5, deadline=None)
    @given(seed=SEEDS)
    def test_scale_and_offset_of_a_unit_do_not_matter(self, seed):
        pair = Convolutions(torch.nn.Identity(), 1), Convolutions(torch.nn.Identity(), 2)
        before = compare(*pair, self.x)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            factor = 0.1 + 10 * torch.rand(6, generator=g)
            pair[0].first.weight.mul_(factor[:, None, None, None])
            pair[0].first.bias.mul_(factor).add_(5 * torch.randn(6, generator=g))
        np.testing.assert_allclose(compare(*pair, self.x), before, atol=1e-5)

    def test_constant_units_are_like_nothing(self, pair):
        with torch.no_grad():
            pair[0].first.weight[2].zero_()
            pair[0].first.bias[2] = 1e6
            pair[1].first.bias[4] = -100.0
        found = compare(*pair, self.x)
        assert np.isfinite(found).all()
        assert not found[2].any() and not found[:, 4].any()

    def test_large_means_do_not_cancel(self):
        pair = Convolutions(torch.nn.Identity(), 1).double(), Convolutions(torch.nn.Identity(), 2).double()
        before = compare(*pair, self.x.double())
        with torch.no_grad():
            pair[0].first.bias.add_(1e5)
        np.testing.assert_allclose(compare(*pair, self.x.double()), before, atol=1e-8)

    def test_the_published_statistic(self, pair):
        found = compare(*pair, self.x, statistic="clewi2024")
        a, b = channels(pair[0], self.x), channels(pair[1], self.x)
        wide = 4 * 5
        means, squares = (a.mean(1), b.mean(1)), (a.var(1), b.var(1))
        covariance = (a - means[0][:, None]) @ (b - means[1][:, None]).T / a.shape[1]
        scale = [np.sqrt(s + (wide - 1) ** 2 * m**2) for s, m in zip(squares, means, strict=True)]
        closed = (covariance - (wide - 1) * np.outer(*means)) / np.outer(*scale)
        np.testing.assert_allclose(found, closed, rtol=5e-3, atol=1e-3)
        assert np.abs(found - compare(*pair, self.x)).max() > 0.5

    def test_the_published_statistic_is_pearsons_at_one_position(self, pair):
        x = noise(300, 3, 1, 1)
        found = compare(*pair, x, statistic="clewi2024")
        np.testing.assert_allclose(found, compare(*pair, x), atol=1e-2)


class TestAssignment:
    @pytest.fixture(scope="class")
    @staticmethod
    def symmetry():
        net = nn.Sequential(nn.Linear(3, 6), nn.GroupNorm(3, 6), nn.Linear(6, 2))
        return alignment.symmetry(net, noise(2, 3))

    def total(self, matrices, permutations) -> float:
        return sum(m[np.arange(len(m)), permutations[g].numpy()].sum() for g, m in matrices.items())

    @settings(max_examples=10, deadline=None)
    @given(seed=SEEDS)
    def test_it_is_the_best_of_all_elements(self, symmetry, seed):
        outer = next(g for g in symmetry.groups.values() if not g.within)
        inner = symmetry.groups[symmetry.members[outer.name][0]]
        rng = np.random.default_rng(seed)
        matrices = {outer.name: rng.normal(size=(3, 3)), inner.name: rng.normal(size=(6, 6))}
        found = alignment.assign(symmetry, matrices)
        best = max(
            self.total(matrices, {outer.name: torch.tensor(blocks), inner.name: torch.tensor(members)})
            for blocks in itertools.permutations(range(3))
            for swaps in itertools.product((0, 1), repeat=3)
            for members in [[2 * b + (k ^ s) for b, s in zip(blocks, swaps, strict=True) for k in (0, 1)]]
        )
        assert self.total(matrices, found) == pytest.approx(best)

    def test_no_other_element_does_better_on_networks(self):
        a, b, x = Convolutions(seed=1), Convolutions(seed=2), noise(30, 3, 4, 4)
        symmetry = alignment.symmetry(a, x[:2])
        matrices = alignment.similarities(symmetry, a, get_weights(a), get_weights(b), x).matrix
        found = alignment.align(symmetry, a, get_weights(a), get_weights(b), x)
        best = self.total(matrices, found.permutations)
        assert best >= self.total(matrices, alignment.identity(symmetry))
        for seed in range(20):
            other = alignment.random_permutations(symmetry, torch.Generator().manual_seed(seed))
            assert best >= self.total(matrices, other)
        assert found.similarity["first"] == pytest.approx(best / 6)

    def test_ties_stay(self, symmetry):
        found = alignment.assign(symmetry, {})
        assert all(torch.equal(found[g], p) for g, p in alignment.identity(symmetry).items())


class TestAlign:
    @pytest.fixture(scope="class")
    @staticmethod
    def nets():
        nets = [randomise(NETS["convnet"](), seed=seed) for seed in (1, 2)]
        x = example("convnet", 30)
        return alignment.symmetry(nets[0], x[:2]), nets[0], *map(get_weights, nets), x

    def test_it_is_repeatable_and_leaves_inputs_alone(self, nets):
        symmetry, net, reference, moving, x = nets
        before = {name: t.clone() for name, t in moving.items()}, x.clone(), get_weights(net)
        first, second = (alignment.align(symmetry, net, reference, moving, x) for _ in range(2))
        assert all(torch.equal(first.permutations[g], p) for g, p in second.permutations.items())
        assert all(torch.equal(moving[n], t) for n, t in before[0].items()) and torch.equal(x, before[1])
        assert all(torch.equal(before[2][n], t) for n, t in get_weights(net).items())

    def test_a_network_stays_where_it_is(self, nets):
        symmetry, net, reference, _, x = nets
        for by in ("activations", "weights"):
            result = alignment.align(symmetry, net, reference, reference, x, by=by)
            assert set(result.unmoved.values()) == {1.0}

    def test_dead_units_are_reported(self, nets):
        symmetry, net, reference, moving, x = nets
        dead = reference | {"norm1.weight": reference["norm1.weight"].clone()}
        dead["norm1.weight"][:2] = 0
        result = alignment.align(symmetry, net, dead, moving, x)
        assert result.degenerate["conv1"] >= 2
        assert all(-1 <= s <= 1 for s in result.similarity.values())

    def test_by_weights_brings_weights_closer(self, nets):
        symmetry, net, reference, moving, _ = nets
        permutations = alignment.align(symmetry, net, reference, moving, by="weights").permutations
        parameters = [name for name in reference if name not in symmetry.buffers]

        def distance(weights):
            return sum(float((reference[n] - weights[n]).square().sum()) for n in parameters)

        assert distance(alignment.permute(symmetry, permutations, moving)) < distance(moving)

    def test_a_model_bound_to_a_batch_size(self):
        class Bound(Convolutions):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + x.new_ones(int(x.shape[0]), 1)

        a, b, x = Bound(seed=1), Bound(seed=2), noise(10, 3, 4, 4)
        symmetry = alignment.symmetry(a, x[:4])
        found = alignment.similarities(symmetry, a, get_weights(a), get_weights(b), x, batch=4)
        expected = compare(Convolutions(seed=1), Convolutions(seed=2), x)
        np.testing.assert_allclose(found.matrix["first"], expected, atol=1e-6)

    def test_errors_come_before_any_work(self, nets):
        symmetry, net, reference, moving, x = nets
        with pytest.raises(ValueError, match="did you mean 'activations'"):
            alignment.align(symmetry, net, reference, moving, x, by="activation")
        with pytest.raises(ValueError, match="pearson, clewi2024"):
            alignment.align(symmetry, net, reference, moving, x, statistic="cosine")
        with pytest.raises(ValueError, match=r"inputs: .* by='weights'"):
            alignment.align(symmetry, net, reference, moving, x[:0])
        with pytest.raises(ValueError, match="batch: 0"):
            alignment.align(symmetry, net, reference, moving, x, batch=0)
        with pytest.raises(ValueError, match=r"moving: 'conv1.weight' holds a NaN"):
            alignment.align(symmetry, net, reference, moving | {"conv1.weight": moving["conv1.weight"] * torch.nan}, x)
        with pytest.raises(ValueError, match="reference: names differ"):
            alignment.align(symmetry, net, {}, moving, x)


class Mixer(nn.Module):
    """A hidden axis of tokens beside the channels."""

    def __init__(self, tokens: int = 12, channels: int = 24, hidden: int = 32):
        super().__init__()
        self.e, self.a, self.b = nn.Linear(6, channels), nn.Linear(tokens, hidden), nn.Linear(hidden, tokens)
        self.f, self.h = nn.Linear(channels, channels), nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.e(x)
        z = z + self.b(self.a(z.transpose(1, 2)).relu()).transpose(1, 2)
        return self.h((z + self.f(z).relu()).mean(1))


class Beside(nn.Module):
    """Axes that never show alone: two or three of them, on one activation."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.axes = "abc"[: len(sizes)]
        self.w, self.b = nn.Parameter(torch.randn(6, *sizes)), nn.Parameter(torch.randn(sizes))
        self.v = nn.Parameter(torch.randn(*sizes, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.einsum(f"nti,i{self.axes}->n{self.axes}", x, self.w) / 3
        return torch.einsum(f"n{self.axes},{self.axes}k->nk", (z + self.b).tanh(), self.v)


class Gram(nn.Module):
    """One group on both axes of an activation."""

    def __init__(self):
        super().__init__()
        self.a, self.v = nn.Linear(6, 9), nn.Parameter(torch.randn(9, 9, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x).tanh()
        return torch.einsum("ncd,cdk->nk", (z.transpose(1, 2) @ z).relu(), self.v)


class Heads(nn.Module):
    """Heads that share the maps of their members, so that these move beside them."""

    def __init__(self, heads: int = 5, size: int = 6):
        super().__init__()
        self.e, self.f, self.g = nn.Linear(6, heads * size), nn.Linear(size, 8), nn.Linear(8, 7)
        self.heads, self.o = heads, nn.Linear(heads, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.e(x[:, 0]).unflatten(-1, (self.heads, -1)).tanh()
        return self.o(self.g(self.f(z).tanh()).tanh().sum(-1))


class Recurrent(nn.Module):
    """One group on both axes of a weight."""

    def __init__(self, units: int = 10):
        super().__init__()
        self.i, self.r, self.o = nn.Linear(6, units), nn.Linear(units, units), nn.Linear(units, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.i(x[:, 0]).tanh()
        for t in range(1, 3):
            z = (self.i(x[:, t]) + self.r(z)).tanh()
        return self.o(z)


MEETING = {
    "mixer": Mixer,
    "two": lambda: Beside(7, 9),
    "three": lambda: Beside(5, 6, 7),
    "gram": Gram,
    "heads": Heads,
    "recurrent": Recurrent,
}


def net_of(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MEETING[name]().eval()


class TestAxesThatMeet:
    x = noise(64, 12, 6)

    @pytest.mark.parametrize("name", MEETING)
    def test_planted_permutations_of_many_networks(self, name):
        symmetry = alignment.symmetry(net_of(name, 0), self.x[:2])
        for seed in range(12):
            net = net_of(name, seed)
            first = alignment.random_permutations(symmetry, torch.Generator().manual_seed(seed))
            moved = alignment.permute(symmetry, first, get_weights(net))
            found = alignment.align(symmetry, net, get_weights(net), moved, self.x)
            back = alignment.invert(first)
            assert all(torch.equal(p, back[g]) for g, p in found.permutations.items()), seed
            assert min(found.similarity.values()) > 0.999

    def test_the_other_order_does_not_count(self):
        """What is found for a network is what is found for a permuted copy of it, then permuted."""
        a, b = net_of("mixer", 1), net_of("mixer", 2)
        symmetry = alignment.symmetry(a, self.x[:2])
        first = alignment.random_permutations(symmetry, torch.Generator().manual_seed(3))
        moved = alignment.permute(symmetry, first, get_weights(b))
        one, other = (alignment.align(symmetry, a, get_weights(a), w, self.x) for w in (get_weights(b), moved))
        assert all(torch.equal(first[g][p], one.permutations[g]) for g, p in other.permutations.items())

    @pytest.mark.parametrize("name", ["mixer", "two", "gram"])
    def test_similarities_are_those_of_the_aligned_networks(self, name):
        """And no assignment of one group alone makes them larger."""
        nets = [net_of(name, seed) for seed in (1, 2)]
        symmetry, (a, b) = alignment.symmetry(nets[0], self.x[:2]), map(get_weights, nets)
        found = alignment.align(symmetry, nets[0], a, b, self.x)
        aligned = alignment.permute(symmetry, found.permutations, b)
        matrices = alignment.similarities(symmetry, nets[0], a, aligned, self.x).matrix
        assert found.similarity == pytest.approx({g: m.diagonal().mean() for g, m in matrices.items()}, abs=1e-6)
        before = alignment.similarities(symmetry, nets[0], a, b, self.x).matrix
        total = sum(m.trace() for m in matrices.values())
        assert total > sum(m.trace() for m in before.values())
        for g in [] if name == "gram" else symmetry.groups:
            best = alignment.assign(symmetry, matrices, [g])
            again = alignment.permute(symmetry, best, aligned)
            after = alignment.similarities(symmetry, nets[0], a, again, self.x).matrix
            assert sum(m.trace() for m in after.values()) <= total + 1e-6

    @pytest.mark.parametrize(("name", "more"), [("convnet", False), ("vit", False), ("mixer", True)])
    def test_one_pass_where_no_axes_meet(self, name, more, monkeypatch):
        net = net_of(name, 0) if more else randomise(NETS[name]())
        x = self.x if more else example(name, 20)
        symmetry, passes, watch = alignment.symmetry(net, x[:2]), [], alignment.Symmetry.watch
        monkeypatch.setattr(alignment.Symmetry, "watch", lambda *a, **k: passes.append(1) or watch(*a, **k))
        alignment.align(symmetry, net, get_weights(net), get_weights(net), x)
        assert (len(passes) > 1) == more


PAIRS = [(0, 1), (0, 2), (1, 2)]


def compare_weights(symmetry, net, a, b, x) -> np.ndarray:
    return alignment.similarities(symmetry, net, a, b, x).matrix["first"]


class TestMany:
    @pytest.fixture(scope="class")
    @staticmethod
    def nets():
        nets = [Convolutions(seed=seed) for seed in range(4)]
        return alignment.symmetry(nets[0], noise(2, 3, 4, 5)), nets[0], [*map(get_weights, nets)]

    x = noise(20, 3, 4, 5)

    @pytest.mark.parametrize("by", ["activations", "weights"])
    @pytest.mark.parametrize("name", ["convnet", "vit", "mixer"])
    def test_permuted_copies_come_to_the_order_of_the_first(self, name, by):
        net = net_of(name, 0) if name in MEETING else randomise(NETS[name]())
        x = noise(40, 12, 6) if name in MEETING else example(name, 40)
        symmetry, weights = alignment.symmetry(net, x[:2]), get_weights(net)
        planted = [alignment.random_permutations(symmetry, torch.Generator().manual_seed(k)) for k in range(4)]
        copies = [alignment.permute(symmetry, p, weights) for p in planted]
        found = alignment.align_many(symmetry, net, copies, x if by == "activations" else None, by=by)
        for moved, result in zip(copies, found, strict=True):
            assert equal(alignment.permute(symmetry, result.permutations, moved), copies[0])

    @pytest.mark.parametrize("by", ["activations", "weights"])
    def test_two_networks_get_what_align_finds(self, nets, by):
        symmetry, net, (a, b, *_) = nets
        one, other = alignment.align_many(symmetry, net, [a, b], self.x, by=by)
        found = alignment.align(symmetry, net, a, b, self.x, by=by)
        assert equal(one.permutations, alignment.identity(symmetry))
        assert equal(other.permutations, found.permutations) and other.similarity == found.similarity

    @pytest.mark.parametrize("by", ["activations", "weights"])
    def test_the_order_of_the_list_does_not_count(self, nets, by):
        symmetry, net, weights = nets
        found = alignment.align_many(symmetry, net, weights, self.x, by=by)
        for order in ([1, 0, 2, 3], [3, 1, 2, 0]):
            again = alignment.align_many(symmetry, net, [weights[k] for k in order], self.x, by=by)
            common = alignment.invert(found[order[0]].permutations)
            for k, result in zip(order, again, strict=True):
                assert equal(alignment.compose(found[k].permutations, common), result.permutations)

    def test_no_network_alone_can_come_closer_to_the_others(self, nets):
        """Against all permutations of its six units, by the sum over pairs of their similarities, taken one by one."""
        symmetry, net, weights = nets
        p = [r.permutations["first"].numpy() for r in alignment.align_many(symmetry, net, weights[:3], self.x)]
        pairs = {(j, k): compare_weights(symmetry, net, weights[j], weights[k], self.x) for j, k in PAIRS}

        def total(orders) -> float:
            return sum(m[orders[j], orders[k]].sum() for (j, k), m in pairs.items())

        for k in range(3):
            others = [[np.array(q) if i == k else p[i] for i in range(3)] for q in itertools.permutations(range(6))]
            assert total(p) >= max(map(total, others)) - 1e-6
        first = [alignment.align(symmetry, net, weights[0], w, self.x).permutations["first"] for w in weights[:3]]
        assert total(p) >= total([q.numpy() for q in first]) - 1e-6

    @pytest.mark.parametrize("name", ["mixer", "recurrent"])
    def test_by_weights_inner_products_grow(self, name):
        nets = [net_of(name, seed) for seed in range(3)]
        symmetry, weights = alignment.symmetry(nets[0], noise(2, 12, 6)), [*map(get_weights, nets)]
        found = alignment.align_many(symmetry, nets[0], weights, by="weights")
        ends = [alignment.permute(symmetry, r.permutations, w) for r, w in zip(found, weights, strict=True)]
        assert sum(dot(ends[j], ends[k]) for j, k in PAIRS) > sum(dot(weights[j], weights[k]) for j, k in PAIRS)
        for k, end in enumerate(ends):
            rest = combine([w for j, w in enumerate(ends) if j != k], [0.5, 0.5])
            again = alignment.align(symmetry, nets[0], rest, end, by="weights").permutations
            assert equal(again, alignment.identity(symmetry))

    def test_errors_come_before_any_work(self, nets):
        symmetry, net, weights = nets
        with pytest.raises(ValueError, match=r"networks: 1;"):
            alignment.align_many(symmetry, net, weights[:1], self.x)
        with pytest.raises(ValueError, match=r"networks\[1\]: names differ"):
            alignment.align_many(symmetry, net, [weights[0], {}], self.x)
        with pytest.raises(ValueError, match=r"inputs: .* by='weights'"):
            alignment.align_many(symmetry, net, weights)


@pytest.mark.gpu
def test_alignment_on_a_gpu_finds_what_the_cpu_finds():
    nets = [randomise(NETS["resnet18"](), seed=seed) for seed in (1, 2)]
    x = example("resnet18", 30)
    symmetry = alignment.symmetry(nets[0], x[:2])
    here = alignment.align(symmetry, nets[0], *map(get_weights, nets), x)
    nets = [net.cuda() for net in nets]
    symmetry = alignment.symmetry(nets[0], x[:2].cuda())
    there = alignment.align(symmetry, nets[0], *map(get_weights, nets), x.cuda())
    assert all(torch.equal(here.permutations[g], p) for g, p in there.permutations.items())


def test_a_frozen_convolution_in_groups_stays():
    net = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 1, groups=2, bias=False), nn.Conv1d(8, 2, 1))
    symmetry, x = alignment.symmetry(net, torch.randn(2, 3, 5)), torch.randn(64, 3, 5)
    weights = get_weights(net)
    moved = alignment.permute(symmetry, alignment.random_permutations(symmetry), weights)
    assert not equal(alignment.align(symmetry, net, weights, moved, x).permutations, alignment.identity(symmetry))
    net[2].requires_grad_(False)
    assert equal(alignment.align(symmetry, net, weights, moved, x).permutations, alignment.identity(symmetry))
