"""The data buffer: what is kept, what takes whose place, and its two ends, fine-tuning and joint training."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import toys
from clkit import data
from clkit.consolidation import CLeWI
from clkit.data import Augment
from clkit.learners import Criterion, DataBuffer, Joint, Learner, Setting, Sum
from clkit.training import Training
from clkit.weights import equal
from toys import quick


@pytest.fixture(scope="module")
def toy():
    return toys.stream()


def filled(learner, stream, tasks=2, seed=0):
    """A learner as the loop would start it, with the data of some tasks behind it."""
    criterion = Criterion(stream, "all", 0.0, torch.device("cpu"))
    learner.start(Setting(torch.Generator().manual_seed(seed), criterion, len(stream.classes), 8, 0.0))
    for task in stream.tasks[:tasks]:
        learner.after_training(torch.nn.Identity(), task)
    return learner


def mixed_by(learner, batch):
    """The batch with rows of the buffer in the place of some of its own."""
    return learner.replayed(torch.nn.Identity(), batch)


def same(a, b):
    return all(equal(x, y) for x, y in zip(a.trained, b.trained, strict=True))


def rows(examples):
    return {(*x.flatten().tolist(), y) for x, y in zip(examples.x, examples.y.tolist(), strict=True)}


@pytest.mark.parametrize("mixing", ["concatenate", "half"])
class TestBoth:
    def test_nothing_kept_is_fine_tuning_bit_for_bit(self, toy, mixing):
        result = quick(toy, DataBuffer(0.0, mixing))
        assert same(result, quick(toy)) and result.learner.past is None
        assert torch.equal(result.learner.examples(toy[1]).x, Learner.examples(result.learner, toy[1]).x)

    @pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.1, 2), (0.5, 10), (1.0, 21)])
    def test_a_share_of_each_task_is_kept(self, toy, mixing, share, count):
        past = quick(toy, DataBuffer(share, mixing)).learner.past
        assert len(past) == 3 * count == len(rows(past))
        for task in toy:
            mine = torch.isin(past.y, torch.tensor(task.classes))
            assert mine.sum() == count and rows(past[mine]) <= rows(task.train)

    def test_what_is_kept_is_drawn_at_random(self, toy, mixing):
        counts = np.zeros(21)
        for seed in range(200):
            kept = filled(DataBuffer(0.2, mixing), toy, 1, seed).past
            counts += (toy[0].train.x[:, None] == kept.x[None]).all(-1).any(-1).numpy()
        assert counts.sum() == 200 * 4 and np.abs(counts / 200 - 4 / 21).max() < 0.12

    def test_a_batch_keeps_its_size_and_its_raw_rows(self, toy, mixing):
        learner, batch = filled(DataBuffer(0.5, mixing), toy), toy[2].batch(torch.arange(9))
        mixed = mixed_by(learner, batch)
        assert mixed.x.shape == batch.x.shape and mixed.raw is batch.raw and mixed.size == 9
        own = (mixed.y == batch.y) & (mixed.x == batch.x).all(-1)
        assert 0 < own.sum() < 9
        kept = rows(learner.past)
        others = zip(mixed.x[~own].tolist(), mixed.y[~own].tolist(), strict=True)
        assert all((*x, y) in kept for x, y in others)
        assert torch.equal(batch.x, toy[2].train.x[:9])

    def test_consolidations_see_the_buffer(self, toy, mixing):
        result = quick(toy, DataBuffer(0.5, mixing), CLeWI(alpha=0.3, align=None, points=0))
        assert torch.equal(result.learner.examples(toy[2]).x, result.learner.past.x)
        assert len(result.inputs[0]) == 10 and len(result.inputs[2]) == 30

    def test_none_of_it_is_held_out(self, toy, mixing):
        with pytest.raises(ValueError, match=r"holdout: .* DataBuffer.* keeps none"):
            quick(toy, DataBuffer(0.5, mixing), replace(CLeWI(), holdout=0.5))

    def test_replayed_rows_are_augmented_like_the_others(self, mixing):
        plain = toys.images()
        stream = replace(plain, tasks=tuple(replace(task, augment=Augment(shift=2)) for task in plain))
        learner = filled(DataBuffer(1.0, mixing), stream, 1)
        batch = stream[1].batch(torch.arange(24), torch.Generator().manual_seed(0))
        mixed = mixed_by(learner, batch)
        replayed = mixed.x[mixed.y < 2]
        stored = stream[0].prepare(stream[0].train.x)
        as_stored = (replayed[:, None] == stored[None]).flatten(2).all(-1).any(-1)
        assert len(replayed) and as_stored.float().mean() < 0.5

    def test_it_may_be_the_first_of_a_sum(self, toy, mixing):
        assert same(quick(toy, Sum(DataBuffer(0.3, mixing))), quick(toy, DataBuffer(0.3, mixing)))


def test_concatenate_replaces_rows_in_proportion(toy):
    """Two tasks behind and one at hand, all kept: two rows of three are of the buffer."""
    learner, batch = filled(DataBuffer(1.0), toy), toy[2].batch(torch.arange(20))
    shares = [float((mixed_by(learner, batch).y < 4).float().mean()) for _ in range(300)]
    assert np.mean(shares) == pytest.approx(2 / 3, abs=0.02) and np.std(shares) > 0.05
    little = filled(DataBuffer(0.1), toy)
    assert np.mean([float((mixed_by(little, batch).y < 4).float().mean()) for _ in range(300)]) == pytest.approx(
        4 / 25, abs=0.02
    )


def test_half_replaces_half_however_small_the_buffer(toy):
    learner = filled(DataBuffer(0.05, "half"), toy)
    for count, replaced in ((8, 4), (9, 4), (1, 0)):
        assert (mixed_by(learner, toy[2].batch(torch.arange(count))).y < 4).sum() == replaced


def accuracy(learner, training):
    return quick(data.split(data.digits(), 5), learner, training=training, keep=False).summary()["acc"]


def test_everything_kept_comes_near_joint_training():
    """With half of every batch for the newest task it is further off, however long the training."""
    training = Training(epochs=10, batch=16, lr=0.1)
    joint, whole, half = (accuracy(l, training) for l in (Joint(), DataBuffer(1.0), DataBuffer(1.0, "half")))
    assert abs(joint - whole) < 0.03 and abs(joint - half) < 0.08


def test_the_more_is_kept_the_less_is_forgotten():
    nothing, little, more = (accuracy(DataBuffer(s), Training(epochs=4, batch=32, lr=0.1)) for s in (0.0, 0.02, 0.2))
    assert nothing + 0.05 < little and little + 0.2 < more


def test_token_targets_go_with_their_rows():
    stream = toys.tokens(rows=12)
    learner = filled(DataBuffer(1.0, "half"), stream, 1)
    mixed = mixed_by(learner, stream[1].batch(torch.arange(6)))
    assert (mixed.x[:3] < 4).all() and (mixed.x[3:] >= 4).all()
    assert torch.equal(mixed.x[:, 1:], mixed.y[:, :-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataBuffer(-0.1), "share: -0.1"),
        (lambda: DataBuffer(1.1), "share: 1.1"),
        (lambda: DataBuffer(float("nan")), "share: nan"),
        (lambda: DataBuffer(mixing="join"), "mixing: 'join' is unknown; choose one of concatenate, half"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
