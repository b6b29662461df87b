import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toys
from clkit import data, models
from clkit.consolidation import EMA, CLeWI, Merged, Progress
from clkit.data import Examples, Normalize, Stream, Task
from clkit.evaluation import evaluate, score
from clkit.learners import ER, Learner
from clkit.modules import hooked
from clkit.training import Training, label, run
from clkit.training.computing import descend, lay_out
from clkit.training.loop import _Loop
from clkit.weights import equal, get_weights
from toys import quick


@pytest.fixture(scope="module")
def toy() -> Stream:
    return toys.stream()


class Diary(Learner):
    """Writes down what it is called for and with which weights."""

    def start(self, setting):
        super().start(setting)
        self.events = []

    def note(self, name, model, *rest):
        self.events.append((name, float(get_weights(model)["linear.bias"].sum())))

    def loss(self, model, batch):
        self.note("loss", model)
        return super().loss(model, batch)

    begin_task = adjust_gradients = after_step = after_training = on_consolidated = calibrate = None


for hook in ("begin_task", "adjust_gradients", "after_step", "after_training", "on_consolidated", "calibrate"):
    setattr(Diary, hook, lambda self, model, _, hook=hook: self.note(hook, model))


class Shift:
    """Adds 1 to the output bias where training goes on, 10 where it is deployed."""

    def due(self, progress):
        return progress.end

    def __call__(self, context):
        def plus(c):
            return {n: t + c * (n == "linear.bias") for n, t in context.current.items()}

        return Merged(plus(1), plus(10), {"said": "hello"})


def test_the_order_of_events_is_the_one_that_the_docstring_tells(toy):
    training = Training(epochs=1, batch=11, lr=0.1)
    result = quick(toys.stream(tasks=2), Diary(), Shift(), training=training)
    step = ["loss", "adjust_gradients", "after_step"]
    task = ["begin_task", *step, *step, "after_training", "on_consolidated", "calibrate"]
    assert [name for name, _ in result.learner.events] == task * 2
    sums = dict(result.learner.events[:10])
    assert sums["on_consolidated"] - sums["after_training"] == pytest.approx(4, abs=1e-4)
    assert sums["calibrate"] - sums["after_training"] == pytest.approx(40, abs=1e-4)
    again = dict(result.learner.events[10:11])
    assert again["begin_task"] == pytest.approx(sums["on_consolidated"], abs=1e-4)
    assert float(result.weights[0]["linear.bias"].sum()) == pytest.approx(sums["calibrate"], abs=1e-4)
    assert float(result.trained[0]["linear.bias"].sum()) == pytest.approx(sums["after_training"], abs=1e-4)
    assert result.reports == [{"said": "hello"}] * 2


class DeployNothing(Shift):
    """Deploys zeros, looks at everything, draws random numbers, and trains on from the current weights."""

    uses_history = True

    def due(self, progress):
        return True

    def __call__(self, context):
        torch.randn(3)
        context.model.train()(context.inputs)
        assert len(context.history) == context.progress.task
        return Merged(context.current, {n: torch.zeros_like(t) for n, t in context.current.items()})


class Drawing(ER):
    """Shows a consolidation examples that it draws, by its own generator and by torch's."""

    def examples(self, task):
        rows = torch.randperm(len(task.train), generator=self.setting.generator)[:5]
        return Examples(task.prepare(task.train.x[rows]) + torch.randn(1), task.train.y[rows])


@pytest.mark.parametrize("learner", [Learner(), ER(memory=9), Drawing(memory=9)])
def test_a_deploy_only_consolidation_leaves_training_bit_identical(learner):
    class Dropped(nn.Module):
        def __init__(self, stream, seed):
            super().__init__()
            self.net = models.mlp(stream, seed=seed)

        def forward(self, x):
            return self.net(nn.functional.dropout(x, 0.3, self.training))

    def factory(stream, *, seed):
        return Dropped(stream, seed)

    plain, with_ = (quick(toys.stream(), learner, c, model=factory) for c in (None, DeployNothing()))
    assert all(equal(a, b) for a, b in zip(plain.trained, with_.trained, strict=True))
    assert all(not t.any() for t in with_.weights[0].values())


def test_training_is_the_same_whether_or_not_the_examples_are_asked_for(toy):
    class Asking(Shift):
        def __call__(self, context):
            assert torch.equal(context.inputs, context.inputs) and context.score(context.current).loss > 0
            return Merged(context.current, context.current)

    class Silent(Shift):
        def __call__(self, context):
            return Merged(context.current, context.current)

    asking, silent = (quick(toy, Drawing(9), c()) for c in (Asking, Silent))
    unkept = quick(toy, Drawing(9), Silent(), keep=False)
    assert all(equal(a, b) for a, b in zip(asking.weights, silent.weights, strict=True))
    assert np.array_equal(np.concatenate(unkept.training_loss), np.concatenate(silent.training_loss))
    assert all(torch.equal(a, b) for a, b in zip(asking.inputs, silent.inputs, strict=True))


def test_what_is_first_asked_for_after_the_call_is_refused(toy):
    contexts = []

    class Keeping(Shift):
        def __call__(self, context):
            contexts.append(context)
            assert context.held_out is False
            return super().__call__(context)

    quick(toys.stream(1), ER(9), Keeping())
    assert contexts[0].held_out is False and contexts[0].progress.end
    with pytest.raises(AttributeError, match=r"context: 'inputs' is not there; ask for one of .* during the call"):
        contexts[0].inputs  # noqa: B018


def test_work_that_nobody_asks_for_is_not_done(toy, monkeypatch):
    asked = []

    class Noting(ER):
        def examples(self, task):
            asked.append(task.index)
            return super().examples(task)

    for name in ("moments", "aside"):
        whole = getattr(_Loop, name)
        monkeypatch.setattr(_Loop, name, lambda self, *a, w=whole, n=name: asked.append(n) or w(self, *a))
    quick(toy, Noting(9), EMA(), keep=False)
    assert asked == []
    quick(toys.stream(2), Noting(9), CLeWI(0.3, align=None), keep=False)
    assert asked == ["aside", 1]


def test_results_have_their_shapes_and_ranges(toy):
    result = quick(toy, ER(memory=9))
    for matrix in (result.accuracy, result.masked, result.losses):
        assert matrix.shape == (3, 3) and matrix.dtype == np.float64
    assert result.initial.shape == (3,)
    assert ((result.accuracy >= 0) & (result.masked <= 1) & (result.accuracy <= result.masked)).all()
    assert [len(loss) for loss in result.training_loss] == [6, 6, 6]
    assert json.loads(json.dumps(result.config)) == result.config
    assert set(result.summary()) == {"acc", "forgetting", "bwt", "fwt", "last", "plasticity"}


def test_a_run_is_one_textbook_loop():
    """The reference twin: plain SGD over the same batches, written out."""
    stream = toys.stream(tasks=2)
    result = quick(stream, training=Training(epochs=2, batch=8, lr=0.1, momentum=0.9))
    net = models.mlp(stream, seed=0)
    order = torch.Generator().manual_seed(int(np.random.SeedSequence(0).generate_state(3)[0]))
    for task in stream:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            for rows in torch.randperm(21, generator=order).split(8):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(task.train.x[rows]), task.train.y[rows]).backward()
                optimizer.step()
    for name, tensor in get_weights(net).items():
        assert torch.allclose(tensor, result.weights[-1][name], atol=1e-6)


def test_a_module_is_copied_and_a_factory_is_called_with_the_seed(toy):
    net = models.mlp(toy, seed=3)
    before = get_weights(net)
    given_module, given_factory = quick(toy, model=net, seed=3), quick(toy, seed=3)
    assert equal(before, get_weights(net))
    assert equal(given_module.weights[-1], given_factory.weights[-1])
    assert given_module.config["model"].startswith("Sequential[")
    assert given_factory.config["model"] == "clkit.models.mlp"


def test_the_global_random_state_is_left_alone(toy):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    quick(toy, ER(memory=5))
    assert torch.equal(before, torch.random.get_rng_state())


def test_runs_that_differ_in_the_consolidation_see_the_same_batches(toy):
    a, b = quick(toy, ER(memory=9)), quick(toy, ER(memory=9), Shift())
    assert np.array_equal(a.training_loss[0], b.training_loss[0])


def test_every_task_begins_with_a_fresh_optimizer(toy, monkeypatch):
    made = []

    class Spy(Learner):
        def begin_task(self, model, task):
            made.append([])

    def count(self, closure=None, step=torch.optim.SGD.step):
        made[-1].append(len(self.state))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", count)
    quick(toy, Spy(), training=Training(1, 8, momentum=0.9))
    assert [(sizes[0], min(sizes[1:])) for sizes in made] == [(0, 6)] * 3


def test_nothing_is_kept_when_asked(toy):
    result = quick(toy, keep=False)
    assert result.weights == [] and result.trained == [] and result.accuracy.shape == (3, 3)


def test_a_progress_bar_shows_unless_silenced(toy, capsys):
    quick(toy, progress=True)
    assert "task 3 of 3" in capsys.readouterr().err
    quick(toy, progress=False)
    assert capsys.readouterr().err == ""


class TestEvaluation:
    def test_it_equals_one_example_at_a_time(self, toy):
        net = models.mlp(toy, seed=1)
        found = evaluate(net, toy, batch=3)
        for task in toy:
            with torch.no_grad():
                logits = torch.cat([net(x[None]) for x in task.test.x])
            own = torch.tensor(task.classes)
            assert found.accuracy[task.index] == (logits.argmax(1) == task.test.y).double().mean()
            assert found.masked[task.index] == (own[logits[:, own].argmax(1)] == task.test.y).double().mean()
            loss = nn.functional.cross_entropy(logits, task.test.y).item()
            assert found.loss[task.index] == pytest.approx(loss, rel=1e-5)

    def test_a_score_is_the_evaluation_of_one_task(self, toy):
        net, other = models.mlp(toy, seed=1), models.mlp(toy, seed=2)
        found = score(net, Examples(toy[1].prepare(toy[1].test.x), toy[1].test.y), get_weights(other))
        assert equal(get_weights(net), get_weights(other))
        assert found == (evaluate(other, toy).loss[1], evaluate(other, toy).accuracy[1])

    def test_training_flags_are_given_back(self, toy):
        net = nn.Sequential(nn.Dropout(0.5), models.mlp(toy))
        net[1].eval()
        evaluate(net, toy)
        assert net.training and net[0].training and not net[1].training

    def test_the_task_scenario_gives_the_task_and_masks(self):
        seen = []

        class Spy(Learner):
            def predict(self, model, x, task=None):
                seen.append(task and task.index)
                return super().predict(model, x, task)

        stream = toys.stream(scenario="task")
        result = quick(stream, Spy())
        assert set(seen) == {0, 1, 2}
        assert np.array_equal(result.accuracy, result.masked)
        seen.clear()
        quick(toys.stream(), Spy())
        assert set(seen) == {None}


@pytest.mark.parametrize(
    "training",
    [
        Training(2, 8, 0.01, optimizer="adamw", weight_decay=0.01),
        Training(2, 8, schedule="cosine", warmup=0.2, clip=1.0),
        Training(2, 8, label_smoothing=0.1, labels="seen"),
        Training(2, 8, labels="task", momentum=0.9),
        Training(2, 8, precision="bfloat16"),
        Training(2, 8, channels_last=True),
    ],
    ids=lambda t: f"{t.optimizer}-{t.schedule}-{t.labels}-{t.precision}",
)
def test_every_setting_learns(training):
    result = quick(toys.images(tasks=2), ER(memory=9), model=toys.small_convnet, training=training)
    assert result.training_loss[0][-1] < result.training_loss[0][0]


RULES = [{"optimizer": "sgd"}, {"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adamw", "weight_decay": 0.1}]


@pytest.mark.parametrize("settings", RULES)
@pytest.mark.parametrize("layout", ["like the parameter", "rows", "sparse", "none"])
def test_a_step_is_torch_s_whatever_the_gradient_s_layout(settings, layout):
    """The twin takes torch's own step, entry by entry, on gradients in their parameters' layout."""
    g = torch.Generator().manual_seed(0)
    shapes = {"conv": (5, 4, 3, 3), "flat": (6, 4), "turned": (4, 6)}
    start = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    start["conv"] = start["conv"].contiguous(memory_format=torch.channels_last)
    start["turned"] = start["turned"].T
    ours, twin = ([nn.Parameter(t.clone()) for t in start.values()] for _ in range(2))
    training = Training(lr=0.1, **settings)
    light = training.make_optimizer(ours)
    kind, options = type(light), {"lr": 0.1, "weight_decay": training.weight_decay, "foreach": False}
    plain = kind(twin, **options | ({"momentum": training.momentum} if kind is torch.optim.SGD else {}))
    for _ in range(3):
        for a, b in zip(ours, twin, strict=True):
            b.grad = torch.randn(b.shape, generator=g)
            a.grad = torch.empty_like(b).copy_(b.grad)
        if layout != "like the parameter":
            dense = ours[0].grad.contiguous()
            ours[0].grad = {"rows": dense, "sparse": dense.to_sparse(), "none": None}[layout]
            twin[0].grad = None if layout == "none" else twin[0].grad
        descend(light)
        plain.step()
    for a, b in zip(ours, twin, strict=True):
        assert a.stride() == b.stride() and torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    assert training.momentum or settings["optimizer"] == "adamw" or all(map(torch.equal, ours, twin))


@pytest.mark.parametrize("there", [1, 2])
def test_a_run_computes_with_as_many_threads_as_it_is_told_and_by_default_one(there):
    seen, before = [], torch.get_num_threads()

    class Seeing(Learner):
        def begin_task(self, model, task):
            seen.append(torch.get_num_threads())
            if task.index:
                raise KeyError

    torch.set_num_threads(there)
    try:
        assert quick(toys.stream(1), Seeing()).config["threads"] == 1
        assert quick(toys.stream(1), Seeing(), threads=2).config["threads"] == 2
        with pytest.raises(KeyError):
            quick(toys.stream(2), Seeing(), threads=3)
        assert seen == [1, 2, 3, 3] and torch.get_num_threads() == there
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="threads: 0"):
        quick(toys.stream(1), threads=0)


@pytest.mark.parametrize(
    ("model", "asked", "last"),
    [
        (toys.small_convnet, None, True),
        (toys.small_convnet, False, False),
        (models.mlp, None, False),
        (partial(models.vit, patch=2, dim=8, depth=1, heads=2), None, False),
    ],
)
def test_channels_come_last_where_a_network_convolves(model, asked, last):
    layouts = []

    class Seeing(ER):
        def after_step(self, model, batch):
            layouts.append(batch.layout is torch.channels_last)
            super().after_step(model, batch)

    result = quick(toys.images(1), Seeing(9), model=model, training=Training(1, 8, channels_last=asked))
    assert layouts == [last] * 3
    assert all(p.is_contiguous() for p in (*result.model.parameters(), *result.weights[0].values()))


class Viewing(nn.Module):
    """Reads memory as it lies: what a convolution gives, in one mode or both, or its weight."""

    def __init__(self, of):
        super().__init__()
        self.of, self.conv, self.linear = of, nn.Conv2d(1, 4, 3, bias=False), nn.Linear(64, 2)

    def forward(self, x):
        weight = self.conv.weight.view(4, -1).view(4, 1, 3, 3) if self.of == "weight" else self.conv.weight
        x = nn.functional.conv2d(x, weight).relu()
        viewed = self.of in ("outputs", "training" if self.training else "testing")
        return self.linear(x.view(x.size(0), -1) if viewed else x.flatten(1))


@pytest.mark.parametrize("of", ["outputs", "training", "testing", "weight"])
def test_a_network_that_cannot_take_channels_last_has_its_rows_as_they_come(of):
    net, layouts = Viewing(of), []

    class Seeing(ER):
        def adjust_gradients(self, model, batch):
            layouts.append(batch.layout)
            assert torch.cat([p.grad.view(-1) for p in model.parameters()]).isfinite().all()

    free, contiguous = (
        quick(toys.images(1), Seeing(9), model=net, training=Training(1, 8, channels_last=c)) for c in (None, False)
    )
    assert layouts == [torch.channels_last if of == "weight" else None] * 3 + [None] * 3
    assert of == "weight" or equal(free.weights[0], contiguous.weights[0])
    if of != "weight":
        with pytest.raises(ValueError, match=r"model: it fails in \w+ mode .*view size is not compatible"):
            quick(toys.images(1), model=net, training=Training(1, 8, channels_last=True))


class Tied(nn.Module):
    """Two layers whose weights are one memory, and a buffer that looks into a third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.b.weight = nn.Parameter(self.a.weight.data)
        self.register_buffer("row", self.c.weight.data[0])
        self.first, self.linear = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(72, 2)

    def forward(self, x):
        return self.linear(self.c(self.b(self.a(self.first(x))).relu()).flatten(1))

    def check(self):
        return self.a.weight.equal(self.b.weight) and self.row.equal(self.c.weight[0])


def test_memory_that_is_shared_stays_shared():
    result = quick(toys.images(1), model=lambda stream, seed: Tied(), training=Training(1, 8))
    assert result.model.check() and "b.weight" not in result.weights[0]
    net = Tied()
    lay_out(net, torch.channels_last)
    with torch.no_grad():
        net.a.weight.add_(1), net.row.add_(1)
    assert net.check() and net.first.weight.is_contiguous(memory_format=torch.channels_last)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_step_writes_a_parameter_and_nothing_else(data):
    """A factory may give a part of a larger tensor; the twin steps on a copy of its own."""
    rule = data.draw(st.sampled_from(RULES))
    big = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    part = tuple(slice(0, None, data.draw(st.integers(1, 3))) for _ in big.shape)
    order = data.draw(st.permutations(range(3)))
    whole = big.clone()
    ours, twin = nn.Parameter(whole[part].permute(order)), nn.Parameter(big[part].permute(order).contiguous())
    light, plain = (Training(lr=0.1, **rule).make_optimizer([p]) for p in (ours, twin))
    for _ in range(2):
        twin.grad = torch.randn(twin.shape, generator=torch.Generator().manual_seed(1))
        ours.grad = twin.grad.clone()
        descend(light), descend(plain)
    expected = big.clone()
    expected[part] = twin.detach().permute(*(order.index(i) for i in range(3)))
    assert torch.allclose(whole, expected, atol=1e-6)
    assert light.param_groups[0]["fused"] or any(axis.step > 1 for axis in part)


def test_parameters_that_are_no_convolutions_of_images_are_left_in_their_layout():
    """A volume's convolution has a memory format of its own, to which torch would not turn it."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.volume = toys.small_convnet(toys.images(1)), nn.Conv3d(1, 1, 1)

        def to(self):
            raise AssertionError

        def forward(self, x):
            return self.net(x) + 0 * self.volume(x[:, None, None, 0]).mean()

    assert quick(toys.images(1), model=Odd(), training=Training(1, 8)).accuracy.shape == (1, 1)


def test_channels_last_changes_no_result_beyond_rounding():
    a, b = (
        quick(toys.images(tasks=1), model=toys.small_convnet, training=Training(1, 8, channels_last=c))
        for c in (False, True)
    )
    for name, tensor in a.weights[0].items():
        assert torch.allclose(tensor, b.weights[0][name], atol=1e-5)


def test_a_compiled_run_is_the_run(toy, monkeypatch):
    """Hooks that a learner holds on the compiled model are called, and the result's model is not compiled."""
    compiled, seen = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="eager"))

    class Looking(ER):
        def on_consolidated(self, model, task):
            with hooked([(model.linear, lambda *_: seen.append(task.index))]):
                model(task.prepare(task.train.x[:3]))

    plain, fast = (quick(toy, Looking(9), Shift(), training=Training(2, 8, compile=c)) for c in (False, True))
    assert all(equal(a, b) for a, b in zip(plain.weights, fast.weights, strict=True))
    assert seen == [0, 1, 2] * 2
    assert fast.model._compiled_call_impl is None


def test_a_module_that_was_compiled_is_the_module(toy):
    net = models.mlp(toy)
    plain, wrapped = (quick(toy, ER(9), model=m) for m in (net, torch.compile(net, backend="eager")))
    made = quick(toy, ER(9), model=lambda stream, seed: torch.compile(models.mlp(stream), backend="eager"))
    assert equal(plain.weights[-1], wrapped.weights[-1]) and equal(plain.weights[-1], made.weights[-1])
    assert plain.config == wrapped.config


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["constant", "cosine", "linear", "multistep"]), st.integers(1, 200), st.floats(0, 0.5))
def test_schedules_rise_then_fall_within_bounds(schedule, steps, warmup):
    training = Training(schedule=schedule, warmup=warmup)
    rates = [training.rate(step, steps) for step in range(steps)]
    rise = int(np.ceil(warmup * steps))
    assert all(0 < r <= 1 for r in rates)
    assert (np.diff(rates[:rise]) > 0).all() and (np.diff(rates[rise:]) <= 0).all()


def test_multistep_is_a_tenth_at_each_milestone():
    training = Training(schedule="multistep", milestones=(0.7, 0.9))
    assert [training.rate(step, 10) for step in (0, 6, 7, 8, 9)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("rows", "batch", "sizes"),
    [(17, 8, [8, 9]), (16, 8, [8, 8]), (18, 8, [8, 8, 2]), (9, 8, [9]), (1, 8, [1]), (3, 1, [1, 1, 1])],
)
def test_every_row_is_offered_once_an_epoch_and_the_last_is_not_alone(rows, batch, sizes):
    seen = []

    class Spy(Learner):
        def after_step(self, model, batch):
            seen.append(batch.rows)

    result = quick(toys.stream(tasks=1, rows=rows), Spy(), training=Training(2, batch))
    assert [len(part) for part in seen] == 2 * sizes
    assert [torch.cat(part).sort().values.tolist() for part in (seen[: len(sizes)], seen[len(sizes) :])] == (
        2 * [list(range(rows))]
    )
    assert len(result.training_loss[0]) == len(seen)


def test_tokens_go_through_the_same_loop():
    class Characters(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear = nn.Embedding(7, 8), nn.Linear(8, 7)

        def forward(self, x):
            return self.linear(self.embed(x))

    x = torch.randint(0, 7, (30, 5), generator=torch.Generator().manual_seed(0))
    part = Examples(x, (x + 1) % 7)
    stream = Stream("next letter", (Task(0, "t", tuple(range(7)), part, part),), tuple("abcdefg"), "domain")
    result = quick(stream, ER(memory=9), model=Characters(), training=Training(epochs=30, batch=8, lr=1.0))
    assert result.accuracy[0, 0] > 0.9


class TestBadInput:
    def test_divergence_names_task_and_step(self, toy):
        with pytest.raises(FloatingPointError, match=r"in step \d+ of task 0 .* smaller lr than 1e\+30"):
            quick(toy, training=Training(5, 8, lr=1e30))

    def test_non_finite_weights_are_refused_before_any_work(self, toy):
        net = models.mlp(toy)
        nn.init.constant_(net.linear.bias, float("nan"))
        with pytest.raises(ValueError, match="model: 'linear"):
            quick(toy, model=net)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"optimizer": "sdg"}, "optimizer: 'sdg' .* did you mean 'sgd'"),
            ({"schedule": "cosin"}, "did you mean 'cosine'"),
            ({"labels": "some"}, "labels: 'some'"),
            ({"precision": "half"}, "precision: 'half'"),
            ({"epochs": -1}, "epochs: -1"),
            ({"epochs": 1.5}, "epochs: 1.5"),
            ({"batch": 0}, "batch: 0"),
            ({"lr": 0}, "lr: 0"),
            ({"lr": float("nan")}, "lr: nan"),
            ({"momentum": 1.0}, "momentum: 1.0"),
            ({"weight_decay": -1}, "weight_decay: -1"),
            ({"clip": 0}, "clip: 0"),
            ({"milestones": (0.5, 1.5)}, "milestones"),
        ],
    )
    def test_settings_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Training(**settings)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("digits", models.mlp), "stream: 'digits'; give an instance of Stream"),
            ((None, models.mlp), "stream: None; give an instance of Stream"),
            ((toys.stream(1), "mlp"), "model: 'mlp'; give an instance of Module or an instance of Callable"),
            ((toys.stream(1), models.mlp, ER), "learner: .*; give an instance of Learner or None"),
            ((toys.stream(1), models.mlp, ER(5), Shift), "consolidation: .* give one such as CLeWI"),
            ((toys.stream(1), models.mlp, ER(5), None, 10), "training: 10; give an instance of Training or None"),
        ],
    )
    def test_arguments_of_the_wrong_kind_are_named(self, arguments, message):
        with pytest.raises((TypeError, ValueError), match=message):
            run(*arguments)

    def test_seed_and_device(self, toy):
        with pytest.raises(ValueError, match="seed: -1"):
            quick(toy, seed=-1)
        with pytest.raises(ValueError, match="device: 'abacus' is unknown"):
            quick(toy, device="abacus")
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="torch sees no GPU"):
                quick(toy, device="cuda")

    def test_a_frozen_model_cannot_be_trained(self, toy):
        with pytest.raises(ValueError, match="no parameter that requires a gradient"):
            quick(toy, model=models.mlp(toy).requires_grad_(False))


def test_a_description_tells_settings_and_weights_apart(toy):
    from functools import partial

    assert label(partial(models.mlp, hidden=(3,))) == "clkit.models.mlp(hidden=(3,))"
    net = models.mlp(toy)
    other = copy.deepcopy(net)
    assert label(net) == label(other)
    nn.init.zeros_(other.linear.bias)
    assert label(net) != label(other)


def test_progress_counts_steps_within_a_task(toy):
    seen = []

    class Count(Shift):
        def due(self, progress):
            seen.append(progress)
            return False

    quick(toys.stream(tasks=1), consolidation=Count())
    assert seen == [Progress(0, s, 6, False) for s in range(1, 7)] + [Progress(0, 6, 6, True)]


@pytest.mark.gpu
def test_a_gpu_learns_what_the_cpu_learns():
    stream = data.split(data.digits(), 2)
    training = Training(3, deterministic=True)
    gpu, cpu, again = (
        run(stream, models.convnet, ER(50), None, training, device=d, progress=False) for d in ("cuda", "cpu", "cuda")
    )
    assert np.abs(gpu.accuracy - cpu.accuracy).max() < 0.1
    assert np.array_equal(gpu.accuracy, again.accuracy)


def test_examples_of_a_task_without_a_memory_are_evenly_spaced(toy):
    x = torch.arange(2500.0)[:, None]
    part = Examples(x, torch.zeros(2500, dtype=torch.int64))
    task = Task(0, "long", (0,), part, part, Normalize())
    learner = quick(Stream("s", (task,), ("a",)), training=Training(0)).learner
    rows = learner.examples(task).x[:, 0]
    assert len(rows) == 1000 and rows[0] == 0 and rows[-1] == 2499


@pytest.mark.parametrize("steps", [40, 500, 800])
def test_a_warm_up_of_so_many_steps_is_the_released_one(steps):
    training = Training(schedule="cosine", warmup=500)
    for step in range(steps):
        after = 0.5 * (1 + np.cos(np.pi * (step - 500) / max(1, steps - 500)))
        assert training.rate(step, steps) == pytest.approx((step + 1) / 500 if step < 500 else after)


def test_a_warm_up_is_a_share_or_a_number_of_steps():
    assert Training(warmup=0.25).rate(0, 8) == pytest.approx(1 / 3) and Training(warmup=2).rate(0, 8) == 0.5
    assert [Training(warmup=w).rate(2, 8) for w in (0.25, 2)] == [1, 1]
    for bad in (1, 1.5, -2, True):
        with pytest.raises((ValueError, TypeError), match="warmup"):
            Training(warmup=bad)
