"""Symmetries: permutations keep the function, form a group, and stop where an operation is not understood."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clkit import alignment, models
from clkit.data import Examples, Normalize, Stream, Task
from clkit.symmetry.points import Points
from clkit.weights import get_weights
from test_alignment_zoo import randomise

SEEDS = st.integers(0, 2**31 - 1)


def stream(*shape: int) -> Stream:
    x = torch.zeros(4, *shape, dtype=torch.uint8)
    rows = Examples(x, torch.arange(4))
    return Stream("s", (Task(0, "t", (0, 1, 2, 3), rows, rows, Normalize((0.5,), (0.5,))),), tuple("abcd"))


class Tokens(nn.Module):
    """A causal language model with a tied head."""

    def __init__(self, vocabulary: int = 11, dim: int = 12, heads: int = 3, length: int = 7):
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.zeros(length, dim))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 20), nn.Linear(20, dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(length, length).tril().bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length = x.shape
        h = self.embedding(x) + self.position
        q, k, v = self.qkv(self.norm1(h)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / 2).masked_fill(~self.mask, -torch.inf).softmax(-1)
        h = h + self.out((scores @ v).transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        return self.head(self.norm3(h))


NETS = {
    "mlp": lambda: models.mlp(stream(1, 6, 6), (9, 8)),
    "convnet": lambda: models.convnet(stream(1, 6, 6), (5, 6, 7)),
    "resnet18": lambda: models.resnet18(stream(1, 8, 8), width=4),
    "vit": lambda: models.vit(stream(1, 8, 8), dim=12, heads=3),
    "tokens": Tokens,
}


def example(name: str, rows: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(3)
    if name == "tokens":
        return torch.randint(0, 11, (rows, 7), generator=g)
    return torch.randn(rows, 1, *((6, 6) if name in ("mlp", "convnet") else (8, 8)), generator=g)


@pytest.fixture(scope="module", params=NETS)
def case(request):
    net = randomise(NETS[request.param]())
    x = example(request.param)
    return net, x, alignment.symmetry(net, x)


def draw(symmetry: alignment.Symmetry, seed: int) -> dict[str, Tensor]:
    return alignment.random_permutations(symmetry, torch.Generator().manual_seed(seed))


class TestGroup:
    def test_a_random_element_keeps_the_function(self, case):
        net, x, symmetry = case
        assert symmetry.verify(net, x, tolerance=1e-5).holds
        assert symmetry.verify(net, x, tolerance=1e-12, dtype=torch.float64).holds
        assert symmetry.share == 1 or isinstance(net, Tokens)

    def test_it_moves_the_weights(self, case):
        net, _, symmetry = case
        weights = get_weights(net)
        moved = alignment.permute(symmetry, draw(symmetry, 0), weights)
        assert not all(torch.equal(moved[name], weights[name]) for name in weights)

    def test_one_axis_alone_would_change_the_function(self, case):
        net, x, symmetry = case
        weights = get_weights(net)
        p = draw(symmetry, 0)
        name = next(n for n, axes in symmetry.axes.items() if len(axes) > 1 and (axes[0].group >= 0).all())
        odd = weights | {name: alignment.permute(symmetry, p, weights)[name]}
        net.eval()
        with torch.no_grad():
            a, b = functional_call(net, weights, (x,)), functional_call(net, odd, (x,))
        assert (a - b).abs().max() > 1e-3 * a.abs().max()

    @settings(max_examples=5, deadline=None)
    @given(seed=SEEDS)
    def test_the_inverse_restores_every_bit(self, case, seed):
        net, _, symmetry = case
        weights, p = get_weights(net), draw(symmetry, seed)
        back = alignment.permute(symmetry, alignment.invert(p), alignment.permute(symmetry, p, weights))
        assert all(torch.equal(back[name], weights[name]) for name in weights)

    @settings(max_examples=5, deadline=None)
    @given(seed=SEEDS)
    def test_composition(self, case, seed):
        net, _, symmetry = case
        weights, p, q, r = get_weights(net), *(draw(symmetry, seed + k) for k in range(3))
        once = alignment.permute(symmetry, alignment.compose(p, q), weights)
        twice = alignment.permute(symmetry, q, alignment.permute(symmetry, p, weights))
        assert all(torch.equal(once[name], twice[name]) for name in weights)
        left = alignment.compose(alignment.compose(p, q), r)
        right = alignment.compose(p, alignment.compose(q, r))
        assert all(torch.equal(left[g], right[g]) for g in symmetry.groups)
        unit = alignment.compose(p, alignment.invert(p))
        assert all(torch.equal(unit[g], i) for g, i in alignment.identity(symmetry).items())

    def test_weights_and_model_are_left_alone(self, case):
        net, x, symmetry = case
        weights = get_weights(net)
        kept = copy.deepcopy(weights)
        net.train()
        alignment.symmetry(net, x)
        moved = alignment.permute(symmetry, draw(symmetry, 1), weights)
        symmetry.verify(net)
        assert net.training
        assert all(torch.equal(kept[n], weights[n]) and torch.equal(kept[n], t) for n, t in get_weights(net).items())
        assert all(moved[n].data_ptr() != weights[n].data_ptr() for n in weights)

    def test_the_table_lists_every_axis_and_classes_never_move(self, case):
        net, _, symmetry = case
        rows = symmetry.table()
        assert [(r.parameter, r.axis, r.size) for r in rows] == [
            (name, k, n) for name, t in get_weights(net).items() for k, n in enumerate(t.shape)
        ]
        last = next(name for name in reversed(symmetry.axes) if name.startswith(("linear.", "embedding.")))
        assert (symmetry.axes[last][0].group < 0).all()
        assert len(str(rows).splitlines()) == len(rows) + 1
        assert f"{len(symmetry.groups)} groups" in repr(symmetry)


def test_a_residual_stream_is_one_group():
    symmetry = alignment.symmetry(NETS["resnet18"](), example("resnet18"))
    follows = {(r.parameter, r.axis): r.follows for r in symmetry.table()}
    stem = follows["conv.weight", 0]
    assert stem == follows["stage1.0.conv2.weight", 0] == follows["stage1.1.conv2.weight", 0]
    assert stem == follows["stage2.0.shortcut.conv.weight", 1] != follows["stage2.0.conv2.weight", 0]
    assert follows["linear.weight", 1] == follows["stage4.1.conv2.weight", 0]
    assert len(symmetry.groups) == 12


def test_heads_move_as_blocks_and_members_within_each():
    symmetry = alignment.symmetry(Tokens(), example("tokens"))
    outer = next(g for g in symmetry.groups.values() if symmetry.members[g.name])
    inner = [symmetry.groups[m] for m in symmetry.members[outer.name]]
    assert outer.size == 3
    assert [(g.size, g.blocks, g.within) for g in inner] == [(4, 3, outer.name)] * 2  # queries with keys, and values
    p = draw(symmetry, 0)
    for g in inner:
        assert torch.equal(p[g.name].view(3, 4) // 4, p[outer.name][:, None].expand(3, 4))
        within = p[g.name].view(3, 4) % 4
        assert not torch.equal(within[0], within[1])


def test_tied_weights_are_one_entry_with_fixed_words():
    net = randomise(Tokens())
    symmetry = alignment.symmetry(net, example("tokens"))
    assert "head.weight" not in symmetry.axes
    words, width = symmetry.axes["embedding.weight"]
    assert (words.group < 0).all() and (width.group >= 0).all()


def test_auxiliary_heads_follow_the_training_graph_and_unused_weights_stay():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
            self.idle = nn.Linear(5, 5)

        def forward(self, x: Tensor):
            h = self.body(x).relu()
            return (self.head(h), self.aux(h)) if self.training else self.head(h)

    net, x = Auxiliary(), torch.randn(4, 4)
    symmetry = alignment.symmetry(net, x)
    moved = alignment.permute(symmetry, draw(symmetry, 0), get_weights(net))
    for a, b in zip(net.train()(x), functional_call(net, moved, (x,)), strict=True):
        torch.testing.assert_close(a, b)
    assert symmetry.frozen["not used"] == 15


class Around(nn.Module):
    """Two linear layers around an operation."""

    def __init__(self, operation, width: int = 12, **weights):
        super().__init__()
        self.first, self.second, self.operation = nn.Linear(5, 12), nn.Linear(width, 3), operation
        for name, value in weights.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(self, self.first(x)))


@torch.library.custom_op("clkit_tests::ramp", mutates_args=())
def ramp(x: Tensor) -> Tensor:
    return x * torch.arange(x.shape[1], dtype=x.dtype)


@ramp.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def rotate(h: Tensor) -> Tensor:
    a, b = h.chunk(2, -1)
    c = torch.arange(2.0).cos()
    return torch.cat([a * c - b, b * c + a], -1)


def overwrite(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, :6].relu_()
    h[:, 2:4] = 0
    return h


def write_into_repeated(h: Tensor) -> Tensor:
    h = h[:, :1].expand(-1, 12).clone()
    h[:, :3] = 0
    return h


UNDERSTOOD = {  # operation, width after it, groups (size, blocks), further weights
    "activation": (lambda s, h: F.gelu(h), 12, {(12, 1)}, {}),
    "normalised": (lambda s, h: F.normalize(h, dim=-1), 12, {(12, 1)}, {}),
    "reversed": (lambda s, h: h.flip(-1), 12, {(12, 1)}, {}),
    "rolled": (lambda s, h: h.roll(5, -1), 12, {(12, 1)}, {}),
    "known index": (lambda s, h: h[:, [3, 1, 2, 0, 5, 4, 7, 6, 9, 8, 11, 10]], 12, {(12, 1)}, {}),
    "repeating index": (lambda s, h: h[:, [0, 0, 1, 1, 2, 2]], 6, {(3, 1), (9, 1)}, {}),
    "concatenated twice": (lambda s, h: torch.cat([h, -h], 1).relu(), 24, {(12, 1)}, {}),
    "concatenated with itself": (lambda s, h: torch.cat([h, h], 1).tanh(), 24, {(12, 1)}, {}),
    "repeated": (lambda s, h: h.repeat_interleave(2, 1).tanh(), 24, {(12, 1), (2, 12)}, {}),
    "halves added": (lambda s, h: h[:, :6] + h[:, 6:], 6, {(6, 1)}, {}),
    "gated": (lambda s, h: F.glu(h), 6, {(6, 1)}, {}),
    "interleaved": (lambda s, h: torch.stack([h[:, :6], h[:, 6:]], -1).flatten(1), 12, {(6, 1)}, {}),
    "shuffled": (lambda s, h: h.view(-1, 3, 4).transpose(1, 2).flatten(1), 12, {(12, 1)}, {}),
    "padded": (lambda s, h: F.pad(h, (2, 2)), 16, {(12, 1)}, {}),
    "where": (lambda s, h: torch.where(h > 0, h, torch.zeros_like(h)), 12, {(12, 1)}, {}),
    "blocks": (lambda s, h: h.view(-1, 3, 4).softmax(-1).flatten(1), 12, {(3, 1), (4, 3)}, {}),
    "GroupNorm": (lambda s, h: s.norm(h), 12, {(3, 1), (4, 3)}, {"norm": nn.GroupNorm(3, 12)}),
    "blocks in blocks": (
        lambda s, h: h.view(-1, 2, 6).softmax(-1).reshape(-1, 4, 3).softmax(-1).flatten(1),
        12,
        {(2, 1), (2, 2), (3, 4)},
        {},
    ),
    "heads innermost": (
        lambda s, h: (h.view(-1, 4, 3).softmax(1) * s.w * h.view(-1, 4, 3)).flatten(1),
        12,
        {(3, 1), (4, 3)},
        {"w": torch.randn(3)},
    ),
    "scale by head": (lambda s, h: (h.view(-1, 3, 4) * s.w).flatten(1), 12, {(3, 1), (4, 3)}, {"w": torch.randn(3, 1)}),
    "rotary": (lambda s, h: rotate(h.view(-1, 3, 4)).flatten(1), 12, {(3, 1)}, {}),
    "einsum by head": (
        lambda s, h: torch.einsum("nhd,hdo->no", torch.einsum("ni,hid->nhd", h, s.w).relu(), s.u),
        12,
        {(12, 1), (3, 1), (4, 1)},
        {"w": torch.randn(3, 12, 4), "u": torch.randn(3, 4, 12)},
    ),
    "shared layer": (lambda s, h: s.layer(s.layer(h).relu()), 12, {(12, 1)}, {"layer": nn.Linear(12, 12)}),
    "transposed weight": (lambda s, h: (h @ s.w).relu() @ s.w.T, 12, {(12, 1), (9, 1)}, {"w": torch.randn(12, 9)}),
    "addmm": (
        lambda s, h: torch.addmm(s.b, h, s.w).relu(),
        9,
        {(12, 1), (9, 1)},
        {"w": torch.randn(12, 9), "b": torch.randn(9)},
    ),
    "PReLU": (lambda s, h: s.act(h), 12, {(12, 1)}, {"act": nn.PReLU(12)}),
    "in place": (lambda s, h: overwrite(h), 12, {(4, 1), (2, 1), (6, 1)}, {}),
    "in place in a repeated axis": (lambda s, h: write_into_repeated(h), 12, {(11, 1)}, {}),
}


def spread(symmetry: alignment.Symmetry) -> set[tuple[int, int]]:
    return {(g.size, g.blocks) for g in symmetry.groups.values()}


def holds(net: nn.Module, symmetry: alignment.Symmetry) -> bool:
    generators = (torch.Generator().manual_seed(k) for k in range(3))
    return all(symmetry.verify(net, tolerance=1e-11, dtype=torch.float64, generator=g).holds for g in generators)


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_operations_that_are_understood(name):
    operation, width, groups, weights = UNDERSTOOD[name]
    net = randomise(Around(operation, width, **weights))
    symmetry = alignment.symmetry(net, torch.randn(6, 5))
    assert spread(symmetry) == groups
    assert holds(net, symmetry)


FROZEN = {
    "sort": (lambda s, h: h.sort(-1).values, 12),
    "cumsum": (lambda s, h: h.cumsum(-1), 12),
    "topk": (lambda s, h: h.topk(6).values, 6),
    "fft_r2c": (lambda s, h: torch.fft.fft(h).real, 12),
    "max_pool2d": (lambda s, h: F.max_pool1d(h[:, None], 2)[:, 0], 6),
    "unfold": (lambda s, h: h.unfold(1, 4, 4).flatten(1), 12),
    "argmax": (lambda s, h: h * F.one_hot(h.argmax(-1), 12), 12),
    "linalg_det": (lambda s, h: torch.linalg.det(h.view(-1, 3, 2, 2)), 3),
    "ramp": (lambda s, h: torch.ops.clkit_tests.ramp(h), 12),
    "softmax": (lambda s, h: h.view(-1, 3, 4).softmax(-1).reshape(-1, 4, 3).softmax(-1).flatten(1), 12),
    "add": (lambda s, h: h + h.roll(1, -1), 12),
}


@pytest.mark.parametrize("name", FROZEN)
def test_operations_that_are_not_understood_freeze_what_they_meet_and_are_named(name):
    operation, width = FROZEN[name]
    net = randomise(Around(operation, width))
    symmetry = alignment.symmetry(net, torch.randn(6, 5))
    assert symmetry.share == 0
    assert any(why.startswith(name) for why in symmetry.frozen)
    assert holds(net, symmetry)


def test_a_convolution_in_groups_moves_groups_and_channels_within_each():
    net = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=3), nn.BatchNorm2d(18), nn.ReLU(),
        nn.Conv2d(18, 36, 3, groups=18), nn.Conv2d(36, 4, 1), nn.Flatten(),
    )  # fmt: skip
    randomise(net)
    symmetry = alignment.symmetry(net, torch.randn(2, 3, 6, 6))
    assert spread(symmetry) == {(3, 1), (4, 3), (6, 3), (2, 18)}
    assert symmetry.share == 1
    assert holds(net, symmetry)


def test_a_model_bound_to_a_batch_size_can_be_derived():
    net = randomise(Around(lambda s, h: h.view(4, 12) + h.new_ones(4, 1)))
    symmetry = alignment.symmetry(net, torch.randn(4, 5))
    assert symmetry.program.batch == 4
    assert holds(net, symmetry)


def test_weights_in_shared_memory_of_another_order_stand_still():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2))
    net[1].weight = nn.Parameter(net[0].weight.T)
    symmetry = alignment.symmetry(net, torch.randn(3, 4))
    assert "shared memory" in symmetry.frozen
    assert symmetry.share == 0


@pytest.fixture(scope="module")
def mlp():
    net = NETS["mlp"]()
    return alignment.symmetry(net, example("mlp")), get_weights(net)


class TestErrors:
    def test_a_model_that_branches_on_values(self):
        class Branching(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x if x.sum() > 0 else -x

        with pytest.raises(ValueError, match=r"model: torch.export cannot follow 1 \(Branching.forward.*branches"):
            alignment.symmetry(nn.Sequential(nn.Linear(3, 3), Branching()), torch.randn(2, 3))

    def test_unknown_groups(self, mlp):
        symmetry, weights = mlp
        with pytest.raises(ValueError, match="linear1"):
            alignment.permute(symmetry, {"linear": torch.arange(9)}, weights)

    def test_what_is_no_permutation(self, mlp):
        symmetry, weights = mlp
        with pytest.raises(ValueError, match="every number below 9 once"):
            alignment.permute(symmetry, {"linear1": torch.zeros(9, dtype=torch.int64)}, weights)

    def test_torn_blocks(self):
        net = Tokens()
        symmetry = alignment.symmetry(net, example("tokens"))
        inner = next(g for g in symmetry.groups.values() if g.within)
        p = alignment.identity(symmetry) | {inner.name: torch.arange(inner.units).flip(0)}
        with pytest.raises(ValueError, match="blocks of 4"):
            alignment.permute(symmetry, p, get_weights(net))

    def test_other_weights(self, mlp):
        symmetry, weights = mlp
        with pytest.raises(ValueError, match="names differ"):
            alignment.permute(symmetry, {}, {"a": torch.zeros(2)})
        with pytest.raises(ValueError, match=r"linear.bias.*shape \(7,\)"):
            alignment.permute(symmetry, {}, weights | {"linear.bias": torch.zeros(7)})

    def test_permutations_of_other_symmetries(self, mlp):
        with pytest.raises(ValueError, match="groups differ"):
            alignment.compose(alignment.identity(mlp[0]), {"a": torch.arange(2)})


class TestPoints:
    def test_free_points_are_one_cell(self):
        points = Points()
        orbits = (points.fresh(4), points.finish())[1]
        assert len(set(orbits.orbit.tolist())) == 1

    def test_a_slice_is_a_cell_of_its_own(self):
        points = Points()
        a = points.fresh(5)
        points.recolour(a[:2])
        orbit = points.finish().orbit
        assert orbit[0] == orbit[1] != orbit[2] == orbit[4]

    def test_united_arrays_split_along_each_other(self):
        points = Points()
        a, b, c = points.fresh(2), points.fresh(3), points.fresh(5)
        points.unite(np.concatenate([a, b]), c, "")
        orbit = points.finish().orbit
        assert orbit[a[0]] == orbit[c[1]] != orbit[b[0]] == orbit[c[4]]

    def test_an_array_united_with_a_shift_of_itself_stands_still(self):
        points = Points()
        a = points.fresh(6)
        points.unite(a, np.roll(a, 2), "")
        orbits = points.finish()
        units, first = np.unique(orbits.unit, return_index=True)
        assert len(set(orbits.orbit[first].tolist())) == len(units)

    def test_crossing_blocks_are_refused(self):
        points = Points()
        a = points.fresh(6)
        assert points.rows(a.reshape(2, 3)) is not None
        assert points.rows(a.reshape(3, 2)) is None

    def test_growth_keeps_what_is_there(self):
        points = Points()
        a = points.fresh(3)
        points.recolour(a[:1])
        before = points.finish().orbit[a].copy()
        points.fresh(5000)
        assert np.array_equal(np.unique(before, return_inverse=True)[1].shape, a.shape)
        assert (points.finish().orbit[a] == points.finish().orbit[a][0]).tolist() == (before == before[0]).tolist()
