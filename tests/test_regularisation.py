"""Rules that add a term to the loss: penalties on the way from an anchor, a teacher's answers, and sums of rules."""

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch

import toys
from clkit import curvature, models
from clkit.consolidation import Merged, NoConsolidation
from clkit.evaluation import outputs
from clkit.learners import AGEM, ER, EWC, L2, LEARNERS, MAS, SI, DecoupledL2, Learner, LwF, OnlineEWC, Sum
from clkit.learners.anchored import Anchored, parameter_values
from clkit.training import Training
from clkit.weights import equal, get_weights, lerp, norm, set_weights, sub
from toys import quick

RULES = {
    "L2": L2(0.5),
    "EWC": EWC(5.0),
    "EWC exact on some": EWC(5.0, labels="exact", samples=7),
    "online EWC": OnlineEWC(5.0, gamma=0.9),
    "SI": SI(0.5),
    "MAS": MAS(0.05),
    "LwF": LwF(),
}
ANCHORED = {name: rule for name, rule in RULES.items() if name != "LwF"} | {"decoupled L2": DecoupledL2(0.5)}


def ones(model):
    return {name: torch.ones_like(t) for name, t in parameter_values(model).items()}


@dataclass
class PlainEWC(EWC):
    """EWC to which all parameters matter alike."""

    def task_importance(self, model, task):
        return ones(model)


@dataclass
class PlainOnlineEWC(OnlineEWC):
    """Online EWC to which all parameters matter alike."""

    def task_importance(self, model, task):
        return ones(model)


@dataclass(frozen=True)
class Jump(NoConsolidation):
    """Halves all weights in mid-task and at the end of each task."""

    def due(self, progress):
        return progress.end or progress.step == 3

    def __call__(self, context):
        half = {name: t / 2 for name, t in context.current.items()}
        return Merged(half, half)


@dataclass(frozen=True)
class DeployOnly(NoConsolidation):
    """Deploys the mean of the base and the current weights, and trains on from the current ones."""

    def due(self, progress):
        return progress.end

    def __call__(self, context):
        return Merged(context.current, lerp(context.base, context.current, 0.5))


def same(a, b):
    """Whether two runs have the same weights after every task, bit for bit."""
    return all(equal(x, y) for x, y in zip(a.trained, b.trained, strict=True))


def far(a, b):
    return norm(sub(a, b))


def moved(learner, seed=0):
    """A learner after two tasks, and its model somewhere near where it ended."""
    result = quick(toys.stream(), learner, training=Training(epochs=2, batch=8, lr=0.05))
    noise = torch.Generator().manual_seed(seed)
    weights = {n: t + 0.1 * torch.randn(t.shape, generator=noise) for n, t in get_weights(result.model).items()}
    set_weights(result.model, weights)
    return result.learner, result.model


def gradients(model, value):
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))


@pytest.mark.parametrize("name", RULES)
class TestAll:
    def test_the_first_task_is_fine_tuning(self, name):
        for stream, model in ((toys.stream(), models.mlp), (toys.images(), toys.small_convnet)):
            rule, plain = (quick(stream, learner, model=model) for learner in (RULES[name], None))
            assert equal(rule.trained[0], plain.trained[0])
            assert not equal(rule.trained[1], plain.trained[1])

    def test_no_strength_is_fine_tuning(self, name):
        idle = copy.copy(RULES[name])
        idle.strength = 0.0
        assert same(quick(toys.stream(), idle), quick(toys.stream()))

    def test_it_keeps_low_what_it_adds_to_the_loss(self, name):
        """By the term as it is in the second task, that task takes fine-tuning further than the rule."""

        @dataclass
        class Noting(type(RULES[name])):
            def begin_task(self, model, task):
                super().begin_task(model, task)
                kept[task.index] = copy.deepcopy(self)

        kept = {}
        stream = toys.stream(tasks=2)
        held, plain = quick(stream, Noting(**vars(RULES[name]))), quick(stream)
        batch = stream[1].batch(slice(None))
        assert 0 < kept[1].term(held.model, batch) < 0.9 * kept[1].term(plain.model, batch)

    def test_training_does_not_see_what_is_only_deployed(self, name):
        stream = toys.stream()
        assert same(quick(stream, RULES[name]), quick(stream, RULES[name], DeployOnly()))

    def test_state_goes_on_bit_for_bit(self, name):
        """After two tasks, a fresh learner with the state does on the third what the first does."""
        stream = toys.stream()
        learner = quick(stream, RULES[name]).learner
        model, batch = models.mlp(stream, seed=3), stream[2].batch(slice(0, 8))
        twin = copy.deepcopy(RULES[name])
        twin.start(learner.setting)
        assert twin.term(model, batch) is None
        state = copy.deepcopy(learner.state_dict())
        twin.load_state_dict(state)
        assert equal(gradients(model, learner.loss(model, batch)), gradients(model, twin.loss(model, batch)))
        learner.on_consolidated(model, stream[2])
        after = learner.state_dict()
        twin.setting = copy.copy(learner.setting)
        twin.setting.generator = torch.Generator()
        twin.load_state_dict(state)
        twin.on_consolidated(model, stream[2])
        assert toys.same_tree(after, twin.state_dict())

    def test_a_compiled_model_is_the_model(self, name):
        learner, model = moved(RULES[name])
        compiled = copy.deepcopy(model)
        compiled.compile(backend="eager")
        batch = toys.stream()[2].batch(slice(0, 8))
        assert torch.equal(learner.term(model, batch), learner.term(compiled, batch))


@pytest.mark.parametrize("name", ANCHORED)
class TestAnchored:
    def test_the_gradient_pulls_to_the_anchor_by_importance(self, name):
        learner, model = moved(ANCHORED[name])
        found = gradients(model, learner.penalty(model))
        pull = learner.pull(model)
        for key, p in model.named_parameters():
            importance = 1 if learner.importance is None else learner.importance[key]
            slope = 2 * learner.factor * learner.strength * importance * (p.detach() - learner.anchor[key])
            assert torch.allclose(found[key], slope, atol=1e-7) and torch.allclose(pull[key], slope, atol=1e-7)
        assert all((t >= 0).all() for t in (learner.importance or {}).values())

    def test_the_penalty_is_zero_at_the_anchor_and_positive_elsewhere(self, name):
        learner, model = moved(ANCHORED[name])
        assert learner.penalty(model) > 0
        set_weights(model, learner.anchor)
        assert learner.penalty(model) == 0

    def test_a_parameter_that_came_later_is_free(self, name):
        learner, model = moved(ANCHORED[name])
        before = learner.penalty(model)
        model.register_parameter("later", torch.nn.Parameter(torch.ones(3)))
        assert torch.equal(learner.penalty(model), before)
        learner.setting.criterion.begin_task(toys.stream()[2])
        learner.begin_task(model, toys.stream()[2])
        learner.on_consolidated(model, toys.stream()[2])
        assert "later" in learner.anchor

    def test_a_frozen_parameter_adds_nothing(self, name):
        learner, model = moved(ANCHORED[name])
        rest = copy.copy(learner)
        rest.anchor = {key: t for key, t in learner.anchor.items() if key != "linear.weight"}
        model.linear.weight.requires_grad_(False)
        assert torch.equal(learner.penalty(model), rest.penalty(model))
        model.requires_grad_(False)
        assert learner.term(model, toys.stream()[2].batch(slice(0, 8))) is None and learner.pull(model) == {}


def test_a_large_strength_keeps_the_weights():
    stream, training = toys.stream(tasks=2), Training(epochs=2, batch=8, lr=0.01)
    runs = [quick(stream, learner, training=training) for learner in (None, L2(90.0))]
    free, held = (far(run.trained[0], run.trained[1]) for run in runs)
    assert held < 0.3 * free


def test_ewc_by_hand():
    """The anchor and the Fisher information are those of the weights that training goes on from."""
    stream = toys.stream(tasks=1)
    result = quick(stream, EWC(labels="true"), Jump())
    model, learner = result.model, result.learner
    assert equal(learner.anchor, result.weights[0])
    x, y = stream[0].train.x, stream[0].train.y
    assert equal(learner.importance, curvature.fisher(model, x, labels="true", y=y))


def test_the_fisher_is_over_the_label_space_of_the_loss():
    for labels, silent in (("all", 0), ("seen", 4), ("task", 4)):
        result = quick(toys.stream(), training=Training(epochs=1, batch=8, labels=labels))
        learner = EWC(labels="exact")
        learner.start(result.learner.setting)
        learner.setting.criterion.begin_task(toys.stream()[0])
        assert (learner.task_importance(result.model, toys.stream()[0])["linear.bias"] == 0).sum() == silent


def test_ewc_where_all_parameters_matter_alike_is_l2():
    two = toys.stream(tasks=2)
    assert same(quick(two, PlainEWC(0.5)), quick(two, L2(0.5)))
    three = toys.stream()
    assert same(quick(three, PlainOnlineEWC(0.25, gamma=0.0)), quick(three, L2(0.5)))
    assert not same(quick(three, PlainEWC(0.5)), quick(three, L2(0.5)))


def test_ewcs_one_quadratic_is_the_sum_of_the_tasks_quadratics():
    @dataclass
    class Noting(EWC):
        def start(self, setting):
            super().start(setting)
            self.quadratics = []

        def task_importance(self, model, task):
            found = super().task_importance(model, task)
            found["linear.weight"][:, :3] = 0
            self.quadratics.append((found, parameter_values(model)))
            return found

    learner, model = moved(Noting(5.0))
    assert len(learner.quadratics) == 3

    def explicit():
        return 2.5 * sum(
            (f[name] * (p - anchor[name]).square()).sum()
            for f, anchor in learner.quadratics
            for name, p in model.named_parameters()
        )

    found, twin = gradients(model, learner.penalty(model)), gradients(model, explicit())
    assert all(torch.allclose(found[name], t, atol=1e-6) for name, t in twin.items())
    gaps = []
    for seed in range(3):
        _, elsewhere = moved(EWC(), seed)
        set_weights(model, get_weights(elsewhere))
        gaps.append((explicit() - learner.penalty(model)).item())
    assert gaps == pytest.approx([gaps[0]] * 3, rel=1e-3) and gaps[0] > 0
    assert torch.equal(learner.anchor["linear.weight"][:, :3], learner.quadratics[2][1]["linear.weight"][:, :3])


def test_online_ewc_lets_the_fisher_fade_and_keeps_the_latest_anchor():
    @dataclass
    class Noting(OnlineEWC):
        def start(self, setting):
            super().start(setting)
            self.seen = []

        def task_importance(self, model, task):
            self.seen.append(super().task_importance(model, task))
            return self.seen[-1]

    result = quick(toys.stream(), Noting(5.0, gamma=0.5))
    one, two, three = result.learner.seen
    for name, f in result.learner.importance.items():
        assert torch.allclose(f, 0.25 * one[name] + 0.5 * two[name] + three[name])
    assert equal(result.learner.anchor, result.weights[2])


def test_mas_adds_up_the_sensitivities():
    result = quick(toys.stream(), MAS(0.1))
    stream, learner = toys.stream(), result.learner
    model, total = result.model, {}
    for task, weights in zip(stream, result.weights, strict=True):
        set_weights(model, weights)
        new = curvature.sensitivity(model, task.train.x)
        total = {name: total.get(name, 0) + t for name, t in new.items()}
    assert all(torch.allclose(learner.importance[name], t) for name, t in total.items())


def test_importance_is_measured_on_rows_that_are_not_augmented():
    stream = toys.images()
    learner = quick(stream, MAS()).learner
    every, some = (learner.sampled(stream[1], samples) for samples in (None, 5))
    assert torch.equal(every.x, stream[1].prepare(stream[1].train.x)) and torch.equal(every.y, stream[1].train.y)
    assert len(some) == 5 and all((every.x == row).flatten(1).all(1).sum() == 1 for row in some.x)


class TestSI:
    def test_the_path_adds_up_to_the_drop_of_the_loss(self):
        """Small steps on one batch: sum_i omega_i is what the loss has lost."""
        stream = toys.stream(tasks=1, rows=8)
        paths = []

        @dataclass
        class Noting(SI):
            def after_step(self, model, batch):
                super().after_step(model, batch)
                paths.append(sum(float(t.sum()) for t in self.path.values()))

        result = quick(stream, Noting(), training=Training(epochs=30, batch=8, lr=3e-4))
        loss = result.training_loss[0]
        assert paths[-2] == pytest.approx(loss[0] - loss[-1], rel=0.01)

    def test_the_path_leaves_the_penalty_out(self):
        """In the second task the slope is the gradient of the loss alone."""
        slopes, losses = [], []

        @dataclass
        class Noting(SI):
            def adjust_gradients(self, model, batch):
                before = {name: p.grad.clone() for name, p in model.named_parameters()}
                super().adjust_gradients(model, batch)
                assert all(torch.equal(before[name], p.grad) for name, p in model.named_parameters())
                alone = self.setting.criterion(model(batch.x), batch.y)
                slopes.append(self.slope)
                losses.append(gradients(model, alone))

        quick(toys.stream(), Noting(0.5))
        for slope, twin in zip(slopes, losses, strict=True):
            assert all(torch.allclose(slope[name], t, atol=1e-6) for name, t in twin.items())

    def test_importance_by_hand_in_spite_of_jumps(self):
        """Omega of one task from a record of all steps; what a consolidation moves is not among them."""
        record = []

        @dataclass
        class Noting(SI):
            def adjust_gradients(self, model, batch):
                super().adjust_gradients(model, batch)
                record.append((parameter_values(model), {name: p.grad.clone() for name, p in model.named_parameters()}))

            def after_step(self, model, batch):
                super().after_step(model, batch)
                record[-1] += (parameter_values(model),)

        result = quick(toys.stream(tasks=1), Noting(xi=0.2), Jump())
        for name, omega in result.learner.importance.items():
            path = sum(-slope[name] * (after[name] - before[name]) for before, slope, after in record)
            gone = sum(after[name] - before[name] for before, _, after in record)
            assert torch.allclose(omega, path.clamp(min=0) / (gone**2 + 0.2), atol=1e-7)
        assert equal(result.learner.anchor, result.weights[0])

    def test_importance_grows_task_by_task(self):
        growth = []

        @dataclass
        class Noting(SI):
            def on_consolidated(self, model, task):
                super().on_consolidated(model, task)
                growth.append(curvature.diagonal_trace(self.importance))

        quick(toys.stream(), Noting())
        assert 0 < growth[0] < growth[1] < growth[2]


class TestLwF:
    def test_it_is_zero_with_no_gradient_at_the_teacher(self):
        learner, model = moved(LwF())
        batch = toys.stream()[2].batch(slice(0, 8))
        away = learner.term(model, batch)
        assert away > 1e-4
        set_weights(model, learner.teacher)
        at = learner.term(model, batch)
        assert at == 0 and all(t.abs().max() < 1e-6 for t in gradients(model, at).values())

    def test_it_is_the_divergence_over_earlier_classes(self):
        result = quick(toys.stream(), None)
        learner = copy.deepcopy(LwF(strength=0.7, temperature=3.0))
        learner.start(result.learner.setting)
        model, stream = result.model, toys.stream()
        for t in range(2):
            set_weights(model, result.weights[t])
            learner.on_consolidated(model, stream[t])
        set_weights(model, result.weights[2])
        batch = stream[2].batch(slice(0, 8))
        old, new = (outputs(model, result.weights[t], batch.x)[:, :4] / 3 for t in (1, 2))
        teacher, student = (torch.distributions.Categorical(logits=logits) for logits in (old, new))
        twin = 0.7 * 9 * torch.distributions.kl_divergence(teacher, student).mean()
        assert torch.allclose(learner.term(model, batch), twin, rtol=1e-4)
        assert torch.allclose(learner.loss(model, batch), twin + Learner.loss(learner, model, batch), rtol=1e-5)
        slope = gradients(model, learner.term(model, batch))["linear.bias"]
        assert (slope[4:] == 0).all() and (slope[:4] != 0).all()

    @pytest.mark.parametrize(("labels", "heads"), [("task", [[0, 1], [2, 3]]), ("seen", [[0, 1, 2, 3]])])
    def test_with_a_label_space_for_each_task_it_is_the_sum_over_old_heads(self, labels, heads):
        """By the formula, row by row and class by class: T^2 sum_heads sum_c p_c (log p_c - log q_c)."""
        training = Training(epochs=2, batch=8, lr=0.05, labels=labels)
        result = quick(toys.stream(), LwF(strength=0.7, temperature=3.0), training=training)
        stream, learner = toys.stream(), copy.deepcopy(result.learner)
        learner.start(learner.setting)
        for t in range(2):
            set_weights(result.model, result.weights[t])
            learner.on_consolidated(result.model, stream[t])
        student = get_weights(models.mlp(stream, seed=3))
        set_weights(result.model, student)
        batch = stream[2].batch(slice(0, 5))
        old, new = (outputs(result.model, w, batch.x).double() / 3 for w in (result.weights[1], student))
        rows = []
        for pair in zip(old.tolist(), new.tolist(), strict=True):
            rows.append(0.0)
            for head in heads:
                p, q = ([math.exp(row[c]) for c in head] for row in pair)
                rows[-1] += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        term = learner.term(result.model, batch)
        assert term.item() == pytest.approx(0.7 * 9 * sum(rows) / 5, rel=1e-5) and term > 0.1
        slope = gradients(result.model, term)["linear.bias"]
        assert (slope[4:] == 0).all() and (slope[:4] != 0).all()
        assert [abs(float(slope[head].sum())) < 1e-6 for head in heads] == [True] * len(heads)

    def test_old_heads_are_free_to_shift_against_each_other(self):
        """What tells tasks apart is not taught where the task is given, and is where it is not."""
        for labels, alike in (("task", True), ("seen", False), ("all", False)):
            training = Training(epochs=1, batch=8, lr=0.05, labels=labels)
            learner = quick(toys.stream(), LwF(), training=training).learner
            model, batch = models.mlp(toys.stream(), seed=3), toys.stream()[2].batch(slice(0, 8))
            before = learner.term(model, batch)
            with torch.no_grad():
                model.linear.bias[2:4] += 5
            assert torch.allclose(learner.term(model, batch), before, rtol=1e-4) == alike

    def test_one_task_and_a_head_that_tasks_share_are_one_softmax(self):
        for stream, tasks in ((toys.stream(), 2), (toys.domains(), 3)):
            for t in range(tasks):
                part = replace(stream, tasks=stream.tasks[: t + 1])
                runs = [quick(part, LwF(), training=replace(toys.QUICK, labels=labels)) for labels in ("task", "seen")]
                model, batch = models.mlp(stream, seed=3), stream[2].batch(slice(0, 8))
                learner, twin = (run.learner for run in runs)
                twin.teacher = learner.teacher
                assert torch.equal(learner.term(model, batch), twin.term(model, batch)) == (t == 0 or tasks == 3)

    def test_its_heads_come_back_with_its_state(self):
        stream = toys.stream()
        learner = quick(stream, LwF(), training=replace(toys.QUICK, labels="task")).learner
        model, batch = models.mlp(stream, seed=3), stream[2].batch(slice(0, 8))
        twin = LwF()
        twin.start(learner.setting)
        twin.load_state_dict(learner.state_dict())
        assert equal(gradients(model, learner.loss(model, batch)), gradients(model, twin.loss(model, batch)))
        assert [head.tolist() for head in twin.heads] == [[4, 5], [2, 3], [0, 1]]
        assert repr(twin) == "LwF(strength=1.0, temperature=2.0)"

    def test_one_pass_a_step_and_statistics_of_batchnorm_move_once(self):
        stream = toys.images()
        learner = quick(stream, LwF(), model=toys.small_convnet).learner
        model = toys.small_convnet(stream, seed=4).train()
        twin = copy.deepcopy(model)
        batch = stream[2].batch(slice(0, 8))
        learner.loss(model, batch)
        twin(batch.x)
        assert equal(get_weights(model), get_weights(twin)) and model.training

    def test_all_classes_are_known_where_tasks_share_them(self):
        toy = toys.stream(tasks=1)
        learner = quick(toy, LwF()).learner
        learner.on_consolidated(models.mlp(toy), toy[0])
        assert learner.known.tolist() == [0, 1]


class TestDecoupledL2:
    """L2 that is added to the step and not to the loss."""

    @pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"schedule": "cosine"}, {"optimizer": "adamw"}])
    def test_a_step_is_the_optimizers_and_the_pull_at_the_steps_own_rate(self, options):
        """By a twin with an optimizer of its own, which sees the gradients of the task alone."""
        steps = []

        @dataclass
        class Noting(DecoupledL2):
            def adjust_gradients(self, model, batch):
                super().adjust_gradients(model, batch)
                assert self.term(model, batch) is None
                slopes = gradients(model, self.setting.criterion(model(batch.x), batch.y))
                assert all(torch.allclose(slopes[n], p.grad, atol=1e-6) for n, p in model.named_parameters())
                steps.append((parameter_values(model), slopes, dict(self.anchor), batch.lr))

        training = Training(epochs=2, batch=8, lr=0.05, **options)
        result = quick(toys.stream(tasks=2), Noting(0.5), training=training)
        steps = steps[len(steps) // 2 :]
        twin = {n: t.clone().requires_grad_() for n, t in steps[0][0].items()}
        optimizer = training.make_optimizer(twin.values())
        for (before, slopes, anchor, lr), after in zip(
            steps, [s[0] for s in steps[1:]] + [parameter_values(result.model)], strict=True
        ):
            optimizer.param_groups[0]["lr"] = lr
            for n, p in twin.items():
                p.data, p.grad = before[n].clone(), slopes[n]
            optimizer.step()
            for n, p in twin.items():
                expected = p.detach() - lr * 0.5 * (before[n] - anchor[n])
                assert torch.allclose(after[n], expected, atol=1e-6)
        assert len({step[-1] for step in steps}) == (len(steps) if "schedule" in options else 1)

    def test_with_gradient_descent_it_is_l2_and_with_momentum_it_is_not(self):
        stream = toys.stream(tasks=2)
        for momentum, alike in ((0.0, True), (0.9, False)):
            training = Training(epochs=2, batch=8, lr=0.02, momentum=momentum)
            a, b = (quick(stream, rule, training=training).trained[1] for rule in (L2(3.0), DecoupledL2(3.0)))
            assert (far(a, b) < 1e-5 * norm(a)) == alike

    def test_the_first_task_and_no_strength_are_fine_tuning(self):
        for stream, model in ((toys.stream(), models.mlp), (toys.images(), toys.small_convnet)):
            rule, idle, plain = (quick(stream, l, model=model) for l in (DecoupledL2(0.5), DecoupledL2(0.0), None))
            assert equal(rule.trained[0], plain.trained[0]) and same(idle, plain)
            assert not equal(rule.trained[1], plain.trained[1])

    def test_training_does_not_see_what_is_only_deployed(self):
        stream = toys.stream()
        assert same(quick(stream, DecoupledL2(0.5)), quick(stream, DecoupledL2(0.5), DeployOnly()))

    def test_it_pulls_beside_any_rule(self):
        stream = toys.stream()
        assert same(quick(stream, Sum(Learner(), DecoupledL2(0.5))), quick(stream, DecoupledL2(0.5)))
        for first in (ER(memory=12), AGEM(memory=12), SI(0.5)):
            alone, idle, both = (
                quick(stream, l) for l in (first, Sum(first, DecoupledL2(0.0)), Sum(first, DecoupledL2(3.0)))
            )
            assert same(alone, idle) and equal(alone.trained[0], both.trained[0])
            free, held = (far(run.trained[0], run.trained[1]) for run in (alone, both))
            assert held < 0.9 * free

    def test_the_record_of_l2_does_not_change_with_it(self):
        """Results on disk are found by it."""
        assert repr(L2()) == "L2(strength=0.1)" and repr(DecoupledL2()) == "DecoupledL2(strength=0.1)"


class TestSum:
    def test_one_rule_alone_is_itself(self):
        stream = toys.stream()
        for learner in (ER(memory=12), EWC(5.0)):
            assert same(quick(stream, Sum(learner)), quick(stream, learner))

    def test_replay_with_a_penalty_is_replay_in_the_first_task(self):
        stream = toys.stream()
        for others in ((EWC(5.0),), (SI(0.5), LwF())):
            both, alone = quick(stream, Sum(ER(memory=12), *others)), quick(stream, ER(memory=12))
            assert equal(both.trained[0], alone.trained[0])
            assert not equal(both.trained[1], alone.trained[1])

    @pytest.mark.parametrize("rule", [L2(0.5), EWC(5.0, labels="exact"), SI(0.5), MAS(0.05)])
    def test_fine_tuning_with_a_rule_is_the_rule(self, rule):
        """But for what is drawn at random."""
        stream = toys.stream()
        assert same(quick(stream, Sum(Learner(), rule)), quick(stream, rule))

    def test_others_without_strength_leave_the_first_alone(self):
        stream = toys.stream()
        idle = Sum(ER(memory=12), EWC(0.0), SI(0.0), MAS(0.0), LwF(0.0))
        assert same(quick(stream, idle), quick(stream, ER(memory=12)))

    def test_a_teachers_pass_moves_no_statistics(self):
        stream, model = toys.images(), toys.small_convnet
        alone = quick(stream, ER(memory=12), model=model)
        assert same(quick(stream, Sum(ER(memory=12), LwF(0.0)), model=model), alone)

    def test_each_part_draws_numbers_of_its_own(self):
        learner = quick(toys.stream(), Sum(ER(memory=12), EWC(5.0), EWC(5.0))).learner
        seeds = {part.setting.generator.initial_seed() for part in learner.parts}
        assert len(seeds) == 3

    def test_terms_add_up(self):
        stream = toys.stream()
        learner = quick(stream, Sum(Learner(), L2(0.5), LwF())).learner
        model, batch = models.mlp(stream, seed=5), stream[2].batch(slice(0, 8))
        terms = [part.term(model, batch) for part in learner.others]
        plain = Learner.loss(learner.first, model, batch)
        assert torch.equal(learner.loss(model, batch), plain + terms[0] + terms[1])

    def test_si_takes_the_other_terms_for_a_part_of_the_loss(self):
        slopes = []

        @dataclass
        class Noting(SI):
            def adjust_gradients(self, model, batch):
                super().adjust_gradients(model, batch)
                slopes.append((self.slope, self.pull(model), {n: p.grad.clone() for n, p in model.named_parameters()}))

        quick(toys.stream(tasks=2), Sum(L2(0.5), Noting(0.5)))
        for slope, pull, total in slopes:
            for name, t in total.items():
                assert torch.allclose(slope[name] + pull.get(name, 0), t, atol=1e-6)

    def test_the_others_see_the_gradients_before_the_first_changes_them(self):
        seen = []

        @dataclass
        class Doubling(Learner):
            def adjust_gradients(self, model, batch):
                for p in model.parameters():
                    p.grad *= 2

        @dataclass
        class Noting(SI):
            def adjust_gradients(self, model, batch):
                super().adjust_gradients(model, batch)
                seen.append((self.slope, gradients(model, self.setting.criterion(model(batch.x), batch.y))))

        quick(toys.stream(tasks=1), Sum(Doubling(), Noting(0.5)))
        assert all(torch.allclose(slope[n], t, atol=1e-6) for slope, twin in seen for n, t in twin.items())

    def test_it_shows_what_the_first_shows(self):
        stream = toys.stream()
        both, alone = (quick(stream, learner) for learner in (Sum(ER(memory=12), EWC(0.0)), ER(memory=12)))
        assert torch.equal(both.learner.examples(stream[2]).x, alone.learner.examples(stream[2]).x)
        assert both.learner.remembers and not Sum(EWC(), L2()).remembers
        assert both.learner.held_out(stream[2]) is None

    def test_a_memory_in_it_can_be_held_out(self):
        stream = toys.stream()

        @dataclass(frozen=True)
        class Holding(NoConsolidation):
            holdout = 0.5

        learner = quick(stream, Sum(ER(memory=12), EWC(5.0)), Holding()).learner
        assert len(learner.held_out(stream[2])) == 6
        with pytest.raises(ValueError, match=r"EWC\(.*keeps none"):
            quick(stream, Sum(EWC(), L2()), Holding())

    def test_the_record_names_all_parts(self):
        learner = Sum(ER(memory=50), EWC(3.0), LwF(temperature=1.0))
        assert repr(learner) == f"Sum({ER(memory=50)!r}, {EWC(3.0)!r}, {LwF(temperature=1.0)!r})"
        assert eval(repr(learner)) == learner == copy.deepcopy(learner) != Sum(ER(memory=50), EWC(3.0))

    def test_sums_nest_on_the_left(self):
        stream = toys.stream()
        nested, flat = Sum(Sum(ER(memory=12), L2(0.5)), LwF()), Sum(ER(memory=12), L2(0.5), LwF())
        assert same(quick(stream, nested), quick(stream, flat))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Sum(EWC(), ER(memory=50)), r"ER\(memory=50.*does more than add a term.*put it first"),
            (lambda: Sum(ER(), Learner()), r"Learner\(\) does more"),
            (lambda: Sum(ER(), Sum(ER(), EWC())), r"Sum\(ER\(.*does more"),
            (lambda: Sum(ER(), EWC), "is not a learner; pass instances"),
            (lambda: Sum("ER"), "'ER' is not a learner"),
        ],
    )
    def test_rules_that_cannot_be_added_are_named(self, make, message):
        with pytest.raises(TypeError, match=message):
            make()


def test_every_anchored_rule_is_tried():
    assert {type(rule) for rule in ANCHORED.values()} == {l for l in LEARNERS.values() if issubclass(l, Anchored)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2(-1.0), "strength: -1.0"),
        (lambda: DecoupledL2(-1.0), "strength: -1.0"),
        (lambda: EWC(float("nan")), "strength: nan"),
        (lambda: EWC(labels="real"), "labels: 'real' is unknown"),
        (lambda: EWC(samples=0), "samples: 0"),
        (lambda: OnlineEWC(samples=-1), "samples: -1"),
        (lambda: OnlineEWC(gamma=1.5), "gamma: 1.5"),
        (lambda: SI(xi=0.0), "xi: 0.0"),
        (lambda: MAS(samples=0), "samples: 0"),
        (lambda: LwF(strength=-1), "strength: -1"),
        (lambda: LwF(temperature=0), "temperature: 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
