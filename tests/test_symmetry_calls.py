"""Symmetries of models as they are called: what examples and outputs may hold, and what is told when a trace fails."""

import copy
import dataclasses
import gc
import logging
import threading
import warnings
import weakref
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clkit import alignment
from clkit.weights import get_weights

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
ONE, SCALE = X[:1], torch.tensor([0.7])


class Net(nn.Module):
    """A hidden layer of eight units and an output layer; `call(net, *arguments)` is its forward."""

    def __init__(self, call: Callable[..., Any], hidden: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.h, self.call = hidden or nn.Linear(6, 8), nn.Linear(8, 3), call

    def out(self, x: Tensor) -> Tensor:
        return self.h(self.a(x).relu())

    def forward(self, *args, **kwargs):
        return self.call(self, *args, **kwargs)


def optional(net: Net, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return net.out(x) if mask is None else net.out(x) * mask


def scaled(net: Net, x: Tensor, scale: Any) -> Tensor:
    return net.h(net.a(x).relu() * scale)


def pooled(net: Net, x: Tensor) -> Tensor:
    return net.h(net.a(x).relu().mean((-1, -2)))


EXAMPLES = {  # a forward, an example
    "None": (optional, (X, None)),
    "None in front": (lambda net, mask, x: net.out(x), (None, X)),
    "a mask": (optional, (X, torch.ones(4, 1))),
    "an integer": (scaled, (X, 2)),
    "a number": (scaled, (X, 0.5)),
    "a boolean": (lambda net, x, on: net.out(x) if on else x, (X, True)),
    "a string that an operation has too": (lambda net, x, name: net.h(getattr(net.a(x), name)()), (X, "relu")),
    "a dict": (lambda net, x, more: scaled(net, x, more["scale"]), (X, {"scale": 0.5, "mask": None})),
    "nested": (lambda net, x, more: net.out(x) + net.out(more[0][0]) * more[1], (X, [(X + 1, None), 3])),
    "a list": (lambda net, xs: net.out(xs[0]) + net.out(xs[1]), [X, X + 1]),
    "by name": (optional, {"x": X}),
    "by name, None": (optional, {"mask": None, "x": X}),
    "a mapping, as tokenizers give": (optional, UserDict(x=X)),
    "any arguments by name": (lambda net, **kw: net.out(kw["x"]) * kw["scale"], {"x": X, "scale": 2}),
    "any arguments": (lambda net, *xs: net.out(xs[0]) + net.out(xs[1]), (X, X + 1)),
    "a tensor without dimensions": (scaled, (X, torch.tensor(0.5))),
    "a batch of one": (lambda net, x: net.out(x), ONE),
    "one row, not a batch": (lambda net, x: net.out(x).sum(0), ONE),
    "a vector": (lambda net, x: net.out(x), X[0]),
    "a view of one row": (lambda net, x: net.out(x.view(6)), ONE),
    "a scale of length one": (scaled, (X, SCALE)),
    "a scale of length one in a batch of one": (scaled, (ONE, SCALE)),
    "first dimensions differ": (lambda net, x, y: net.out(x) + net.out(y).mean(0), (X, X[:3])),
    "the second has a batch of one": (lambda net, x, y: net.out(x) + net.out(y), (X, ONE)),
    "the first has a batch of one": (lambda net, x, y: net.out(x) + net.out(y), (ONE, X)),
    "empty slices": (lambda net, x: net.h(torch.cat([net.a(x)[:, :0], net.a(x).relu()], 1)), X),
    "an empty batch beside": (lambda net, x: torch.cat([net.out(x[:0]), net.out(x)]), X),
    "an empty sum": (lambda net, x: net.out(x) + (net.a(x)[:, 8:] * net.a(x)[:, :0]).sum(), X),
    "complex": (lambda net, x: net.out((x * x).imag), torch.complex(X, X + 1)),
}
IMAGES = {"an image without a batch": (1, 12, 12), "an image": (1, 1, 12, 12), "images": (2, 1, 12, 12)}


def changes(net: nn.Module, symmetry: alignment.Symmetry) -> list[float]:
    generators = (torch.Generator().manual_seed(k) for k in range(3))
    return [symmetry.verify(net, dtype=torch.float64, generator=g).change for g in generators]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    call, example = EXAMPLES[name]
    net = Net(call)
    symmetry = alignment.symmetry(net, example)
    assert symmetry.share == 1
    assert max(changes(net, symmetry)) < 1e-14
    assert symmetry.verify(net, example).holds


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    net = Net(pooled, nn.Conv2d(1, 8, 3))
    symmetry = alignment.symmetry(net, torch.randn(IMAGES[name]))
    assert symmetry.share == 1
    assert max(changes(net, symmetry)) < 1e-14


MASK = torch.tensor([True, False, True, True, False, True, True, False])
PICKS = {  # of eight hidden units; how many they are then
    "a mask": (lambda net, y: y[:, net.mask], 5),
    "a mask's negation": (lambda net, y: y[:, ~net.mask], 3),
    "where a mask is": (lambda net, y: y[:, net.mask.nonzero()[:, 0]], 5),
    "a mask of the forward's own": (lambda net, y: y[:, [True, False] * 4], 4),
    "a mask of numbers": (lambda net, y: y[:, torch.arange(8) < 6], 6),
    "a mask twice": (lambda net, y: y[:, net.mask][:, torch.arange(5) > 1], 3),
    "a mask, and no size known": (lambda net, y: y[:, net.mask].mean(1, keepdim=True), 1),
    "a mask on the weights": (lambda net, y: y[:, net.mask] @ net.a.weight[net.mask] @ net.a.weight.T, 8),
}
MASKED = {
    "a product": lambda net, y: y * net.mask,
    "filled": lambda net, y: y.masked_fill(net.mask, 0.5),
    "one or the other": lambda net, y: torch.where(net.mask, y, 0.1 * y),
    "selected": lambda net, y: y.masked_select(net.mask).view(len(y), 5).repeat(1, 2)[:, :8],
    "random": lambda net, y: y + torch.rand(8) * 0,
}


def masked(f: Callable[[Net, Tensor], Tensor], width: int) -> Net:
    net = Net(lambda net, x: net.h(f(net, net.a(x).relu())))
    net.h = nn.Linear(width, 3)
    net.register_buffer("mask", MASK)
    return net


@pytest.mark.parametrize("name", PICKS)
def test_masks_of_the_model_that_pick_units(name):
    net = masked(*PICKS[name])
    symmetry = alignment.symmetry(net, X if "twice" in name else ONE)
    assert symmetry.share == 1
    assert symmetry.program.batch is None
    assert max(changes(net, symmetry)) < 1e-14
    weights = get_weights(net)
    x = torch.randn(40, 6)
    moved = alignment.permute(symmetry, p := alignment.random_permutations(symmetry), weights)
    found = alignment.align(symmetry, net, weights, moved, x).permutations
    assert all(torch.equal(alignment.compose(p, found)[g], i) for g, i in alignment.identity(symmetry).items())


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_the_model_elsewhere(name):
    net = masked(MASKED[name], 8)
    assert max(changes(net, alignment.symmetry(net, X))) < 1e-14


def test_a_mask_that_depends_on_the_input_in_training_only():
    def call(net: Net, x: Tensor) -> Tensor:
        return net.out(x) + (net.get_submodule("more")(x)[x[:, 0] > 0].cumsum(0).mean() if net.training else 0)

    net = Net(call)
    net.more = nn.Linear(6, 8)
    symmetry = alignment.symmetry(net, X)
    assert list(symmetry.groups) == ["a"] and max(changes(net, symmetry)) < 1e-14
    assert symmetry.frozen["not used"] == 8 + 6 + 8


def test_a_mask_that_depends_on_the_input():
    net = Net(lambda net, x: net.out(x) + net.a(x)[x[:, 0] > 0].mean())
    with pytest.raises(ValueError, match="depends on the values of the input"):
        alignment.symmetry(net, X)


OUTPUTS = {  # of the output layer's result: an output, whether a wrong permutation changes it
    "booleans": (lambda y: y > 0, True),
    "integers": (lambda y: (y * 10).long(), True),
    "None beside": (lambda y: (y, None), True),
    "None": (lambda y: None, False),
    "empty beside": (lambda y: (y[:, :0], y), True),
    "empty": (lambda y: y[:0], False),
    "nested": (lambda y: {"a": [y, (y.sum(), None)], "n": 3, "s": "s"}, True),
    "without dimensions": (lambda y: y.sum(), True),
    "zeros": (lambda y: y * 0, False),
    "constants": (lambda y: torch.ones(3), False),
    "with infinities": (lambda y: torch.cat([y, torch.full_like(y, -torch.inf)], 1), True),
    "complex": (lambda y: torch.complex(y, -y), True),
    "small": (lambda y: y * 1e-12, True),
    "halves": (lambda y: y.bfloat16(), True),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name):
    output, told = OUTPUTS[name]
    net = Net(lambda net, x: output(net.out(x)))
    symmetry = alignment.symmetry(net, X)
    assert max(changes(net, symmetry)) < 1e-10
    first, second = symmetry.axes["h.weight"]
    still = dataclasses.replace(second, group=np.full_like(second.group, -1))
    wrong = dataclasses.replace(symmetry, axes=symmetry.axes | {"h.weight": (first, still)})
    proofs = [wrong.verify(net, dtype=torch.float64), wrong.verify(net)]
    assert [p.change > 0.05 for p in proofs] == [not p.holds for p in proofs] == [told] * 2


def test_a_change_is_relative_and_absolute_where_all_was_zero():
    def net(first: float, then: float) -> float:
        outputs = iter((first, then))
        return nothing.verify(Net(lambda net, x: torch.tensor([next(outputs), 0.0])), X).change

    nothing = alignment.symmetry(Net(lambda net, x: x), X)
    assert net(2.0, 3.0) == 0.5
    assert net(0.0, 0.25) == 0.25
    assert net(torch.inf, torch.inf) == 0
    assert net(1.0, torch.nan) == net(1.0, torch.inf) == net(torch.inf, 1.0) == torch.inf
    with pytest.raises(FloatingPointError, match=r"example: the model's output holds a NaN.*other inputs"):
        net(torch.nan, torch.nan)


class Stateful(Net):
    """It writes into its argument and its buffers."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__(lambda net, x: net.out(x))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        self.calls.add_(1)
        self.mean.mul_(0.5).add_(self.a(x).mean(0))
        return self.out(x) * self.calls + self.h(self.mean)


def test_arguments_and_buffers_are_left_alone():
    net, x = Stateful(), X.clone()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    symmetry = alignment.symmetry(net, x)
    assert symmetry.share == 1
    assert symmetry.verify(net).change < 1e-5 and max(changes(net, symmetry)) < 1e-14
    assert torch.equal(x, X) and all(torch.equal(before[name], t) for name, t in net.state_dict().items())


@pytest.mark.parametrize("wrapped", [nn.DataParallel, torch.compile])
def test_wrapped_models(wrapped):
    net = wrapped(Net(lambda net, x: net.out(x)))
    assert max(changes(net, alignment.symmetry(net, X))) < 1e-14


def test_parameters_without_elements():
    net = Net(lambda net, x: net.out(x) + net.nothing.sum())
    net.nothing = nn.Parameter(torch.empty(0, 4))
    symmetry = alignment.symmetry(net, X)
    assert symmetry.share == 1
    assert max(changes(net, symmetry)) < 1e-14


def test_tensors_made_for_inference():
    net = Net(lambda net, x: net.out(x))
    with torch.inference_mode():
        x = X * 2
    assert max(changes(net, alignment.symmetry(net, x))) < 1e-14
    with torch.inference_mode():
        assert alignment.symmetry(net, X).verify(net).holds


@pytest.mark.parametrize("net", [nn.Flatten(), nn.ReLU(), nn.Sequential()], ids=repr)
@pytest.mark.parametrize("rows", [1, 4])
def test_models_without_parameters(net, rows):
    symmetry = alignment.symmetry(net, X[:rows])
    assert (symmetry.share, symmetry.groups) == (0, {})
    assert "0 groups" in repr(symmetry) and not symmetry.table()
    assert symmetry.verify(net, dtype=torch.float64).change == 0


def test_tokens_stay_integers_in_double_precision():
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    symmetry = alignment.symmetry(net, torch.arange(8).view(2, 4))
    assert symmetry.share == 1
    assert max(changes(net, symmetry)) < 1e-14


class TestMatching:
    @pytest.mark.parametrize("example", [(X, None), {"x": X}, {"x": ONE, "mask": None}], ids=["None", "name", "one"])
    @pytest.mark.parametrize("bound", [False, True])
    def test_models_of_one_tensor_and_other_arguments(self, example, bound):
        def call(net: Net, x: Tensor, mask: Tensor | None) -> Tensor:
            return net.out(x) + (x.new_ones(int(x.shape[0]), 1) if bound else 1)

        net = Net(call if isinstance(example, tuple) else lambda net, x, mask=None: call(net, x, mask))
        symmetry, weights = alignment.symmetry(net, example), get_weights(net)
        moved = alignment.permute(symmetry, p := alignment.random_permutations(symmetry), weights)
        found = alignment.align(symmetry, net, weights, moved, X.repeat(9, 1) + torch.randn(36, 6), batch=12)
        assert torch.equal(found.permutations["a"], alignment.invert(p)["a"])

    def test_inputs_of_other_dimensions_than_the_example(self):
        net, weights = (net := Net(pooled, nn.Conv2d(1, 8, 3))), get_weights(net)
        symmetry = alignment.symmetry(net, torch.randn(1, 12, 12))
        with pytest.raises(ValueError, match=r"inputs: \(5, 1, 12, 12\).*\(1, 12, 12\).*from a batch"):
            alignment.align(symmetry, net, weights, weights, torch.randn(5, 1, 12, 12))


def branching(net: Net, x: Tensor) -> Tensor:
    warnings.warn("a warning of the model's own", stacklevel=1)
    logging.getLogger("models").error("an error of the model's own")
    return net.out(x) if x.sum() > 0 else x


def sizes(net: Net, x: Tensor) -> Tensor:
    if isinstance(x.shape[0], torch.SymInt):
        raise TypeError("rows are counted\nin integers")
    return branching(net, x)


class TestFailures:
    def test_both_errors_are_named_in_a_line_each_where_they_differ(self):
        with pytest.raises(ValueError) as caught:
            alignment.symmetry(nn.Sequential(Net(sizes)), X)
        lines = str(caught.value).splitlines()
        assert len(lines) == 2
        assert "cannot follow 0 (Net.forward, line" in lines[0] and "rows are counted;" in lines[0]
        assert "the example's sizes" in lines[1] and "data-dependent" in lines[1]

    @pytest.mark.parametrize("example", [X, ONE])
    def test_an_error_of_both_is_named_once(self, example):
        with pytest.raises(ValueError, match=r"^model: [^\n]*data-dependent[^\n]*branches[^\n]*$"):
            alignment.symmetry(Net(branching), example)

    def test_outputs_of_an_unknown_kind(self):
        class Cache:
            pass

        with pytest.raises(ValueError, match=r"Cache'> in output.*tensors alone \(use_cache=False\)"):
            alignment.symmetry(Net(lambda net, x: (net.out(x), Cache())), X)

    def test_examples_that_the_model_does_not_take(self):
        for example in ((X, X, X), {"y": X}, [X], None, "x"):
            with pytest.raises(ValueError, match=r"model: torch.export cannot follow"):
                alignment.symmetry(Net(optional), example)

    @pytest.mark.parametrize("net", [Net(branching), Net(sizes), Net(lambda net, x: net.out(x) + len(x))])
    def test_nothing_is_spilled_and_logging_is_as_it_was(self, net, capfd, caplog):
        logging.disable(logging.WARNING)
        try:
            for example in (X, ONE):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    try:
                        alignment.symmetry(net, example)
                    except ValueError:
                        pass
                assert not caught
            assert logging.root.manager.disable == logging.WARNING
        finally:
            logging.disable(logging.NOTSET)
        assert capfd.readouterr() == ("", "")
        assert not vars(X) and not vars(ONE)
        assert {record.name for record in caplog.records} <= {"torch.__trace"}  # which pytest alone hears
        assert net.training


RAMP = torch.ones(8)  # what the net below reads from its module


class Told(Net):
    """Its eight units stay where they are as soon as one of many things in it tells them apart."""

    def __init__(self) -> None:
        super().__init__(lambda net, x: net.out(x))
        self.more, self.flag, self.plain = nn.Identity(), False, torch.ones(8)

    def out(self, x: Tensor) -> Tensor:
        y = self.more(self.a(x).relu()) * self.plain * RAMP
        return self.h(y * torch.arange(8.0) if self.flag else y)


class Ramp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(8.0)


def scaled_rows(self: nn.Linear, x: Tensor) -> Tensor:
    return x @ self.weight.T * torch.arange(len(self.weight)) + self.bias


TOLD = {
    "an attribute": lambda net, _: setattr(net, "flag", True),
    "a submodule": lambda net, _: setattr(net, "more", Ramp()),
    "a tensor's values": lambda net, _: net.plain.mul_(torch.arange(8.0)),
    "a tensor in place of another": lambda net, _: setattr(net, "plain", torch.arange(8.0)),
    "a method": lambda net, _: setattr(net, "out", lambda x: net.h(net.a(x) * torch.arange(8.0))),
    "what it calls": lambda net, _: setattr(net, "call", lambda net, x: net.h(net.a(x).sort().values)),
    "the forward of a part": lambda net, _: setattr(net.more, "forward", lambda x: x * torch.arange(8.0)),
    "the forward of an installed class": lambda _, patch: patch.setattr(nn.Linear, "forward", scaled_rows),
    "a method of the class": lambda _, patch: patch.setattr(Told, "out", lambda net, x: net.h(net.a(x).cumsum(1))),
    "a global": lambda _, patch: patch.setitem(globals(), "RAMP", torch.arange(8.0)),
    "a hook": lambda net, _: net.a.register_forward_hook(lambda *args: args[-1] * torch.arange(8.0)),
    "shared memory": lambda net, _: net.a.register_parameter("bias", nn.Parameter(net.h.weight.data[0])),
}


class TestTheSecondCall:
    def test_it_gets_the_answer_of_the_first(self):
        net, x = Told(), X.clone()
        first = alignment.symmetry(net, x)
        assert alignment.symmetry(net, X) is first and list(first.groups) == ["a"]
        assert alignment.symmetry(copy.deepcopy(net), X) is not first
        assert alignment.symmetry(net, X[:3]) is not first

    @pytest.mark.parametrize("name", TOLD)
    def test_a_change_is_seen(self, name, monkeypatch):
        net = Told()
        assert alignment.symmetry(net, X).groups
        TOLD[name](net, monkeypatch)
        symmetry = alignment.symmetry(net, X)
        assert not symmetry.groups and symmetry.verify(net).holds

    def test_what_has_no_description_is_derived_again(self):
        net = Told()
        vars(net)["lock"] = threading.Lock()
        assert alignment.symmetry(net, X) is not alignment.symmetry(net, X)

    def test_nothing_is_kept_of_a_model_that_is_gone(self):
        net = Told()
        kept = weakref.ref(alignment.symmetry(net, X))
        del net
        gc.collect()
        assert kept() is None
