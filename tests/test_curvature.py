"""Per-example gradients, many at once, are what a loop over examples with autograd gives."""

from functools import partial
from typing import get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import toys
from clkit import curvature, data, models
from clkit.curvature import diagonal_trace, fisher, grams, sensitivity
from clkit.modules import evaluation_mode
from clkit.weights import equal, get_weights, set_weights


def loop(model, x, objective, size):
    """The mean over examples of size(gradient of objective(logits, row)), one example after the other."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    total = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    with evaluation_mode(model):
        for row in range(len(x)):
            value = objective(model(x[row : row + 1])[0], row)
            leaves = [model.get_parameter(name) for name in names]
            slopes = torch.autograd.grad(value, leaves, materialize_grads=True)
            for name, slope in zip(names, slopes, strict=True):
                total[name] += size(slope) / len(x)
    return total


def close(a, b, tolerance=1e-9):
    return a.keys() == b.keys() and all(torch.allclose(t, b[n], rtol=1e-6, atol=tolerance) for n, t in a.items())


def vectors():
    stream = toys.stream()
    return models.mlp(stream, hidden=(5,)).double(), stream[1].train.x[:9].double(), stream[1].train.y[:9]


def pictures():
    """A network with BatchNorm whose statistics are not those of the batch."""
    stream = toys.images()
    model = toys.small_convnet(stream).double()
    with torch.no_grad():
        model.norm1.running_mean += 0.3
        model.norm2.running_var *= 2
    return model, stream[0].prepare(stream[0].train.x[:9]).double(), stream[0].train.y[:9]


def attentive():
    stream = toys.images()
    model = models.vit(stream, patch=3, dim=8, depth=1, heads=2).double()
    return model, stream[0].prepare(stream[0].train.x[:9]).double(), stream[0].train.y[:9]


@pytest.fixture(params=[vectors, pictures, attentive])
def case(request):
    return request.param()


SPACE = torch.tensor([True, True, True, True, False, False])


class TestFisher:
    def test_true_labels_are_squared_gradients_of_the_loss(self, case):
        model, x, y = case
        twin = loop(model, x, lambda logits, row: nn.functional.cross_entropy(logits, y[row]), torch.square)
        assert close(fisher(model, x, labels="true", y=y), twin)

    def test_exact_is_the_expectation_over_the_models_own_prediction(self, case):
        model, x, _ = case
        twin = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        with evaluation_mode(model), torch.no_grad():
            p = model(x).softmax(-1)
        for c in range(6):
            of_class = loop(
                model, x, lambda logits, row, c=c: logits.log_softmax(-1)[c] * p[row, c].sqrt(), torch.square
            )
            twin = {name: t + of_class[name] for name, t in twin.items()}
        assert close(fisher(model, x, labels="exact"), twin)

    def test_sampled_is_true_of_the_labels_drawn(self, case):
        model, x, _ = case
        with evaluation_mode(model), torch.no_grad():
            p = model(x).softmax(-1)
        drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
        sampled = fisher(model, x, generator=torch.Generator().manual_seed(3))
        assert close(sampled, fisher(model, x, labels="true", y=drawn))

    def test_weighted_is_the_labels_own_term_of_exact(self, case):
        model, x, _ = case
        parts = [fisher(model, x, labels="weighted", y=torch.full((len(x),), c)) for c in range(6)]
        total = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
        assert close(fisher(model, x, labels="exact"), total)

    def test_sampled_tends_to_exact(self):
        model, x, _ = vectors()
        many = fisher(model, x.repeat(1500, 1), generator=torch.Generator().manual_seed(0))
        exact = fisher(model, x, labels="exact")
        for name, t in exact.items():
            assert torch.allclose(many[name], t, rtol=0.2, atol=0.02 * float(t.max()))

    @pytest.mark.parametrize("labels", get_args(curvature.FisherLabels))
    def test_a_label_space_leaves_the_other_classes_alone(self, labels):
        model, x, y = vectors()
        found = fisher(model, x, labels=labels, y=y, space=SPACE, generator=torch.Generator().manual_seed(0))
        assert all(t.isfinite().all() for t in found.values())
        assert (found["linear.bias"][4:] == 0).all() and (found["linear.bias"][:4] > 0).all()
        rows = fisher(
            model, x, labels=labels, y=y, space=SPACE.expand(9, 6), generator=torch.Generator().manual_seed(0)
        )
        assert equal(found, rows)

    def test_a_label_space_of_each_rows_own(self):
        model, x, y = vectors()
        space = torch.zeros(9, 6, dtype=torch.bool)
        space[:, 2:4] = True
        space[0] = True
        twin = loop(
            model,
            x,
            lambda logits, row: nn.functional.cross_entropy(logits[space[row]], y[row] if row == 0 else y[row] - 2),
            torch.square,
        )
        assert close(fisher(model, x, labels="true", y=y, space=space), twin)

    def test_softmax_regression_has_it_in_closed_form(self):
        stream = toys.stream()
        model = models.mlp(stream, hidden=()).double()
        x = stream[0].train.x.double()
        p = model(x).softmax(-1).detach()
        found = fisher(model, x, labels="exact")
        assert torch.allclose(found["linear.bias"], (p * (1 - p)).mean(0))
        assert torch.allclose(found["linear.weight"], torch.einsum("nc,ni->ci", p * (1 - p), x**2) / len(x))

    def test_sequences_add_up_their_positions(self):
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
        g = torch.Generator().manual_seed(0)
        x, y = torch.randint(0, 7, (2, 5, 3), generator=g)
        y[0, 1] = y[3, :2] = -100

        def objective(logits, row):
            return nn.functional.cross_entropy(logits, y[row], reduction="sum", ignore_index=-100)

        assert close(fisher(model, x, labels="true", y=y), loop(model, x, objective, torch.square))
        blank = fisher(model, x, y=torch.full_like(y, -100), generator=g)
        assert diagonal_trace(blank) == 0 and diagonal_trace(fisher(model, x, generator=g)) > 0
        with pytest.raises(ValueError, match=r"logits \(N, C\), not \(5, 3, 7\)"):
            fisher(model, x, labels="exact")


class Built(nn.Module):
    """A function of the module and its input, with layers and parameters of its own."""

    def __init__(self, function, *layers, **shapes):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


class Doubled(torch.autograd.Function):
    """A linear layer whose derivative is not its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return F.linear(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        x, w = ctx.saved_tensors
        return grads[0] @ w, 2 * grads[0].T @ x


def chain(*layers):
    return nn.Sequential(*layers)


def twice(layer):
    return chain(layer, nn.Tanh(), layer, nn.Flatten())


def sharing(name):
    model = chain(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    setattr(model[2], name, getattr(model[0], name))
    return model


def partly_frozen():
    model = chain(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def listened_to():
    layer = nn.Linear(5, 3)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output + module.weight.sum())
    return chain(layer, nn.Tanh())


def gated(model, x):
    with torch.no_grad():
        gate = F.linear(x, model.w)
    return x @ model.w.T * gate


def beside(again):
    """A layer that is called once more, where the outputs' graph takes in nothing of it or all."""

    def forward(model, x):
        first = model.layers[0](x)
        return first - again(model.layers[0], 3 * x)

    return lambda: Built(forward, nn.Linear(5, 3))


def without_gradients(layer, x):
    with torch.no_grad():
        return layer(x)


def derived(model, x):
    """The slope of an energy: the forward pass takes the second layer in, and so does its derivative."""
    return torch.func.grad(lambda h: model.layers[1](h).tanh().sum())(model.layers[0](x))


def pushed(model, x):
    """The derivative in the direction of the input."""
    return torch.func.jvp(lambda h: model.layers[0](h).tanh(), (x,), (torch.ones_like(x),))[1]


def hooked_tensor(model, x):
    hidden = model.layers[0](x)
    if hidden.requires_grad:
        hidden.register_hook(lambda slope: 2 * slope)
    return model.layers[1](hidden.tanh())


def hooked_layer(register):
    model = chain(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    getattr(model[1], register)(lambda module, *slopes: (2 * slopes[-1][0],))
    return model


def modulus(*shape):
    """Real outputs of complex weights, from real inputs."""
    return lambda: Built(
        lambda m, x: m.layers[0](torch.complex(x, x.flip(-1) ** 2)).abs().flatten(1),
        (nn.Linear if len(shape) == 2 else nn.Conv1d)(*shape, dtype=torch.complex128),
    )


def clkits(factory, stream):
    return lambda: factory(stream), stream[0].prepare(stream[0].train.x[:4])


IDS = torch.tensor([[0, 2, 3], [2, 2, 4], [5, 2, 2], [0, 0, 6]])
BLANK = torch.cat([torch.zeros(2, 5), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))])
FAMILY = {
    "resnet18": (lambda: models.resnet18(data.split(data.digits(), tasks=5), width=4), (4, 1, 8, 8)),
    "encoder": clkits(partial(models.encoder, widths=(4, 8), dim=4), toys.images()),
    "gpt": clkits(partial(models.gpt, width=8, depth=1, heads=2), toys.tokens()),
    "a sequence": (lambda: chain(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)), (4, 6, 5)),
    "transposed": (lambda: chain(nn.ConvTranspose2d(2, 4, 3, stride=2), nn.Flatten()), (4, 2, 4, 3)),
    "a layer twice": (lambda: twice(nn.Linear(5, 5)), (4, 5)),
    "a convolution twice": (lambda: twice(nn.Conv2d(2, 2, 3, padding=1)), (4, 2, 4, 3)),
    "a weight for two layers": (lambda: sharing("weight"), (4, 5)),
    "a bias for two layers": (lambda: sharing("bias"), (4, 5)),
    "a weight outside its layer": (
        lambda: Built(lambda m, x: m.layers[0](x) * m.layers[0].weight.norm(), nn.Linear(5, 3)), (4, 5)
    ),
    "a weight back and forth": (
        lambda: Built(lambda m, x: F.linear(m.layers[0](x), m.layers[0].weight.T), nn.Linear(5, 3)), (4, 5)
    ),
    "direct parameters": (lambda: Built(lambda m, x: x @ m.w + m.b, w=(5, 3), b=(3,)), (4, 5)),
    "parameters by name": (lambda: Built(lambda m, x: F.linear(bias=m.b, weight=m.w, input=x), w=(3, 5), b=3), (4, 5)),
    "a derivative of its own": (lambda: Built(lambda m, x: Doubled.apply(x, m.w), w=(3, 5)), (4, 5)),
    "rows that meet": (lambda: Built(lambda m, x: m.layers[0](x - x.mean(0) / 2), nn.Linear(5, 3)), (4, 5)),
    "a layer of a constant": (
        lambda: Built(lambda m, x: m.layers[0](x) * m.layers[1](m.w), nn.Linear(5, 3), nn.Linear(2, 3), w=2), (4, 5)
    ),
    "an output that is not used": (
        lambda: Built(lambda m, x: (m.layers[1](x), m.layers[0](x))[1], nn.Linear(5, 3), nn.Linear(5, 3)), (4, 5)
    ),
    "frames of a film": (
        lambda: Built(lambda m, x: m.layers[0](x.flatten(0, 1)).view(len(x), -1), nn.Conv2d(2, 4, 3, groups=2)),
        (4, 3, 2, 5, 4),
    ),
    "norms": (
        lambda: chain(
            nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.LayerNorm(5), nn.PReLU(4), nn.Flatten(),
        ),
        (4, 2, 7),
    ),
    "in place": (lambda: chain(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.ReLU(inplace=True)), (4, 5)),
    "counted words": (lambda: chain(nn.Embedding(7, 4, scale_grad_by_freq=True), nn.Flatten()), IDS),
    "attention": (
        lambda: Built(lambda m, x: m.layers[0](x, x, x)[0][:, 0], nn.MultiheadAttention(4, 2, batch_first=True)),
        (4, 5, 4),
    ),
    "normed weights": (lambda: chain(parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), nn.Flatten()), (4, 2, 4, 4)),
    "frozen parts": (partly_frozen, (4, 5)),
    "a derivative in the forward pass": (lambda: Built(derived, nn.Linear(5, 4), nn.Linear(4, 3)), (4, 5)),
    "a derivative in a direction": (lambda: Built(pushed, nn.Linear(5, 3)), (4, 5)),
    "a hook": (listened_to, (4, 5)),
    "a layer again without gradients": (beside(without_gradients), (4, 5)),
    "a layer again, detached": (beside(lambda layer, x: layer(x).detach()), (4, 5)),
    "a layer again, unused": (beside(lambda layer, x: 0 if layer(x) is x else x[:, :3]), (4, 5)),
    "a layer again in the graph": (beside(lambda layer, x: layer(x)), (4, 5)),
    "one transposed weight in two products": (
        lambda: Built(lambda m, x: (lambda t: (x @ t).tanh() + (2 * x) @ t)(m.w.t()) + F.linear(x, m.w), w=(3, 5)),
        (4, 5),
    ),
    "no row of gradients at first": (lambda: chain(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), BLANK),
    "complex numbers": (modulus(5, 3), (4, 5)),
    "complex sequences": (modulus(5, 3), (4, 6, 5)),
    "complex convolutions": (modulus(2, 3, 2), (4, 2, 5)),
}  # fmt: skip
ALONE = {
    "a tensor's hook": (lambda: Built(hooked_tensor, nn.Linear(5, 4), nn.Linear(4, 3)), (4, 5)),
    "a backward hook": (lambda: hooked_layer("register_full_backward_hook"), (4, 5)),
    "a hook before backward": (lambda: hooked_layer("register_full_backward_pre_hook"), (4, 5)),
    "padded words": (lambda: chain(nn.Embedding(7, 4, padding_idx=2), nn.Flatten(), nn.Linear(12, 3)), IDS),
    "a gate without gradients": (lambda: Built(gated, w=(3, 5)), (4, 5)),
    "a branch": (
        lambda: Built(lambda m, x: m.layers[0](x) * (m.w if m.w.sum() > 0 else -m.w), nn.Linear(5, 3), w=3), (4, 5)
    ),
    "padded words without a layer": (lambda: Built(lambda m, x: torch.embedding(m.w, x, 2).flatten(1), w=(7, 2)), IDS),
    "a recurrent layer": (
        lambda: Built(lambda m, x: m.layers[0](x)[0][:, -1], nn.GRU(5, 3, batch_first=True)), (4, 6, 5)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("name", [*FAMILY, *ALONE])
def test_by_layers_or_row_by_row_they_are_what_a_loop_gives(name, monkeypatch):
    """Layers are a way to the same numbers; a model that has no such way goes row by row."""
    make, x = (FAMILY | ALONE)[name]
    rows, way = [], curvature._one_by_one
    monkeypatch.setattr(curvature, "_one_by_one", lambda *given: rows.append(name) or way(*given))
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = make().eval()
        model = model if any(p.is_complex() for p in model.parameters()) else model.double()
        x = x if isinstance(x, torch.Tensor) else torch.randn(x, dtype=torch.float64)
    x = x.double() if x.is_floating_point() else x
    y = model(x[:1]).argmax(-1).expand(len(x), *model(x[:1]).shape[1:-1])
    twins = {
        "size": loop(model, x, lambda logits, row: logits.square().sum(), torch.abs),
        "true": loop(model, x, lambda logits, row: F.cross_entropy(logits, y[row], reduction="sum"), torch.square),
    }
    assert close(sensitivity(model, x, chunk=3), twins["size"])
    assert close(fisher(model, x, labels="true", y=y), twins["true"])
    assert bool(rows) == (name in ALONE)


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_of_any_convolution_they_are_what_a_loop_gives(drawn):
    axes = drawn.draw(st.integers(1, 3))

    def each(low, high):
        return tuple(drawn.draw(st.integers(low, high)) for _ in range(axes))

    groups, kernel, dilation, sizes = drawn.draw(st.sampled_from([1, 2, 4])), each(1, 3), each(1, 2), each(3, 6)
    padding = drawn.draw(st.sampled_from(["same", "valid", 1, each(0, 2)]))
    options = {"groups": groups, "dilation": dilation, "padding": padding}
    options |= {"stride": 1 if isinstance(padding, str) else each(1, 2)}
    options |= {"padding_mode": drawn.draw(st.sampled_from(["zeros", "circular", "replicate"]))}
    assume(all(size > gap * (width - 1) for size, gap, width in zip(sizes, dilation, kernel, strict=True)))
    layer = getattr(nn, f"Conv{axes}d")(4, 4, kernel, bias=drawn.draw(st.booleans()), **options).double()
    model, x = chain(layer, nn.Tanh(), nn.Flatten()), torch.randn(3, 4, *sizes, dtype=torch.float64)
    assert close(sensitivity(model, x), loop(model, x, lambda logits, row: logits.square().sum(), torch.abs))


def test_an_input_that_is_overwritten_has_no_gradients():
    def overwritten(model, x):
        x = torch.tanh(x)
        y = model.layers[0](x)
        return y + x.mul_(2)[:, :3]

    with pytest.raises(ValueError, match="no gradients for one example alone"):
        sensitivity(Built(overwritten, nn.Linear(5, 3)), torch.ones(2, 5))


def test_a_network_that_is_another_at_every_call_goes_row_by_row(monkeypatch):
    calls, rows = [], []

    def count(model, x):
        calls.append(len(x))
        return model.layers[0](x if len(calls) == 1 else model.layers[0](x))

    monkeypatch.setattr(curvature, "_one_by_one", lambda *given: rows.append(1) or {})
    sensitivity(Built(count, nn.Linear(3, 3)), torch.ones(2, 3))
    assert rows == [1]


def test_sensitivity_is_the_mean_size_of_the_gradient_of_the_squared_output(case):
    model, x, _ = case
    assert close(sensitivity(model, x), loop(model, x, lambda logits, row: logits.square().sum(), torch.abs))


@pytest.mark.parametrize(
    "measure", [sensitivity, lambda *a, **k: fisher(*a, **k, generator=torch.Generator().manual_seed(1))]
)
def test_the_chunk_only_bounds_memory(measure, case):
    model, x, _ = case
    whole = measure(model, x)
    assert close(measure(model, x, chunk=4), whole) and close(measure(model, x, chunk=1), whole)


@pytest.mark.parametrize("measure", [fisher, sensitivity])
def test_the_model_is_left_as_it_was(measure):
    model, x, _ = pictures()
    model.train()
    model.norm1.eval()
    model.conv1.weight.requires_grad_(False)
    before = get_weights(model)
    with torch.no_grad():
        found = measure(model, x)
    assert equal(before, get_weights(model)) and model.training and not model.norm1.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert found.keys() == dict(model.named_parameters()).keys() - {"conv1.weight"}
    assert found.keys() <= before.keys() and not any(t.requires_grad for t in found.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_they_can_be_measured_where_gradients_are_off(mode):
    model, x, y = pictures()
    wanted = fisher(model, x, labels="true", y=y), sensitivity(model, x)
    with mode():
        inputs, labels = x.clone(), y.clone()
        assert equal(fisher(model, inputs, labels="true", y=labels), wanted[0])
        assert equal(sensitivity(model, inputs), wanted[1])


def test_tied_parameters_appear_once_with_both_their_uses():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model[1].weight = model[0].weight
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sensitivity(model, x)
    assert list(found) == ["0.weight", "0.bias", "1.bias"]
    assert close(found, loop(model, x, lambda logits, row: logits.square().sum(), torch.abs))


def test_trace_adds_everything_up():
    assert diagonal_trace({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}) == 6.0
    assert diagonal_trace({}) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "real"}, "labels: 'real' is unknown; choose one of sampled, true, exact"),
        ({"labels": "true"}, "pass y"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, "y: it has 3 rows and x has 9"),
        ({"chunk": 0}, "chunk: 0"),
        ({"x": torch.zeros(0, 6)}, "x: it has no rows"),
        ({"model": nn.Flatten()}, "no parameter that requires a gradient"),
    ],
)
def test_bad_arguments_are_named(change, message):
    model, x, _ = vectors()
    arguments = {"model": model, "x": x} | change
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        fisher(arguments.pop("model"), arguments.pop("x"), **arguments)


class TestGrams:
    def test_of_a_linear_layer_they_are_the_products_of_its_inputs(self):
        model, x, _ = vectors()
        found = grams(model, get_weights(model), x, chunk=4)
        weights = [name for name, p in model.named_parameters() if p.ndim == 2]
        assert list(found) == weights
        hidden = torch.relu(
            x.flatten(1) @ model.get_parameter(weights[0]).T + model.get_parameter(weights[0][:-6] + "bias")
        )
        assert torch.allclose(found[weights[0]], x.flatten(1).T @ x.flatten(1))
        assert torch.allclose(found[weights[1]], hidden.T @ hidden)

    @pytest.mark.parametrize(
        "options",
        [
            {"stride": 2, "padding": 1},
            {"padding": "same", "dilation": 2},
            {"padding": (0, 2), "padding_mode": "reflect"},
        ],
    )
    def test_of_a_convolution_they_give_the_squares_of_its_outputs(self, options):
        """With Y = X W^T over all places, Y^T Y = W X^T X W^T."""
        layer = nn.Conv2d(3, 4, (3, 2), bias=False, **options).double()
        x = torch.randn(5, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = grams(layer, get_weights(layer), x, chunk=2)["weight"]
        kernel, y = layer.weight.detach().flatten(1), layer(x).detach().transpose(0, 1).flatten(1)
        assert torch.allclose(kernel @ found @ kernel.T, y @ y.T)

    def test_they_are_those_of_the_given_weights_in_evaluation_mode(self):
        model, x, _ = pictures()
        before, moved = get_weights(model), {n: t * 1.5 for n, t in get_weights(model).items()}
        model.train()
        model.norm1.eval()
        found = grams(model, moved, x)
        assert equal(before, get_weights(model)) and model.training and not model.norm1.training
        other = toys.small_convnet(toys.images()).double()
        set_weights(other, moved)
        assert equal(grams(other.eval(), moved, x), found) and found["conv1.weight"].shape == (9, 9)
        assert not torch.allclose(grams(model, before, x)["conv2.weight"], found["conv2.weight"])
        assert torch.allclose(grams(model, before, x, chunk=2)["conv2.weight"], grams(model, before, x)["conv2.weight"])

    def test_shared_weights_add_up_and_grouped_convolutions_have_none(self):
        first, grouped = nn.Linear(3, 3, bias=False).double(), nn.Conv2d(2, 2, 1, groups=2).double()
        model = nn.Sequential(first, nn.Linear(3, 3, bias=False).double())
        model[1].weight = first.weight
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        h = x @ first.weight.detach().T
        assert torch.allclose(grams(model, get_weights(model), x)["0.weight"], x.T @ x + h.T @ h)
        assert grams(grouped, get_weights(grouped), torch.ones(1, 2, 3, 3, dtype=torch.float64)) == {}

    def test_bad_arguments_are_named(self):
        model, x, _ = vectors()
        with pytest.raises(ValueError, match="x: it has no rows"):
            grams(model, get_weights(model), x[:0])
        with pytest.raises(ValueError, match="chunk: 0"):
            grams(model, get_weights(model), x, chunk=0)
        with pytest.raises(ValueError, match="different names"):
            grams(model, {}, x)
