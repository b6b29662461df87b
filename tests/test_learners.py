"""Every learner keeps the contract of the family; then what each rule is."""

import copy
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

import toys
from clkit import data
from clkit.data import Examples, Normalize, Stream, Task
from clkit.evaluation import outputs
from clkit.learners import (
    AGEM,
    DER,
    ER,
    ERACE,
    EWC,
    GEM,
    L2,
    LEARNERS,
    MAS,
    MIR,
    SI,
    BiC,
    Criterion,
    DataBuffer,
    DecoupledL2,
    DERpp,
    GDumb,
    ICaRL,
    Joint,
    Learner,
    LwF,
    MemoryOnly,
    OnlineEWC,
    PerTask,
    Sum,
)
from clkit.memory import Policy
from clkit.weights import equal, get_weights, lerp
from toys import QUICK, quick

SETTINGS = {
    "fine-tuning": Learner(),
    "joint": Joint(),
    "data buffer": DataBuffer(share=0.3),
    "data buffer half": DataBuffer(share=0.1, mixing="half"),
    "memory only": MemoryOnly(memory=12),
    "ER": ER(memory=12),
    "ER balanced": ER(memory=12, policy="balanced", batch=4),
    "ER herding": ER(memory=12, policy="herding"),
    "ER-ACE": ERACE(memory=12),
    "A-GEM": AGEM(memory=12),
    "GEM": GEM(memory=12),
    "MIR": MIR(memory=12, batch=4, candidates=8),
    "DER": DER(memory=12, alpha=0.5),
    "DER++": DERpp(memory=12),
    "DER++ refreshed": DERpp(memory=12, refresh=True),
    "GDumb": GDumb(memory=12, fit_epochs=4),
    "iCaRL": ICaRL(memory=12),
    "BiC": BiC(memory=12),
    "L2": L2(strength=0.5),
    "decoupled L2": DecoupledL2(strength=0.5),
    "EWC": EWC(strength=5.0),
    "EWC true labels": EWC(strength=5.0, labels="true", samples=7),
    "online EWC": OnlineEWC(strength=5.0, gamma=0.9),
    "SI": SI(strength=0.5),
    "MAS": MAS(strength=0.05),
    "LwF": LwF(),
    "per task": PerTask(),
    "per task nearest": PerTask(begin="nearest"),
    "ER + SI + LwF": Sum(ER(memory=12), SI(strength=0.5), LwF()),
}


@pytest.fixture(scope="module")
def toy() -> Stream:
    return toys.stream()


def test_every_learner_is_in_the_contract_suite():
    assert {type(learner) for learner in SETTINGS.values()} == {*LEARNERS.values(), Sum}


@pytest.mark.parametrize("name", SETTINGS)
class TestContract:
    def test_same_seed_same_bits_and_another_seed_others(self, toy, name):
        first, second, other = (quick(toy, SETTINGS[name], seed=seed) for seed in (1, 1, 2))
        for a, b in zip(first.weights, second.weights, strict=True):
            assert all(torch.equal(a[n], b[n]) for n in a)
        assert not equal(first.weights[0], other.weights[0])

    def test_settings_are_left_as_they_were_and_are_the_record(self, toy, name):
        learner = SETTINGS[name]
        before = (repr(learner), copy.deepcopy(vars(learner)))
        result = quick(toy, learner)
        assert (repr(learner), vars(learner)) == before
        assert result.config["learner"] == repr(learner) and eval(repr(learner)) == learner

    def test_the_first_task_lowers_the_loss(self, toy, name):
        if isinstance(SETTINGS[name], GDumb):
            pytest.skip("trains on its memory after the task, and the loss of its steps is zero")
        loss = quick(toy, SETTINGS[name]).training_loss[0]
        assert loss[-3:].mean() < loss[:3].mean()

    def test_state_saves_and_loads(self, toy, name):
        learner = quick(toy, SETTINGS[name]).learner
        twin = copy.deepcopy(SETTINGS[name])
        setting = copy.copy(learner.setting)
        setting.generator = torch.Generator()
        twin.start(setting)
        twin.load_state_dict(learner.state_dict())
        assert toys.same_tree(learner.state_dict(), twin.state_dict())
        assert torch.equal(learner.examples(toy[2]).x, twin.examples(toy[2]).x)

    def test_a_run_keeps_the_inputs_of_its_examples(self, toy, name):
        result = quick(toy, SETTINGS[name])
        assert torch.equal(result.inputs[2], result.learner.examples(toy[2]).x)


def test_replay_keeps_what_fine_tuning_forgets(toy):
    assert quick(toy, ER(memory=12)).summary()["acc"] > quick(toy, Learner()).summary()["acc"] + 0.2


@pytest.mark.parametrize(("once", "times"), [(False, 2), (True, 1)])
@pytest.mark.parametrize("rule", [ER, MemoryOnly, MIR, ERACE, DERpp])
def test_replay_offers_each_example_to_the_memory_in_every_epoch_or_once(toy, rule, once, times):
    store = quick(toy, rule(memory=1000, once=once)).learner.store
    assert store.seen == len(store) == times * 3 * 21
    x = torch.cat([task.train.x for task in toy] * times)
    assert sorted(store.all()["x"].tolist()) == sorted(x.tolist())


@pytest.mark.parametrize("learner", [AGEM(1000), GEM(1000), ICaRL(1000), GDumb(1000, fit_epochs=1), BiC(1000)])
def test_rules_that_choose_their_examples_are_offered_each_once(toy, learner):
    learner = quick(toy, learner).learner
    assert learner.store.seen + (learner.reserve.seen if learner.reserve else 0) == 3 * 21


def test_er_with_an_empty_memory_is_fine_tuning(toy):
    a, b = quick(toy, Learner()), quick(toy, ER(memory=1, batch=1))
    assert a.training_loss[0][0] == b.training_loss[0][0]
    assert a.training_loss[0][1] != b.training_loss[0][1]


@pytest.mark.parametrize("policy", get_args(Policy))
def test_held_out_rows_are_never_replayed_nor_shown(toy, policy):
    class Spy(ER):
        def start(self, setting):
            setting.holdout = 0.5
            super().start(setting)
            self.replays = []

        def replayed(self, model, batch):
            joined = super().replayed(model, batch)
            self.replays.append(joined.x[batch.size :])
            return joined

    learner = quick(toy, Spy(memory=20, policy=policy), training=replace(QUICK, epochs=4)).learner
    held, shown = learner.held_out(toy[2]).x, learner.examples(toy[2]).x
    assert len(held) == 10 and len(shown) == 10
    for rows in (torch.cat(learner.replays), shown):
        assert not (rows[:, None] == held[None]).all(-1).any()


class TestCriterion:
    """The label space of a loss."""

    @pytest.fixture
    def logits(self):
        return torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    y = torch.tensor([0, 1, 2, 3, 2, 3, 0, 1])

    def criterion(self, labels, smoothing=0.0, task=1):
        stream = toys.stream()
        criterion = Criterion(stream, labels, smoothing, torch.device("cpu"))
        criterion.begin_task(stream[task])
        return criterion

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_seen_is_cross_entropy_without_the_classes_to_come(self, logits, smoothing):
        ours = self.criterion("seen", smoothing)(logits, self.y)
        theirs = torch.nn.functional.cross_entropy(logits[:, :4], self.y, label_smoothing=smoothing)
        assert torch.allclose(ours, theirs)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_task_is_cross_entropy_within_each_rows_own_task(self, logits, smoothing):
        ours = self.criterion("task", smoothing)(logits, self.y, "none")
        for row, (l, y) in enumerate(zip(logits, self.y, strict=True)):
            own = l[2 * (y // 2) : 2 * (y // 2) + 2]
            theirs = torch.nn.functional.cross_entropy(own, y % 2, label_smoothing=smoothing)
            assert torch.allclose(ours[row], theirs)

    def test_all_is_plain_cross_entropy(self, logits):
        assert torch.equal(self.criterion("all")(logits, self.y), torch.nn.functional.cross_entropy(logits, self.y))

    @pytest.mark.parametrize(("labels", "silent"), [("all", 0), ("seen", 2), ("task", 4)])
    def test_a_class_outside_the_label_space_gets_no_gradient(self, logits, labels, silent):
        l = logits.clone().requires_grad_()
        self.criterion(labels)(l, self.y).backward()
        assert ((l.grad == 0).sum(1) == silent).all()

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_targets_without_a_loss_count_for_nothing(self, smoothing):
        logits, y = torch.randn(2, 5, 6), torch.randint(0, 6, (2, 5))
        y[0, 1] = y[1, 3:] = -100
        kept = y != -100
        for labels in ("all", "seen", "task"):
            criterion = self.criterion(labels, smoothing, task=2)
            assert torch.allclose(criterion(logits, y), criterion(logits[kept], y[kept]))
            assert torch.allclose(criterion(logits, y, "sum"), criterion(logits[kept], y[kept], "sum"))
            assert (criterion(logits, y, "none")[~kept.flatten()] == 0).all()

    def test_a_narrower_label_space(self, logits):
        among = torch.tensor([True, True, True, True, False, True])
        for labels, space in (("all", [0, 1, 2, 3, 5]), ("seen", [0, 1, 2, 3])):
            ours = self.criterion(labels, 0.1)(logits, self.y, among=among)
            theirs = torch.nn.functional.cross_entropy(logits[:, space], self.y, label_smoothing=0.1)
            assert torch.allclose(ours, theirs)

    def test_sequences_are_flattened(self):
        logits = torch.randn(2, 5, 6)
        y = torch.randint(0, 6, (2, 5))
        for labels in ("all", "seen", "task"):
            criterion = self.criterion(labels, task=2)
            flat = criterion(logits.flatten(0, 1), y.flatten())
            assert torch.allclose(criterion(logits, y), flat)
            assert torch.allclose(criterion(logits, y, "none").mean(), flat)


@pytest.mark.parametrize("labels", ["all", "seen", "task"])
@pytest.mark.parametrize("name", SETTINGS)
def test_token_streams_are_learned_or_refused_in_words(name, labels):
    training = toys.Training(epochs=1, batch=8, lr=0.05, labels=labels)
    learner = SETTINGS[name]
    first = learner.first if isinstance(learner, Sum) else learner
    if getattr(first, "policy", "reservoir") == "reservoir":
        quick(toys.tokens(), learner, model=toys.small_reader, training=training)
    else:
        with pytest.raises(ValueError, match=r"policy: .* \(tokens\); use policy=\"reservoir\""):
            quick(toys.tokens(), learner, model=toys.small_reader, training=training)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ER(memory=0), "memory: 0; give a whole number, at least 1"),
        (lambda: ER(batch=0), "batch: 0"),
        (lambda: ER(policy="x"), "policy: 'x' is unknown; choose one of reservoir, balanced, ring, herding"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_augmented_rows_are_stored_as_they_are():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 255, (40, 1, 8, 8), generator=g, dtype=torch.uint8)
    part = Examples(x, torch.arange(40) % 2)
    stream = Stream("s", (Task(0, "t", (0, 1), part, part, Normalize(), data.Augment(crop=2, flip=True)),), ("a", "b"))
    rows = quick(stream, ER(memory=40)).learner.store.all()["x"]
    assert rows.dtype == torch.uint8
    assert all((x == row).flatten(1).all(1).any() for row in rows)


class Slow(Learner):
    """A learner of a user's, no dataclass: predicts with a running mean of the weights, and counts what it has seen."""

    state = ("slow", "counts", "notes")

    def __init__(self, decay=0.9):
        self.decay = decay

    def start(self, setting):
        super().start(setting)
        self.slow, self.counts, self.notes = {}, {}, torch.nn.Linear(1, 1)

    def after_step(self, model, batch):
        now = get_weights(model)
        self.slow = lerp(now, self.slow or now, self.decay)

    def after_training(self, model, task):
        torch.nn.init.constant_(self.notes.weight, float(task.index))
        self.counts[task.index] = (task.name, task.train[:2], task.train.y.float().mean(), None)

    def predict(self, model, x, task=None):
        return outputs(model, self.slow, x) if self.slow else model(x)


class Slower(Slow):
    state = ("steps",)

    def __init__(self, decay=0.9, *, every=2):
        super().__init__(decay)
        self.every = every

    def start(self, setting):
        super().start(setting)
        self.steps = 0

    def after_step(self, model, batch):
        self.steps += 1
        if self.steps % self.every == 0:
            super().after_step(model, batch)


class Heavier(ER):
    """A learner of a user's that derives from a dataclass and is none."""

    def __init__(self, memory, weight):
        super().__init__(memory)
        self.weight = weight

    def loss(self, model, batch):
        return self.weight * super().loss(model, batch)


@pytest.mark.parametrize("learner", [Slow(), Slower(0.8), Sum(Slower(every=3), EWC()), Heavier(9, weight=0.5)])
class TestAUsersLearner:
    def test_it_goes_on_from_a_checkpoint_bit_for_bit(self, toy, learner, tmp_path, monkeypatch):
        class Stop(Exception):
            pass

        def stop(task, *args, batch=Task.batch, **more):
            if task.index == 2:
                raise Stop
            return batch(task, *args, **more)

        plain = quick(toy, learner)
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(Task, "batch", stop)
            quick(toy, learner, checkpoint=tmp_path / "run")
        again = quick(toy, learner, checkpoint=tmp_path / "run")
        assert toys.same_tree(plain.learner.state_dict(), again.learner.state_dict())
        assert (plain.accuracy == again.accuracy).all() and equal(plain.weights[-1], again.weights[-1])

    def test_its_record_tells_settings_apart(self, learner):
        assert eval(repr(learner)) == learner == copy.deepcopy(learner)
        assert learner != Slow(0.5) and repr(Slower(0.5)) == "Slower(decay=0.5, every=2)"
        assert Heavier(9, 0.5) != Heavier(9, 0.4) and Slow() != Slower()


def test_state_that_cannot_be_kept_is_named(toy):
    class Odd(Learner):
        state = ("odd",)

        def start(self, setting):
            super().start(setting)
            self.odd = None

    learner = quick(toy, Odd()).learner
    learner.odd = {"a": [object()]}
    with pytest.raises(TypeError, match="state: 'odd' holds a object; give tensors"):
        learner.state_dict()
    learner.odd = torch.nn.Linear(1, 1)
    state, learner.odd = learner.state_dict(), None
    with pytest.raises(TypeError, match="state: 'odd' is None and takes no state; make the object in `start`"):
        learner.load_state_dict(state)


def test_settings_may_be_numbers_of_numpy():
    assert repr(ER(memory=np.int64(9))) == "ER(memory=9, batch=None, policy='reservoir', once=False)"
    assert repr(SI(np.float32(0.5))) == "SI(strength=0.5, xi=0.1)"
