"""Small networks that once changed their function under the derived symmetry, never ended, or did not move at all."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from clkit import alignment
from proofs import randomise

L = nn.Linear


class Net(nn.Module):
    """A forward as a function of the module and its input; tensors become buffers that are not saved: constants."""

    def __init__(self, f: Callable[["Net", Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def copied(repeat: Callable[[Tensor], Tensor]) -> Net:
    """Unit 0 is tied to unit 3 and 1 to 2, before units are repeated."""
    return Net(lambda s, x: s.h(repeat(s.q(x) * s.q(x).flip(1) * s.w)), q=L(6, 4), w=parameter(4), h=L(8, 3))


def written(write: Callable[[Tensor], Tensor]) -> Net:
    def f(s: Net, x: Tensor) -> Tensor:
        h = s.a(x).relu()
        scale = torch.ones_like(h)
        write(scale[:, :4])
        return s.h(h * scale)

    return Net(f, a=L(6, 8), h=L(8, 3))


def rotary(heads: int, width: int) -> Net:
    def rotate(q: Tensor) -> Tensor:
        return torch.stack([-q[..., 1::2], q[..., ::2]], -1).reshape(q.shape)

    def f(s: Net, x: Tensor) -> Tensor:
        q, k = (part(x).view(len(x), heads, width) for part in (s.q, s.k))
        return ((q + rotate(q)) * (k + rotate(k))).sum((1, 2))

    return Net(f, q=L(6, heads * width), k=L(6, heads * width))


def strides(s: Net, x: Tensor) -> Tensor:
    n = len(x)
    p = s.a(x).view(n, 1, 2, 1, 3).expand(n, 4, 2, 2, 3).reshape(n, 16, 3)
    q = s.b(x).view(n, 1, 1, 4, 3).expand(n, 2, 2, 4, 3).reshape(n, 16, 3)
    scale = s.r.view(1, 2, 1, 6).expand(2, 2, 4, 6).reshape(16, 6)
    return (torch.cat([p, q], -1) * scale).sum(-1).tanh().sum(-1)


class Counter(nn.Module):
    """Writes a buffer and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = L(6, 8)
        self.register_buffer("h", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.h.add_(self.a(x).mean(0))


def tokens(s: Net, x: Tensor) -> Tensor:
    return s.h(s.e((s.a(x) * 3).clamp(0, 5).long()).flatten(1))


def beside_itself(s: Net, x: Tensor) -> Tensor:
    h = s.b(s.a(x).relu().flatten(-2))
    return s.h(torch.cat([h, h.flip(1)], 1).flatten(1))


SOUND = {  # network, shape of the example
    "groups beside themselves reversed, and other axes walked anew": (
        Net(
            beside_itself,
            a=nn.Conv2d(2, 6, 3, stride=2),
            b=nn.ConvTranspose1d(6, 12, 2, stride=2, groups=2),
            c=nn.TransformerEncoderLayer(2, 1, 6, 0.0, batch_first=True),
            h=L(48, 3),
        ),
        (1, 2, 4, 4),
    ),
    "copies beside their negatives": (copied(lambda y: torch.cat([y, -y], 1)), (4, 6)),
    "copies in sequence": (copied(lambda y: y.repeat(1, 2)), (4, 6)),
    "a part is scaled in place": (written(lambda v: v.mul_(0.5)), (4, 6)),
    "a part is clamped in place": (written(lambda v: v.clamp_(max=0.5)), (4, 6)),
    "tokens made of hidden units": (Net(tokens, a=L(6, 8), e=nn.Embedding(6, 2), h=L(16, 3)), (4, 6)),
    "rotary, heads of 2": (rotary(2, 2), (4, 6)),
    "rotary, heads of 8": (rotary(3, 8), (4, 6)),
    "a causal mask over equal tokens": (
        Net(
            lambda s, x: (
                F.scaled_dot_product_attention(*[s.a(x)[:, None].expand(-1, 8, -1)] * 3, is_causal=True)
                .cumsum(1)
                .mul(s.w)
                .sum((1, 2))
            ),
            a=L(6, 4),
            w=parameter(8, 4),
        ),
        (4, 6),
    ),
    "a buffer is written and returned": (Counter(), (4, 6)),
    "rows that are looked up by a grid": (
        Net(lambda s, x: F.grid_sample(s.p, x.tanh(), align_corners=False).sum(0), p=parameter(4, 1, 3, 3)),
        (4, 2, 2, 2),
    ),
    "a batch of one that is squeezed": (Net(lambda s, x: s.a(x).squeeze().cumsum(0).sum(), a=L(6, 8)), (1, 6)),
    "a zero with a sign": (
        Net(
            lambda s, x: torch.atan2(s.z, -s.a(x).exp()).add(s.a(x)).tanh().sum(-1),
            a=L(6, 2),
            z=torch.tensor([0.0, -0.0]),
        ),
        (4, 6),
    ),
    "heads at other strides beside each other": (Net(strides, a=L(6, 6), b=L(6, 12), r=parameter(12)), (4, 6)),
    "a mask and numbers as indices": (
        Net(
            lambda s, x: torch.index_put(s.a(x), (torch.tensor([0, 1]), s.m), torch.tensor([1.0, 2.0], dtype=x.dtype)),
            a=L(6, 4),
            m=torch.tensor([True, False, True, False]),
        ),
        (4, 6),
    ),
}


def changes(net: nn.Module, symmetry: alignment.Symmetry) -> list[float]:
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    return [symmetry.verify(net, dtype=torch.float64, generator=g).change for g in generators]


@pytest.mark.parametrize("name", SOUND)
def test_the_function_stays(name):
    net, shape = SOUND[name]
    randomise(net)
    assert max(changes(net, alignment.symmetry(net, torch.randn(shape)))) < 1e-10


class Steps(nn.Module):
    """A cell, step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.h = cell, L(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 8, dtype=x.dtype)
        state = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        for row in x.unbind(1):
            state = self.cell(row, state)
        return self.h(state[0] if isinstance(state, tuple) else state)


def layers(layer: nn.RNNBase, width: int) -> Net:
    return Net(lambda s, x: s.h(s.r(x)[0].mean(1)), r=layer, h=L(width, 3))


def shared_keys(s: Net, x: Tensor) -> Tensor:
    q, k, v = (part(x).view(len(x), 5, -1, 3).transpose(1, 2) for part in (s.q, s.k, s.v))
    return s.h(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)).sum(1)


def with_a_head_for_training(s: Net, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    h = s.d(s.a(x).relu())
    return (s.h(h), s.e(s.d(s.b(h).relu()))) if s.training else s.h(h)


images, rows, series = (2, 3, 8, 8), (4, 6), (2, 5, 6)
MOVES = {  # network, shape of the example: all of it moves
    "RNNCell": (Steps(nn.RNNCell(6, 8)), series),
    "GRUCell": (Steps(nn.GRUCell(6, 8)), series),
    "LSTMCell": (Steps(nn.LSTMCell(6, 8)), series),
    "RNN": (layers(nn.RNN(6, 8, batch_first=True), 8), series),
    "GRU": (layers(nn.GRU(6, 8, batch_first=True), 8), series),
    "LSTM, two layers, both ways": (layers(nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True), 16), series),
    "LSTM with a projection": (layers(nn.LSTM(6, 8, batch_first=True, proj_size=4), 4), series),
    "weight_norm": (nn.Sequential(parametrizations.weight_norm(L(6, 8)), nn.ReLU(), L(8, 3)), rows),
    "spectral_norm": (nn.Sequential(parametrizations.spectral_norm(L(6, 8)), nn.ReLU(), L(8, 3)), rows),
    "PixelShuffle": (nn.Sequential(nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 3, 1)), images),
    "PixelUnshuffle": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelUnshuffle(2), nn.Conv2d(16, 3, 1)), images),
    "a transposed convolution in groups": (
        nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.ConvTranspose2d(12, 18, 2, groups=3), nn.Conv2d(18, 2, 1)),
        images,
    ),
    "bicubic": (
        Net(
            lambda s, x: s.b(F.interpolate(s.a(x), scale_factor=2, mode="bicubic")),
            a=nn.Conv2d(3, 4, 3),
            b=nn.Conv2d(4, 3, 1),
        ),
        images,
    ),
    "heads that share keys": (Net(shared_keys, q=L(6, 12), k=L(6, 6), v=L(6, 6), h=L(12, 3)), series),
    "a filter that is the same for all channels": (
        Net(
            lambda s, x: s.b(F.conv2d(s.a(x).relu(), x.new_ones(8, 1, 3, 3), groups=8)),
            a=nn.Conv2d(3, 8, 3),
            b=nn.Conv2d(8, 3, 1),
        ),
        images,
    ),
    "stacked, and weighed": (
        Net(
            lambda s, x: s.h((torch.stack([s.a(x), s.b(x)], 1) * s.w).sum(1)),
            a=L(6, 8),
            b=L(6, 8),
            w=parameter(2, 8),
            h=L(8, 3),
        ),
        rows,
    ),
    "distances to a book of codes": (Net(lambda s, x: torch.cdist(s.a(x), s.c), a=L(6, 8), c=parameter(4, 8)), series),
    **{
        f"a head for training alone, behind {drop}": (
            Net(with_a_head_for_training, a=L(6, 8), b=L(8, 5), d=drop, e=L(5, 3), h=L(8, 3)),
            rows,
        )
        for drop in (nn.Dropout(0.7), nn.Dropout(0.7, inplace=True), nn.Dropout1d(0.7), nn.AlphaDropout(0.7))
    },
    "a number": (Net(lambda s, x: s.a(x).tanh().sum().softmax(0), a=L(6, 8)), rows),
}


@pytest.mark.parametrize("name", MOVES)
def test_all_of_it_moves(name):
    net, shape = MOVES[name]
    randomise(net)
    symmetry = alignment.symmetry(net, torch.randn(shape))
    assert symmetry.share == 1
    assert max(changes(net, symmetry)) < 1e-10


@pytest.mark.parametrize("part", [slice(2, None), slice(None)])
def test_weights_that_share_memory_stand_still(part):
    net = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Flatten(), L(20, 2))
    net.w = nn.Parameter(net[0].weight.data.view(2, 4)[part.start and 1 :])
    table = alignment.symmetry(net, torch.randn(3, 4, 5)).table()
    assert all(row.follows.startswith("fixed (shared") for row in table if row.parameter == "0.weight" and row.size > 1)


def test_an_example_without_rows_is_refused():
    with pytest.raises(ValueError, match="example: its first tensor has no elements; pass a row"):
        alignment.symmetry(L(6, 3), torch.randn(0, 6))
