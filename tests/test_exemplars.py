"""GDumb, iCaRL and BiC: rules that live on exemplars."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import toys
from clkit import models
from clkit.consolidation import CLeWI, Merged
from clkit.data import Augment, Examples, Stream
from clkit.evaluation import outputs
from clkit.learners import ER, Criterion, Learner, Setting
from clkit.learners.exemplars import BEYOND, BiC, GDumb, ICaRL, cutmix, fitted_bias
from clkit.memory import herding
from clkit.training import Training
from clkit.weights import equal, get_weights, lerp, set_weights
from toys import domains, quick

RULES = {"GDumb": GDumb(memory=12, fit_epochs=4), "iCaRL": ICaRL(memory=12), "BiC": BiC(memory=12)}
NO_STEPS = Training(epochs=0, batch=8)


@pytest.fixture(scope="module")
def toy() -> Stream:
    return toys.stream()


@pytest.fixture(scope="module")
def pictures() -> Stream:
    return toys.images()


@pytest.fixture(scope="module")
def corrected(toy):
    return quick(toy, BiC(memory=24, validation=0.25))


def started(learner: Learner, stream: Stream, seed: int = 0, holdout: float = 0.0) -> Learner:
    criterion = Criterion(stream, "all", 0.0, torch.device("cpu"))
    learner.start(Setting(torch.Generator().manual_seed(seed), criterion, len(stream.classes), 8, holdout))
    return learner


class DeployOnly:
    """Evaluates half of the weights and trains on as if nothing were."""

    def due(self, progress):
        return progress.end

    def __call__(self, context):
        return Merged(context.current, lerp(context.base, context.current, 0.5))


@pytest.mark.parametrize("name", RULES)
class TestAll:
    @pytest.mark.parametrize(
        "consolidation",
        [CLeWI(alpha=0.4, points=2), CLeWI(alpha="search", points=3, holdout=0.3)],
        ids=["fixed", "search"],
    )
    def test_consolidations_find_examples(self, pictures, name, consolidation):
        result = quick(pictures, RULES[name], consolidation, model=toys.small_convnet)
        assert all(report["judged_by"] for report in result.reports[1:])
        if consolidation.holdout:
            assert {report["judged_by"] for report in result.reports[1:]} == {"held-out memory"}

    def test_deploying_other_weights_leaves_training_alone(self, pictures, name):
        plain = quick(pictures, RULES[name], model=toys.small_convnet)
        other = quick(pictures, RULES[name], DeployOnly(), model=toys.small_convnet)
        assert all(equal(a, b) for a, b in zip(plain.trained, other.trained, strict=True))
        assert not equal(plain.weights[-1], other.weights[-1])

    def test_calibrating_changes_nothing_but_predictions(self, toy, name):
        result = quick(toy, RULES[name])
        learner, model = result.learner, result.model
        before = learner.state_dict()
        set_weights(model, result.weights[0])
        for _ in range(2):
            learner.calibrate(model, toy[2])
        after = learner.state_dict()
        changed = {key for key in before if not toys.same_tree(before[key], after[key])}
        assert before.keys() == after.keys() and changed <= {"means", "known", "correction"}

    def test_a_restored_learner_predicts_and_goes_on_alike(self, toy, name):
        result = quick(toy, RULES[name])
        learner, model, task = result.learner, result.model, toy[2]
        twin = started(type(RULES[name])(**{k: v for k, v in vars(RULES[name]).items() if k != "policy"}), toy)
        twin.load_state_dict(learner.state_dict())
        batch = task.batch(torch.arange(8))
        for a, b in (
            (learner.predict(model, task.test.x), twin.predict(model, task.test.x)),
            (learner.loss(model, batch), twin.loss(model, batch)),
        ):
            assert torch.equal(a, b)
        for each in (learner, twin):
            each.after_training(model, task)
        assert toys.same_tree(learner.state_dict(), twin.state_dict())

    def test_a_task_incremental_stream(self, name):
        result = quick(toys.stream(scenario="task"), RULES[name])
        assert result.accuracy[-1].mean() > 0.7

    def test_policy_is_no_setting(self, name):
        with pytest.raises(TypeError, match="policy"):
            type(RULES[name])(policy="reservoir")


@pytest.mark.parametrize("learner", [GDumb(memory=24, fit_epochs=8), BiC(memory=24)], ids=["GDumb", "BiC"])
def test_domains_are_learned_and_kept(learner):
    assert quick(domains(), learner).accuracy[-1].mean() > 0.85


class TestGDumb:
    def test_the_memory_is_balanced_to_within_one(self, toy):
        y = quick(toy, GDumb(memory=16, fit_epochs=1)).learner.store.all()["y"]
        counts = torch.bincount(y, minlength=6)
        assert counts.sum() == 16 and counts.max() - counts.min() <= 1

    def test_the_stream_trains_nothing(self, pictures):
        class Watched(GDumb):
            def after_training(self, model, task):
                assert task.index or equal(get_weights(model), self.initial)
                super().after_training(model, task)

        result = quick(pictures, Watched(memory=12, fit_epochs=1), model=toys.small_convnet)
        assert all((loss == 0).all() for loss in result.training_loss)

    def test_the_fit_forgets_what_came_before_it(self, toy):
        """From another model's weights, the same memory and draws give the same network."""
        result = quick(toy, GDumb(memory=12, fit_epochs=2))
        learner, state = result.learner, result.learner.setting.generator.get_state()
        fitted = []
        for model in (result.model, models.mlp(toy, seed=5)):
            learner.setting.generator.set_state(state)
            learner.after_training(model, toy[2])
            fitted.append(get_weights(model))
        assert equal(*fitted) and not equal(fitted[0], learner.initial)

    def test_the_fit_lowers_the_loss_on_the_memory(self, toy):
        result = quick(toy, GDumb(memory=12, fit_epochs=8))
        x, y = (result.learner.examples(toy[2]).x, result.learner.examples(toy[2]).y)
        before, after = (
            cross_entropy(outputs(result.model, w, x), y) for w in (result.learner.initial, result.weights[2])
        )
        assert after < before / 2
        assert result.accuracy[-1].mean() > 0.7

    def test_without_examples_it_is_the_fresh_network(self, toy):
        result = quick(toy, GDumb(), training=NO_STEPS)
        assert equal(result.weights[2], result.learner.initial)

    def test_a_held_out_share_is_not_fitted(self, toy):
        learner = started(GDumb(memory=10, fit_epochs=2, batch=3), toy, holdout=0.5)
        learner.begin_task(models.mlp(toy), toy[0])
        learner.offer(toy[0])
        seen = []
        model = models.mlp(toy)
        model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        learner.fit(model, toy[0])
        assert [len(x) for x in seen] == [3, 2, 3, 2]
        assert not (torch.cat(seen)[:, None] == learner.held_out(toy[0]).x).all(-1).any()

    @pytest.mark.parametrize(("batch", "sizes"), [(1, [1] * 5), (2, [2, 3]), (3, [3, 2]), (4, [5]), (5, [5]), (9, [5])])
    def test_every_row_is_fitted_and_the_last_is_not_alone(self, toy, batch, sizes):
        learner, seen = started(GDumb(memory=5, fit_epochs=1, batch=batch), toy), []
        learner.store.offer(learner.setting.generator, x=toy[0].train.x, y=toy[0].train.y)
        model = models.mlp(toy)
        model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        learner.fit(model, toy[0])
        assert seen == sizes

    def test_the_rate_is_sgdr_after_a_warm_epoch(self):
        """torch's scheduler, driven as in the released code, is the reference."""
        learner = GDumb()
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learner.max_lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1, 2, eta_min=learner.min_lr)
        assert learner.rate(0) == 0.1 * learner.max_lr and learner.rate(1) == learner.max_lr
        for epoch in range(2, 40):
            optimizer.step()
            scheduler.step()
            assert learner.rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)

    def test_cutmix_puts_one_box_of_others_into_all(self):
        g = torch.Generator().manual_seed(0)
        x = torch.arange(5.0)[:, None, None, None].expand(5, 2, 8, 8)
        shares = []
        for _ in range(200):
            mixed, other, share = cutmix(x, 1.0, g)
            foreign = (mixed != x).any(0).any(0)
            rows, columns = foreign.any(1), foreign.any(0)
            assert torch.equal(foreign, rows[:, None] & columns) or (other == torch.arange(5)).all()
            for i in range(5):
                assert set(mixed[i].unique().tolist()) <= {float(i), float(other[i])}
            if (other != torch.arange(5)).any():
                assert share == 1 - foreign.float().mean()
            shares.append(float(share))
        assert min(shares) < 0.2 and max(shares) == 1

    def test_cutmix_of_probability_0_changes_nothing_and_half_does_half_the_time(self):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(4, 1, 6, 6, generator=g)
        assert all(torch.equal(cutmix(x, 0.0, g)[0], x) for _ in range(20))
        mixed = sum(float(cutmix(x, 0.5, g)[2]) < 1 for _ in range(400))
        always = sum(float(cutmix(x, 1.0, g)[2]) < 1 for _ in range(400))
        assert 0.4 < mixed / always < 0.6

    def test_images_are_mixed_and_other_inputs_are_not(self, toy, pictures):
        a, b = (quick(pictures, GDumb(memory=12, fit_epochs=3, cutmix=p)).weights[0] for p in (0.0, 1.0))
        assert not equal(a, b)
        a, b = (quick(toy, GDumb(memory=12, fit_epochs=3, cutmix=p)).weights[0] for p in (0.0, 1.0))
        assert equal(a, b)

    def test_memory_rows_are_augmented_when_the_streams_are(self, pictures):
        stream = replace(pictures, tasks=tuple(replace(t, augment=Augment(shift=1)) for t in pictures))
        learner = GDumb(memory=12, fit_epochs=2, cutmix=0.0)
        on, off = (quick(stream, learner, training=Training(2, 8, augment=augment)) for augment in (True, False))
        plain = quick(pictures, learner, training=Training(2, 8))
        assert not equal(on.weights[0], off.weights[0]) and equal(off.weights[0], plain.weights[0])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"fit_epochs": 0}, "fit_epochs: 0"),
            ({"min_lr": 0.1}, "min_lr: 0.1"),
            ({"min_lr": 0.0}, "min_lr: 0.0"),
            ({"cutmix": 1.5}, "cutmix: 1.5"),
            ({"memory": 0}, "memory: 0"),
        ],
    )
    def test_bad_settings_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            GDumb(**settings)


class TestICaRL:
    def test_prediction_is_the_nearest_mean_of_exemplars(self, toy):
        """The reference twin, class by class."""
        result = quick(toy, ICaRL(memory=14))
        rows = result.learner.store.all()
        x = torch.cat([task.test.x for task in toy])
        represented = normalize(models.features(result.model, rows["x"]))
        means = [normalize(represented[rows["y"] == c].mean(0), dim=0) for c in range(6)]
        at = normalize(models.features(result.model, x))
        expected = torch.stack([-(at - mean).square().sum(1) for mean in means], 1)
        logits = result.learner.predict(result.model, x)
        assert torch.allclose(logits, expected, atol=1e-5)
        assert (logits <= 0).all() and (logits >= -4 - 1e-5).all()

    def test_classes_without_exemplars_come_last_and_are_finite(self, toy):
        result = quick(replace(toy, tasks=toy.tasks[:2]), ICaRL(memory=12))
        logits = result.learner.predict(result.model, toy[0].test.x)
        assert (logits[:, 4:] == -BEYOND).all() and logits.isfinite().all()
        assert logits[:, :4].min() > -BEYOND

    def test_before_there_are_means_the_network_predicts(self, toy):
        learner, model = started(ICaRL(memory=12), toy), models.mlp(toy).eval()
        assert torch.equal(learner.predict(model, toy[0].test.x), model(toy[0].test.x))

    def test_exemplars_are_those_of_herding_by_the_trained_network(self, toy):
        result = quick(toy, ICaRL(memory=12))
        model = models.mlp(toy)
        kept = result.learner.store.all()
        for task in toy:
            set_weights(model, result.trained[task.index])
            order = herding(normalize(models.features(model, task.train.x)), task.train.y)
            for label in task.classes:
                best = order[task.train.y[order] == label][:2]
                mine = kept["x"][kept["y"] == label]
                assert torch.equal(mine.sort(0).values, task.train.x[best].sort(0).values)

    def loss_of(self, toy, now):
        """The loss on the rows of task `now`, whose teacher is another network, and by the paper's sum."""
        learner, model, teacher = started(ICaRL(memory=12), toy), models.mlp(toy), models.mlp(toy, seed=1)
        learner.on_consolidated(teacher, toy[now - 1])
        rows = torch.arange(0, 21, 2)
        batch = toy[now].batch(rows)
        batch.y = torch.arange(len(rows)) % (2 * now + 2)
        with torch.no_grad():
            g, q = model(batch.x).sigmoid().double(), teacher.eval()(batch.x).sigmoid().double()
        total = 0.0
        for row, y in enumerate(batch.y.tolist()):
            for c in range(2 * now + 2):
                t = q[row, c] if c < 2 * now else float(c == y)
                total -= t * g[row, c].log() + (1 - t) * (1 - g[row, c]).log()
        return learner.loss(model, batch).double(), total / len(rows)

    @pytest.mark.parametrize("now", [1, 2])
    def test_the_loss_is_the_papers_sum(self, toy, now):
        ours, theirs = self.loss_of(toy, now)
        assert ours.item() == pytest.approx(float(theirs), rel=1e-5)

    def test_classes_to_come_get_no_gradient(self, toy):
        learner, model = started(ICaRL(memory=12), toy), models.mlp(toy)
        learner.loss(model, toy[1].batch(torch.arange(8))).backward()
        grad = model.linear.weight.grad
        assert (grad[4:] == 0).all() and (grad[:4] != 0).any()

    def test_it_forgets_less_than_fine_tuning(self, toy):
        assert quick(toy, ICaRL(memory=12)).summary()["acc"] > quick(toy).summary()["acc"] + 0.2

    def test_classes_that_come_again_are_refused_before_training(self):
        with pytest.raises(ValueError, match="use ER or BiC there"):
            quick(domains(), ICaRL(memory=12))


class TestBiC:
    def test_a_share_of_each_class_is_kept_apart(self, toy):
        learner = started(BiC(memory=24, validation=0.25), toy)
        learner.begin_task(models.mlp(toy), toy[0])
        y = toy[0].train.y
        for label in toy[0].classes:
            assert learner.apart[y == label].sum() == round(0.25 * int((y == label).sum()))

    @pytest.mark.parametrize(("count", "apart"), [(1, 0), (2, 1), (3, 1)])
    def test_one_row_a_class_is_kept_apart_where_another_is_left(self, toy, count, apart):
        rows = (toy[0].train.y == 0).nonzero().squeeze(1)[:count]
        task = replace(toy[0], train=toy[0].train[rows])
        learner = started(BiC(memory=24), toy)
        learner.begin_task(models.mlp(toy), task)
        assert learner.apart.sum() == apart

    def test_the_memories_never_mix(self, toy):
        class Watched(BiC):
            def begin_task(self, model, task):
                super().begin_task(model, task)
                self.parts = [*getattr(self, "parts", []), self.apart]

        learner = quick(toy, Watched(memory=24, validation=0.25)).learner
        x = torch.cat([task.train.x for task in toy])
        apart = torch.cat(learner.parts)
        for store, rows in ((learner.store, x[~apart]), (learner.reserve, x[apart])):
            assert (store.all()["x"][:, None] == rows).all(-1).any(1).all()
        assert len(learner.store) + len(learner.reserve) == 24 and len(learner.reserve) == 6
        assert torch.equal(learner.held_out(toy[2]).x, learner.reserve.all()["x"])

    @pytest.mark.parametrize(
        ("memory", "share", "apart"), [(50, 0.1, 6), (200, 0.1, 20), (8, 0.1, 4), (2, 0.1, 1), (3, 0.9, 2)]
    )
    def test_the_memory_is_divided(self, toy, memory, share, apart):
        learner = started(BiC(memory=memory, validation=share), toy)
        assert (learner.store.capacity, learner.reserve.capacity) == (memory - apart, apart)

    def test_rows_kept_apart_give_no_gradient(self, toy):
        learner, model = started(BiC(memory=24, validation=0.25), toy), models.mlp(toy)
        learner.begin_task(model, toy[0])
        x, y = toy[0].train.x.clone(), toy[0].train.y.clone()
        x[learner.apart], y[learner.apart] = 7.0, 1 - y[learner.apart]
        other = replace(toy[0], train=Examples(x, y))
        gradients = []
        for task in (toy[0], other):
            model.zero_grad()
            loss = learner.loss(model, task.batch(torch.arange(21)))
            loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert equal(*gradients)
        kept = (~learner.apart).nonzero().squeeze(1)
        assert torch.allclose(loss, cross_entropy(model(toy[0].train.x[kept]), toy[0].train.y[kept]))

    def test_a_step_of_rows_kept_apart_alone_is_finite(self, toy):
        learner, model = started(BiC(memory=24), toy), models.mlp(toy)
        learner.begin_task(model, toy[0])
        assert learner.loss(model, toy[0].batch(learner.apart.nonzero().squeeze(1))) == 0

    def test_the_loss_is_the_papers(self, toy):
        """The reference twin in the third task, four old classes and two new ones."""
        learner, model, teacher = started(BiC(memory=24), toy), models.mlp(toy), models.mlp(toy, seed=1)
        learner.begin_task(model, toy[2])
        learner.teacher = get_weights(teacher)
        learner.teacher_correction = torch.tensor([[1, 1, 0.5, 0.5, 1, 1], [0, 0, -0.3, -0.3, 0, 0]])
        batch = toy[2].batch((~learner.apart).nonzero().squeeze(1))
        o, taught = model(batch.x), teacher(batch.x)
        taught = torch.cat([taught[:, :2], 0.5 * taught[:, 2:4] - 0.3], 1)
        distilled = -((taught / 2).softmax(1) * (o[:, :4] / 2).log_softmax(1)).sum(1).mean()
        expected = cross_entropy(o, batch.y) / 3 + distilled * 2 / 3
        assert torch.allclose(learner.loss(model, batch), expected)

    def test_only_the_newest_classes_logits_are_corrected(self, toy, corrected):
        learner, model, x = corrected.learner, corrected.model.eval(), toy[0].test.x
        scale, shift = learner.correction
        raw, logits = model(x), learner.predict(model, x)
        assert torch.equal(raw[:, :4], logits[:, :4])
        assert torch.equal(logits[:, 4:], scale[4] * raw[:, 4:] + shift[4])
        assert scale[4] == scale[5] != 1 and shift[4] == shift[5] != 0

    def test_the_correction_lowers_the_validation_loss(self, toy, corrected):
        learner, model = corrected.learner, corrected.model.eval()
        rows = learner.held_out(toy[2])
        loss = cross_entropy(learner.predict(model, rows.x), rows.y)
        assert loss < cross_entropy(model(rows.x), rows.y)

    def test_classes_to_come_are_left_alone(self, toy):
        learner = quick(replace(toy, tasks=toy.tasks[:2]), BiC(memory=24)).learner
        assert (learner.correction[0, 4:] == 1).all() and (learner.correction[1, 4:] == 0).all()
        assert (learner.correction[0, 2:4] != 1).all()

    def test_the_first_task_is_not_corrected(self, toy):
        learner = quick(replace(toy, tasks=toy.tasks[:1]), BiC(memory=24)).learner
        assert torch.equal(learner.correction, learner._identity())

    def test_teacher_and_predictions_have_corrections_of_their_own(self, pictures):
        learner = quick(pictures, BiC(memory=24), DeployOnly(), model=toys.small_convnet).learner
        assert not torch.equal(learner.correction, learner.teacher_correction)

    def test_the_minimum_has_no_gradient_and_no_better_neighbour(self):
        g = torch.Generator().manual_seed(0)
        logits = 2 * torch.randn(60, 5, generator=g, dtype=torch.float64)
        y = torch.randint(0, 5, (60,), generator=g)
        logits[:, 3:] += 2
        new = torch.tensor([False, False, False, True, True])

        def objective(ab):
            corrected = torch.cat([logits[:, :3], ab[0] * logits[:, 3:] + ab[1]], 1)
            return cross_entropy(corrected, y) + ((ab[0] - 1) ** 2 + ab[1] ** 2) / 120

        ab = fitted_bias(logits, y, new).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(ab), ab)
        assert gradient.abs().max() < 1e-6
        steps = 1e-2 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [-1, -1]], dtype=torch.float64)
        assert all(objective(ab + step) > objective(ab) for step in steps)

    def test_a_known_bias_is_undone(self):
        """Labels drawn from the softmax of o, with the new classes shown as (o - b) / a."""
        g = torch.Generator().manual_seed(0)
        o = 2 * torch.randn(4000, 4, generator=g, dtype=torch.float64)
        y = torch.multinomial(o.softmax(1), 1, generator=g).squeeze(1)
        new = torch.tensor([False, False, True, True])
        shown = torch.where(new, (o + 1.5) / 0.5, o)
        assert torch.allclose(fitted_bias(shown, y, new), torch.tensor([0.5, -1.5], dtype=torch.float64), atol=0.1)

    def test_rows_told_apart_perfectly_have_a_finite_correction(self):
        y = torch.arange(4)
        ab = fitted_bias(20 * torch.eye(4, dtype=torch.float64), y, y > 1)
        assert ab.isfinite().all() and ab.abs().max() < 2

    def test_without_the_gradient_mode_it_fits_too(self):
        y = torch.arange(4)
        logits = torch.eye(4, dtype=torch.float64)
        with torch.no_grad():
            ab = fitted_bias(logits, y, y > 1)
        assert torch.equal(ab, fitted_bias(logits, y, y > 1))

    def test_it_forgets_less_than_fine_tuning(self, toy):
        assert quick(toy, BiC(memory=24)).summary()["acc"] > quick(toy).summary()["acc"] + 0.2

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"validation": 0.0}, "validation: 0.0"),
            ({"validation": 1.0}, "validation: 1.0"),
            ({"memory": 1}, "memory: 1"),
            ({"batch": 0}, "batch: 0"),
        ],
    )
    def test_bad_settings_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            BiC(**settings)


def test_the_defaults_are_records():
    for learner in (GDumb(), ICaRL(), BiC(), GDumb(memory=7, cutmix=0.0)):
        assert eval(repr(learner)) == learner
        assert isinstance(learner, ER)
