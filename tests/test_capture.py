"""Captured steps: on a CPU a tape stands in for CUDA's graphs, which replays the operations of a step and no Python."""

import copy
import itertools
import random
import threading
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toys
from clkit import models
from clkit.consolidation import EMA, HCMM, SFA, CLeWI, Merged
from clkit.learners import ER, EWC, MIR, DataBuffer, Joint, Learner, MemoryOnly
from clkit.modulation import Modulated, Modulation
from clkit.training import Training, capture, loop
from clkit.weights import equal
from test_checkpoint import Interrupted, interrupted
from toys import quick

TRAINING = Training(epochs=3, batch=8, lr=0.1)


def tensors(*tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Takes down operations below autograd; like a capture, it leaves no trace in tensors and generators."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.random = [], {}, torch.get_rng_state()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in func.tags or func.overloadpacket is torch.ops.aten.nonzero:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        written = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        if "native_batch_norm" in str(func):  # whose schema does not say so
            written += [given.get("running_mean"), given.get("running_var")]
        for tensor in tensors(written):
            storage = tensor.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in tensors(args, kwargs)}
        fresh = [i for i, t in enumerate(tensors(out)) if t.untyped_storage().data_ptr() not in known]
        self.calls.append((func, args, kwargs, out, fresh))
        return out

    def rewind(self):
        for storage, content in self.before.values():
            storage.copy_(content)
        torch.set_rng_state(self.random)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out, fresh in self.calls:
            again, old = tensors(func(*args, **kwargs)), tensors(out)
            for i in fresh:
                old[i].copy_(again[i])


class Tapes:
    """The CPU's stand-in for `capture.Graphs`, which counts what it does, over all tasks."""

    def __init__(self, counts):
        self.counts = counts

    def watch(self, step):
        self.counts["watched"] += 1
        return step(), ""

    def capture(self, step):
        tape = Tape()
        try:
            with tape:
                step()
        finally:
            tape.rewind()
        self.counts["captured"] += 1

        def replay():
            self.counts["replayed"] += 1
            tape.replay()

        return replay


@pytest.fixture
def counts(monkeypatch):
    """Steps on the CPU are captured by a tape; counts of watched, captured and replayed ones."""
    counts = Counter()
    monkeypatch.setitem(capture.CAPTURES, "cpu", lambda: Tapes(counts))
    return counts


@pytest.fixture
def loops(monkeypatch):
    """The loops of the runs in a test."""
    made = []

    class Kept(loop._Loop):
        def __post_init__(self):
            super().__post_init__()
            made.append(self)

    monkeypatch.setattr(loop, "_Loop", Kept)
    return made


def assert_same(a, b):
    assert np.array_equal(np.concatenate(a.training_loss), np.concatenate(b.training_loss))
    for name in ("trained", "weights"):
        assert all(equal(x, y) for x, y in zip(getattr(a, name), getattr(b, name), strict=True))
    assert np.array_equal(a.accuracy, b.accuracy) and np.array_equal(a.losses, b.losses)
    same = [{k: v for k, v in r.state.items() if k != "identity"} for r in (a, b)]
    assert toys.same_tree(*same)


def both(stream, learner, rule=None, *, training=TRAINING, **more):
    """A run whose steps are captured, after it is found to be the one whose steps are not."""
    plain = quick(stream, learner, rule, training=replace(training, capture=False), **more)
    captured = quick(stream, learner, rule, training=training, **more)
    assert_same(plain, captured)
    return captured


class Dropped(nn.Module):
    def __init__(self, stream, seed=0):
        super().__init__()
        self.net = toys.small_convnet(stream, seed=seed)

    def forward(self, x):
        return self.net(nn.functional.dropout(x, 0.3, self.training))


class Tied(nn.Module):
    """A perceptron that uses one weight twice, which autocast casts twice or once."""

    def __init__(self, stream, seed=0):
        super().__init__()
        self.net, self.inner = models.mlp(stream, hidden=(), seed=seed), nn.Linear(6, 6)

    def forward(self, x):
        return self.net(self.inner(self.inner(x).relu()))


class Fresh:
    """Takes weights on in the middle of a task and asks for a fresh optimizer."""

    def due(self, progress):
        return progress.step == 6

    def __call__(self, context):
        moved = {name: tensor * 0.9 for name, tensor in context.current.items()}
        return Merged(moved, moved, fresh=True)


def adamw(**more):
    return Training(epochs=3, batch=8, lr=0.01, optimizer="adamw", **more)


@pytest.mark.parametrize(
    ("model", "learner", "rule", "training"),
    [
        (models.mlp, Learner(), None, TRAINING),
        (models.mlp, ER(30), SFA(p=0.25, beta=0.3), Training(3, 8, 0.1, momentum=0.9, weight_decay=1e-3)),
        (toys.small_convnet, ER(30), CLeWI(points=3), Training(3, 8, 0.1, momentum=0.9, schedule="cosine")),
        (toys.small_convnet, MIR(30), EMA(0.9), Training(3, 8, 0.1, clip=0.5, labels="seen", label_smoothing=0.1)),
        (Dropped, ER(30, once=True), None, Training(3, 8, 0.1, schedule="multistep", warmup=3)),
        (toys.small_convnet, Joint(), Fresh(), adamw(labels="task")),
        (models.mlp, ER(30), HCMM(), adamw(schedule="linear")),
        (Tied, ER(30), None, Training(3, 8, 0.1, precision="bfloat16")),
    ],
)
def test_a_captured_step_is_the_step_bit_for_bit(counts, model, learner, rule, training):
    stream = toys.stream(rows=36) if model in (models.mlp, Tied) else toys.images(rows=36)
    both(stream, learner, rule, training=training, model=model)
    assert counts["captured"] and counts["replayed"] > 2 * counts["captured"]


def test_a_shape_is_captured_when_it_comes_for_the_third_time_in_a_task(counts, loops):
    quick(toys.stream(2, rows=20), ER(30), training=Training(epochs=3, batch=8))
    # Task 1: once 8 rows, else 16 and at an epoch's end 12; task 2: 16 and 12. Of nine steps a task, three end epochs.
    assert counts == {"watched": 4, "captured": 4, "replayed": (5 - 2) + (3 - 2) + (6 - 2) + (3 - 2)}
    assert not loops[0].captured.refused and not loops[0].captured.steps


def test_a_task_holds_few_captured_steps(counts, monkeypatch):
    monkeypatch.setattr(capture, "MOST", 1)
    both(toys.stream(2, rows=20), ER(30))
    assert counts["captured"] == 2


@pytest.mark.parametrize(
    ("learner", "training"),
    [
        (EWC(), TRAINING),
        (ER(30), replace(TRAINING, capture=False)),
        (type("Halved", (ER,), {"adjust_gradients": lambda self, model, batch: None})(30), TRAINING),
    ],
)
def test_a_learner_with_a_step_of_its_own_runs_as_it_is(counts, loops, learner, training):
    quick(toys.stream(2), learner, training=training)
    assert loops[0].captured is None and not counts


class TestALearnerOfAUsersOwn:
    """It may do anything between steps, which no replay would see: none of its steps are captured."""

    def change(self, what, model, learner):
        if what == "bn":
            model.net[1].eval()
        if what == "freeze":
            model.net[0].requires_grad_(False)
        if what == "data":
            for parameter in model.parameters():
                parameter.data = parameter.data.clamp(-0.3, 0.3)
        if what == "rate":
            model.net[2].p = 0.9
        if what == "smoothing":
            learner.setting.criterion.smoothing = 0.3
        if what == "hook":
            model.net[0].register_forward_hook(lambda module, x, out: out * 0.5)

    @pytest.mark.parametrize("what", ["bn", "freeze", "data", "rate", "smoothing", "hook"])
    @pytest.mark.parametrize("hook", ["after_step", "replayed"])
    def test_runs_as_it_is(self, counts, loops, what, hook):
        test = self

        class Mid(ER):
            def start(self, setting):
                super().start(setting)
                self.steps = 0

        def changing(self, model, batch):
            self.steps += 1
            if self.steps == 5:
                test.change(what, model, self)
            return getattr(ER, hook)(self, model, batch)

        setattr(Mid, hook, changing)

        class Net(nn.Module):
            def __init__(self, stream, seed=0):
                super().__init__()
                self.net = nn.Sequential(
                    nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), models.mlp(stream, seed=seed)
                )

            def forward(self, x):
                return self.net(x)

        def made(stream, seed=0):
            torch.manual_seed(seed)
            return Net(stream, seed)

        both(toys.stream(2, rows=40), Mid(30), model=made)
        assert loops[-1].captured is None and not counts

    def test_is_told_by_its_code(self, counts):
        cpu, mine = torch.device("cpu"), lambda self, *about: None

        class Mixin:
            def stored(self, task, examples):
                return {"x": examples.x, "y": examples.y}

        for own in (Learner(), ER(30), MIR(30), Joint(), DataBuffer(), MemoryOnly(30)):
            assert capture.capturable(own, cpu)
            for hook in ("loss", "adjust_gradients", "replayed", "begin_task", "after_step", "stored"):
                assert not capture.capturable(type("Mine", (type(own),), {hook: mine})(), cpu)
            for shadow in (mine, partial(mine, None)):
                changed = copy.deepcopy(own)
                changed.after_step = shadow
                assert not capture.capturable(changed, cpu)
        assert not capture.capturable(type("Mixed", (Mixin, ER), {"__module__": "clkit.mixed"})(30), cpu)

    def test_is_told_where_a_hook_is_replaced_in_the_class(self, counts, monkeypatch):
        assert capture.capturable(ER(30), torch.device("cpu"))
        monkeypatch.setattr(ER, "after_step", lambda self, model, batch: None)
        assert not capture.capturable(ER(30), torch.device("cpu"))


@pytest.mark.parametrize("model", ["lstm", "convnet", "vit", "parametrized", "modulated"])
def test_a_step_of_a_usual_network_changes_nothing_on_the_host(model):
    images, x = toys.images(2), torch.rand(4, 1, 6, 6)
    made = {
        "lstm": lambda: nn.LSTM(6, 3),
        "convnet": lambda: toys.small_convnet(images),
        "vit": lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
        "modulated": lambda: Modulated(toys.small_convnet(images), Modulation(2, 2)),
    }[model]()
    optimizer = torch.optim.AdamW(made.parameters())
    steps = capture.Captured(lambda x, y: x, made, lambda: None)
    steps.begin(optimizer)
    before = steps._described()
    out = made(x if model in ("convnet", "modulated") else x[:, 0])
    (out[0] if model == "lstm" else out).sum().backward()
    optimizer.step()
    assert steps._changed(before) == ""


def test_a_loss_that_an_object_has_of_its_own_is_seen(counts, loops):
    class Doubled(ER):
        def start(self, setting):
            super().start(setting)
            self.loss = lambda model, batch: 2 * Learner.loss(self, model, batch)

    quick(toys.stream(2), Doubled(30))
    assert loops[0].captured is None


class Odd(nn.Module):
    """A network with BatchNorm and dropout that does in training what no captured step may do."""

    def __init__(self, stream, seed=0, *, how):
        super().__init__()
        self.net, self.how, self.count = Dropped(stream, seed), how, 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        out = self.net(x)
        if not self.training:
            return out
        if self.how == "waits":
            return out * (1.0 if out.sum().item() < 1e9 else 0.5)
        if self.how == "shapes":
            return out + out.detach().nonzero().sum() * 1e-6
        if self.how == "counts":
            self.count += 1
            return out * (1 + self.count % 2)
        if self.how == "replaces":
            self.total = self.total + 1
            return out * (1 + self.total % 2)
        if self.how == "draws":
            return out * (1 + (random.random() < 0.5))
        if self.how == "numpy":
            return out * (1 + (np.random.rand() < 0.5))  # noqa: NPY002
        raise AssertionError


class Own(nn.Module):
    """A perceptron with something of its own, which it changes within in training, and which scales what it gives."""

    def __init__(self, stream, seed=0, *, make, use):
        super().__init__()
        self.net, self.own, self.use = models.mlp(stream, seed=seed), make(), use

    def forward(self, x):
        return self.net(x) * (1 + self.use(self.own)) if self.training else self.net(x)


def seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002


class TestWhatCannotBeCaptured:
    WORDS = {"waits": "not permitted", "shapes": "not permitted", "counts": "it changes count",
             "replaces": "it sets 'total'", "draws": "random numbers on the host",
             "numpy": "random numbers on the host"}  # fmt: skip

    @pytest.mark.parametrize("how", WORDS)
    def test_runs_as_it_is_and_changes_no_bit(self, counts, loops, how):
        random.seed(0)
        model, stream = partial(Odd, how=how), toys.images(2, rows=40)
        plain = quick(stream, ER(30), model=model, training=replace(TRAINING, capture=False))
        seeded()
        tried = quick(stream, ER(30), model=model, training=TRAINING)
        assert_same(plain, tried)
        assert self.WORDS[how] in loops[-1].captured.refused and not counts["replayed"]

    @pytest.mark.parametrize("how", WORDS)
    @pytest.mark.parametrize("training", [Training(momentum=0.9), adamw()])
    def test_an_attempt_leaves_all_as_it_was(self, counts, how, training):
        stream = toys.images(2)
        model = Odd(stream, how=how)
        optimizer = training.make_optimizer(model.parameters())

        def update(x, y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        steps = capture.Captured(update, model, capture.CAPTURES["cpu"])
        steps.begin(optimizer)
        batch = stream[0].batch(slice(0, 8))
        for _ in range(2):
            steps(batch.x, batch.y)

        def state():
            gradients = [parameter.grad for parameter in model.parameters()]
            groups = [{k: v for k, v in group.items() if k != "capturable"} for group in optimizer.param_groups]
            parts = model.state_dict(), optimizer.state_dict()["state"], gradients, groups[0]["lr"], model.count
            return copy.deepcopy([*parts, torch.get_rng_state(), list(random.getstate()[1]), np.random.get_state()[1]])  # noqa: NPY002

        before, objects = state(), [id(p.grad) for p in model.parameters()]
        steps._attempt("shape", batch.x, batch.y)
        assert steps.refused and not steps.steps and steps.optimizer is optimizer
        assert str(before) == str(state()) and all(map(torch.equal, tensors(before), tensors(state())))
        assert objects == [id(p.grad) for p in model.parameters()]

    OWN = {
        "a list": (list, lambda own: own.append(0) or len(own) % 2),
        "a dict": (lambda: {"n": 0}, lambda own: own.update(n=own["n"] + 1) or own["n"] % 2),
        "a list in a dict": (lambda: {"n": [0]}, lambda own: own["n"].append(0) or len(own["n"]) % 2),
        "an array": (lambda: np.zeros(2), lambda own: own.__iadd__(1)[0] % 2),
        "an object": (Counter, lambda own: own.update(n=1) or own["n"] % 2),
        "NumPy's generator": (lambda: np.random.default_rng(0), lambda own: own.random() < 0.5),
        "Python's generator": (lambda: random.Random(0), lambda own: own.random() < 0.5),
        "torch's generator": (lambda: torch.Generator().manual_seed(0), lambda own: torch.rand((), generator=own)),
        "a bound method": (lambda: random.Random(0).random, lambda own: own() < 0.5),
        "a counter": (itertools.count, lambda own: next(own) % 2),
        "a module that is no part": (lambda: [nn.ReLU()], lambda own: bool(own[0].train(not own[0].training).training)),
        "a lock": (threading.Lock, lambda own: own.acquire(blocking=False)),
    }  # fmt: skip

    @pytest.mark.parametrize("what", OWN)
    def test_what_a_module_changes_within_is_seen_before_an_attempt(self, counts, loops, what):
        make, use = self.OWN[what]
        both(toys.stream(2, rows=40), ER(30), model=partial(Own, make=make, use=use))
        assert "own" in loops[-1].captured.refused and counts == {"watched": 1}

    @pytest.mark.parametrize("what", [w for w in OWN if w != "a lock"])
    def test_what_an_attempt_alone_changes_within_is_seen(self, what):
        make, use = self.OWN[what]
        model = Own(toys.stream(2), make=make, use=lambda own: 0)
        steps = capture.Captured(lambda x, y: use(model.own) + x.sum(), model, lambda: Tapes(Counter()))
        steps.begin(torch.optim.SGD(model.parameters(), 0.1))
        steps._attempt("shape", torch.ones(3, 2), torch.ones(3, 2))
        assert "own" in steps.refused or (what == "a dict" and model.own == {"n": 0})

    def test_what_a_hook_fills_is_seen(self, counts, loops):
        def hooked(stream, seed=0):
            model, seen = models.mlp(stream, seed=seed), []
            model.register_forward_hook(lambda module, x, out: seen.append(0) or out * (1 + len(seen) % 2))
            return model

        both(toys.stream(2, rows=40), ER(30), model=hooked)
        assert "seen" in loops[-1].captured.refused and not counts["captured"]

    def test_draws_of_torch_on_the_host_are_seen_and_drawn_again(self):
        class Host:
            def watch(self, step):
                return step(), ""

            def capture(self, step):
                step()

        model, x = nn.Linear(2, 2), torch.ones(3, 2)
        steps = capture.Captured(lambda x, y: x.sum() * torch.rand(()), model, Host)
        steps.begin(torch.optim.SGD(model.parameters(), 0.1))
        before = torch.get_rng_state()
        steps._attempt("shape", x, x)
        assert "on the host" in steps.refused and torch.equal(before, torch.get_rng_state())

    def test_what_is_seen_before_an_attempt_is_not_tried(self, monkeypatch, loops):
        class Watchful(Tapes):
            def watch(self, step):
                return step(), "it waits"

        monkeypatch.setitem(capture.CAPTURES, "cpu", lambda: Watchful(Counter()))
        monkeypatch.setattr(Watchful, "capture", None)
        both(toys.stream(2), ER(30))
        assert loops[-1].captured.refused == "it waits"

    def test_a_failure_gives_up_what_was_captured_before(self, monkeypatch, loops):
        class Once(Tapes):
            def capture(self, step):
                if self.counts["captured"]:
                    raise RuntimeError("no more")
                return super().capture(step)

        counts = Counter()
        monkeypatch.setitem(capture.CAPTURES, "cpu", lambda: Once(counts))
        both(toys.stream(2, rows=20), ER(30))
        assert counts["captured"] == 1 and counts["replayed"] and "no more" in loops[-1].captured.refused


def test_a_gradient_that_is_asked_for_is_the_last_steps(counts):
    seen = []

    class Looking:
        def due(self, progress):
            return True

        def __call__(self, context):
            seen.append({name: gradient.clone() for name, gradient in context.gradients().items()})
            return Merged(context.current, context.current)

    both(toys.stream(2, rows=20), ER(30), Looking())
    half = len(seen) // 2
    assert counts["captured"] and all(map(equal, seen[:half], seen[half:]))


def test_what_a_learner_keeps_of_a_batch_stays(counts, monkeypatch):
    monkeypatch.setattr(loop, "capturable", lambda learner, device: True)

    class Keeping(Learner):
        def start(self, setting):
            super().start(setting)
            self.kept = []

        def after_step(self, model, batch):
            self.kept.append((batch.x, batch.y, batch.x.clone(), batch.y.clone()))

    for x, y, x_then, y_then in both(toys.tokens(3, 24), Keeping(), model=toys.small_reader).learner.kept:
        assert torch.equal(x, x_then) and torch.equal(y, y_then)
    assert counts["replayed"]


def test_a_parameter_without_a_gradient_stays_without(counts):
    class Unused(nn.Module):
        def __init__(self, stream, seed=0):
            super().__init__()
            self.net, self.spare = models.mlp(stream, seed=seed), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.net(x)

    result = both(toys.stream(2), ER(30), training=replace(TRAINING, momentum=0.9, weight_decay=0.1), model=Unused)
    assert result.weights[-1]["spare"].eq(1).all()


@pytest.mark.parametrize("rule", [None, CLeWI(points=3)])
def test_a_run_that_is_interrupted_goes_on(counts, tmp_path, rule):
    stream, more = toys.images(3), {"model": Dropped, "training": TRAINING}
    whole, path = quick(stream, ER(30), rule, **more), tmp_path / "run"
    with pytest.raises(Interrupted):
        quick(stream, interrupted(ER(30), 1), rule, checkpoint=path, **more)
    assert_same(whole, quick(stream, ER(30), rule, checkpoint=path, **more))


class TestTheCallsToCuda:
    """In which order torch.cuda is called: what a machine without a GPU can tell of `Graphs` and of a run's stream."""

    @pytest.fixture
    def log(self, monkeypatch):
        log = []

        class Noted:
            def __init__(self, name):
                self.name, self.device_index = name, 0

            def __getattr__(self, method):
                return lambda *args: log.append((self.name, method, *args))

            def clone_state(self):
                return "state"

        @contextmanager
        def graph(graph, **options):
            log.append(("begin", options))
            yield
            log.append("end")

        @contextmanager
        def stream(chosen):
            log.append(f"on {chosen.name}")
            yield
            log.append("off")

        fakes = {"graph_pool_handle": lambda: "pool", "current_stream": lambda *_: Noted("default"),
                 "Stream": lambda *_: Noted("own"), "CUDAGraph": lambda: Noted("graph"), "graph": graph,
                 "stream": stream, "default_generators": [Noted("generator")],
                 "set_sync_debug_mode": lambda mode: log.append(mode)}  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(capture.Graphs, "broken", [])
        return log

    def test_a_capture(self, log):
        replay = capture.Graphs().capture(lambda: log.append("step"))
        ((begin, options), step, end), (_, *calls) = log[:3], ("", *log[3:])
        assert (begin, step, end, calls) == ("begin", "step", "end", [])
        assert (options["pool"], options["stream"].name) == ("pool", "default")
        assert options["capture_error_mode"] == "thread_local"
        replay()
        assert log[-1] == ("graph", "replay")

    def test_a_capture_that_fails_gives_the_generator_back(self, log):
        def step():
            raise RuntimeError("waits")

        graphs = capture.Graphs()
        with pytest.raises(RuntimeError, match="waits"):
            graphs.capture(step)
        assert log[-1] == ("generator", "graphsafe_set_state", "state") and len(capture.Graphs.broken) == 1

    def test_a_step_that_is_watched(self, log):
        def step():
            log.append("step")
            warnings.warn("something else", stacklevel=1)
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            return 3

        assert capture.Graphs().watch(step) == (3, "called a synchronizing CUDA operation")
        assert capture.Graphs().watch(lambda: 4) == (4, "")
        assert log[:3] == ["warn", "step", "default"]
        with pytest.raises(ZeroDivisionError):
            capture.Graphs().watch(lambda: 1 / 0)
        assert log[-1] == "default"

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_a_run_has_a_stream_of_its_own_and_the_kernels_that_it_asks_for(self, log, deterministic, monkeypatch):
        flags = torch.backends.cudnn
        monkeypatch.setattr(flags, "flags", lambda **given: log.append(given) or nullcontext())
        with capture.on_gpu(torch.device("cuda"), deterministic):
            log.append("run")
        waits, chosen, *rest = log
        assert (waits[:2], waits[2].name) == (("own", "wait_stream"), "default")
        assert chosen == {"enabled": True, "deterministic": deterministic, "benchmark": not deterministic}
        assert rest[:3] == ["on own", "run", "off"] and (*rest[3][:2], rest[3][2].name) == (
            "default",
            "wait_stream",
            "own",
        )


@pytest.mark.gpu
class TestOnAGpu:
    STREAM = toys.images(3, rows=40)

    @pytest.mark.parametrize("model", [toys.small_convnet, Dropped])
    @pytest.mark.parametrize("training", [Training(4, 8, 0.1, momentum=0.9, schedule="cosine"), adamw(clip=1.0)])
    def test_a_captured_step_is_the_step_bit_for_bit(self, loops, model, training):
        training = replace(training, deterministic=True)
        both(self.STREAM, ER(30), SFA(p=0.3, beta=0.2), training=training, model=model, device="cuda")
        assert loops[-1].captured.refused == ""

    @pytest.mark.parametrize("how", TestWhatCannotBeCaptured.WORDS)
    def test_what_cannot_be_captured_runs_as_it_is(self, loops, how):
        more = {"training": replace(TRAINING, deterministic=True), "model": partial(Odd, how=how), "device": "cuda"}
        seeded()
        plain = quick(self.STREAM, ER(30), **{**more, "training": replace(more["training"], capture=False)})
        seeded()
        assert_same(plain, quick(self.STREAM, ER(30), **more))
        assert loops[-1].captured.refused and not capture.Graphs.broken

    def test_dropout_draws_on_after_a_capture_that_fails(self, loops, monkeypatch):
        monkeypatch.setattr(capture.Graphs, "watch", lambda self, step: (step(), ""))
        monkeypatch.setattr(capture.Graphs, "broken", [])
        more = {"training": replace(TRAINING, deterministic=True), "model": partial(Odd, how="waits"), "device": "cuda"}
        tried = quick(self.STREAM, ER(30), **more)
        plain = quick(self.STREAM, ER(30), **{**more, "training": replace(more["training"], capture=False)})
        assert_same(plain, tried)
        assert len(capture.Graphs.broken) == 1

    def test_a_repeated_run_has_the_same_bits_if_it_is_deterministic(self):
        more = {"training": replace(TRAINING, deterministic=True), "model": toys.small_convnet, "device": "cuda"}
        assert_same(quick(self.STREAM, ER(30), **more), quick(self.STREAM, ER(30), **more))
