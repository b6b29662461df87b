"""Linearised models are affine in their weights, tangent to the network, and trained like any other."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import toys
from clkit import ER, SFA, Learner, Training, WiSEFT, alignment, merging, models, normalization, run
from clkit import weights as W
from clkit.curvature import fisher
from clkit.tangent import Linearized, linearised

PICTURES, VECTORS, TOKENS = toys.images(), toys.stream(), toys.tokens()


class Tied(nn.Module):
    """Two layers that share their weight, and a parameter that no layer owns."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.scale * self.second(torch.tanh(self.first(x)))


def seeded(make):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make()


def sequence(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


def attentive():
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True, norm_first=True)


class Masked(nn.Module):
    """Attention with a mask, of bools or of numbers, and a scale of its own."""

    def __init__(self, mask, causal=False):
        super().__init__()
        self.qkv, self.mask, self.causal = nn.Linear(6, 18), mask, causal

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.causal, scale=0.7)


class Keywords(nn.Module):
    """Functions called by keywords, under torch's own names."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.batch = nn.Linear(6, 6), nn.LayerNorm(6), nn.BatchNorm1d(6)

    def forward(self, x):
        x = F.linear(input=x, weight=self.linear.weight, bias=self.linear.bias)
        x = F.layer_norm(x, normalized_shape=(6,), weight=self.norm.weight, bias=self.norm.bias)
        x = F.group_norm(x, num_groups=2, weight=self.norm.bias + 1, bias=self.norm.weight)
        mean, var = self.batch.running_mean, self.batch.running_var
        x = F.batch_norm(x, running_mean=mean, running_var=var, weight=self.batch.weight, bias=self.batch.bias)
        return F.relu(input=x)


def statistics(net):
    """The same network with BatchNorm statistics and biases that are not those of a fresh one."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean += 0.3 * torch.randn(module.num_features, generator=g)
                module.running_var *= 0.5 + torch.rand(module.num_features, generator=g)
                module.bias += 0.2 * torch.randn(module.num_features, generator=g)
    return net


FACTORIES = {
    "mlp": (partial(models.mlp, hidden=(7, 5)), VECTORS),
    "convnet": (toys.small_convnet, PICTURES),
    "encoder": (partial(models.encoder, widths=(4, 8), dim=5), PICTURES),
    "resnet18": (partial(models.resnet18, width=2), "8x8"),
    "vit": (partial(models.vit, patch=3, dim=8, heads=2), PICTURES),
    "gpt": (partial(models.gpt, width=8, heads=2), TOKENS),
    "torchvision": (partial(models.torchvision, name="mobilenet_v3_small"), "32x32"),
}
LAYERS = {
    "conv1d, inplace": (sequence(partial(nn.Conv1d, 3, 4, 3), partial(nn.ReLU, True), nn.Flatten), (3, 5)),
    "conv3d, silu": (sequence(partial(nn.Conv3d, 1, 2, 2), partial(nn.SiLU, True), nn.Flatten), (1, 3, 3, 3)),
    "groups": (sequence(partial(nn.Conv2d, 4, 8, 3, padding=1, padding_mode="reflect", groups=2), nn.GELU), (4, 5, 5)),
    "norm first": (sequence(partial(nn.LayerNorm, 6), partial(nn.Linear, 6, 3)), (6,)),
    "layer norm, no bias": (sequence(partial(nn.Linear, 6, 6), partial(nn.LayerNorm, 6, bias=False)), (6,)),
    "layer norm, plain": (
        sequence(partial(nn.Linear, 6, 6), partial(nn.LayerNorm, 6, elementwise_affine=False)),
        (4, 6),
    ),
    "group norm": (sequence(partial(nn.Conv2d, 1, 4, 3), partial(nn.GroupNorm, 2, 4), nn.Tanh), (1, 5, 5)),
    "group norm, plain": (
        sequence(partial(nn.Conv2d, 1, 4, 3), partial(nn.GroupNorm, 2, 4, affine=False), nn.Tanh),
        (1, 5, 5),
    ),
    "instance norm": (sequence(partial(nn.Conv2d, 1, 4, 3), partial(nn.InstanceNorm2d, 4, affine=True)), (1, 5, 5)),
    "batch norm of the batch": (
        sequence(partial(nn.Conv2d, 1, 4, 3), partial(nn.BatchNorm2d, 4, track_running_stats=False)),
        (1, 5, 5),
    ),
    "own attention": (attentive, (5, 8)),
    "bool mask": (lambda: Masked(torch.tensor([[True, False, True], [True, True, False], [True] * 3])), (3, 6)),
    "added mask": (lambda: Masked(torch.randn(3, 3).double()), (3, 6)),
    "causal": (lambda: Masked(None, causal=True), (3, 6)),
    "dropout": (sequence(partial(nn.Linear, 6, 6), nn.Dropout, partial(nn.Linear, 6, 3)), (6,)),
    "tied": (Tied, (6,)),
    "keywords": (Keywords, (6,)),
}


def factory(name):
    """A network of a factory, in double precision, and inputs for it."""
    make, stream = FACTORIES[name]
    if isinstance(stream, str):
        side = int(stream.split("x")[0])
        from clkit.data import Examples, Stream, Task

        part = Examples(torch.zeros(3, 1, side, side, dtype=torch.uint8), torch.arange(3))
        stream = Stream("blank", (Task(0, "all", (0, 1, 2), part, part),), ("a", "b", "c"))
        x = torch.randn(4, 1, side, side, generator=torch.Generator().manual_seed(0)).double()
    else:
        x = stream[0].prepare(stream[0].train.x[:4])
    model = statistics(make(stream)).double()
    return model, x.double() if x.is_floating_point() else x


def layers(name):
    make, shape = LAYERS[name]
    return seeded(make).double(), torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).double()


def moved(model, size=0.05, seed=0):
    """Weights a step away: every parameter moves, nothing else."""
    g = torch.Generator().manual_seed(seed)
    own = {name for name, _ in model.named_parameters()}
    return {
        name: t + size * torch.randn(t.shape, generator=g, dtype=torch.double) if name in own else t
        for name, t in W.get_weights(model).items()
    }


def at(model, weights):
    """What a linearised model gives with these weights."""
    W.set_weights(model, weights)
    return model


@torch.no_grad()
def outputs(model, weights, x):
    return at(model, weights)(x)


def by_jvp(model, x):
    """The definition, by torch's own rules."""
    return model._by_jvp(x, dict(model.network.named_parameters()), dict(model.named_parameters()))


every_factory = pytest.mark.parametrize("name", FACTORIES)
every_case = pytest.mark.parametrize(
    "case", [partial(factory, n) for n in FACTORIES] + [partial(layers, n) for n in LAYERS]
)


class TestLaws:
    @every_factory
    def test_at_the_point_of_expansion_it_is_the_network(self, name):
        model, x = factory(name)
        assert torch.equal(Linearized(model)(x), model.eval()(x))

    @pytest.mark.parametrize("name", LAYERS)
    def test_at_the_point_of_expansion_layers_are_themselves(self, name):
        model, x = layers(name)
        torch.testing.assert_close(Linearized(model)(x), model.eval()(x), rtol=1e-12, atol=1e-12)

    @every_factory
    def test_it_is_affine_in_the_weights(self, name):
        model, x = factory(name)
        lin = Linearized(model)
        ws = [moved(model, 0.3, seed) for seed in range(3)]
        mixed = outputs(lin, W.combine(ws, [0.7, 1.1, -0.8]), x)
        apart = sum(c * outputs(lin, w, x) for c, w in zip([0.7, 1.1, -0.8], ws, strict=True))
        torch.testing.assert_close(mixed, apart, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(mixed, outputs(lin, ws[0], x), rtol=1e-3)

    @every_factory
    def test_an_average_of_weights_is_the_average_of_outputs(self, name):
        model, x = factory(name)
        lin = Linearized(model)
        ws = [moved(model, 0.3, seed) for seed in range(4)]
        merged = outputs(lin, merging.average(ws), x)
        torch.testing.assert_close(merged, torch.stack([outputs(lin, w, x) for w in ws]).mean(0))
        network = copy.deepcopy(model).eval()
        curved = torch.stack([outputs(network, w, x) for w in ws]).mean(0)
        assert not torch.allclose(curved, outputs(network, merging.average(ws), x), rtol=1e-3)

    @pytest.mark.parametrize("name", ["vit", "gpt"])
    def test_the_push_is_the_finite_difference(self, name):
        model, x = factory(name)
        there = moved(model, 0.3)
        lin, network = Linearized(model), copy.deepcopy(model).eval()
        here, step = W.get_weights(model), 1e-5
        ends = [outputs(network, W.lerp(here, there, t), x) for t in (step, -step)]
        push = outputs(lin, there, x) - outputs(lin, here, x)
        torch.testing.assert_close(push, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("case", [partial(factory, "vit"), partial(factory, "gpt"), partial(layers, "group norm")])
    def test_the_error_falls_with_the_square_of_the_step(self, case):
        model, x = case()
        lin, network = Linearized(model), copy.deepcopy(model).eval()
        here, there = W.get_weights(model), moved(model, 0.004)
        errors = []
        for t in (0.5, 0.25, 0.125):
            w = W.lerp(here, there, t)
            errors.append(float((outputs(lin, w, x) - outputs(network, w, x)).norm()))
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
        assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)

    @every_factory
    def test_gradients_are_those_of_the_network_at_the_point(self, name):
        model, x = factory(name)
        lin = at(Linearized(model), moved(model, 0.3))
        out = lin(x)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
        network = copy.deepcopy(model).eval()
        expected = torch.autograd.grad(network(x), list(network.parameters()), g)
        found = torch.autograd.grad(out, list(lin.parameters()), g)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class TestTwins:
    @every_case
    def test_values_and_gradients_are_those_of_torchs_own_rules(self, case):
        model, x = case()
        lin = at(Linearized(model), moved(model, 0.3))
        slow = by_jvp(lin, x)
        with torch.no_grad():
            torch.testing.assert_close(lin(x), slow, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(lin(x), slow, rtol=1e-9, atol=1e-10)

    def test_an_explicit_jacobian_gives_the_same_training(self):
        model = models.mlp(VECTORS, hidden=(4,)).double()
        x, y = VECTORS[0].train.x[:8].double(), VECTORS[0].train.y[:8]
        lin = Linearized(model)
        theta0 = W.get_weights(model)
        jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(theta0)
        tau = {name: torch.zeros_like(t, requires_grad=True) for name, t in theta0.items()}
        optimizers = [torch.optim.SGD(ps, lr=0.5) for ps in (lin.parameters(), tau.values())]
        for _ in range(5):
            push = sum((jacobian[n].flatten(2) @ t.flatten() for n, t in tau.items()), torch.zeros(()))
            for optimizer, logits in zip(optimizers, (lin(x), model(x).detach() + push), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(logits, y).backward()
                optimizer.step()
        for name, t in W.get_weights(lin).items():
            torch.testing.assert_close(t, theta0[name] + tau[name].detach())
        assert not torch.allclose(lin(x), model(x), atol=1e-2)

    def test_second_derivatives_are_gauss_newtons(self):
        model, x = factory("convnet")
        lin, y = at(Linearized(model), moved(model, 0.3)), torch.arange(4)

        def curvature_along_ones(logits):
            ps = list(lin.parameters())
            slopes = torch.autograd.grad(F.cross_entropy(logits, y), ps, create_graph=True)
            return torch.autograd.grad(sum(s.sum() for s in slopes), ps)

        for a, b in zip(curvature_along_ones(lin(x)), curvature_along_ones(by_jvp(lin, x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)

    def test_gradients_in_the_inputs_are_refused(self):
        model, x = factory("vit")
        lin = Linearized(model)
        for gradient in (
            lambda: lin(x.clone().requires_grad_()),
            lambda: torch.func.grad(lambda x: lin(x).sum())(x),
            lambda: torch.func.grad(lambda x: torch.func.vmap(lambda row: lin(row[None]))(x).sum())(x),
        ):
            with pytest.raises(ValueError, match="x: it wants a gradient"):
                gradient()
        with torch.no_grad():
            lin(x.clone().requires_grad_())

    @pytest.mark.parametrize("name", ["convnet", "vit"])
    def test_per_example_gradients(self, name):
        model, x = factory(name)
        lin, y = at(Linearized(model), moved(model, 0.3)), torch.arange(4)
        found = fisher(lin, x, labels="true", y=y)
        twin = {n: torch.zeros_like(p) for n, p in lin.named_parameters()}
        for row in range(4):
            loss = F.cross_entropy(lin(x[row : row + 1]), y[row : row + 1])
            for n, slope in zip(twin, torch.autograd.grad(loss, list(lin.parameters())), strict=True):
                twin[n] += slope.square() / 4
        assert found.keys() == twin.keys()
        for n, t in twin.items():
            torch.testing.assert_close(found[n], t)

    @pytest.mark.parametrize("name", ["mlp", "convnet", "resnet18", "vit", "gpt"])
    def test_hooks_read_linearised_features(self, name):
        model, x = factory(name)
        there = moved(model, 0.3)
        seen = []
        lin = at(Linearized(model), there)
        hook = lin.network.linear.register_forward_pre_hook(lambda _, args: seen.append(linearised(args[0])))
        with torch.no_grad():
            lin(x)
        hook.remove()
        body = {name: t for name, t in there.items() if not name.startswith("linear.")}
        torch.testing.assert_close(seen[0], outputs(Linearized(model[:-1]), body, x))
        assert linearised(x) is x

    def test_in_bfloat16_it_is_nearly_the_same(self):
        for name in ("convnet", "vit"):
            model, x = factory(name)
            lin = at(Linearized(model), moved(model, 0.1)).float()
            with torch.autocast("cpu", torch.bfloat16):
                rough = lin(x.float())
            rough.float().sum().backward()
            assert rough.dtype == torch.bfloat16
            torch.testing.assert_close(rough.float(), lin(x.float()), rtol=0.05, atol=0.05)
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lin.parameters())


class TestModule:
    @every_factory
    def test_its_weights_are_the_models(self, name):
        model, _ = factory(name)
        lin = Linearized(model)
        assert W.equal(W.get_weights(lin), W.get_weights(model))
        assert list(W.get_weights(lin)) == list(W.get_weights(model))
        assert lin.state_dict().keys() == model.state_dict().keys()
        there = moved(model)
        W.set_weights(model, W.get_weights(at(lin, there)))
        assert W.equal(W.get_weights(model), there)
        assert [n for n, _ in lin.named_parameters()] == [n for n, _ in model.named_parameters()]

    def test_the_model_is_left_alone_and_the_point_stays(self):
        model, x = factory("convnet")
        model.train()
        before = W.get_weights(model)
        lin = Linearized(model).train()
        optimizer = torch.optim.SGD(lin.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            lin(x).square().sum().backward()
            optimizer.step()
        assert model.training and all(m.training for m in model.modules())
        assert W.equal(W.get_weights(model), before) and W.equal(W.get_weights(lin.network), before)
        assert not W.equal(W.get_weights(lin), before)
        for name, buffer in lin.named_buffers():
            assert torch.equal(buffer, model.get_buffer(name)), name

    def test_another_point(self):
        model, x = factory("convnet")
        point = W.get_weights(statistics(copy.deepcopy(model)))
        point = W.add(point, W.sub(moved(model), W.get_weights(model)))
        lin = Linearized(model, at=point)
        assert W.equal(W.get_weights(lin), W.get_weights(model)) and W.equal(W.get_weights(lin.network), point)
        network = copy.deepcopy(model).eval()
        assert torch.equal(outputs(lin, point, x), outputs(network, point, x))

    @pytest.mark.parametrize("name", ["convnet", "vit"])
    def test_modes_change_nothing(self, name):
        model, x = factory(name)
        lin = at(Linearized(nn.Sequential(model, nn.Dropout(0.5))), {f"0.{k}": v for k, v in moved(model).items()})
        assert torch.equal(lin.train()(x), lin.eval()(x))

    def test_statistics_are_not_read_and_not_re_estimated(self):
        model, x = factory("convnet")
        lin = at(Linearized(model), moved(model))
        before, w = lin(x), W.get_weights(lin)
        assert normalization.batchnorms(lin) == () and W.equal(normalization.refresh(lin, w, x), w)
        other = {name: t + 1 if "running" in name else t for name, t in w.items()}
        assert torch.equal(at(lin, other)(x), before)

    def test_it_copies_moves_and_pickles_whole(self):
        model, x = factory("vit")
        lin = at(Linearized(model), moved(model))
        for other in (copy.deepcopy(lin), pickle.loads(pickle.dumps(lin))):
            assert torch.equal(other(x), lin(x))
            assert not {p.data_ptr() for p in other.network.parameters()} & {
                p.data_ptr() for p in lin.network.parameters()
            }
        single = lin.float()
        assert single(x.float()).dtype == torch.float32
        assert {p.dtype for p in single.network.parameters()} == {torch.float32}

    def test_frozen_parameters_stay_frozen(self):
        model, x = factory("convnet")
        model.conv1.weight.requires_grad_(False)
        lin = at(Linearized(model), moved(model))
        slow = by_jvp(lin, x)
        torch.testing.assert_close(lin(x), slow)
        lin(x).square().sum().backward()
        assert lin.get_parameter("conv1.weight").grad is None
        assert all(p.grad is not None for n, p in lin.named_parameters() if n != "conv1.weight")
        lin.requires_grad_(False)
        assert not lin(x).requires_grad

    def test_a_head_may_follow(self):
        model, x = factory("mlp")
        chain = nn.Sequential(at(Linearized(model), moved(model)), nn.Linear(6, 2).double())
        chain(x).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in chain.parameters())

    def test_it_shows_its_network(self):
        assert repr(Linearized(models.mlp(VECTORS, hidden=()))).startswith("Linearized(Sequential(")

    def test_compiled(self):
        model, x = factory("mlp")
        lin = at(Linearized(model), moved(model))
        torch.testing.assert_close(torch.compile(lin, backend="eager")(x), lin(x))

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda m: Linearized("net"), TypeError, "model: 'net'"),
            (lambda m: Linearized(Linearized(m)), TypeError, "linearised already"),
            (lambda m: Linearized(nn.ReLU()), ValueError, "ReLU has no parameters"),
            (lambda m: Linearized(m, at={}), ValueError, "at and the model have different names"),
            (lambda m: Linearized(m, at=W.scale(W.get_weights(m), float("nan"))), ValueError, "at: .* holds a NaN"),
            (lambda m: alignment.symmetry(Linearized(m), VECTORS[0].train.x[:2]), ValueError, "export or align its"),
        ],
    )
    def test_bad_input_names_itself(self, make, error, message):
        with pytest.raises(error, match=message):
            make(models.mlp(VECTORS, hidden=(3,)))


class TestTraining:
    def test_softmax_regression_is_linear_already(self):
        model = models.mlp(VECTORS, hidden=()).double()
        stream = VECTORS
        plain, tangent = (
            run(stream, m.float(), Learner(), None, toys.QUICK, device="cpu", progress=False)
            for m in (model, Linearized(model))
        )
        for a, b in zip(plain.weights, tangent.weights, strict=True):
            for name, t in a.items():
                torch.testing.assert_close(b[name], t, rtol=1e-4, atol=1e-5)
        assert (plain.accuracy == tangent.accuracy).all()

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_the_loop_trains_it(self, optimizer):
        net = toys.small_convnet(PICTURES)
        training = Training(epochs=8, batch=8, lr=0.3 if optimizer == "sgd" else 0.02, optimizer=optimizer, clip=5.0)
        result = run(PICTURES, Linearized(net), Learner(), None, training, device="cpu", progress=False)
        model = result.model
        assert isinstance(model, Linearized) and W.equal(W.get_weights(model.network), W.get_weights(net))
        assert result.weights[-1].keys() == W.get_weights(net).keys()
        assert all(losses[-3:].mean() < 0.7 * losses[0] for losses in result.training_loss)
        again = run(PICTURES, Linearized(net), Learner(), None, training, device="cpu", progress=False)
        assert W.equal(result.weights[-1], again.weights[-1])

    def test_tokens_train_too(self):
        net = models.gpt(TOKENS, width=8, heads=2)
        training = Training(epochs=4, batch=6, lr=0.3)
        result = run(TOKENS, Linearized(net), Learner(), None, training, device="cpu", progress=False)
        assert all(losses[-1] < losses[0] for losses in result.training_loss)

    @pytest.mark.parametrize("consolidation", [WiSEFT(0.5), SFA(p=0.5, beta=0.5)])
    def test_consolidations_mix_functions(self, consolidation):
        net = toys.small_convnet(PICTURES)
        lin = Linearized(net)
        result = run(PICTURES, lin, ER(8), consolidation, toys.QUICK, device="cpu", progress=False)
        if isinstance(consolidation, WiSEFT):
            x = PICTURES[0].prepare(PICTURES[0].test.x)
            mixed = 0.5 * outputs(lin, result.weights[-2], x) + 0.5 * outputs(lin, result.trained[-1], x)
            torch.testing.assert_close(outputs(lin, result.weights[-1], x), mixed, rtol=1e-4, atol=1e-5)
        assert not W.equal(result.weights[-1], result.weights[0])
