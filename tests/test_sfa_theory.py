"""SFA's closed forms: by simulation, by the real loop with the real rules, and the curvature that they depend on."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toys
from clkit import models
from clkit.consolidation import SFA
from clkit.data import Examples, Stream
from clkit.learners import L2, DecoupledL2, Learner
from clkit.training import Training
from clkit.weights import equal, get_weights, norm, set_weights, sub
from studies.sfa.theory import (
    effective_strength,
    kept_l2,
    kept_sfa,
    matched_l2,
    matched_sfa,
    measured_sfa,
    top_curvature,
)
from toys import quick

LAWS = settings(max_examples=60, deadline=None)
BETAS, RATES = st.floats(0.05, 1.0), st.floats(0.001, 0.5)
CURVATURES = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=8)


class TestClosedForms:
    @LAWS
    @given(lr=RATES, beta=st.floats(0.0, 0.95))
    def test_the_map_and_its_inverse(self, lr, beta):
        eta, strength = matched_l2(lr, beta)
        assert matched_sfa(eta, strength) == pytest.approx((lr, beta))
        assert eta <= lr and eta * strength == pytest.approx(beta) and strength == effective_strength(beta, lr, 1)

    @LAWS
    @given(h=CURVATURES, beta=BETAS, lr=RATES, k=st.integers(1, 100))
    def test_what_is_kept_lies_between_beta_and_1_and_falls_with_the_curvature(self, h, beta, lr, k):
        s = kept_sfa(sorted(h), beta, lr, k)
        assert (s >= beta - 1e-12).all() and (s <= 1 + 1e-12).all() and (np.diff(s) <= 1e-12).all()
        assert kept_sfa(0.0, beta, lr, k) == pytest.approx(1, abs=1e-12)

    @LAWS
    @given(h=CURVATURES, beta=BETAS, lr=RATES, k=st.integers(1, 100))
    def test_simulated_training_settles_there(self, h, beta, lr, k):
        assert np.abs(measured_sfa(h, beta, lr, k) - kept_sfa(h, beta, lr, k)).max() < 1e-10

    @LAWS
    @given(h=CURVATURES, beta=st.floats(0.05, 0.95), lr=RATES)
    def test_a_merge_after_every_step_is_l2(self, h, beta, lr):
        _, strength = matched_l2(lr, beta)
        assert np.abs(kept_sfa(h, beta, lr, 1) - kept_l2(h, strength)).max() < 1e-12

    @pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
    def test_the_limit_of_small_rates_is_l2(self, beta):
        """The gap shrinks with lr, at a strength and a k that stay; at k = 1 there is none."""
        h, k = np.array([0.1, 1.0, 10.0]), 20
        gaps = []
        for lr in (1e-3, 1e-4, 1e-5):
            matched = beta / (1 - beta) / (k * lr)
            scaled = h * matched  # where what is kept is not 1
            gaps.append(np.abs(kept_sfa(h, beta, lr, k) - kept_l2(h, matched)).max())
            assert ((kept_l2(scaled, matched) > 0.05) & (kept_l2(scaled, matched) < 0.95)).all()
        assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] and gaps[2] < 1e-4

    def test_in_sharp_directions_sfa_keeps_beta_and_l2_nothing(self):
        h = [0.1, 1.0, 10.0]
        assert kept_sfa(h, 0.5, 0.01, 100) == pytest.approx([0.913, 0.612, 0.500], abs=5e-4)
        assert kept_l2(h, effective_strength(0.5, 0.01, 100)) == pytest.approx([0.909, 0.500, 0.091], abs=5e-4)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: matched_l2(0.1, 1), r"beta: 1; give a number in \[0, 1\), since 1 undoes every step"),
            (lambda: matched_l2(0, 0.5), "lr: 0"),
            (lambda: matched_l2(0.1, -0.5), "beta: -0.5"),
            (lambda: matched_sfa(0.5, 2), "strength=2: .* lr strength below 1"),
            (lambda: effective_strength(1, 0.1, 2), "beta: 1; give .* undoes"),
            (lambda: effective_strength(0.5, 0.1, 0), "k: 0"),
            (lambda: kept_sfa(1.0, 0.5, 0.1, 0), "k: 0"),
            (lambda: kept_sfa([0.0, 1.0], 0.0, 0.1, 1), "does not settle"),
            (lambda: kept_sfa(40.0, 0.5, 0.1, 10), "does not settle"),
            (lambda: measured_sfa(40.0, 0.5, 0.1, 10), "does not settle"),
        ],
    )
    def test_bad_arguments_are_named(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


class OnlyLater:
    """Trains from the second task on: a first task whose gradient is zero leaves the same anchor for all rules."""

    def loss(self, model, batch):
        loss = super().loss(model, batch)  # type: ignore[misc]
        return loss if batch.task.index else 0 * loss


class FineTuning(OnlyLater, Learner):
    """Fine-tuning that trains from the second task on."""


@dataclass
class Coupled(OnlyLater, L2):
    """L2 that trains from the second task on."""


@dataclass
class Decoupled(OnlyLater, DecoupledL2):
    """Decoupled L2 that trains from the second task on."""


STEPS = 400


def precise(dtype=torch.float64) -> Stream:
    """A short task and one of five batches an epoch, in a precision."""
    stream = toys.stream(tasks=2, rows=40)

    def cast(part: Examples) -> Examples:
        return Examples(part.x.to(dtype), part.y)

    tasks = [replace(t, train=cast(t.train), test=cast(t.test)) for t in stream]
    tasks[0] = replace(tasks[0], train=tasks[0].train[:8])
    return replace(stream, tasks=tuple(tasks))


def trained(learner, consolidation, lr, dtype=torch.float64, **options):
    """The weights after a task of `STEPS` steps."""
    stream = precise(dtype)
    training = Training(epochs=STEPS // 5, batch=8, lr=lr, **options)
    model = models.mlp(stream, hidden=(12,), seed=0).to(dtype)
    result = quick(stream, learner, consolidation, model=model, training=training)
    assert len(result.training_loss[1]) == STEPS and equal(result.weights[0], get_weights(model))
    assert norm(sub(result.weights[1], result.weights[0])) > 0.1 and result.training_loss[1].std() > 0
    return result.weights[1]


def gap(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


LR, BETA = 0.1, 0.002
EVERY = SFA(p=1 / STEPS, beta=BETA)


@pytest.fixture(scope="module")
def averaged():
    return trained(FineTuning(), EVERY, LR)


class TestAgainstL2:
    """SFA with a merge after every step, through the loop, on the same batches."""

    @pytest.mark.parametrize("rule", [Coupled, Decoupled])
    def test_with_gradient_descent_it_is_l2(self, averaged, rule):
        eta, strength = matched_l2(LR, BETA)
        assert gap(averaged, trained(rule(strength), None, eta)) <= 1e-10

    def test_in_single_precision(self):
        eta, strength = matched_l2(LR, BETA)
        a = trained(FineTuning(), EVERY, LR, torch.float32)
        b = trained(Coupled(strength), None, eta, torch.float32)
        assert norm(sub(a, b)) <= 1e-4 * norm(a)

    def test_with_the_same_rate_for_both_it_is_not(self, averaged):
        assert gap(averaged, trained(Coupled(BETA / LR), None, LR)) > 1e-5

    @pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": "adamw"}])
    def test_with_momentum_and_adam_it_is_the_decoupled_l2_alone(self, options):
        eta, strength = matched_l2(LR / 10, BETA)
        a = trained(FineTuning(), EVERY, LR / 10, **options)
        assert gap(a, trained(Decoupled(strength), None, eta, **options)) <= 1e-10
        assert gap(a, trained(Coupled(strength), None, eta, **options)) > 1e-5

    def test_where_the_rate_falls_it_is_not(self):
        """The pull of L2 falls with the rate, beta does not."""
        eta, strength = matched_l2(LR, BETA)
        a = trained(FineTuning(), EVERY, LR, schedule="cosine")
        assert gap(a, trained(Decoupled(strength), None, eta, schedule="cosine")) > 1e-5


class Valley(nn.Module):
    """Numbers to train, whose logits are no matter."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(count, dtype=torch.float64))

    def forward(self, x):
        return self.theta[:4].expand(len(x), -1)


class Descent(Learner):
    """Minimises a quadratic with its optimum at 0 in every direction, from the second task on."""

    h = torch.tensor([0.0, 0.1, 1.0, 5.0, 20.0, 90.0], dtype=torch.float64)

    def loss(self, model, batch):
        return (self.h * model.theta.square()).sum() / 2 * (batch.task.index > 0)


@pytest.mark.parametrize("k", [1, 5, 20, 100])
@pytest.mark.parametrize(("beta", "merges"), [(0.5, 36), (0.8, 16)])
def test_the_loop_settles_on_a_quadratic_where_the_closed_form_says(k, beta, merges):
    """Every merge leaves 1 - beta of the distance or less."""
    stream = precise()
    stream = replace(stream, tasks=tuple(replace(t, train=t.train[:8]) for t in stream))
    training = Training(epochs=merges * k, batch=8, lr=0.01)
    result = quick(stream, Descent(), SFA(p=1 / merges, beta=beta), model=Valley(6), training=training)
    assert len(result.reports[1]["steps"]) == merges
    kept = result.weights[1]["theta"].numpy()
    assert np.abs(kept - kept_sfa(Descent.h, beta, 0.01, k)).max() < 1e-10
    assert (kept >= beta - 1e-12).all() and (kept <= 1).all()


class TestCurvature:
    @pytest.fixture
    def examples(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
        return Examples(x, torch.randint(0, 4, (30,), generator=generator))

    @pytest.fixture
    def net(self):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    @staticmethod
    def dense(net, examples):
        """All eigenvalues, from the whole Hessian."""
        names = [name for name, _ in net.named_parameters()]
        shapes = [p.shape for p in net.parameters()]
        flat = torch.cat([p.detach().flatten() for p in net.parameters()])

        def loss(flat):
            parts = flat.split([s.numel() for s in shapes])
            weights = {n: t.view(s) for n, t, s in zip(names, parts, shapes, strict=True)}
            logits = torch.func.functional_call(net, weights, (examples.x,))
            return nn.functional.cross_entropy(logits, examples.y)

        return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))

    def test_it_is_the_largest_of_the_dense_hessian(self, net, examples):
        exact = self.dense(net, examples)[-1].item()
        found = top_curvature(net, get_weights(net), examples, iterations=2000, tolerance=1e-10)
        assert found == pytest.approx(exact, rel=1e-5)
        assert top_curvature(net, get_weights(net), examples) == pytest.approx(exact, rel=0.05)

    def test_it_is_the_largest_where_a_negative_one_is_of_larger_size(self, examples):
        """Logits that fall with the squares of both parameters, for the label of the other class."""

        class Product(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = (nn.Parameter(torch.full((), v, dtype=torch.float64)) for v in (0.2, 0.1))

            def forward(self, x):
                odds = -(self.a**2) - 3 * self.b**2
                return torch.stack([odds, -odds], -1).expand(len(x), 2)

        net, labels = Product(), Examples(examples.x, torch.ones(30, dtype=torch.int64))
        exact = self.dense(net, labels)
        assert -exact[0] > 1.5 * exact[-1].abs()
        found = top_curvature(net, get_weights(net), labels, iterations=2000, tolerance=1e-12)
        assert found == pytest.approx(exact[-1].item(), rel=1e-4)

    def test_the_weights_are_those_given_and_the_model_is_left_alone(self, net, examples):
        own = get_weights(net)
        double = {name: 2 * t for name, t in own.items()}
        found = top_curvature(net, double, examples)
        assert equal(get_weights(net), own) and net.training and all(p.grad is None for p in net.parameters())
        set_weights(net, double)
        assert found == top_curvature(net, double, examples) != top_curvature(net, own, examples)

    def test_portions_add_up(self, net, examples, monkeypatch):
        whole = top_curvature(net, get_weights(net), examples)
        monkeypatch.setattr("studies.sfa.theory.EVALUATION_BATCH", 7)
        assert top_curvature(net, get_weights(net), examples) == pytest.approx(whole, rel=1e-9)

    def test_targets_without_a_loss_count_for_nothing(self):
        stream = toys.tokens()
        net, task = toys.small_reader(stream), toys.tokens()[0]
        found = top_curvature(net, get_weights(net), task.train, tolerance=1e-8, iterations=500)
        x, y = task.train.x[:, :-1].reshape(-1, 1), task.train.y[:, :-1].reshape(-1, 1)
        alone = top_curvature(net, get_weights(net), Examples(x, y), tolerance=1e-8, iterations=500)
        assert found == pytest.approx(alone, rel=1e-3)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"iterations": 0}, "iterations: 0; give"),
            ({"tolerance": 0.0}, "tolerance: 0.0; give"),
            ({"rows": 0}, "there are none"),
        ],
    )
    def test_bad_arguments_are_named(self, net, examples, more, message):
        rows = more.pop("rows", 30)
        with pytest.raises(ValueError, match=message):
            top_curvature(net, get_weights(net), examples[:rows], **more)
