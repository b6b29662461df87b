"""Logits that are not finite become no number, wherever logits become one."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import toys
from clkit import evaluation, landscape, models
from clkit.consolidation import Merged
from clkit.evaluation import evaluate, score
from clkit.language import continued
from clkit.weights import get_weights


class Spoilt(nn.Module):
    """Gives `value` as one logit for the inputs of one task."""

    def __init__(self, inner, value, task):
        super().__init__()
        self.inner, self.value, self.task = inner, value, task

    def forward(self, x):
        logits = self.inner(x)
        return logits.index_fill(-1, torch.tensor([2]), self.value) if (x == self.task).all() else logits


@pytest.fixture(scope="module")
def stream():
    """Inputs of a task are its index throughout."""
    made = toys.stream()
    for task in made:
        task.test.x.fill_(task.index)
    return made


def spoilt(stream, value, task=1):
    return Spoilt(models.mlp(stream, hidden=(4,)), value, task)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_task_is_named_whose_logits_are_not_finite(stream, value):
    net = spoilt(stream, value)
    with pytest.raises(FloatingPointError, match=r"test data of task 1 \('task 1'\): logits are NaN or infinite"):
        evaluate(net, stream)
    with pytest.raises(FloatingPointError, match="examples to judge by: logits are"):
        score(net, stream[1].test, get_weights(net))
    with pytest.raises(FloatingPointError, match="task 1"):
        landscape.curve(net, (get_weights(net), get_weights(net)), stream, 2)
    assert score(net, stream[0].test, get_weights(net)).loss > 0


def test_a_class_that_is_masked_by_a_finite_number_is_masked(stream):
    found = evaluate(spoilt(stream, -1e9), stream)
    assert found.accuracy[1] <= 0.5 and 1e8 < found.loss[1] < 1e10
    assert evaluate(spoilt(stream, 1e30), stream).loss[1] > 1e29


def test_tokens_that_follow_logits_that_are_not_finite_are_refused():
    net = Spoilt(toys.small_reader(toys.tokens()), math.nan, 5)
    assert continued(net, torch.full((2, 3), 4), 1, context=3).shape == (2, 1)
    with pytest.raises(FloatingPointError, match="continuation"):
        continued(net, torch.full((2, 3), 5), 1, context=3)


class Waits(TorchDispatchMode):
    """Counts how often a number is taken from the device."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_before_the_end(stream):
    with Waits() as waits:
        evaluate(models.mlp(stream, hidden=(4,)), stream, batch=3)
    assert waits.number == 0  # all results come over together


def test_what_a_rule_keeps_comes_again_with_the_same_rows(stream, monkeypatch):
    """A dict for each batch, in every test, of a rule that takes it, and of no other."""
    net, asked, kept = models.mlp(stream, hidden=(4,)), [], {}

    def predict(model, x, task, kept=None):
        asked.append((x, kept))
        if kept is not None:
            kept.setdefault("rows", x)
        return model(x)

    first = evaluate(net, stream, predict=predict, batch=4, kept=kept)
    number = len(asked)
    again = evaluate(net, stream, predict=predict, batch=4, kept=kept)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert number == 9 == len(kept) == len({id(own) for _, own in asked})
    for (x, own), (other, same) in zip(asked[:number], asked[number:], strict=True):
        assert own is same and torch.equal(own["rows"], x) and torch.equal(x, other)
    asked.clear()
    evaluate(net, stream, predict=predict)
    monkeypatch.setattr(evaluation, "KEPT", 3 * 10 * 6 - 1)
    evaluate(net, stream, predict=predict, kept=kept)
    assert [own for _, own in asked] == [None] * 6
    evaluate(net, stream, predict=lambda model, x, task: model(x), kept=kept)


@dataclass(frozen=True)
class Backwards:
    """Deploys weights with variances below zero."""

    def due(self, progress):
        return progress.end and progress.task == 1

    def __call__(self, context):
        bad = {n: -t if n.endswith("running_var") else t for n, t in context.current.items()}
        return Merged(context.current, bad)


def test_a_run_names_task_learner_and_consolidation():
    with pytest.raises(FloatingPointError, match=r"^Learner\(\) with Backwards\(\), the test data of task 0 .* NaN"):
        toys.quick(toys.images(), None, Backwards(), model=toys.small_convnet)
