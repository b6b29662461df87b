"""A finished run that is saved, loaded and goes on with more tasks is the run over all of them, bit for bit."""

import copy
import itertools
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import toys
from clkit import data, models, store, weights
from clkit.consolidation import EMA, HCMM, SFA, CLeWI, Merging
from clkit.data import Stream
from clkit.learners import ER, EWC, GDumb, Joint, Learner, PerTask, Sum
from clkit.tangent import Linearized
from clkit.training import Result, Training
from test_checkpoint import Dropped, assert_same_run, dropped_mlp, same
from test_grid import CONSOLIDATIONS, LEARNERS, scenario_of
from toys import quick

pytestmark = pytest.mark.usefixtures("one_symmetry")
SHORT = Training(epochs=1, batch=8, lr=0.05)


def cut(stream: Stream, tasks: int) -> Stream:
    """The first tasks of a stream; all its classes are named."""
    return replace(stream, tasks=stream.tasks[:tasks])


def kept(result: Result) -> dict:
    """What a run measured and kept."""
    return {name: part for name, part in vars(result).items() if name not in ("config", "model", "learner", "state")}


def assert_goes_on(stream, learner=None, consolidation=None, cuts=(2,), path=None, **more) -> tuple[Result, Result]:
    """That a run over `cuts` of a stream, one after another, and then all of it, is the whole run; gives the two."""
    more = {"training": SHORT} | more
    whole, result = quick(stream, learner, consolidation, **more), None
    for tasks in (*cuts, len(stream)):
        if path is not None and result is not None:
            result.save(path)
            result = Result.load(path)
        result = quick(cut(stream, tasks), learner, consolidation, resume=result, **more)
    assert result is not None
    ends = (*cuts, len(stream))
    known = np.array([min([end for end in ends if end > t + 1], default=len(stream)) for t in range(len(stream))])
    unknown = np.arange(len(stream)) >= known[:, None]
    for name in ("accuracy", "masked", "losses"):
        ours, theirs = getattr(result, name), getattr(whole, name)
        assert np.array_equal(np.isnan(ours), unknown) and np.array_equal(ours[~unknown], theirs[~unknown]), name
        setattr(result, name, theirs)
    for ours, theirs in zip(result.watched, whole.watched, strict=True):
        there = ~np.isnan(ours["accuracy"])
        assert there[: cuts[0]].all() and np.array_equal(ours["accuracy"][there], theirs["accuracy"][there])
        ours["accuracy"] = theirs["accuracy"]
    assert_same_run(result, whole)
    return result, whole


def fits(learner: str, consolidation: str) -> bool:
    """Whether a learner's memory can be held out, or its network corrected, as the consolidation asks."""
    rule, merge = LEARNERS[learner], CONSOLIDATIONS[consolidation]
    corrected = isinstance(rule, PerTask) and getattr(merge, "correction", "none") != "none"
    return not corrected and (rule.remembers or not getattr(merge, "holdout", 0))


def pairs() -> list[tuple[str, str]]:
    """Every learner and every consolidation at least once."""
    left, found = dict.fromkeys(LEARNERS), []
    for consolidation, spare in zip(CONSOLIDATIONS, itertools.cycle(LEARNERS)):
        fitting = [learner for learner in (*left, spare, "ER", "DER++") if fits(learner, consolidation)]
        found.append((fitting[0], consolidation))
        left.pop(fitting[0], None)
    return found + [(learner, "averaged") for learner in left]


@pytest.mark.parametrize(("learner", "consolidation"), pairs())
def test_every_learner_and_every_consolidation(learner, consolidation, tmp_path):
    more = {"model": toys.small_convnet, "path": tmp_path / "run"}
    assert_goes_on(toys.images(3, 16), LEARNERS[learner], CONSOLIDATIONS[consolidation], **more)


def test_every_member_is_among_the_pairs():
    assert {a for a, _ in pairs()} == {*LEARNERS} and {b for _, b in pairs()} == {*CONSOLIDATIONS}


@pytest.mark.parametrize(
    ("cuts", "more"),
    [
        ((1,), {}),
        ((3,), {"keep": False}),
        ((1, 2), {"watch": 0}),
        ((2, 4), {"watch": 2, "keep": False}),
        ((1, 2, 3, 4), {"watch": 2}),
        ((2, 2, 5), {"seed": 1}),
    ],
)
def test_any_number_of_times(cuts, more):
    result, whole = assert_goes_on(toys.stream(5), ER(memory=9), SFA(p=0.5), cuts, **more)
    assert result.summary() == whole.summary()
    assert result.trajectory().equals(whole.trajectory())


def linearised_mlp(stream, seed):
    return Linearized(models.mlp(stream, seed=seed))


def turned() -> Stream:
    """Pictures that are augmented."""
    tasks = (replace(task, augment=data.Augment(crop=1, flip=True)) for task in toys.images())
    return data.Stream("turned", tuple(tasks), toys.images().classes)


@pytest.mark.parametrize(
    ("stream", "model"),
    [
        (scenario_of("task"), toys.small_convnet),
        (scenario_of("domain"), toys.small_convnet),
        (toys.tokens(3), toys.small_reader),
        (toys.stream(3), dropped_mlp),
        (turned(), toys.small_convnet),
    ],
    ids=["task", "domain", "tokens", "dropout", "augmented"],
)
def test_in_every_scenario(stream, model, tmp_path):
    assert_goes_on(stream, ER(memory=9), EMA(0.9), path=tmp_path / "run", model=model)


@pytest.mark.parametrize(
    "longer", [data.permuted, lambda dataset, tasks: data.rotated(dataset, range(0, 9 * tasks, 9))]
)
def test_a_longer_stream_may_be_made_anew(longer, digits):
    few = replace(digits, train=digits.train[:60], test=digits.test[:40])
    more = {"learner": ER(memory=9), "model": dropped_mlp, "training": SHORT}
    result, whole = quick(longer(few, 2), **more), quick(longer(few, 4), **more)
    again = quick(longer(few, 4), resume=result, **more)
    assert same(again.weights, whole.weights) and np.array_equal(again.accuracy[1:], whole.accuracy[1:])
    assert again.config == whole.config != result.config


@pytest.mark.parametrize(
    ("learner", "consolidation", "model"),
    [
        (Learner(), HCMM(importance="fisher", correction="none"), linearised_mlp),
        (PerTask(begin="previous"), EMA(0.9), models.mlp),
        (GDumb(memory=9, fit_epochs=2), Merging("average", training="independent"), models.mlp),
        (Sum(ER(memory=9), EWC(strength=1.0)), CLeWI(points=3, align=None), models.mlp),
        (Joint(), SFA(p=0.4, anchor="uniform"), models.mlp),
    ],
    ids=["tangent", "per task", "GDumb", "sum", "history"],
)
def test_what_keeps_more_than_weights(learner, consolidation, model, tmp_path):
    assert_goes_on(toys.stream(4), learner, consolidation, (1, 3), tmp_path / "run", model=model)


def test_a_compiled_run_goes_on(monkeypatch):
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="eager"))
    assert_goes_on(toys.stream(), ER(memory=9), CLeWI(points=0, align=None), training=replace(SHORT, compile=True))


def test_one_result_goes_on_in_several_ways():
    stream, more = toys.stream(3), {"training": SHORT, "learner": ER(memory=9), "consolidation": EMA(0.9)}
    first = quick(cut(stream, 2), **more)
    before = copy.deepcopy({name: getattr(first, name) for name in (*kept(first), "config", "state")})
    tasks = list(stream)
    tasks[2] = replace(tasks[2], train=tasks[2].train[:9])
    other = replace(stream, tasks=tuple(tasks))
    for way in (stream, other, stream):
        whole = quick(way, **more)
        again = quick(way, resume=first, **more)
        assert same(again.weights, whole.weights) and same(again.learner.state_dict(), whole.learner.state_dict())
    assert same(before, {name: getattr(first, name) for name in before})


def test_every_task_of_a_result_that_went_on_counts(tmp_path):
    stream = toys.stream(4)
    result = quick(cut(stream, 3), training=SHORT, resume=quick(cut(stream, 1), training=SHORT))
    result.save(tmp_path / "run")
    tasks = [task if task.index != 2 else replace(task, test=task.test[:5]) for task in stream]
    for start in (result, tmp_path / "run"):
        with pytest.raises(ValueError, match=r"is of another run \(tasks 2: \w+ there, \w+ here\)"):
            quick(replace(stream, tasks=tuple(tasks)), training=SHORT, resume=start)


def test_the_result_s_model_and_learner_are_free_to_be_changed():
    stream = toys.stream(3)
    first, whole = (quick(cut(stream, n), ER(memory=9), training=SHORT) for n in (2, 3))
    weights.set_weights(first.model, first.weights[0])
    first.model.requires_grad_(False)
    first.learner.store.rows["x"].zero_()
    assert same(quick(stream, ER(memory=9), training=SHORT, resume=first).weights, whole.weights)


def test_flags_of_a_model_s_parts_come_back():
    class Settling(Learner):
        def on_consolidated(self, model, task):
            model[0].eval().requires_grad_(False)

    def net(stream, seed):
        return nn.Sequential(Dropped(nn.Linear(6, 8)), nn.Linear(8, len(stream.classes)))

    result, whole = assert_goes_on(toys.stream(3), Settling(), model=net)
    for model in (result.model, whole.model):
        assert not any(m.training for m in model[0].modules()) and not model[0].net.weight.requires_grad


class Counting(nn.Module):
    """A network that scales its answers by the number of its steps, which is in no buffer."""

    def __init__(self, net):
        super().__init__()
        self.net, self.steps = net, 0

    def forward(self, x):
        self.steps += self.training
        return self.net(x) * (1 + 0.01 * self.steps)


class Weighing(Learner):
    """A learner that weighs tasks by their number, which it counts without naming it in `state`."""

    def begin_task(self, model, task):
        self.begun = getattr(self, "begun", 0) + 1

    def loss(self, model, batch):
        return super().loss(model, batch) / self.begun


def test_plain_attributes_of_modules_and_learners_come_back(tmp_path):
    def counting(stream, seed):
        return Counting(models.mlp(stream, seed=seed))

    result, whole = assert_goes_on(toys.stream(4), Weighing(), None, (1, 3), tmp_path / "run", model=counting)
    assert result.model.steps == whole.model.steps > 9 and result.learner.begun == whole.learner.begun == 4


class Judged(Learner):
    """Fine-tuning beside a network of its own with an optimizer of its own, whose answers it adds."""

    state = ("net", "optimizer", "seen")

    def start(self, setting):
        super().start(setting)
        torch.manual_seed(0)
        self.net, self.seen = nn.Linear(6, setting.classes), {0: torch.zeros(2)}
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01, betas=(0.8, 0.9))

    def after_step(self, model, batch):
        self.optimizer.zero_grad()
        self.setting.criterion(self.net(batch.x), batch.y).backward()
        self.optimizer.step()
        self.seen[0] += len(batch.y)

    def predict(self, model, x, task=None):
        return model(x) + self.net(x)


def test_a_learner_s_own_network_and_optimizer_go_on(tmp_path):
    result, whole = assert_goes_on(toys.stream(4), Judged(), None, (1, 3), tmp_path / "run")
    assert torch.equal(result.learner.seen[0], whole.learner.seen[0]) and whole.learner.seen[0].min() == 84


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import toys
from clkit.consolidation import EMA
from clkit.learners import ER
toys.quick(toys.stream(3), ER(memory=9), EMA(0.9), resume=sys.argv[2]).save(sys.argv[3])
"""


def test_another_process_goes_on_to_the_same_bits(tmp_path):
    stream, more = toys.stream(3), {"learner": ER(memory=9), "consolidation": EMA(0.9)}
    first, second = tmp_path / "first", tmp_path / "second"
    quick(cut(stream, 2), **more).save(first)
    subprocess.run([sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(first), str(second)], check=True)
    here, there = quick(stream, resume=first, **more), Result.load(second)
    here.seconds = there.seconds
    assert same(kept(here), kept(there)) and same(here.config, there.config)
    assert_same_run(here, quick(stream, resume=second, **more))


def test_a_checkpoint_goes_on_with_a_longer_stream(tmp_path):
    stream, more = toys.stream(4), {"learner": ER(memory=9), "training": SHORT}
    first = quick(cut(stream, 2), checkpoint=tmp_path / "run", **more)
    by_result, by_file = (quick(stream, resume=start, **more) for start in (first, tmp_path / "run"))
    by_checkpoint = quick(stream, checkpoint=tmp_path / "run", **more)
    assert_same_run(by_result, by_file)
    assert_same_run(by_result, by_checkpoint)
    assert same(Result.load(tmp_path / "run").accuracy, by_result.accuracy)
    both = quick(stream, checkpoint=tmp_path / "other", resume=first, **more)
    assert_same_run(by_result, both)
    assert_same_run(by_result, quick(stream, checkpoint=tmp_path / "other", **more))


def test_the_file_of_an_unfinished_run_is_the_result_so_far(tmp_path):
    class Stop(Learner):
        def begin_task(self, model, task):
            if task.index == 2 and stopped:
                raise InterruptedError

    stopped = [True]
    with pytest.raises(InterruptedError):
        quick(toys.stream(4), Stop(), training=SHORT, checkpoint=tmp_path / "run")
    so_far = Result.load(tmp_path / "run")
    assert so_far.accuracy.shape == (2, 4) and len(so_far.weights) == 2
    assert so_far.summary() == quick(cut(toys.stream(4), 2), training=SHORT).summary() and "2 tasks" in repr(so_far)
    with pytest.raises(ValueError, match=r"learner class: .* there"):
        quick(toys.stream(4), Learner(), training=SHORT, resume=so_far)


class TestFile:
    @pytest.mark.parametrize("keep", [True, False])
    def test_it_has_all_that_the_result_had(self, keep, tmp_path):
        more = {"keep": keep, "watch": 0, "training": SHORT}
        result = quick(toys.stream(3), ER(memory=9), CLeWI(points=3, align=None), **more)
        result.save(str(tmp_path / "deep" / "run"))
        loaded = Result.load(str(tmp_path / "deep" / "run"))
        assert same(kept(loaded), kept(result)) and loaded.config == result.config
        assert repr(loaded) == repr(result) and loaded.summary() == result.summary()
        assert loaded.trajectory().equals(result.trajectory())
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run"]
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "deep" / "run").read_bytes()
        live = quick(toys.stream(3), ER(memory=9), CLeWI(points=3, align=None), **more, resume=loaded)
        assert_same_run(live, result)

    def test_it_holds_no_code(self, tmp_path):
        quick(toys.stream(2)).save(tmp_path / "run")
        for name in ("model", "learner"):
            with pytest.raises(AttributeError, match=rf"{name}: a file holds no code; run\(.* resume=result\)"):
                getattr(Result.load(tmp_path / "run"), name)
        with pytest.raises(AttributeError, match="acuracy: a Result has no such attribute"):
            _ = Result.load(tmp_path / "run").acuracy

    def test_home_is_understood(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        result = quick(toys.stream(2), checkpoint="~/a")
        result.save("~/b")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
        assert_same_run(quick(toys.stream(2), resume="~/b"), result)

    def test_what_is_damaged_or_foreign_is_refused(self, tmp_path):
        quick(toys.stream(2)).save(tmp_path / "run")
        whole = (tmp_path / "run").read_bytes()
        flipped = bytearray(whole)
        flipped[-5] ^= 1
        for content in (whole[:99], bytes(flipped), b"", b"hello" * 9):
            (tmp_path / "run").write_bytes(content)
            for read in (Result.load, lambda path: quick(toys.stream(2), resume=path)):
                with pytest.raises(ValueError, match=rf"{tmp_path / 'run'} is damaged or no saved run"):
                    read(tmp_path / "run")
        store.write_tree(tmp_path / "tree", {"past": 1})
        with pytest.raises(ValueError, match=r"tree is damaged or no saved run \(it holds something else\)"):
            Result.load(tmp_path / "tree")
        with pytest.raises(FileNotFoundError, match="none cannot be read"):
            quick(toys.stream(2), resume=tmp_path / "none")

    def test_a_file_of_a_gpu_is_read_without_one(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        quick(toys.stream(2)).save(tmp_path / "run")
        tensors, header = store.load_tensors(tmp_path / "run")
        marked = header["tree"].replace('{"tensor of this file"', '{"moved": true, "tensor of this file"')
        store.save_tensors(tmp_path / "run", tensors, {"tree": marked.replace('"device": "cpu"', '"device": "cuda"')})
        loaded = Result.load(tmp_path / "run")
        assert all(t.device.type == "cpu" for t in loaded.weights[1].values()) and loaded.summary()
        with pytest.raises(ValueError, match="device: cuda there, cpu here"):
            quick(toys.stream(2), resume=tmp_path / "run")


class Odd(Learner):
    """A learner with something in it that has no stable description."""

    def __init__(self, thing=None):
        self.thing = thing

    def __deepcopy__(self, memo):
        return type(self)(self.thing)


class Loose(Learner):
    """A learner that names in its state what no file can hold."""

    state = ("things",)

    def start(self, setting):
        super().start(setting)
        self.things = {1, 2}


class TestRefusals:
    @pytest.fixture
    def first(self):
        return quick(toys.stream(2), ER(memory=9), model=models.mlp(toys.stream(2)), training=SHORT)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"learner": ER(memory=8)}, "learner memory: 9 there, 8 here"),
            ({"seed": 1}, "seed: 0 there, 1 here"),
            ({"training": replace(SHORT, lr=0.1)}, "training lr: 0.05 there, 0.1 here"),
            ({"consolidation": CLeWI()}, r"consolidation class: \S+NoConsolidation there, \S+CLeWI here"),
            ({"model": models.mlp(toys.stream(2), seed=3)}, "initial weights"),
            ({"stream": toys.stream(3)}, r"classes: \['0', '1', '2', '3'\] there, .* the same classes\)"),
            ({"stream": toys.stream(2, rows=22)}, r"tasks 0: \w+ there, \w+ here; tasks 1"),
            ({"stream": replace(toys.stream(2), scenario="task")}, "scenario: class there, task here"),
            ({"stream": cut(toys.stream(2), 1)}, r"tasks 1: \w+ there, None here"),
            ({"keep": False}, "keep: True there, False here"),
            ({"watch": 3}, "watch: None there, 3 here"),
            ({"threads": 2}, "threads: 1 there, 2 here"),
        ],
    )
    def test_another_run_is_refused_by_name_before_any_work(self, first, change, message, monkeypatch):
        monkeypatch.setattr("clkit.training.loop._Loop.train", None)
        kept = {"stream": toys.stream(2), "learner": ER(memory=9), "model": models.mlp(toys.stream(2))}
        more = {**kept, "training": SHORT, **change}
        with pytest.raises(ValueError, match=rf"resume: Result\(.* is of another run \(.*{message}"):
            quick(more.pop("stream"), more.pop("learner"), resume=first, **more)

    @pytest.mark.parametrize("wrong", [3, nn.Linear(2, 2), {"state": 1}])
    def test_what_is_no_result_is_refused(self, wrong):
        with pytest.raises(ValueError, match=r"resume: .*; give an instance of Result or a path or a text or None"):
            quick(toys.stream(2), resume=wrong)

    def test_what_has_no_stable_description_runs_and_is_saved_to_be_read(self, tmp_path):
        result = quick(toys.stream(2), Odd(threading.Lock()))
        result.save(tmp_path / "run")
        assert same(Result.load(tmp_path / "run").weights, result.weights)
        for more in ({"resume": result}, {"checkpoint": tmp_path / "other"}):
            with pytest.raises(TypeError, match=r"learner.*lock.* has no stable description"):
                quick(toys.stream(2), Odd(threading.Lock()), **more)
        with pytest.raises(ValueError, match="is of another run"):
            quick(toys.stream(2), Odd(), resume=result)

    def test_what_no_file_can_hold_runs_and_is_saved_to_be_read(self, tmp_path):
        result = quick(toys.stream(2), Loose())
        result.save(tmp_path / "run")
        for start in (result, tmp_path / "run"):
            with pytest.raises(ValueError, match=r"resume: .* has no state: it was taken out"):
                quick(toys.stream(2), Loose(), resume=start)

    def test_paths_that_cannot_be_written_are_said_before_training(self, tmp_path, monkeypatch):
        result = quick(toys.stream(2))
        monkeypatch.setattr("clkit.training.loop._Loop.train", None)
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder").mkdir()
        before = sorted(tmp_path.rglob("*"))
        for path in (tmp_path / "file" / "run", tmp_path / "file" / "deep" / "run", tmp_path / "folder"):
            for write in (lambda path: quick(toys.stream(2), checkpoint=path), result.save):
                with pytest.raises(ValueError, match=rf"path: {path} cannot be written"):
                    write(path)

        def full(**where):
            raise PermissionError(13, "Permission denied", str(where["dir"]))

        monkeypatch.setattr("clkit.store.files.tempfile.TemporaryFile", full)
        with pytest.raises(ValueError, match=r"run cannot be written \(.*Permission denied.*give a file in a folder"):
            quick(toys.stream(2), checkpoint=tmp_path / "run")
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("kind", ["tensor", "array", "list", "dict", "tuple", "number of numpy"])
    def test_a_module_whose_own_data_training_changes_is_not_gone_on_with(self, kind, tmp_path):
        class Counts(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = models.mlp(stream)
                kinds = {"tensor": torch.zeros(()), "array": np.zeros(2), "list": [], "dict": {"n": 0}, "tuple": (0,)}
                self.seen = kinds.get(kind, np.int64(0))

            def forward(self, x):
                if self.training and isinstance(self.seen, list):
                    self.seen.append(1)
                elif self.training:
                    more = {"dict": lambda s: {"n": s["n"] + 1}, "tuple": lambda s: (*s, 1)}.get(kind, lambda s: s + 1)
                    self.seen = more(self.seen)
                return self.net(x)

        stream = toys.stream(3)
        first = quick(replace(stream, tasks=stream.tasks[:2]), model=Counts())
        with pytest.raises(
            ValueError, match=r"model: \['seen'\] changed in training and are not kept; make them buffers"
        ):
            quick(stream, model=Counts(), resume=first)

    def test_a_disk_that_fills_in_the_midst_costs_no_task(self, tmp_path, monkeypatch, caplog):
        def full(*arguments, **named):
            raise OSError(28, "No space left on device")

        undisturbed = quick(toys.stream(3))
        monkeypatch.setattr("clkit.store.files.save_file", full)
        result = quick(toys.stream(3), checkpoint=tmp_path / "run")
        assert same(result.weights, undisturbed.weights) and not list(tmp_path.iterdir())
        assert [str(tmp_path / "run") in record.message for record in caplog.records] == [True], "not said once"
        monkeypatch.undo()
        assert same(quick(toys.stream(3), checkpoint=tmp_path / "run").weights, undisturbed.weights)


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on(tmp_path):
    more = {"model": toys.small_convnet, "device": "cuda", "path": tmp_path / "run"}
    more["training"] = replace(SHORT, deterministic=True)
    for name in ("ER", "DER++", "LwF", "per task"):
        assert_goes_on(toys.images(3), LEARNERS[name], CLeWI(points=3), **more)
