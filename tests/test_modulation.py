"""Modulated networks: what small tensors expand to, what a task is made of and takes, and files of it."""

import copy
from contextlib import nullcontext
from functools import partial
from math import ceil, prod

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import toys
from clkit import data, models
from clkit.modulation import (
    LowRank,
    Mask,
    Modulated,
    Modulation,
    Own,
    interpolation_matrix,
    listed,
    load,
    network,
    save,
)
from clkit.store import load_tensors, save_tensors
from clkit.training import label
from clkit.weights import equal, get_weights

FEW = settings(max_examples=40, deadline=None)
KINDS = ["bicubic", "bilinear", "nearest"]
RULES = {
    "factor": Modulation(2, 2),
    "grid": Modulation(2, 3, mode="grid"),
    "reviewed": Modulation(2, 2, layout="reviewed"),
    "shuffled": Modulation(2, 2, shuffle=1),
    "nearest": Modulation(1, 2, interpolation="nearest"),
    "mask": Mask(),
    "low rank": LowRank(2),
    "own": Own(),
    "head alone": None,
}
STEM, WIDE, POINTS = (32, 3, 3, 3), (96, 1, 3, 3), (24, 96, 1, 1)


def separable(classes: int = 6, *, seed: int = 0) -> nn.Module:
    """A small network with a stem, a depthwise and a pointwise convolution, dropout and a head of its own name."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = nn.Sequential()
        net.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        net.depth = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        net.point = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        net.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2))
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
        net.last = nn.Linear(12, classes)
    return net


def pictures(rows: int = 5, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def trained(rule, *, seed: int = 0, backbone: nn.Module | None = None, **options) -> Modulated:
    """A modulated network whose live tensors are random, as if trained, and whose statistics have moved."""
    net = Modulated(separable() if backbone is None else backbone, rule, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        for name, score in net.gains.items():
            if name.endswith("score"):
                score.copy_(torch.randn(score.shape, generator=generator))
        net.train()
        for i in range(4):
            net(pictures(8, seed=10 + i) * 2 + 1)
    return net.eval()


def state_bits(module: nn.Module) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in module.state_dict().items()}


def along(small: int, large: int, kind: str) -> np.ndarray:
    """The matrix of one axis by its formula, in double precision: out[i] = sum_k w_k(t) in[clamp(floor(x) + k)]."""
    matrix = np.zeros((large, small))
    for i in range(large):
        if kind == "nearest":
            matrix[i, int(i * small / large)] = 1
            continue
        x = (i + 0.5) * small / large - 0.5
        if kind == "bilinear":
            x = max(x, 0)
            left = int(x)
            matrix[i, left] += 1 - (x - left)
            matrix[i, min(left + 1, small - 1)] += x - left
            continue
        left, a = int(np.floor(x)), -0.75
        for k in range(-1, 3):
            d = abs(x - left - k)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(left + k, 0), small - 1)] += near if d <= 1 else far
    return matrix


def resized(grid: Tensor, size: tuple[int, int], kind: str) -> Tensor:
    """torch's interpolation of one (rows, columns) grid."""
    options = {} if kind == "nearest" else {"align_corners": False, "antialias": False}
    return F.interpolate(grid[None, None], size=size, mode=kind, **options)[0, 0]


def expanded(m: Tensor, shape: tuple[int, ...], kind: str, layout: str) -> Tensor:
    """G(M), a kernel position at a time, as the layouts are defined."""
    if len(shape) == 2:
        return expanded(m[..., None, None], (*shape, 1, 1), kind, layout)[..., 0, 0]
    out, height, width = shape[:2], *shape[2:]
    if layout == "clean":
        grids = [resized(m[:, :, i, j], out, kind) for i in range(height) for j in range(width)]
        return torch.stack(grids, -1).view(shape)
    view = m.contiguous().view(height, width, m.shape[1], m.shape[0])
    grids = [resized(view[i, j], out, kind) for i in range(height) for j in range(width)]
    return torch.stack(grids).view(height, width, *out).contiguous().view(shape)


shapes = st.tuples(st.integers(1, 13), st.integers(1, 13), st.integers(1, 3), st.integers(1, 3))


@st.composite
def cases(draw) -> tuple[Modulation, tuple[int, ...], Tensor]:
    """A rule, a weight's shape that it does not skip, and an M for it."""
    shape = draw(shapes)
    options = {"interpolation": draw(st.sampled_from(KINDS)), "layout": draw(st.sampled_from(["clean", "reviewed"]))}
    m1, m2, mode = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.sampled_from(["factor", "grid"]))
    rule = Modulation(m1, m2, mode=mode, **options)
    if rule.shape(shape) is None:
        rule = Modulation(1, 1, **options)
    seed = draw(st.integers(0, 99))
    return rule, shape, torch.randn(rule.shape(shape), generator=torch.Generator().manual_seed(seed))


class TestInterpolation:
    """One axis, and two."""

    @FEW
    @given(st.integers(1, 40), st.integers(1, 60), st.sampled_from(KINDS))
    def test_rows_sum_to_one_and_are_the_formula(self, small, large, kind):
        matrix = interpolation_matrix(small, large, kind)
        assert matrix.shape == (large, small)
        assert (matrix.sum(1) - 1).abs().max() < 1e-12
        if kind != "nearest":  # which entry is nearest is a matter of rounding where two are
            assert np.abs(matrix.numpy() - along(small, large, kind)).max() < 1e-12
        else:
            assert set(matrix.unique().tolist()) <= {0.0, 1.0}

    @pytest.mark.parametrize("kind", KINDS)
    def test_to_its_own_size_is_the_identity_exactly(self, kind):
        for size in (1, 2, 7, 160):
            assert torch.equal(interpolation_matrix(size, size, kind), torch.eye(size).double())

    def test_nearest_repeats_entries_where_the_factor_is_whole(self):
        assert torch.equal(interpolation_matrix(3, 12, "nearest"), torch.eye(3).repeat_interleave(4, 0).double())

    @FEW
    @given(cases())
    def test_expansion_is_torchs_a_position_at_a_time(self, case):
        """A slow twin of both layouts, on the shapes of convolutions."""
        rule, shape, m = case
        found, twin = rule.expand(m, shape), expanded(m, shape, rule.interpolation, rule.layout)
        assert found.shape == shape and torch.allclose(found, twin, atol=2e-5)

    @FEW
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.sampled_from(["clean", "reviewed"]))
    def test_a_linear_layer_is_a_kernel_of_one_position(self, rows, columns, m, layout):
        rule = Modulation(m, m, layout=layout)
        if (small := rule.shape((rows, columns))) is not None:
            grid = torch.randn(small, generator=torch.Generator().manual_seed(0))
            assert small == rule.shape((rows, columns, 1, 1))[:2]
            found, twin = rule.expand(grid, (rows, columns)), expanded(grid, (rows, columns), "bicubic", layout)
            assert torch.allclose(found, twin, atol=2e-5)

    @FEW
    @given(cases(), st.floats(-3, 3))
    def test_it_is_linear(self, case, factor):
        rule, shape, m = case
        other = torch.randn(m.shape, generator=torch.Generator().manual_seed(7))
        both = rule.expand(m + factor * other, shape)
        assert torch.allclose(both, rule.expand(m, shape) + factor * rule.expand(other, shape), atol=1e-4)

    @FEW
    @given(cases(), st.floats(-2, 2))
    def test_a_constant_stays_that_constant(self, case, value):
        rule, shape, m = case
        grid = rule.expand(torch.full_like(m, value), shape)
        assert torch.allclose(grid, torch.full(shape, value), atol=1e-5)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        effective = rule.effective(weight, {"m": torch.full_like(m, value)})
        assert torch.allclose(effective, (1 - value) * weight, atol=1e-4)

    @pytest.mark.parametrize("shape", [(8, 6, 3, 3), STEM, (16, 1, 3, 3), (12, 8), (6, 1280, 1, 1)])
    def test_ones_are_ones_exactly_and_zero_leaves_the_weight(self, shape):
        for kind in KINDS:
            rule = Modulation(2, 2, interpolation=kind)
            m = torch.ones(rule.shape(shape))
            assert (rule.expand(m, shape) - 1).abs().max() < 1e-6
            weight = torch.randn(shape)
            assert torch.equal(rule.effective(weight, {"m": 0 * m}), weight)

    @FEW
    @given(shapes, st.sampled_from(KINDS), st.integers(0, 9))
    def test_factor_one_is_m_bit_for_bit_and_writes_any_mask(self, shape, kind, seed):
        rule, generator = Modulation(1, 1, interpolation=kind), torch.Generator().manual_seed(seed)
        m, weight = (torch.randn(shape, generator=generator) for _ in range(2))
        assert rule.shape(shape) == shape and torch.equal(rule.expand(m, shape), m)
        mask = (m > 0).float()
        assert torch.equal(rule.effective(weight, {"m": 1 - mask}), weight * mask)

    @pytest.mark.parametrize("layout", ["clean", "reviewed"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients_are_right(self, kind, layout):
        rule = Modulation(2, 2, interpolation=kind, layout=layout)
        for shape in ((5, 4, 2, 2), (8, 1, 3, 1), (6, 5)):
            weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            m = torch.randn(rule.shape(shape), dtype=torch.float64).requires_grad_()
            assert torch.autograd.gradcheck(lambda m, w: rule.effective(w, {"m": m}), (m, weight))

    def test_bicubic_overshoots_and_can_turn_a_sign_and_the_others_do_not(self):
        step = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1).expand(4, 4).contiguous()
        weight = torch.ones(16, 16)
        for kind, outside in (("bicubic", True), ("bilinear", False), ("nearest", False)):
            rule = Modulation(4, 4, interpolation=kind)
            grid = rule.expand(step, (16, 16))
            assert bool((grid.max() > 1.05) and (grid.min() < -0.05)) == outside == bool((grid > 1).any())
            assert bool((rule.effective(weight, {"m": step}) < 0).any()) == outside

    def test_a_shuffle_moves_channels_and_nothing_else(self):
        shape = (12, 8, 3, 3)
        m = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        smooth = Modulation(2, 2).expand(m, shape)
        first, again, other = (Modulation(2, 2, shuffle=seed).expand(m, shape) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.allclose(first, other)
        for grid in (first, other):
            assert not torch.allclose(grid, smooth)
            for axis in (0, 1):
                rest = tuple(i for i in range(4) if i != axis)
                means = [g.mean(rest) for g in (grid, smooth)]
                order = torch.cdist(means[0][:, None], means[1][:, None]).argmin(1)
                assert sorted(order.tolist()) == list(range(shape[axis])), "every channel has another's place"
                grid = grid.index_select(axis, order.argsort())
            assert torch.allclose(grid, smooth, atol=1e-5)

    def test_a_shuffle_is_the_same_in_all_layers_of_a_size(self):
        """So that a residual stream is shuffled alike wherever it is read and written."""
        rule, plain = Modulation(2, 1, shuffle=3), Modulation(2, 1)
        column = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
        orders = []
        for inputs in (1, 5):
            m = column.expand(4, inputs).contiguous()
            found, smooth = (r.expand(m, (8, inputs))[:, 0] for r in (rule, plain))
            orders.append(torch.cdist(found[:, None], smooth[:, None]).argmin(1).tolist())
        assert orders[0] == orders[1] != list(range(8)) and sorted(orders[0]) == list(range(8))


class TestLayouts:
    """The clean layout, and what the reviewed one does to it."""

    @FEW
    @given(st.integers(1, 24), st.integers(1, 5), st.sampled_from(KINDS))
    def test_square_points_are_alike(self, channels, m, kind):
        clean, reviewed = (Modulation(m, m, interpolation=kind, layout=layout) for layout in ("clean", "reviewed"))
        shape = (channels, channels, 1, 1)
        if (small := clean.shape(shape)) is not None and channels >= m:
            grid = torch.randn(small, generator=torch.Generator().manual_seed(0))
            assert torch.allclose(clean.expand(grid, shape), reviewed.expand(grid, shape), atol=1e-5)

    def test_other_kernels_are_not(self):
        clean, reviewed = Modulation(4, 4), Modulation(4, 4, layout="reviewed")
        for shape in (WIDE, POINTS, (96, 24, 1, 1), (16, 16, 3, 3)):
            m = torch.randn(clean.shape(shape), generator=torch.Generator().manual_seed(0))
            assert reviewed.shape(shape) == m.shape
            assert not torch.allclose(clean.expand(m, shape), reviewed.expand(m, shape), atol=0.1)

    def test_a_depthwise_kernel_has_a_profile_for_each_channel_or_nine_numbers(self):
        m = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
        clean, reviewed = (Modulation(4, 4, layout=layout).expand(m, WIDE) for layout in ("clean", "reviewed"))
        assert clean.unique().numel() == 864 == clean.numel() and len(clean.flatten(1).unique(dim=0)) == 96
        assert reviewed.unique().numel() == 9
        blocks = reviewed.flatten().view(9, 96)
        assert torch.equal(blocks, blocks[:, :1].expand(9, 96)), "constant over blocks of the flattened kernel"
        assert torch.linalg.matrix_rank(reviewed.flatten(1)) <= 3 < torch.linalg.matrix_rank(clean.flatten(1))

    @FEW
    @given(cases())
    def test_every_entry_counts_where_it_is_clean(self, case):
        rule, shape, _ = case
        if rule.layout == "clean":
            assert (influence(rule, shape) > 1e-4).all()


def influence(rule: Modulation, shape: tuple[int, ...]) -> Tensor:
    """How much each entry of M moves the weights: the norm over rows times that over columns, for a (rows, columns) M.

    The interpolation of an entry is the product of those along both axes, and M's kernel positions are alike.
    """
    small = rule.shape(shape)
    a, b = small[:2] if rule.layout == "clean" else (small[1], small[0])
    rows, columns = (along(i, o, rule.interpolation) for i, o in ((a, shape[0]), (b, shape[1])))
    return torch.from_numpy(np.outer(np.linalg.norm(rows, axis=0), np.linalg.norm(columns, axis=0)))


@pytest.fixture(scope="module")
def mobilenet() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return torchvision.models.mobilenet_v2(weights=None)


def kernels(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def count(rule: Modulation, sizes) -> int:
    return sum(prod(small) for shape in sizes if (small := rule.shape(shape)) is not None)


class TestCounts:
    """Table 1.7 of what adaptive weight modulation stores of a MobileNetV2."""

    @pytest.mark.parametrize(
        ("m1", "m2", "numbers", "skipped"),
        [
            (1, 1, 2_189_760, 0),
            (2, 2, 547_368, 0),
            (2, 4, 273_720, 0),
            (4, 2, 273_684, 0),
            (3, 3, 241_490, 0),
            (4, 4, 136_860, 0),
            (5, 5, 86_605, 0),
            (4, 8, 68_421, 0),
            (8, 4, 68_421, 0),
            (6, 6, 59_602, 2),
            (7, 7, 42_967, 2),
            (8, 8, 34_188, 2),
            (9, 9, 25_806, 2),
        ],
    )
    def test_factors(self, mobilenet, m1, m2, numbers, skipped):
        sizes, rule = kernels(mobilenet), Modulation(m1, m2)
        assert len(sizes) == 52 and count(rule, sizes.values()) == numbers
        left = [name for name, shape in sizes.items() if rule.shape(shape) is None]
        assert left == ["features.0.0", "features.1.conv.0.0"][:skipped]
        assert [sizes[name] for name in left] == [(32, 3, 3, 3), (32, 1, 3, 3)][:skipped]

    @pytest.mark.parametrize(("m", "numbers"), [(1, 196), (2, 478), (4, 1264), (8, 3616), (16, 11584)])
    def test_grids(self, mobilenet, m, numbers):
        assert count(Modulation(m, m, mode="grid"), kernels(mobilenet).values()) == numbers

    def test_the_parts_at_four(self, mobilenet):
        parts = dict.fromkeys(("stem", "depthwise", "project", "expand", "last"), 0)
        for name, shape in kernels(mobilenet).items():
            kind = "stem" if name == "features.0.0" else "last" if name == "features.18.0" else None
            kind = kind or ("depthwise" if shape[1] == 1 else "project" if shape[0] < shape[1] else "expand")
            parts[kind] += prod(Modulation(4, 4).shape(shape))
        assert parts == {"stem": 54, "depthwise": 4014, "project": 60200, "expand": 46992, "last": 25600}

    @pytest.mark.parametrize(("m", "dead"), [(2, 225_336), (4, 3_474), (8, 720)])
    def test_the_reviewed_layout_has_dead_entries_and_the_clean_one_none(self, mobilenet, m, dead):
        sizes = kernels(mobilenet).values()
        for layout, expected in (("reviewed", dead), ("clean", 0)):
            rule, idle, gradients = Modulation(m, m, layout=layout), 0, {}
            for shape in sizes:
                if (small := rule.shape(shape)) is None:
                    continue
                idle += int((influence(rule, shape) < 1e-9).sum()) * prod(small[2:])
                if shape not in gradients:
                    grid = torch.zeros(small).requires_grad_()
                    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
                    (gradient,) = torch.autograd.grad((rule.expand(grid, shape) * weight).sum(), grid)
                    gradients[shape] = int((gradient.abs() < 1e-9).sum())
            assert idle == expected == sum(gradients.get(shape, 0) for shape in sizes)

    @pytest.mark.parametrize(
        ("shape", "factor", "grid"),
        [
            ((4, 4, 3, 3), (1, 1, 3, 3), (4, 4, 3, 3)),
            ((9, 7, 1, 1), (2, 1, 1, 1), (4, 4, 1, 1)),
            ((3, 16, 1, 1), (3, 1, 1, 1), (3, 4, 1, 1)),
            ((32, 1, 5, 5), (2, 1, 5, 5), (4, 1, 5, 5)),
            ((3, 15, 1, 1), None, (3, 4, 1, 1)),
            ((3, 3), None, (3, 3)),
            ((8, 6), (2, 1), (4, 4)),
        ],
    )
    def test_shapes_at_the_edges(self, shape, factor, grid):
        """An axis that is shorter than its factor stays whole, and the other is divided by both."""
        assert Modulation(4, 4).shape(shape) == factor and Modulation(4, 4, mode="grid").shape(shape) == grid
        assert (Modulation(4, 4).start(torch.zeros(shape), torch.Generator()) == {}) == (factor is None)

    @pytest.mark.parametrize(
        ("name", "weights", "numbers"),
        [
            ("resnet18", 11_166_912, (2_790_944, 697_932, 174_483)),
            ("resnet50", 23_454_912, (5_862_944, 1_465_932, 366_483)),
        ],
    )
    def test_residual_networks(self, name, weights, numbers):
        with torch.device("meta"):
            sizes = kernels(getattr(torchvision.models, name)()).values()
        assert sum(map(prod, sizes)) == weights
        assert tuple(count(Modulation(m, m), sizes) for m in (2, 4, 8)) == numbers

    def test_resnet_20_and_a_vision_transformer(self):
        stages = [(16, 16), (16, 32), (32, 64)]
        small = [(16, 3, 3, 3), (32, 16, 1, 1), (64, 32, 1, 1)]
        small += [(after, before, 3, 3) for before, after in stages]
        small += [(after, after, 3, 3) for _, after in stages for _ in range(5)]
        assert sum(map(prod, small)) == 270_256
        assert [count(Modulation(m, m), small) for m in (2, 4, 8)] == [67_528, 16_891, 4_216]
        block = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
        assert [count(Modulation(m, m), 12 * block) for m in (1, 2, 4, 8)] == [
            84_934_656,
            21_233_664,
            5_308_416,
            1_327_104,
        ]

    def test_a_task_of_a_mobilenet(self, mobilenet):
        """What a task takes, with the head's share, in numbers and in bytes, of a network that is really there."""
        net = Modulated(mobilenet, Modulation(4, 4))
        assert net.parameters_per_task(196) == {
            "gains": 136_860,
            "statistics": 34_112,
            "affine": 0,
            "head": 251_076,
        }
        for classes, head in ((200, 256_200), (102, 130_662), (101, 129_381), (250, 320_250), (195, 249_795)):
            assert net.parameters_per_task(classes)["head"] == head == 1281 * classes
        assert net.bytes_per_task(200) == 4 * 136_860 + 8 * 17_056 + 4 * 1281 * 200
        assert net.parameters_per_task()["head"] == 1_281_000
        learned = [p for p in net.parameters() if p.requires_grad]
        assert sum(p.numel() for p in learned) - 1_281_000 == 136_860 == sum(p.numel() for p in net.gains.values())
        assert len(net.gains) == 52 and net.gains["features/0/0/weight/m"].shape == (2, 3, 3, 3)
        assert net.gains["features/18/0/weight/m"].shape == (320, 80, 1, 1)
        state = net.state(range(7))
        assert state.nbytes == net.bytes_per_task(7) == 4 * 136_860 + 8 * 17_056 + 4 * 1281 * 7

    def test_a_mask_of_a_mobilenet_takes_a_bit_a_weight_and_more_options(self, mobilenet):
        head = 4 * 1281 * 10
        mask = Modulated(mobilenet, Mask())
        assert mask.parameters_per_task(10)["gains"] == 2_189_760
        assert mask.bytes_per_task(10) - 8 * 17_056 - head == 273_720
        affine = Modulated(mobilenet, None, affine=True, statistics="frozen")
        assert affine.parameters_per_task(10) == {"gains": 0, "statistics": 0, "affine": 34_112, "head": 12_810}
        assert affine.bytes_per_task(10) == 4 * 34_112 + head

    @pytest.mark.parametrize(("shape", "std"), [(STEM, 1 / 3), ((16, 32, 1, 1), 0.5**0.5), ((1280, 320, 1, 1), 0.0791)])
    def test_the_released_start_is_noisy_by_the_fan_out(self, shape, std):
        rule = Modulation(4, 4, init="kaiming")
        draws = [rule.start(torch.zeros(shape), torch.Generator().manual_seed(seed))["m"] for seed in range(30)]
        found = torch.stack(draws)
        assert found.std().item() == pytest.approx(std, rel=0.07) and abs(found.mean()) < 0.2 * std
        assert Modulation(4, 4).start(torch.zeros(shape), torch.Generator())["m"].abs().max() == 0


class TestModulated:
    """A network and the live task's tensors."""

    @pytest.mark.parametrize("name", RULES)
    def test_in_the_beginning_it_is_the_backbone_bit_for_bit(self, name):
        backbone = separable().eval()
        net, x = Modulated(backbone, RULES[name]).eval(), pictures()
        assert torch.equal(net(x), backbone(x))
        found, own = net.weights(), backbone.state_dict()
        assert found.keys() == own.keys() and equal(found, own)
        net.train(), backbone.train()
        for module in (*net.modules(), *backbone.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert torch.equal(net(x), backbone(x))

    @pytest.mark.parametrize("name", RULES)
    def test_the_backbone_is_copied_and_frozen(self, name):
        backbone = separable()
        before = state_bits(backbone)
        net = trained(RULES[name], backbone=backbone)
        assert state_bits(backbone) == before and all(p.requires_grad for p in backbone.parameters())
        learned = {name for name, p in net.named_parameters() if p.requires_grad}
        head = {"backbone.last.weight", "backbone.last.bias"}
        assert learned == head | {f"gains.{key}" for key in net.gains}

    def test_w_times_one_minus_g(self):
        """A naive network with the formula, from the names in a task's state."""
        backbone = separable()
        net, x = trained(Modulation(2, 2), backbone=backbone), pictures()
        state = net.state(range(6))
        t = state.tensors
        assert set(t) == {"gains.stem/0/weight/m", "gains.depth/0/weight/m", "gains.point/0/weight/m"} | {
            f"backbone.{part}.1.running_{what}" for part in ("stem", "depth", "point") for what in ("mean", "var")
        } | {"backbone.last.weight", "backbone.last.bias"}
        h = x
        for part, options in (("stem", {"padding": 1}), ("depth", {"groups": 8}), ("point", {})):
            conv, norm, _ = getattr(backbone, part)
            gain = 1 - expanded(t[f"gains.{part}/0/weight/m"], tuple(conv.weight.shape), "bicubic", "clean")
            h = F.conv2d(h, conv.weight * gain, **options)
            mean, var = (t[f"backbone.{part}.1.running_{what}"][:, None, None] for what in ("mean", "var"))
            assert not torch.allclose(mean.flatten(), norm.running_mean, atol=0.01)
            h = (h - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
            h = h.clamp(min=0)
        logits = h.mean((2, 3)) @ t["backbone.last.weight"].T + t["backbone.last.bias"]
        assert torch.allclose(net.call(x, state), logits, atol=1e-5) and torch.allclose(net(x), logits, atol=1e-5)

    @pytest.mark.parametrize("name", RULES)
    def test_gradients_reach_all_that_is_learned_and_nothing_else(self, name):
        net = trained(RULES[name]).train()
        net(pictures()).square().sum().backward()
        for key, p in net.named_parameters():
            assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad, key

    @pytest.mark.parametrize("name", RULES)
    def test_a_stored_task_is_what_it_was(self, name):
        net, x = trained(RULES[name], affine=True), pictures()
        live = net(x)
        state, held = net.state((1, 4)), net.state(range(6))
        kept = {key: t.clone() for key, t in held.tensors.items()}
        start = Modulated(separable(), RULES[name], affine=True)
        net.begin()
        assert torch.equal(net.eval()(x), start.eval()(x)) and equal(kept, dict(held.tensors))
        assert torch.equal(net.call(x, held), live)
        some = net.call(x, state)
        assert torch.equal(some[:, [1, 4]], live[:, [1, 4]]) and state.classes == (1, 4)
        assert not torch.allclose(some[:, [0, 2, 3, 5]], live[:, [0, 2, 3, 5]])
        assert torch.equal(start.call(x, state), some), "rows that it has not are those of the start"
        assert state.tensors["backbone.last.weight"].shape == (2, 12)

    @pytest.mark.parametrize("name", RULES)
    def test_a_call_leaves_the_live_task_alone(self, name):
        net, other = trained(RULES[name], seed=1), trained(RULES[name], seed=2)
        before, states = state_bits(net), [other.state((0, 1)), other.state((2, 3))]
        net.train()
        for state in states:
            net.call(pictures(), state)
        assert state_bits(net) == before and net.training

    @pytest.mark.parametrize("name", RULES)
    def test_a_task_can_go_on(self, name):
        net, x = trained(RULES[name]), pictures()
        state, folded = net.state(range(6)), net.weights()
        net.begin()
        assert not all(torch.equal(t, folded[key]) for key, t in net.weights().items())
        net.begin(state)
        fresh = get_weights(separable())
        for key, t in net.weights().items():
            if t.is_floating_point():
                assert torch.equal(t, fresh[key] if key.startswith("last") else folded[key]), key
        again = Modulated(separable(), RULES[name])
        again.begin(state)
        assert torch.equal(again.eval()(x), net.eval()(x))

    @pytest.mark.parametrize(
        "kind", [partial(nn.InstanceNorm2d, track_running_stats=True), partial(nn.BatchNorm2d, momentum=None)]
    )
    def test_whatever_else_a_network_counts_begins_anew(self, kind):
        net = Modulated(nn.Sequential(nn.Conv2d(1, 4, 3), kind(4), nn.Flatten(), nn.Linear(64, 2)), Modulation(2, 1))
        seen = []
        for _ in range(2):
            net.begin()
            net.train()
            for seed in range(3):
                net(pictures(seed=seed))
            seen.append(net.state((0, 1)))
        assert equal(seen[0].tensors, seen[1].tensors)
        answer = net.eval().call(pictures(), seen[0])
        net.train()(3 * pictures(seed=9))
        assert torch.equal(net.eval().call(pictures(), seen[0]), answer)

    def test_the_backbones_spectral_norms_do_not_move_with_the_tasks(self):
        body = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3))
        net = Modulated(
            nn.Sequential(body, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)),
            Modulation(2, 2),
            layers=["1.weight"],
        )
        state, answers = net.state((0, 1)), []
        for seed in range(2):
            answers.append(net.eval().call(pictures(), state))
            net.begin()
            net.train()(pictures(seed=seed))
        assert torch.equal(*answers)

    def test_two_rules_on_one_backbone_are_two_models(self):
        nets = [Modulated(separable(), Modulation(2, 2, interpolation=kind)) for kind in ("bicubic", "nearest")]
        assert label(nets[0]) != label(nets[1]) and label(nets[0]) == label(copy.deepcopy(nets[0]))

    def test_a_state_from_before_a_change_of_precision_is_understood(self):
        net = trained(Modulation(2, 2)).eval()
        state = net.state(range(6))
        before = net.call(pictures(), state)
        assert torch.allclose(net.double().call(pictures().double(), state), before.double(), atol=1e-5)

    def test_an_initial_state_is_a_copy(self):
        net = Modulated(separable(), Modulation(2, 2))
        before = get_weights(net)
        for tensor in net.initial().tensors.values():
            tensor.fill_(7)
        net.begin()
        assert equal(get_weights(net), before)

    def test_parts_can_be_kept(self):
        names = {"gains": "gains.", "statistics": "running", "affine": ".1.", "head": "last."}
        start = Modulated(separable(), Modulation(2, 2), affine=True).state(range(6)).tensors
        for part in names:
            net = trained(Modulation(2, 2), affine=True)
            before = net.state(range(6)).tensors
            net.begin(keep=(part,))
            for key, t in net.state(range(6)).tensors.items():
                own = next(p for p, mark in names.items() if mark in key)
                assert torch.equal(t, before[key] if own == part else start[key]), (part, key)
                assert not torch.equal(before[key], start[key])

    def test_drawn_starts_are_the_same_every_time_and_differ_by_seed(self):
        for rule in (Modulation(2, 2, init="kaiming"), LowRank(2)):
            net, twin, other = (Modulated(separable(), rule, seed=seed) for seed in (0, 0, 1))
            first = {key: p.detach().clone() for key, p in net.gains.items()}
            net.begin()
            assert equal(first, dict(net.gains)) and equal(first, dict(twin.gains))
            assert not equal(first, dict(other.gains))

    def test_statistics_are_per_task_or_frozen(self):
        for statistics, moves in (("own", True), ("frozen", False)):
            net = Modulated(separable(), Modulation(2, 2), statistics=statistics)
            before, quiet = dict(state_bits(net)), net.eval()(pictures())
            for module in net.train().modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            x = pictures()
            assert torch.equal(net(x), quiet) != moves
            changed = {name for name, bits in state_bits(net).items() if bits != before[name]}
            assert any("running" in name for name in changed) == moves and bool(changed) == moves
            assert any("running" in key for key in net.state((0,)).tensors) == moves
            assert net.parameters_per_task(2)["statistics"] == (56 if moves else 0)

    def test_an_affine_task_has_the_norms_scale_and_shift(self):
        net = trained(Modulation(2, 2), affine=True)
        assert net.parameters_per_task(2)["affine"] == 56
        norms = {f"backbone.{part}.1.{what}" for part in ("stem", "depth", "point") for what in ("weight", "bias")}
        assert norms <= net.state((0,)).tensors.keys()
        assert {name for name, p in net.named_parameters() if p.requires_grad} > norms

    @pytest.mark.parametrize("name", RULES)
    @pytest.mark.parametrize("affine", [False, True])
    def test_counts_and_bytes_are_those_of_a_state(self, name, affine):
        net = trained(RULES[name], affine=affine)
        for classes in (1, 2, 6):
            state, numbers = net.state(range(classes)), net.parameters_per_task(classes)
            assert state.nbytes == net.bytes_per_task(classes) == sum(t.nbytes for t in state.tensors.values())
            assert numbers["head"] == 13 * classes and numbers["gains"] == sum(p.numel() for p in net.gains.values())
            gains = sum(t.nbytes for key, t in state.tensors.items() if key.startswith("gains"))
            sizes = [p.numel() for p in net.gains.values()]
            assert gains == sum(ceil(n / 8) if name == "mask" else 4 * n for n in sizes)
            if name != "own":
                assert state.nbytes - gains == 4 * (numbers["statistics"] + numbers["affine"] + numbers["head"])

    def test_the_own_copy_is_the_whole_network(self):
        net = Modulated(separable(), Own(), layers="all")
        assert {key.removesuffix("/own").replace("/", ".") for key in net.gains} >= {
            "stem.0.weight", "depth.0.weight", "point.0.weight"
        }  # fmt: skip

    @pytest.mark.parametrize("name", RULES)
    def test_it_can_be_copied_and_its_state_loaded(self, name):
        net, x = trained(RULES[name]), pictures()
        twin = Modulated(separable(), RULES[name])
        twin.load_state_dict(net.state_dict())
        for other in (copy.deepcopy(net), twin.eval()):
            assert torch.equal(other(x), net(x))
            assert torch.equal(other.call(x, net.state((0, 1))), net.call(x, net.state((0, 1))))

    @pytest.mark.parametrize("name", RULES)
    def test_everything_moves_with_it(self, name, monkeypatch):
        """To a device on which a tensor that stayed behind cannot be used."""
        monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # it does not know this device
        net, x = trained(RULES[name], affine=True).to("meta"), pictures().to("meta")
        state = net.state((0, 1))
        assert net(x).is_meta and net.train()(x).is_meta and net.eval().call(x, state).is_meta
        for tensors in (net.weights(), net.weights(state), state.tensors):
            assert all(t.is_meta for t in tensors.values())
        with pytest.raises(ValueError, match="meta device"):  # there are no numbers to fold
            net.folded(state)
        net.begin(state)
        assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))
        held = [v for value in vars(net).values() for v in (value.values() if isinstance(value, dict) else [value])]
        assert not any(isinstance(v, Tensor) and not v.is_meta for v in held), "kept and not registered"

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", RULES)
    def test_a_task_answers_alike_on_a_gpu(self, name, tmp_path):
        net, x = trained(RULES[name], affine=True), pictures()
        state, path = net.state((0, 1)), tmp_path / "task.safetensors"
        save(path, net, state)
        answer = net.call(x, state)
        net.cuda()
        moved, other = load(path, net), net.state((2, 3))
        before = net.call(x.cuda(), moved)
        assert (before.cpu() - answer).abs().max() < 1e-4
        net.begin(other)
        assert torch.equal(net.call(x.cuda(), moved), before)
        assert torch.equal(net.cpu().call(x, state), answer)

    @pytest.mark.parametrize("name", ["factor", "mask", "own"])
    def test_compiled_it_is_the_same_network(self, name):
        net, x = trained(RULES[name]), pictures()
        wrapped = torch.compile(net, backend="eager")
        assert torch.allclose(wrapped(x), net(x), atol=1e-6)

    @pytest.mark.parametrize("rule", [Modulation(2, 2), Mask(), LowRank(1), Own(), None])
    def test_a_residual_network_and_a_transformer_fold(self, rule, digits):
        stream, x = data.split(digits), torch.randn(4, 1, 8, 8)
        for factory in (partial(models.resnet18, width=4), partial(models.vit, patch=2, dim=8, depth=2, heads=2)):
            backbone = factory(stream).eval()
            net = Modulated(backbone, rule, affine=True).eval()
            assert torch.equal(net(x), backbone(x))
            with torch.no_grad():
                for p in net.parameters():
                    if p.requires_grad:
                        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
            state = net.state((0, 3))
            assert not torch.allclose(net(x), backbone(x), atol=1e-3)
            assert torch.equal(net.call(x, state)[:, [0, 3]], net(x)[:, [0, 3]])
            assert (net.folded(state)(x) - net.call(x, state)[:, [0, 3]]).abs().max() < 1e-5

    def test_double_precision_is_the_same_network(self):
        net, x = trained(Modulation(2, 2)), pictures()
        single, state = net(x), net.state((0, 1))
        net.double()
        assert net(x.double()).dtype == torch.float64 and torch.allclose(net(x.double()).float(), single, atol=1e-5)
        assert state.tensors["backbone.last.weight"].dtype == torch.float32


class TestLayers:
    """Which weights are modulated."""

    def keys(self, net: Modulated) -> set[str]:
        return {key.rsplit("/", 1)[0].replace("/", ".") for key in net.gains}

    def test_convolutions_of_a_convolutional_network(self):
        backbone = separable()
        every = {"stem.0.weight", "depth.0.weight", "point.0.weight"}
        assert self.keys(Modulated(backbone, Modulation(2, 2))) == every
        backbone.point.append(nn.Conv2d(12, 12, 1, bias=False))
        linear = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))
        assert self.keys(Modulated(linear, Modulation(2, 2))) == {"1.weight"}
        assert self.keys(Modulated(linear, Modulation(2, 2), layers="linear")) == {"1.weight"}
        only = Modulated(backbone, Modulation(2, 2), layers=["point.*", "stem.0.weight"])
        assert self.keys(only) == {"stem.0.weight", "point.0.weight", "point.3.weight"}

    def test_a_transformer_has_linear_maps_and_its_patches(self):
        net = models.vit(toys.images(), patch=2, dim=8, depth=1, heads=2).eval()
        linears = [f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.Linear)]
        convs = {f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
        maps = set(linears[:-1])
        assert len(convs) == 1 and len(maps) == 6
        both = {"auto": maps | convs, "linear": maps, "convolutions": convs, "all": maps | convs}
        for layers, expected in both.items():
            assert self.keys(Modulated(net, Modulation(2, 1), layers=layers)) == expected
        x = torch.randn(3, 1, 6, 6)
        assert torch.equal(Modulated(net, Modulation(2, 2)).eval()(x), net(x))

    def test_the_head_is_the_last_layer_or_the_one_named(self):
        backbone = separable()
        assert Modulated(backbone).parameters_per_task(3)["head"] == 39
        two = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 4))
        net = Modulated(two, Modulation(2, 2), head="1", layers="linear")
        learned = {name for name, p in net.named_parameters() if p.requires_grad}
        assert {"backbone.1.weight", "backbone.1.bias"} < learned and "backbone.2.weight" not in learned
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        squeeze = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), *pool)
        net = Modulated(squeeze, Modulation(2, 1), layers="convolutions")
        assert self.keys(net) == {"0.weight"} and net.parameters_per_task(2)["head"] == 10
        assert net.call(pictures(), net.state((1, 5))).shape == (5, 6)
        assert net.folded(net.state((1, 5)))(pictures()).shape == (5, 2)

    @pytest.mark.parametrize("name", ["attention.in_proj_weight", "qkv.weight"])
    def test_q_k_and_v_of_a_packed_matrix_are_three_weights(self, name):
        net, x = (Attending() if "attention" in name else Packed()).eval(), torch.randn(2, 5, 8)
        modulated = Modulated(net, Modulation(4, 2), layers="linear").eval()
        assert torch.equal(modulated(x), net(x))
        keys = [key for key in modulated.gains if name.replace(".", "/") in key]
        assert len(keys) == 3 and all(modulated.gains[key].shape == (2, 4) for key in keys)
        whole, thirds = dict(net.named_parameters())[name].detach().chunk(3), set()
        for i, key in enumerate(keys):
            modulated.begin()
            with torch.no_grad():
                modulated.gains[key].copy_(torch.randn(2, 4, generator=torch.Generator().manual_seed(i)) + 3)
            changed = modulated.weights()[name].chunk(3)
            (moved,) = (j for j in range(3) if not torch.equal(changed[j], whole[j]))
            grid = expanded(modulated.gains[key].detach(), (8, 8), "bicubic", "clean")
            assert torch.allclose(changed[moved], whole[moved] * (1 - grid), atol=1e-5)
            assert not torch.allclose(modulated(x), net(x), atol=1e-3)
            thirds.add(moved)
        assert thirds == {0, 1, 2}


class Attending(nn.Module):
    """Attention whose q, k and v lie in one matrix, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Packed(nn.Module):
    """The same with a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)).mean(1))


class TestMask:
    """Piggyback."""

    def test_it_keeps_everything_in_the_beginning_and_the_threshold_is_strict(self):
        weight = torch.randn(5, 4)
        start = Mask().start(weight, torch.Generator())
        assert start["score"].unique().tolist() == [pytest.approx(1e-2)]
        assert torch.equal(Mask().effective(weight, start), weight)
        scores = torch.tensor([5e-3, 4e-3, -1.0, 0.0, 5.1e-3, 1e-2])
        kept = Mask().effective(torch.ones(6, 1), {"score": scores[:, None]})
        assert kept.flatten().tolist() == [0, 0, 0, 0, 1, 1]

    def test_scores_get_the_masks_gradient(self):
        generator = torch.Generator().manual_seed(0)
        weight, slope = (torch.randn(6, 5, generator=generator) for _ in range(2))
        score = (0.02 * torch.rand(6, 5, generator=generator)).requires_grad_()
        assert 0 < (score > 5e-3).sum() < 30
        (Mask().effective(weight, {"score": score}) * slope).sum().backward()
        mask = (score.detach() > 5e-3).float().requires_grad_()
        (weight * mask * slope).sum().backward()
        assert torch.equal(score.grad, mask.grad)

    @FEW
    @given(st.integers(1, 40), st.integers(0, 9))
    def test_bits_come_back(self, size, seed):
        weight = torch.randn(size, 1)
        score = torch.randn(size, 1, generator=torch.Generator().manual_seed(seed)) * 0.01
        packed = Mask().pack({"score": score})
        assert sum(t.nbytes for t in packed.values()) == ceil(size / 8)
        back = Mask().unpack(packed, weight)
        assert torch.equal(Mask().effective(weight, back), Mask().effective(weight, {"score": score}))


class TestStores:
    """What is kept of M."""

    @FEW
    @given(st.integers(1, 20), st.floats(1e-6, 100), st.integers(0, 9))
    def test_eight_bits_round_within_half_a_step(self, size, scale, seed):
        rule, m = Modulation(store="int8"), scale * torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
        packed = rule.pack({"m": m})
        back = rule.unpack(packed, m)["m"]
        step = m.abs().max() / 127
        assert back.dtype == torch.float32 and (back - m).abs().max() <= 0.5 * step * 1.0001
        assert 3 * size < sum(t.nbytes for t in packed.values()) <= 3 * size + 4
        assert torch.equal(rule.unpack(rule.pack({"m": torch.zeros(2, 2)}), m)["m"], torch.zeros(2, 2))

    def test_sixteen_bits_are_half_precision_and_thirty_two_are_exact(self):
        m = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
        for store, nbytes in (("float16", 70), ("float32", 140)):
            rule = Modulation(store=store)
            packed = rule.pack({"m": m})
            assert torch.equal(rule.unpack(packed, m)["m"], m.to(getattr(torch, store)).float())
            assert sum(t.nbytes for t in packed.values()) == nbytes

    @pytest.mark.parametrize(("store", "close"), [("float32", 0.0), ("float16", 1e-2), ("int8", 5e-2)])
    def test_a_task_of_few_bits_is_nearly_the_task(self, store, close):
        net, x = trained(Modulation(2, 2, store=store)), pictures()
        state = net.state(range(6))
        numbers, layers = net.parameters_per_task(6), len(net.gains)
        gains = state.nbytes - 4 * (numbers["statistics"] + numbers["head"])
        size = {"float32": 4, "float16": 2, "int8": 1}[store]
        assert gains == size * numbers["gains"] + (4 * layers if store == "int8" else 0)
        assert (net.call(x, state) - net(x)).abs().max() <= close
        assert torch.equal(net.call(x, state), net.call(x, state))

    def test_what_is_stored_does_not_change_by_being_loaded(self):
        net = trained(Modulation(2, 2, store="int8"))
        state = net.state(range(6))
        net.begin(state)
        again = net.state(range(6)).tensors
        assert all(torch.equal(t, again[key]) for key, t in state.tensors.items() if t.dtype == torch.int8)


class TestFolded:
    """An ordinary network for a task."""

    def test_a_network_with_methods_of_its_own_is_folded(self):
        class Curt(nn.Sequential):
            def requires_grad_(self, on):
                super().requires_grad_(on)

            def train(self, mode=True):
                super().train(mode)

        net = Modulated(Curt(*separable()), LowRank(2), layers="all")
        state = net.state((0, 3))
        folded = net.eval().folded(state)
        assert not folded.training and folded(pictures()).shape == (5, 2)

    @pytest.mark.parametrize("name", RULES)
    @pytest.mark.parametrize("affine", [False, True])
    def test_it_answers_as_the_task_does(self, name, affine):
        net, x = trained(RULES[name], affine=affine), pictures()
        state = net.state((4, 1))
        plain = net.folded(state)
        assert type(plain) is nn.Sequential and not any(isinstance(m, Modulated) for m in plain.modules())
        assert not plain.training and plain.last.out_features == 2 and plain.last.weight.shape == (2, 12)
        assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in separable(2).parameters())
        assert (plain(x) - net.call(x, state)[:, [4, 1]]).abs().max() <= 1e-6
        weights = net.weights(state)
        assert all(torch.equal(t, weights[key]) for key, t in get_weights(plain).items() if not key.startswith("last"))
        twin = separable(2)
        twin.load_state_dict(plain.state_dict())
        assert torch.equal(twin.eval()(x), plain(x))

    def test_it_is_a_copy(self):
        net = trained(Modulation(2, 2))
        state = net.state((0, 1))
        plain = net.folded(state)
        before = state_bits(net)
        with torch.no_grad():
            for t in (*plain.parameters(), *plain.buffers()):
                t.zero_()
        assert state_bits(net) == before and state.tensors["backbone.last.weight"].abs().sum() > 0


class TestFiles:
    """A task on disk."""

    @pytest.mark.parametrize("name", [*RULES, "float16", "int8"])
    def test_a_task_comes_back(self, name, tmp_path):
        rule = RULES[name] if name in RULES else Modulation(2, 2, store=name)
        net, x = trained(rule, affine=True), pictures()
        state = net.state((4, 1))
        path = tmp_path / "greek.safetensors"
        save(path, net, state, name="greek", class_names=("alpha", "beta"))
        fresh = Modulated(separable(), rule, affine=True).eval()
        back = load(path, fresh)
        assert back.classes == (4, 1) and back.nbytes == state.nbytes
        assert back.tensors.keys() == state.tensors.keys() and equal(dict(back.tensors), dict(state.tensors))
        assert torch.equal(fresh.call(x, back), net.call(x, state))
        plain = network(path, separable())
        assert type(plain) is nn.Sequential and not plain.training
        assert torch.equal(plain(x), net.folded(state)(x))

    @pytest.mark.parametrize("outputs", [2, 6, 9])
    def test_the_head_of_the_backbone_does_not_matter(self, outputs, tmp_path):
        """As of a network pretrained on other classes."""
        net, x, path = trained(Modulation(2, 2)), pictures(), tmp_path / "task.safetensors"
        state = net.state((5, 1))
        save(path, net, state)
        assert torch.equal(network(path, separable(outputs))(x), net.folded(state)(x))

    def test_files_are_listed_in_order_with_what_they_say(self, tmp_path):
        net = trained(Modulation(2, 2))
        for name, classes in (("b", (2, 3)), ("a", (0,))):
            path = tmp_path / f"{name}.safetensors"
            save(path, net, net.state(classes), name=name, class_names=[*"xy"[: len(classes)]])
        (tmp_path / "notes.txt").write_text("not a task")
        found = listed(tmp_path)
        assert [entry["name"] for entry in found] == ["a", "b"]
        for entry in found:
            path = tmp_path / f"{entry['name']}.safetensors"
            assert str(entry["file"]).endswith(path.name)
            assert net.bytes_per_task(len(entry["classes"])) == entry["bytes"] < path.stat().st_size
        assert list(found[1]["classes"]) == [2, 3] and "Modulation" in str(found[0]["rule"])

    def test_a_file_of_another_backbone_or_rule_is_refused(self, tmp_path):
        net, path = trained(Modulation(2, 2)), tmp_path / "task.safetensors"
        save(path, net, net.state((0, 1)))
        for other in (
            Modulated(separable(seed=1), Modulation(2, 2)),
            Modulated(models.convnet(toys.images()), Modulation(2, 2)),
        ):
            with pytest.raises(ValueError, match="backbone"):
                load(path, other)
        with pytest.raises(ValueError, match="backbone"):
            network(path, separable(seed=1))
        for rule in (Modulation(1, 2), Modulation(2, 2, store="int8"), Mask(), None):
            with pytest.raises(ValueError, match="rule"):
                load(path, Modulated(separable(), rule))

    def test_the_backbone_counts_and_not_what_a_task_made_of_it(self, tmp_path):
        """A live task, its statistics and its head do not change which backbone it is."""
        net, path = trained(Modulation(2, 2)), tmp_path / "task.safetensors"
        save(path, net, net.state((0, 1)))
        assert load(path, trained(Modulation(2, 2), seed=9)).classes == (0, 1)

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "foreign"])
    def test_damaged_and_foreign_files_are_refused(self, damage, tmp_path):
        from safetensors.torch import save_file

        net, path = trained(Modulation(2, 2)), tmp_path / "task.safetensors"
        save(path, net, net.state((0, 1)))
        whole = path.read_bytes()
        if damage == "cut":
            path.write_bytes(whole[: len(whole) // 2])
        elif damage == "flipped":
            path.write_bytes(b"\xff" * 8 + whole[8:])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "text":
            path.write_text("a task\n" * 50)
        else:
            save_file({"weight": torch.zeros(3)}, path)
        for reading in (lambda: load(path, net), lambda: network(path, separable())):
            with pytest.raises(ValueError, match=str(path.name)):
                reading()

    def test_nothing_is_left_of_a_file_that_could_not_be_written(self, tmp_path):
        net = trained(Modulation(2, 2))
        save(tmp_path / "task.safetensors", net, net.state((0, 1)))
        assert [p.name for p in tmp_path.iterdir()] == ["task.safetensors"]
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "none.safetensors", net)

    @pytest.mark.parametrize(
        "damage", ["missing", "extra", "shape", "dtype", "nan", "classes", "negative", "rule", "fields"]
    )
    def test_a_file_with_something_else_in_it_is_refused(self, damage, tmp_path):
        net, path = trained(Modulation(2, 2)), tmp_path / "task.safetensors"
        save(path, net, net.state((0, 1)))
        tensors, header = load_tensors(path)
        first = next(name for name in tensors if name.startswith("gains."))
        changed = {
            "missing": lambda: tensors.pop(first),
            "extra": lambda: tensors.update(extra=torch.zeros(2)),
            "shape": lambda: tensors.update({first: tensors[first][..., :1, :1].flatten()}),
            "dtype": lambda: tensors.update({first: tensors[first].to(torch.int64)}),
            "nan": lambda: tensors.update({first: tensors[first] * float("nan")}),
            "classes": lambda: header.update(classes=[0, 1, 2]),
            "negative": lambda: header.update(classes=[-1, 0]),
            "rule": lambda: header.update(rule=["Nothing", {}]),
            "fields": lambda: header.pop("layers"),
        }
        changed[damage]()
        save_tensors(path, tensors, header)
        for reading in (lambda: load(path, net), lambda: network(path, separable())):
            with pytest.raises(ValueError, match=str(path.name)):
                reading()

    def test_classes_that_a_model_has_not_are_refused_by_it_alone(self, tmp_path):
        net, path = trained(Modulation(2, 2)), tmp_path / "task.safetensors"
        save(path, net, net.state((0, 5)))
        with pytest.raises(ValueError, match="class 5, the model 3"):
            load(path, Modulated(separable(3), Modulation(2, 2)))
        assert network(path, separable(3)).last.out_features == 2

    def test_what_is_no_file_is_not_listed(self, tmp_path):
        (tmp_path / "folder.safetensors").mkdir()
        assert listed(tmp_path) == []


def tied() -> nn.Module:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Modulation(0, 4), "m1: 0"),
        (lambda: Modulation(4, -1), "m2: -1"),
        (lambda: Modulation(2.5, 4), "m1: 2.5"),
        (lambda: Modulation(mode="size"), "mode: 'size'"),
        (lambda: Modulation(interpolation="cubic"), "interpolation: 'cubic'.*bicubic"),
        (lambda: Modulation(init="ones"), "init: 'ones'"),
        (lambda: Modulation(layout="released"), "layout: 'released'"),
        (lambda: Modulation(store="int4"), "store: 'int4'"),
        (lambda: Mask(init=1e-3), "threshold: 0.005"),
        (lambda: LowRank(0), "rank: 0"),
        (lambda: Modulated(separable(), layers="conv"), "layers: 'conv'"),
        (lambda: Modulated(separable(), layers=["nothing.*"]), r"nothing\.\*"),
        (lambda: Modulated(separable(), statistics="shared"), "statistics: 'shared'"),
        (lambda: Modulated(separable(), head="final"), "head: 'final'"),
        (lambda: Modulated(nn.Sequential(nn.ReLU())), "head|last layer|nn.Linear"),
        (lambda: Modulated(separable()).begin(keep=("heads",)), "keep.*heads"),
        (lambda: Modulated(separable()).state((6,)), "6"),
        (lambda: Modulated(separable()).state(()), "classes"),
        (lambda: Modulated(separable()).state((1, 1)), "classes.*each once"),
        (lambda: Modulated(separable(), Modulation(99, 99)), "leaves every layer as it is"),
        (lambda: Modulated(tied()), r"head: \['2.weight'\] belong to another layer"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
