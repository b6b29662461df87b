"""Encoders whose classes are directions known beforehand, plain and with the encoder linearised."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import toys
from clkit import data, models, representation, tangent
from clkit.consolidation import HCMM
from clkit.consolidation.hcmm import projections
from clkit.models import CosineHead, prototypes, with_prototypes
from clkit.models.networks import SCALE
from clkit.tangent import Linearized
from clkit.training import Training
from clkit.weights import equal, get_weights, set_weights

ADAM = Training(epochs=2, batch=8, lr=5e-3, optimizer="adamw", labels="task")
quickly = settings(max_examples=25, deadline=None)
SEED = st.integers(0, 10**6)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream(shape, classes=4) -> data.Stream:
    """A task of noise."""
    y = torch.arange(2 * classes) % classes
    rows = data.Examples((255 * randn(len(y), *shape).sigmoid()).to(torch.uint8), y)
    task = data.Task(0, "noise", tuple(range(classes)), rows, rows)
    return data.Stream("noise", (task,), tuple(map(str, range(classes))))


def everything(pictures):
    """All prepared training images and their labels."""
    x = torch.cat([task.prepare(task.train.x) for task in pictures])
    return x, torch.cat([task.train.y for task in pictures])


def plain(pictures, *, seed=0):
    net = models.encoder(pictures, widths=(4, 8), dim=6, seed=seed)
    return with_prototypes(net.encoder, prototypes(net.encoder, *everything(pictures)))


def nested(pictures, *, seed=0):
    net = plain(pictures, seed=seed)
    return nn.Sequential(OrderedDict(encoder=Linearized(net.encoder), head=net.head))


def moved(net, by=0.1):
    """Moves every trained tensor of a network, in place."""
    weights = get_weights(net)
    set_weights(net, {n: t + by * randn(*t.shape, seed=1) * (n != "head.weight") for n, t in weights.items()})
    return net


class Noisy(nn.Module):
    """An encoder that is another one when it trains."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout, self.norm = nn.Linear(5, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.dropout(self.linear(x)))


class TestHead:
    @quickly
    @given(SEED, st.floats(1e-3, 1e3), st.floats(1, 100))
    def test_only_directions_count(self, seed, factor, scale):
        head, x = CosineHead(5, 3, scale), randn(7, 5, seed=seed)
        with torch.no_grad():
            head.weight.copy_(randn(3, 5, seed=seed + 1))
            logits = head(x)
            rows = [[scale * F.cosine_similarity(a, b, dim=0) for b in head.weight] for a in x]
            torch.testing.assert_close(logits, torch.tensor(rows), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(head(factor * x), logits, rtol=1e-4, atol=1e-4)
            head.weight.mul_(factor)
            torch.testing.assert_close(head(x), logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(head(head.weight).diagonal(), torch.full((3,), float(scale)))
        assert logits.abs().max() <= scale * (1 + 1e-6)

    def test_features_of_zero_and_tokens(self):
        head = CosineHead(5, 3)
        assert not head(torch.zeros(2, 5)).any()
        x = randn(2, 4, 5)
        torch.testing.assert_close(head(x)[:, 2], head(x[:, 2]))
        assert repr(head) == "CosineHead(in_features=5, out_features=3, bias=False, scale=20)"

    def test_gradients_leave_the_length_of_features_alone(self):
        head, x = CosineHead(5, 3), randn(7, 5).requires_grad_()
        F.cross_entropy(head(x), torch.arange(7) % 3).backward()
        assert (x.grad * x).sum(1).abs().max() < 1e-6 < x.grad.abs().max()


class TestPrototypes:
    @quickly
    @given(SEED, st.integers(1, 6), st.integers(0, 12), st.integers(1, 9))
    def test_they_are_a_loops(self, seed, classes, more, batch):
        g = torch.Generator().manual_seed(seed)
        y = torch.cat([torch.randperm(classes, generator=g), torch.randint(classes, (more,), generator=g)])
        encoder, x = Noisy(), torch.randn(len(y), 5, generator=g)
        with torch.no_grad():
            for tensor in encoder.state_dict().values():
                tensor.add_(torch.rand(tensor.shape, generator=g).to(tensor.dtype))
        state = {n: t.clone() for n, t in encoder.state_dict().items()}
        found = prototypes(encoder, x, y, batch=batch)
        assert encoder.training and encoder.norm.training and not found.requires_grad
        assert equal(encoder.state_dict(), state), "statistics were updated"
        wanted = []
        with torch.no_grad():
            features = encoder.eval()(x)
            for label in range(classes):
                mean = sum(f / f.norm() for f, own in zip(features, y, strict=True) if own == label)
                wanted.append(mean / mean.norm())
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(classes))
        order = torch.randperm(len(y), generator=g)
        torch.testing.assert_close(prototypes(encoder, x[order], y[order]), found, rtol=1e-4, atol=1e-5)
        factor = torch.rand(len(y), 1, generator=g) + 0.1
        lengths = prototypes(nn.Identity(), factor * features, y)
        torch.testing.assert_close(lengths, found, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("labels", "missing"),
        [([0, 2, 2], r"\[1\]"), ([3], r"\[0, 1, 2\]"), ([9], r"\[0, 1, 2, 3, 4\]"), ([], r"\[\]")],
    )
    def test_a_class_without_examples_is_named(self, labels, missing):
        y = torch.tensor(labels, dtype=torch.int64)
        with pytest.raises(ValueError, match=f"classes {missing} have no example among {len(y)}; give at least one"):
            prototypes(nn.Identity(), randn(len(y), 5), y)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_network_of_them(self, dtype):
        encoder, directions = nn.Linear(5, 4, bias=False).to(dtype), F.normalize(randn(3, 4).to(dtype), dim=1)
        state = torch.get_rng_state()
        net = with_prototypes(encoder, directions, 7.0)
        assert torch.equal(state, torch.get_rng_state())
        assert net.encoder is encoder and torch.equal(net.head.weight, directions) and net.head.scale == 7
        assert net.head.weight is not directions and encoder.weight.requires_grad
        assert not net.head.weight.requires_grad and net(randn(2, 5).to(dtype)).dtype == dtype
        assert with_prototypes(encoder, directions).head.scale == SCALE

    def test_an_example_alone_is_its_classs_direction(self):
        pictures = stream((1, 16, 16))
        net = models.encoder(pictures)
        x, y = everything(pictures)
        known = with_prototypes(net.encoder, prototypes(net.encoder, x[:4], y[:4]))
        with torch.no_grad():
            logits = known(x[:4])
        torch.testing.assert_close(logits.diagonal(), torch.full((4,), SCALE))
        assert torch.equal(logits.argmax(1), y[:4])


class TestEncoder:
    @pytest.mark.parametrize("shape", [(1, 16, 16), (1, 28, 28), (3, 32, 32), (3, 48, 48), (3, 17, 40), (1, 2, 2)])
    def test_images_of_many_sizes(self, shape):
        pictures = stream(shape)
        net, x = models.encoder(pictures), everything(pictures)[0]
        assert net.encoder(x).shape == (8, 64) and net(x).shape == (8, 4)
        convolutions = 9 * (shape[0] * 16 + 16 * 32 + 32 * 64)
        assert sum(p.numel() for p in net.encoder.parameters()) == convolutions + 2 * 112 + 256 * 64
        assert isinstance(net.head, CosineHead) and net.head.scale == SCALE and net.head.weight.requires_grad

    def test_its_layout(self):
        net = models.encoder(stream((3, 16, 16)), widths=(4, 12), dim=5)
        matrix = net.encoder.projection
        assert type(matrix) is nn.Linear and matrix.bias is None and matrix.weight.shape == (5, 48)
        names = [f"encoder.{part}{i}.weight" for i in (1, 2) for part in ("conv", "norm")]
        assert {n for n in get_weights(net) if not n.endswith("bias")} == {
            *names,
            "encoder.projection.weight",
            "head.weight",
        }
        assert [net.encoder.conv2.weight.shape, net.encoder.conv2.stride] == [(12, 4, 3, 3), (2, 2)]

    def test_an_image_is_read_alone_in_any_mode(self):
        pictures = stream((3, 20, 20))
        net, x = models.encoder(pictures), everything(pictures)[0]
        with torch.no_grad():
            together = net.train()(x)
            torch.testing.assert_close(net.eval()(x[2:3]), together[2:3], rtol=1e-4, atol=1e-4)
        assert not list(net.buffers())

    def test_a_seeds_bits(self):
        state = torch.get_rng_state()
        a, b, c = (get_weights(models.encoder(stream((1, 16, 16)), seed=seed)) for seed in (3, 3, 4))
        assert equal(a, b) and torch.equal(state, torch.get_rng_state())
        assert not torch.equal(a["head.weight"], c["head.weight"])
        assert not torch.equal(a["encoder.conv1.weight"], c["encoder.conv1.weight"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"stream": toys.stream()}, r"inputs \(6,\) are no images"),
            ({"widths": (4, 0)}, r"widths: \(4, 0\); give several, each a whole number"),
            ({"widths": (4, 6)}, r"widths: \(4, 6\); give multiples of 4"),
            ({"widths": (4.0,)}, r"widths: \(4.0,\); give"),
            ({"dim": 0}, "dim: 0; give a whole number"),
        ],
    )
    def test_bad_arguments_are_named(self, change, message):
        with pytest.raises(ValueError, match=message):
            models.encoder(**{"stream": toys.images()} | change)


class TestLinearisedEncoder:
    """A linearised encoder below the frozen head is read, named and corrected as the plain one is."""

    @pytest.mark.parametrize("make", [plain, nested])
    def test_features_are_the_encoders_outputs_as_they_are(self, make):
        pictures = toys.images()
        net, x = moved(make(pictures)).train(), everything(pictures)[0]
        with torch.no_grad():
            wanted = net.encoder(x)
        assert (wanted.norm(dim=1) - 1).abs().max() > 0.1, "they have length 1"
        for read in (models.features, representation.features):
            torch.testing.assert_close(read(net, x), wanted, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(read(net, x, batch=7), wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(net.head(read(net, x)), net(x).detach(), rtol=1e-4, atol=1e-4)
        assert net.training

    def test_features_with_other_weights(self):
        pictures = toys.images()
        net, x = nested(pictures), everything(pictures)[0]
        other = get_weights(moved(nested(pictures)))
        found = representation.features(net, x, weights=other)
        lin = Linearized(net.encoder.network)
        set_weights(lin, {n.removeprefix("encoder."): t for n, t in other.items() if n != "head.weight"})
        with torch.no_grad():
            torch.testing.assert_close(found, lin(x), rtol=1e-5, atol=1e-6)
            assert not torch.allclose(found, lin.network(x), rtol=1e-2)
        torch.testing.assert_close(representation.features(net, x, "encoder.projection", weights=other), found)

    def test_layers_and_weights_have_the_names_of_the_plain_network(self):
        pictures = toys.images()
        net, lin = plain(pictures), nested(pictures)
        names = list(dict(net.named_modules()))
        assert list(tangent.layers(net)) == list(tangent.layers(lin)) == names
        assert all(tangent.layers(net)[name] is module for name, module in net.named_modules())
        network = dict(lin.encoder.network.named_modules(prefix="encoder"))
        assert {n: m for n, m in tangent.layers(lin).items() if n.startswith("encoder")} == network
        assert tangent.layers(lin)["head"] is lin.head and tangent.layers(lin)[""] is lin
        root = Linearized(net)
        assert tangent.layers(root) == dict(root.network.named_modules()) and list(tangent.layers(root)) == names
        deeper = nn.ModuleDict({"one": lin, "two": Linearized(net.head)})
        assert list(tangent.layers(deeper))[1:] == [*(f"one.{n}".strip(".") for n in names), "two"]
        assert get_weights(net).keys() == get_weights(lin).keys() == get_weights(root).keys()

    @pytest.mark.parametrize("make", [plain, nested, lambda s: Linearized(plain(s))])
    def test_what_can_be_corrected(self, make):
        pictures = toys.images()
        net = make(pictures)
        found, last = projections(net, everything(pictures)[0][:1])
        assert list(found) == [f"encoder.{n}.weight" for n in ("conv1", "conv2", "projection")]
        assert last == "encoder.projection.weight"
        assert found[last] is tangent.layers(net)["encoder.projection"]

    @pytest.mark.parametrize("consolidation", [None, HCMM(), HCMM(0.5, accumulate="sum", correction="ridge")])
    @pytest.mark.parametrize("make", [plain, nested])
    def test_the_head_keeps_its_bits_through_all_tasks(self, make, consolidation):
        pictures = toys.images()
        start = get_weights(make(pictures))
        result = toys.quick(pictures, None, consolidation, model=make, training=ADAM)
        again = toys.quick(pictures, None, consolidation, model=make, training=ADAM)
        assert all(map(equal, result.weights, again.weights)) and len(result.weights) == 3
        for weights in (*result.weights, get_weights(result.model)):
            assert weights.keys() == start.keys() and torch.equal(weights["head.weight"], start["head.weight"])
            assert all(not torch.equal(weights[n], t) for n, t in start.items() if n != "head.weight")
        if make is nested:
            encoder = {n.removeprefix("encoder."): t for n, t in start.items() if n != "head.weight"}
            assert equal(get_weights(result.model.encoder.network), encoder)
        if consolidation:
            assert all(report["mismatch"][1] < report["mismatch"][0] for report in result.reports[1:])

    @pytest.mark.parametrize("strength", [100.0, 1.0])
    def test_the_correction_is_ridge_regression_on_the_inputs_at_the_point_of_expansion(self, strength):
        """By hand, from the encoder's own linearisation: f = H_0 P + (J_h d) P_0, affine in P with the design H_0."""
        pictures = toys.images(2)
        bare = toys.quick(pictures, None, HCMM(0.5, correction="none"), model=nested, training=ADAM)
        result = toys.quick(pictures, None, HCMM(0.5, correction="ridge", ridge=strength), model=nested, training=ADAM)
        assert equal(result.weights[0], bare.weights[0]) and equal(result.trained[1], bare.trained[1])
        merged, corrected, name = bare.weights[1], result.weights[1], "encoder.projection.weight"
        assert {n for n, t in merged.items() if not torch.equal(t, corrected[n])} == {name}

        lin = Linearized(plain(pictures).encoder).double()
        x = pictures[1].prepare(pictures[1].train.x).double()

        def outputs(weights):
            own = {n.removeprefix("encoder."): t.double() for n, t in weights.items() if n != "head.weight"}
            set_weights(lin, own)
            with torch.no_grad():
                return lin(x)

        with torch.no_grad():
            design = lin.network[:-1](x)
        residual = outputs(bare.weights[0]) - outputs(merged)
        penalty = strength * torch.linalg.eigvalsh(design.T @ design).mean() * torch.eye(design.shape[1]).double()
        move = torch.linalg.inv(design.T @ design + penalty) @ design.T @ residual
        torch.testing.assert_close((corrected[name] - merged[name]).double(), move.T, rtol=1e-3, atol=1e-6)
        assert move.abs().max() > 1e-4
        torch.testing.assert_close(outputs(corrected), outputs(merged) + design @ move, rtol=1e-4, atol=1e-5)
        found = [float((outputs(w) - outputs(bare.weights[0])).square().mean()) for w in (merged, corrected)]
        assert result.reports[1]["mismatch"] == pytest.approx(found, rel=1e-3) and found[1] < found[0]

    def test_a_straight_merge_mixes_features(self):
        pictures = toys.images(2)
        consolidation = HCMM(0.3, "none", correction="none")
        result = toys.quick(pictures, None, consolidation, model=nested, training=ADAM)
        read = partial(representation.features, result.model, everything(pictures)[0])
        old, new, merged = (read(weights=w) for w in (result.weights[0], result.trained[1], result.weights[1]))
        torch.testing.assert_close(merged, 0.7 * old + 0.3 * new, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(old, new, rtol=1e-2)


def test_features_of_a_network_with_a_linearised_part_are_those_of_evaluation_mode():
    net = nn.Sequential(Linearized(nn.Linear(6, 4)), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(representation.features(net, x), net[0](x).detach())
    assert net.training and net[1].training
