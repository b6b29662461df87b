"""What each rule that keeps examples is."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from clkit.consolidation import CLeWI, Merged, NoConsolidation
from clkit.data import Examples, Stream
from clkit.learners import AGEM, DER, ER, ERACE, GEM, MIR, BiC, DERpp, GDumb, Joint, Learner, MemoryOnly, Setting
from clkit.learners.base import Criterion
from clkit.learners.projection import flat_gradient, projected, projected_on_all, set_gradient
from clkit.weights import equal
from toys import QUICK, domains, quick

laws = settings(max_examples=50, deadline=None)
vectors = st.integers(0, 10**6).map(lambda s: torch.Generator().manual_seed(s))


@pytest.fixture(scope="module")
def toy() -> Stream:
    return toys.stream()


@pytest.fixture(scope="module")
def fine_tuned(toy):
    return quick(toy, Learner())


def shuffled() -> Stream:
    """Three tasks whose classes are in no order: 4, 1; 5, 0; 2, 3."""
    order = torch.tensor([4, 1, 5, 0, 2, 3])

    def renamed(part):
        return Examples(part.x, order[part.y])

    parts = (
        replace(
            t, classes=tuple(order[list(t.classes)].tolist()), **{n: renamed(getattr(t, n)) for n in ("train", "test")}
        )
        for t in toys.stream()
    )
    return replace(toys.stream(), tasks=tuple(parts))


def small(stream: Stream) -> torch.nn.Module:
    return toys.small_reader(stream) if stream[0].train.y.ndim > 1 else toys.models.mlp(stream)


def started(learner, stream, task=0, batch=8, labels="all"):
    """A learner and a criterion as the loop would start them, at the given task."""
    criterion = Criterion(stream, labels, 0.0, torch.device("cpu"))
    learner.start(Setting(torch.Generator().manual_seed(0), criterion, len(stream.classes), batch, 0.0))
    criterion.begin_task(stream[task])
    return learner


def at_rate(stream, lr=0.1):
    """The third task's first batch, as of a step at a learning rate."""
    batch = stream[2].batch(torch.arange(8))
    batch.lr = lr
    return batch


def test_a_memory_that_is_not_replayed_changes_nothing(fine_tuned, toy):
    result = quick(toy, MemoryOnly(memory=12))
    assert all(equal(a, b) for a, b in zip(result.trained, fine_tuned.trained, strict=True))
    assert len(result.learner.store) == 12


@pytest.mark.parametrize("learner", [AGEM(memory=12), GEM(memory=12), ERACE(memory=12), Joint()])
def test_the_first_task_is_fine_tuning_without_earlier_tasks(fine_tuned, toy, learner):
    result = quick(toy, learner)
    assert equal(result.trained[0], fine_tuned.trained[0])
    assert not equal(result.trained[1], fine_tuned.trained[1])


class TestAGEM:
    @laws
    @given(vectors)
    def test_the_projection_does_not_go_against_the_reference(self, g):
        gradient, reference = torch.randn(2, 30, generator=g, dtype=torch.float64)
        result = projected(gradient, reference)
        assert result @ reference >= -1e-12
        if gradient @ reference >= 0:
            assert torch.equal(result, gradient)
        else:  # the nearest such vector: what was taken out lies along the reference
            assert torch.allclose(
                gradient - result, ((gradient - result) @ reference) / reference.square().sum() * reference
            )

    def test_a_reference_of_zero_changes_nothing(self):
        gradient = torch.randn(5)
        assert torch.equal(projected(gradient, torch.zeros(5)), gradient)

    def test_in_training_no_step_goes_against_its_reference(self, toy):
        products = []

        class Watched(AGEM):
            def adjust_gradients(self, model, batch):
                if len(self.store):
                    twin = copy.copy(self)
                    twin.setting = copy.copy(self.setting)
                    twin.setting.generator = torch.Generator()
                    twin.setting.generator.set_state(self.setting.generator.get_state())
                    rows = twin.store.sample(self.setting.batch, twin.setting.generator)
                    reference = flat_gradient(model, self.setting.criterion(model(batch.prepare(rows["x"])), rows["y"]))
                    before = flat_gradient(model) @ reference
                    super().adjust_gradients(model, batch)
                    products.append((before.item(), (flat_gradient(model) @ reference).item()))

        quick(toy, Watched(memory=12))
        before, after = np.array(products).T
        assert (before < 0).any() and (after >= -1e-5).all()

    def test_the_newest_task_is_in_the_memory_when_weights_are_combined(self, toy):
        result = quick(toy, AGEM(memory=1000))
        assert [len(x) for x in result.inputs] == [21, 42, 63]

    def test_the_released_memory_is_one_batch_a_task_after_the_merge(self, toy):
        """As in CLeWI's code: matching and statistics see earlier tasks alone."""
        shown = []

        class Noting(NoConsolidation):
            def due(self, progress):
                return progress.end

            def __call__(self, context):
                shown.append(len(context.inputs))
                return Merged(context.current, context.current)

        for learner in (AGEM(memory=1000, fill="batch"), GEM(memory=1000, fill="batch")):
            result = quick(toy, learner, Noting())
            assert shown == [0, 8, 16] and len(result.learner.store) == 24
            assert torch.bincount(result.learner.store.all()["y"] // 2).tolist() == [8] * 3
            shown.clear()

    def test_gradients_survive_the_way_through_one_vector(self, toy):
        net = toys.models.mlp(toy)
        net(toy[0].train.x).sum().backward()
        before = [p.grad.clone() for p in net.parameters()]
        set_gradient(net, flat_gradient(net))
        assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before, strict=True))


class TestGEM:
    @laws
    @given(vectors, st.integers(1, 6))
    def test_the_projection_goes_against_no_task_and_is_the_nearest(self, g, tasks):
        gradient = torch.randn(40, generator=g, dtype=torch.float64)
        references = torch.randn(tasks, 40, generator=g, dtype=torch.float64)
        result = projected_on_all(gradient, references, 0.0)
        assert ((references @ result) >= -0.05 * references.norm(dim=1)).all()  # the Gram matrix is regularised
        duals = torch.linalg.lstsq(references.T, result - gradient).solution
        assert (duals >= -1e-8).all()
        if ((references @ gradient) >= 0).all():
            assert torch.equal(result, gradient)

    def test_with_one_task_and_no_margin_it_is_a_gem(self):
        gradient, reference = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.0])
        ours = projected_on_all(gradient, reference[None], 0.0)
        assert torch.allclose(ours, projected(gradient, reference), atol=5e-3)

    def test_the_margin_favours_earlier_tasks(self):
        gradient, reference = torch.tensor([1.0, -0.2, 0.5]), torch.tensor([0.0, 1.0, 0.0])
        loose, firm = (projected_on_all(gradient, reference[None], m) @ reference for m in (0.0, 0.5))
        assert abs(loose) < 1e-3 and firm == pytest.approx(0.3, abs=1e-3)

    def test_each_stored_row_counts_for_its_own_task(self, toy):
        store = quick(toy, GEM(memory=12)).learner.store.all()
        assert torch.equal(store["group"] // 6, store["y"] // 2) and torch.equal(store["group"] % 6, store["y"])

    def test_tasks_that_share_classes_share_the_memory(self):
        """By class alone the newest task would have all of it."""
        learner = quick(domains(), GEM(memory=12)).learner
        assert torch.bincount(learner.store.all()["group"]).tolist() == [2] * 6
        learner.begin_task(toys.models.mlp(toys.stream()), domains()[2])
        assert [len(part["y"]) for part in learner.parts] == [4, 4, 4]

    def test_a_gradient_that_is_not_finite_is_left_to_the_run_to_report(self):
        gradient, references = torch.tensor([float("nan"), 1.0]), torch.eye(2)
        assert projected_on_all(gradient, references, 0.5) is gradient


class TestMIR:
    @pytest.mark.parametrize("make", [toys.stream, toys.images])
    @pytest.mark.parametrize("lr", [0.1, 0.02])
    def test_rises_are_what_a_real_step_does(self, make, lr):
        """The reference twin: a copy takes the step at the step's own rate, each example is judged by itself."""
        stream = make()
        model = toys.models.mlp if stream.shape == (6,) else toys.small_convnet
        net = quick(stream, ER(memory=20), model=model).model
        learner = started(MIR(memory=20), stream, 2)
        batch = at_rate(stream, lr)
        x, y = stream[0].prepare(stream[0].train.x), stream[0].train.y
        before = {n: b.clone() for n, b in net.state_dict().items()}
        rises = learner.rises(net.train(), batch, x, y)
        assert all(torch.equal(before[n], b) for n, b in net.state_dict().items())
        moved = copy.deepcopy(net)
        torch.nn.functional.cross_entropy(moved(batch.x), batch.y).backward()
        with torch.no_grad():
            for p in moved.parameters():
                p -= lr * p.grad
        moved.load_state_dict({n: b for n, b in net.state_dict().items() if "running" in n}, strict=False)
        for i in range(len(y)):
            losses = [torch.nn.functional.cross_entropy(m.eval()(x[i : i + 1]), y[i : i + 1]) for m in (net, moved)]
            assert rises[i].item() == pytest.approx((losses[1] - losses[0]).item(), abs=1e-5)
        assert rises.max() > 0

    def test_the_candidates_whose_loss_rises_most_are_replayed(self, toy):
        learner = started(MIR(memory=40, batch=3, candidates=40), toy, 2)
        net = toys.models.mlp(toy)
        for t in (0, 1):
            learner.store.offer(learner.setting.generator, x=toy[t].train.x, y=toy[t].train.y)
        batch = at_rate(toy)
        joined = learner.replayed(net, batch)
        stored = learner.store.all()
        rises = learner.rises(net, batch, batch.prepare(stored["x"]), stored["y"])
        worst = batch.prepare(stored["x"][rises.topk(3).indices])
        assert joined.size == 8 and len(joined.y) == 11
        assert {tuple(r.tolist()) for r in joined.x[8:]} == {tuple(r.tolist()) for r in worst}

    def test_scores_do_not_tie(self, toy):
        """The released code's do: there MIR is ER."""
        learner = started(MIR(memory=40), toy, 2)
        rises = learner.rises(toys.models.mlp(toy), at_rate(toy), toy[0].train.x, toy[0].train.y)
        assert len(rises.unique()) > 15


class TestDER:
    def test_with_both_weights_zero_it_is_fine_tuning_bit_for_bit(self, toy, fine_tuned):
        result = quick(toy, DERpp(memory=12, alpha=0, beta=0))
        assert all(equal(a, b) for a, b in zip(result.trained, fine_tuned.trained, strict=True))

    def test_without_labels_der_pp_is_der(self, toy):
        a, b = quick(toy, DER(memory=12, alpha=0.3)), quick(toy, DERpp(memory=12, alpha=0.3, beta=0))
        assert all(equal(x, y) for x, y in zip(a.trained, b.trained, strict=True))

    def test_stored_logits_are_those_of_the_training_pass(self, toy):
        seen = []

        class Spy(DERpp):
            def loss(self, model, batch):
                seen.append((batch.raw, model(batch.x).detach()))
                return super().loss(model, batch)

        learner = quick(toy, Spy(memory=1000)).learner
        store = learner.store.all()
        x, z = (torch.cat(part) for part in zip(*seen, strict=True))
        for row, logits in zip(store["x"], store["logits"], strict=True):
            assert torch.isclose(z[(x == row).all(1)], logits, atol=1e-6).all(1).any()

    def test_the_distance_to_stored_logits_is_zero_where_they_were_stored(self, toy):
        learner = started(DER(memory=8, alpha=1.0), toy)
        net, batch = toys.models.mlp(toy), toy[0].batch(torch.arange(8))
        first = learner.loss(net, batch)
        learner.after_step(net, batch)
        assert learner.loss(net, batch).item() == pytest.approx(first.item(), abs=1e-6)
        with torch.no_grad():
            net[-1].bias += 0.5
        moved, plain = learner.loss(net, batch), Learner.loss(learner, net, batch)
        assert (moved - plain).item() == pytest.approx(0.25, abs=1e-5)

    @pytest.mark.parametrize("refresh", [False, True])
    def test_refreshing_happens_after_a_merge_and_only_then(self, refresh):
        stream = toys.images()

        def stored(consolidation):
            learner = DERpp(memory=12, refresh=refresh)
            return quick(stream, learner, consolidation, model=toys.small_convnet)

        plain, merged = stored(None), stored(CLeWI(alpha=0.4))
        for result, anew in ((plain, False), (merged, refresh)):
            rows = result.learner.store.all()
            now = result.model.eval()(stream[0].prepare(rows["x"]))
            assert torch.allclose(now, rows["logits"], atol=1e-5) == anew


class TestERACE:
    @pytest.mark.parametrize("among", ["unseen", "present"])
    @pytest.mark.parametrize("labels", ["all", "seen", "task"])
    @pytest.mark.parametrize("make", [toys.stream, shuffled, toys.tokens])
    def test_every_row_competes_among_its_own_classes(self, among, labels, make):
        """The reference twin, row by row: batches of a few rows, so that classes of the task come late."""
        stream = make()
        learner, net = started(ERACE(memory=12, among=among), stream, labels=labels), small(stream)
        met: set[int] = set()
        for task in stream:
            learner.setting.criterion.begin_task(task)
            known = {c for t in stream.tasks[: task.index + 1] for c in t.classes}
            for step in range(4):
                batch = task.batch(torch.arange(2 * step, 2 * step + 2))
                present = set(batch.y.flatten().tolist()) - {-100}
                met |= present
                logits, y = net(batch.x).flatten(0, -2), batch.y.flatten()
                losses = []
                for z, label in zip(logits, y.tolist(), strict=True):
                    rivals = present if among == "present" else present | (set(range(len(z))) - met)
                    if among == "unseen" and task.index == 0:
                        rivals = set(range(len(z)))
                    if labels == "seen":
                        rivals = rivals & known
                    if labels == "task":
                        rivals = rivals & {c for t in stream for c in t.classes if label in t.classes}
                    if label != -100:
                        losses.append(z[sorted(rivals)].logsumexp(0) - z[label])
                assert learner.loss(net, batch).item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)

    def test_replayed_rows_compete_among_all(self, toy):
        learner = started(ERACE(memory=12), toy, 2)
        learner.store.offer(learner.setting.generator, x=toy[0].train.x, y=toy[0].train.y)
        learner.seen[:4] = True
        net, batch = toys.models.mlp(toy), toy[2].batch(torch.arange(8))
        state = learner.setting.generator.get_state()
        value = learner.loss(net, batch)
        learner.setting.generator.set_state(state)
        joined = learner.replayed(net, batch)
        logits = net(joined.x)
        current = torch.nn.functional.cross_entropy(logits[:8, 4:], batch.y - 4)
        assert value.item() == pytest.approx(
            (current + torch.nn.functional.cross_entropy(logits[8:], joined.y[8:])).item()
        )

    def test_a_new_batch_leaves_the_logits_of_earlier_classes_alone(self, toy):
        learner = started(ERACE(memory=12), toy, 1)
        learner.seen[:2] = True
        net, batch = toys.models.mlp(toy), toy[1].batch(torch.arange(8))
        learner.loss(net, batch).backward()
        gradient = net[-1].bias.grad
        assert (gradient[:2] == 0).all() and (gradient[2:] != 0).all()

    def test_smoothing_spreads_over_the_classes_that_compete(self, toy):
        learner = started(ERACE(memory=12, among="present"), toy, 2)
        learner.setting.criterion.smoothing = 0.1
        net, batch = toys.models.mlp(toy), toy[2].batch(torch.arange(8))
        twin = torch.nn.functional.cross_entropy(net(batch.x)[:, 4:], batch.y - 4, label_smoothing=0.1)
        assert torch.allclose(learner.loss(net, batch), twin)


class TestJoint:
    def test_every_row_seen_so_far_is_as_likely(self, toy):
        learner = started(Joint(), toy, 2)
        for t in (0, 1):
            learner.after_training(torch.nn.Identity(), toy[t])
        sizes = []

        class Count(torch.nn.Module):
            def forward(self, x):
                sizes.append(len(x))
                return torch.zeros(len(x), 6, requires_grad=True)

        learner.loss(Count(), toy[2].batch(torch.arange(8)))
        assert sizes == [24]

    def test_it_forgets_least(self, toy):
        assert quick(toy, Joint()).summary()["acc"] >= quick(toy, ER(memory=12)).summary()["acc"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DERpp(alpha=-1), "alpha: -1"),
        (lambda: DER(beta=0.5), "beta: 0.5; .*DER replays no labels"),
        (lambda: DERpp(policy="herding"), "policy: 'herding'"),
        (lambda: GEM(margin=-0.1), "margin: -0.1"),
        (lambda: GEM(policy="herding"), "policy: 'herding'"),
        (lambda: MIR(batch=32, candidates=10), "candidates: 10"),
        (lambda: quick(toys.stream(), MIR(candidates=7)), "candidates: 7, and 8 are replayed"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_herded_exemplars_are_the_nearest_to_their_class_mean():
    stream = toys.images()
    result = quick(stream, ER(memory=6, policy="herding"), model=toys.small_convnet, training=QUICK)
    kept = result.learner.store.all()
    assert torch.bincount(kept["y"]).tolist() == [1] * 6


@pytest.mark.parametrize("learner", [ER(policy="balanced"), MIR(policy="ring"), BiC(), GDumb(), AGEM(policy="herding")])
def test_labels_that_a_memory_cannot_sort_by_are_refused_before_any_work(learner):
    def never(stream, *, seed):
        net = toys.small_reader(stream, seed=seed)
        net.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
        return net

    with pytest.raises(ValueError, match="keeps rows by class"):
        quick(toys.tokens(), learner, model=never)
