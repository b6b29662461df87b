"""A run that is interrupted and goes on from its checkpoint is the undisturbed run, bit for bit."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import toys
from clkit import data, models, store, weights
from clkit.consolidation import CLeWI, Merged
from clkit.data import Batch
from clkit.learners import ER, Learner
from clkit.training import Result, Training
from test_learners import SETTINGS
from toys import quick

pytestmark = pytest.mark.usefixtures("one_symmetry")
TASKS = 3
SHORT = Training(epochs=2, batch=8, lr=0.05)


class Interrupted(Exception):
    """What stops a run in these tests."""


def interrupted(learner: Learner, task: int, hook: str = "after_step") -> Learner:
    """A learner of the same record that stops the run in a hook of a task."""
    kind = type(learner)

    def stop(self, model, what):
        if (what.task if isinstance(what, Batch) else what).index == task:
            raise Interrupted
        return getattr(kind, hook)(self, model, what)

    twin = copy.deepcopy(learner)
    twin.__class__ = type(
        kind.__name__, (kind,), {"__qualname__": kind.__qualname__, "__module__": kind.__module__, hook: stop}
    )
    assert repr(twin) == repr(learner)
    return twin


class Dropped(nn.Module):
    """A network with dropout, BatchNorm's integer counters, and a buffer that no state_dict has."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training and not torch.compiler.is_compiling():
            self.calls += 1
        return self.net(nn.functional.dropout(x, 0.2, self.training))


def dropped_mlp(stream, *, seed=0):
    return Dropped(models.mlp(stream, hidden=(8,), seed=seed))


def dropped_convnet(stream, *, seed=0):
    return Dropped(toys.small_convnet(stream, seed=seed))


def same(a, b) -> bool:
    """Whether two trees are equal bit by bit, with their keys in the same order."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a: Result, b: Result) -> None:
    for name, value in vars(a).items():
        if name not in ("seconds", "model", "learner"):
            assert same(value, getattr(b, name)), name
    for part in ("state_dict", "named_buffers"):
        assert same(dict(getattr(a.model, part)()), dict(getattr(b.model, part)())), part
    assert same(a.learner.state_dict(), b.learner.state_dict())
    assert a.learner.setting.criterion.task == b.learner.setting.criterion.task


def resumed(stream, learner, consolidation, stops, path, hook="after_step", **more) -> Result:
    """The result of a run that is stopped in each of the tasks `stops` and started again every time."""
    for task in stops:
        with pytest.raises(Interrupted):
            quick(stream, interrupted(learner, task, hook), consolidation, checkpoint=path, **more)
    return quick(stream, learner, consolidation, checkpoint=path, **more)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_learner_goes_on_as_if_nothing_had_happened(name, tmp_path):
    stream, merge = toys.stream(TASKS), CLeWI(alpha=0.3, align=None, refresh=False, points=0)
    more = {"model": dropped_mlp, "training": SHORT}
    plain = quick(stream, SETTINGS[name], merge, **more)
    assert_same_run(plain, resumed(stream, SETTINGS[name], merge, range(TASKS), tmp_path / "run", **more))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("stop", range(TASKS))
@pytest.mark.parametrize("learner", [Learner(), ER(memory=9)], ids=["fine-tuning", "ER"])
def test_a_run_stopped_in_any_task_goes_on(learner, stop, keep, tmp_path):
    more = {"model": dropped_mlp, "training": SHORT, "keep": keep}
    plain = quick(toys.stream(TASKS), learner, **more)
    assert_same_run(plain, resumed(toys.stream(TASKS), learner, None, [stop], tmp_path / "run", **more))


@pytest.mark.parametrize("hook", ["begin_task", "loss", "after_training", "on_consolidated", "calibrate"])
def test_a_merging_run_stopped_in_any_hook_goes_on(hook, tmp_path):
    stream, more = toys.images(TASKS), {"model": dropped_convnet, "training": Training(1, 8, channels_last=True)}
    plain = quick(stream, ER(memory=9), CLeWI(points=3), **more)
    assert_same_run(plain, resumed(stream, ER(memory=9), CLeWI(points=3), [1, 2], tmp_path / "run", hook, **more))


class Everything:
    """Trains on from a mean of all that it is given, and deploys the base weights after the last task."""

    uses_history = True

    def __repr__(self):
        return "Everything()"

    def due(self, progress):
        return progress.end

    def __call__(self, context):
        given = [context.base, context.previous, context.current, *context.history]
        return Merged(weights.combine(given, [1 / len(given)] * len(given)), context.base, {"given": len(given)})


def test_base_previous_and_history_come_back(tmp_path):
    stream = toys.stream(4)
    plain = quick(stream, ER(memory=9), Everything(), training=SHORT)
    assert_same_run(plain, resumed(stream, ER(memory=9), Everything(), [1, 3], tmp_path / "run", training=SHORT))
    assert plain.reports[-1] == {"given": 6}


def test_frozen_parameters_stay_frozen(tmp_path):
    class Freezing(Learner):
        __module__, __qualname__ = Learner.__module__, "Freezing"  # told by its name, so that its twins count as it

        def on_consolidated(self, model, task):
            model.linear.requires_grad_(False)

    plain = quick(toys.stream(TASKS), Freezing(), training=SHORT)
    assert_same_run(plain, resumed(toys.stream(TASKS), Freezing(), None, [1], tmp_path / "run", training=SHORT))


def test_a_finished_run_comes_back_without_training(tmp_path, monkeypatch):
    monkeypatch.setattr("clkit.training.loop.time.perf_counter", itertools.count().__next__)  # a second a look
    stream = toys.stream(TASKS)
    first = quick(stream, ER(memory=9), checkpoint=tmp_path / "deep" / "run")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run"]
    again = quick(stream, interrupted(ER(memory=9), 2), checkpoint=str(tmp_path / "deep" / "run"))
    assert_same_run(first, again)
    assert again.seconds == first.seconds == TASKS


def test_an_augmented_run_goes_on(tmp_path):
    flipped = [replace(task, augment=data.Augment(crop=1, flip=True)) for task in toys.images(2)]
    stream = data.Stream("augmented", tuple(flipped), toys.images(2).classes)
    more = {"model": toys.small_convnet, "training": SHORT}
    plain = quick(stream, ER(memory=20), **more)
    assert_same_run(plain, resumed(stream, ER(memory=20), None, [1], tmp_path / "run", **more))


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path):
        quick(toys.stream(2), ER(memory=9), model=models.mlp(toys.stream(2)), checkpoint=tmp_path / "run")
        return tmp_path / "run"

    @pytest.mark.parametrize(
        ("learner", "change", "message"),
        [
            (ER(memory=8), {}, "learner memory: 9 there, 8 here"),
            (ER(memory=9), {"seed": 1}, "seed: 0 there, 1 here"),
            (ER(memory=9), {"training": SHORT}, "training lr: 0.1 there, 0.05 here"),
            (ER(memory=9), {"consolidation": CLeWI()}, r"consolidation class: \S+NoConsolidation there, \S+CLeWI here"),
            (ER(memory=9), {"model": models.mlp(toys.stream(2), seed=3)}, "initial weights"),
            (ER(memory=9), {"model": models.mlp}, r"model: Sequential\[.* there, clkit.models.mlp here"),
            (ER(memory=9), {"stream": toys.stream(3)}, r"classes: \['0', '1', '2', '3'\] there, \['0', .* '5'\] here"),
            (ER(memory=9), {"stream": toys.stream(2, rows=22)}, r"tasks 0: \w+ there, \w+ here"),
            (ER(memory=9), {"keep": False}, "keep: True there, False here"),
        ],
    )
    def test_a_checkpoint_of_another_run_is_refused(self, path, learner, change, message):
        before = path.read_bytes()
        more = {"model": models.mlp(toys.stream(2)), "stream": toys.stream(2)} | change
        with pytest.raises(ValueError, match=f"checkpoint: {path} is of another run.*{message}.*begin anew without it"):
            quick(more.pop("stream"), interrupted(learner, 0, "begin_task"), checkpoint=path, **more)
        assert path.read_bytes() == before

    def test_factories_of_one_name_are_told_apart_by_the_initial_weights(self, tmp_path):
        def factories(hidden):
            return lambda stream, seed: models.mlp(stream, hidden=(hidden,), seed=seed)

        quick(toys.stream(2), model=factories(8), checkpoint=tmp_path / "run")
        with pytest.raises(ValueError, match=r"another run \(model: .*initial weights: "):
            quick(toys.stream(2), model=factories(9), checkpoint=tmp_path / "run")

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
    def test_a_damaged_checkpoint_is_refused_and_left_alone(self, path, damage):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[-5] ^= 1
        broken = {"cut": whole[: len(whole) // 2], "flipped": bytes(flipped), "empty": b"", "text": b"hello" * 9}
        path.write_bytes(broken[damage])
        with pytest.raises(ValueError, match=r"is damaged or no saved run .* delete it to begin anew"):
            quick(toys.stream(2), interrupted(ER(memory=9), 0), model=models.mlp(toys.stream(2)), checkpoint=path)
        assert path.read_bytes() == broken[damage]

    def test_other_files_are_refused(self, tmp_path):
        store.save_tensors(tmp_path / "w", {"a": torch.zeros(3)}, {"tree": "x"})
        store.write_tree(tmp_path / "tree", [1, 2])
        (tmp_path / "folder").mkdir()
        for name, message in (("w", "no saved run"), ("tree", "no saved run"), ("folder", "has that name")):
            with pytest.raises(ValueError, match=message):
                quick(toys.stream(2), interrupted(Learner(), 0), checkpoint=tmp_path / name)

    def test_what_cannot_be_stored_is_named(self, tmp_path):
        class Odd(Everything):
            def __call__(self, context):
                return super().__call__(context)._replace(report={"object": object()})

        with pytest.raises(TypeError, match=r"/reports/0/object is <object"):
            quick(toys.stream(2), consolidation=Odd(), checkpoint=tmp_path / "run")
        assert not list(tmp_path.iterdir())


class TestTree:
    @pytest.fixture
    def tree(self):
        a, image = torch.randn(3, 4), torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        return {
            "z": [a, a[:2], a.T, image, torch.ones(2, 1, 3, 3).to(memory_format=torch.channels_last)],
            "views": [torch.arange(9)[2:5], image[:1], image[:, :1], image[:, :, ::2], torch.ones(1, 3).expand(2, 3)],
            "a": {"z/x": a, "z": {"x": a + 1}, "scalar": torch.tensor(3), "none": torch.empty(0, 3)},
            "types": [torch.ones(2, dtype=d) for d in (torch.bool, torch.bfloat16, torch.uint8, torch.complex64)],
            "arrays": [np.array([1.5, np.nan]), np.zeros((), np.float32), np.zeros((0, 2), np.int64)],
            "plain": [None, True, 1, 0.1, "ü", float("inf"), {}, []],
        }

    def test_it_comes_back_as_it_was(self, tree, tmp_path):
        store.write_tree(tmp_path / "tree", tree)
        again = store.read_tree(tmp_path / "tree")
        assert same(tree, again)
        assert again["z"][0] is again["a"]["z/x"]
        assert [t.stride() for t in again["z"]] == [t.stride() for t in tree["z"]]

    def test_it_is_written_whole_or_not_at_all(self, tree, tmp_path, monkeypatch):
        store.write_tree(tmp_path / "tree", [1])

        def fail(*args, **kwargs):
            raise OSError("the disk is full")

        monkeypatch.setattr("clkit.store.files.save_file", fail)
        with pytest.raises(OSError, match="full"):
            store.write_tree(tmp_path / "tree", tree)
        assert store.read_tree(tmp_path / "tree") == [1]
        assert [path.name for path in tmp_path.iterdir()] == ["tree"]


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on(tmp_path):
    stream, more = (
        toys.images(TASKS),
        {"model": dropped_convnet, "training": replace(SHORT, deterministic=True), "device": "cuda"},
    )
    for name in ("fine-tuning", "ER", "DER++"):
        plain = quick(stream, SETTINGS[name], CLeWI(points=3), **more)
        assert_same_run(plain, resumed(stream, SETTINGS[name], CLeWI(points=3), [1, 2], tmp_path / name, **more))
