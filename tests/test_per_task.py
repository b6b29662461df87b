"""Tensors of its own for every task: nothing is forgotten, bit for bit, and what happens where something is shared."""

import copy
import hashlib
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from clkit import data, evaluation, models
from clkit.consolidation import WiSEFT
from clkit.data import Examples, Normalize, Stream, Task
from clkit.learners import Learner, PerTask
from clkit.modulation import LowRank, Mask, Modulated, Modulation, Own, load, modulated, save
from clkit.modules import evaluation_mode
from clkit.training import Result, Training, run
from clkit.training.loop import _Loop
from clkit.weights import equal
from test_checkpoint import Interrupted, assert_same_run, interrupted

SHORT = Training(epochs=3, batch=8, lr=0.03, optimizer="adamw")
LONG = replace(SHORT, epochs=12)
RULES = {
    "factor": Modulation(2, 2),
    "grid": Modulation(2, 2, mode="grid"),
    "reviewed": Modulation(2, 2, layout="reviewed"),
    "kaiming": Modulation(1, 2, init="kaiming"),
    "eight bits": Modulation(2, 2, store="int8"),
    "mask": Mask(),
    "low rank": LowRank(2),
    "own": Own(),
    "head alone": None,
}


def pictures(tasks: int = 3, *, scenario: str = "task", rows: int = 24) -> Stream:
    return replace(toys.images(tasks, rows), scenario=scenario)


def one_label_space(tasks: int = 3) -> Stream:
    """The same two labels in all tasks, and the task is given."""
    return replace(data.shared_head(toys.images(tasks)), scenario="task")


def quick(stream: Stream, learner=None, consolidation=None, *, model, training=SHORT, **more) -> Result:
    return run(stream, model, learner, consolidation, training, device="cpu", progress=False, **more)


def resumed(stream: Stream, learner: Learner, path, **more) -> Result:
    """The result of a run that is stopped in the second and in the third task and started again."""
    for task in (1, 2):
        with pytest.raises(Interrupted):
            quick(stream, interrupted(learner, task), checkpoint=path, **more)
    return quick(stream, learner, checkpoint=path, **more)


def network(stream: Stream, rule=RULES["factor"], **options) -> Modulated:
    return Modulated(toys.small_convnet(stream), rule, **options)


def fit(stream: Stream, learner: Learner | None = None, rule=RULES["factor"], *, options=None, **more):
    """A short run of a modulated network."""
    model = more.pop("model", None) or network(stream, rule, **(options or {}))
    return quick(stream, learner or PerTask(), model=model, **more)


def darker(task: Task) -> Task:
    """The task with less light, the later it is."""
    train, test = (replace(part, x=part.x // (task.index + 1)) for part in (task.train, task.test))
    return replace(task, train=train, test=test)


def batch_of(task):
    return task.prepare(task.test.x[:5])


def predicted(learner, model, task) -> bytes:
    """The logits of a fixed batch in a task that is given."""
    with evaluation_mode(model), torch.no_grad():
        return learner.predict(model, batch_of(task), task).numpy().tobytes()


@dataclass
class Spy(PerTask):
    """Keeps the logits of every earlier task on a fixed batch after each task."""

    seen: list = field(default_factory=list, repr=False)

    def calibrate(self, model, task):
        super().calibrate(model, task)
        self.seen_tasks = [*getattr(self, "seen_tasks", []), task]
        self.seen.append([predicted(self, model, earlier) for earlier in self.seen_tasks])


def forgets(seen) -> bool:
    """Whether any task's logits differ from those when it was learned."""
    return any(row[k] != seen[k][k] for row in seen for k in range(len(row)))


class TestForgetting:
    """There is none."""

    def test_twenty_later_tasks_change_no_bit(self, tmp_path):
        stream = pictures(21)
        backbone = toys.small_convnet(stream)
        result = fit(stream, Spy(), model=Modulated(backbone, RULES["factor"]), training=replace(SHORT, epochs=1))
        learner, seen = result.learner, result.learner.seen
        assert [len(row) for row in seen] == list(range(1, 22)) and not forgets(seen)
        assert len({row[-1] for row in seen}) == 21, "and tasks do differ"
        order = torch.randperm(21, generator=torch.Generator().manual_seed(0)).tolist()
        for k in order:
            assert predicted(learner, result.model, stream[k]) == seen[k][k]
        for k in reversed(order):
            save(tmp_path / f"{k}.safetensors", result.model, learner.tasks[k], name=stream[k].name)
        fresh = Modulated(backbone, RULES["factor"]).eval()
        for k in order:
            state = load(tmp_path / f"{k}.safetensors", fresh)
            assert fresh.call(batch_of(stream[k]), state).numpy().tobytes() == seen[k][k]
        matrix = result.accuracy
        assert all((matrix[k:, k] == matrix[k, k]).all() for k in range(21)) and result.summary()["forgetting"] == 0
        assert all((matrix[:k, k] == result.initial[k]).all() for k in range(21)), "unlearned tasks are at the start"

    @pytest.mark.parametrize("name", RULES)
    def test_every_rule_learns_and_forgets_nothing(self, name):
        stream = pictures()
        result = fit(stream, Spy(), RULES[name], training=LONG)
        assert not forgets(result.learner.seen)
        assert (result.accuracy[2:] == np.diag(result.accuracy)).all() and np.diag(result.accuracy).mean() >= 0.8
        for k, losses in enumerate(result.training_loss):
            assert losses[-3:].mean() < 0.8 * losses[:3].mean(), k
        if RULES[name] is not None:
            start = dict(network(stream, RULES[name]).gains)
            assert any(not torch.equal(p, start[key]) for key, p in result.model.gains.items())

    @pytest.mark.parametrize("statistics", ["own", "frozen"])
    @pytest.mark.parametrize("affine", [False, True])
    def test_options_of_the_model_do_not_matter(self, statistics, affine):
        result = fit(pictures(), Spy(), options={"statistics": statistics, "affine": affine})
        assert not forgets(result.learner.seen)

    @pytest.mark.parametrize("begin", ["previous", "nearest"])
    def test_neither_does_where_a_task_starts(self, begin):
        assert not forgets(fit(pictures(), Spy(begin=begin)).learner.seen)

    def test_a_network_without_convolutions(self):
        stream = replace(toys.stream(), scenario="task")
        for rule in (Modulation(2, 2), Mask()):
            result = quick(stream, Spy(), model=Modulated(models.mlp(stream, hidden=(8,)), rule), training=LONG)
            assert not forgets(result.learner.seen) and np.diag(result.accuracy).mean() > 0.8

    def test_datasets_with_classes_of_their_own(self):
        """Tiny scripts as tasks, from one network."""
        sets = {name: data.glyphs(characters=c, per_class=12, size=8) for name, c in {"a": "AMO", "b": "XTIC"}.items()}
        stream = data.series(sets)
        result = fit(stream, Spy(), training=LONG)
        assert not forgets(result.learner.seen) and np.diag(result.accuracy).mean() > 0.6
        assert {k: state.classes for k, state in result.learner.tasks.items()} == {0: (0, 1, 2), 1: (3, 4, 5, 6)}

    def test_controls_that_must_forget(self):
        """What is shared changes what earlier tasks answer."""
        stream, same = pictures(), one_label_space()
        assert forgets(fit(stream, Spy(shared=("statistics",))).learner.seen)
        assert forgets(fit(stream, Spy(shared=("affine",)), options={"affine": True}).learner.seen)
        assert forgets(fit(same, Spy(shared=("head",))).learner.seen)

    def test_and_the_same_without_sharing(self):
        stream, same = pictures(), one_label_space()
        assert not forgets(fit(stream, Spy(), options={"affine": True}).learner.seen)
        assert not forgets(fit(same, Spy()).learner.seen)
        assert not forgets(fit(stream, Spy(shared=("statistics",)), options={"statistics": "frozen"}).learner.seen)
        assert not forgets(fit(stream, Spy(shared=("affine",))).learner.seen), "which is not trained"

    @pytest.mark.parametrize(
        ("shared", "options"), [(("statistics",), {}), (("affine",), {"affine": True}), (("head",), {})]
    )
    def test_all_that_is_shared_is_forgotten_and_nothing_else(self, shared, options):
        """With what was shared as it was then, an earlier task answers as it did."""
        stream = one_label_space()
        kept = []

        @dataclass
        class Noting(Spy):
            def calibrate(self, model, task):
                super().calibrate(model, task)
                kept.append(model.state(range(2)).tensors)

        result = fit(stream, Noting(shared=shared), options=options)
        marks = {"statistics": "running", "affine": "norm", "head": "linear"}
        running = shared == ("statistics",)
        parts = [key for key in kept[0] if marks[shared[0]] in key and ("running" in key) == running]
        assert parts and all(any(not torch.equal(kept[0][key], later[key]) for later in kept[1:]) for key in parts)
        live = dict(result.model.backbone.named_parameters()) | dict(result.model.backbone.named_buffers())
        with torch.no_grad():
            for key in parts:
                live[key.removeprefix("backbone.")].copy_(kept[0][key])
        assert predicted(result.learner, result.model, stream[0]) == result.learner.seen[0][0]


class TestWhatIsTrained:
    """Gains and head of the task, and nothing else."""

    def test_the_optimizer_holds_gains_and_head(self, monkeypatch):
        held = []

        def noting(self, parameters):
            optimizer = make(self, parameters)
            held.append([p for group in optimizer.param_groups for p in group["params"]])
            return optimizer

        make = Training.make_optimizer
        monkeypatch.setattr(Training, "make_optimizer", noting)
        result = fit(pictures())
        net = result.model
        expected = {id(p) for p in net.gains.values()} | {id(p) for p in net.backbone.linear.parameters()}
        assert len(held) >= 3
        for parameters in held[-3:]:
            assert {id(p) for p in parameters} == expected and len(parameters) == len(expected)
        numbers = net.parameters_per_task()
        assert sum(p.numel() for p in held[-1]) == numbers["gains"] + numbers["head"]

    @pytest.mark.parametrize("name", [name for name in RULES if name != "own"])
    def test_everything_else_keeps_its_hash(self, name):
        digests = []

        def digest(tensors) -> dict[str, str]:
            return {key: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for key, t in tensors.items()}

        @dataclass
        class Noting(PerTask):
            def after_step(self, model, batch):
                own = {f"backbone.{n}": t for n, t in model.backbone.named_parameters() if not n.startswith("linear")}
                earlier = {f"{k}.{n}": t for k, state in self.tasks.items() for n, t in state.tensors.items()}
                digests.append(digest(own | earlier))

        backbone = toys.small_convnet(pictures())
        result = fit(pictures(), Noting(), model=Modulated(backbone, RULES[name]))
        assert len(digests) == 27 and digests[-1].items() >= digests[0].items()
        whole = digest({f"{k}.{n}": t for k, s in result.learner.tasks.items() for n, t in s.tensors.items()})
        own = digest({f"backbone.{n}": t for n, t in backbone.named_parameters() if not n.startswith("linear")})
        for found in digests:
            assert all(whole[key] == h if key in whole else own[key] == h for key, h in found.items())
        assert digests[-1].keys() == own.keys() | {key for key in whole if not key.startswith("2.")}

    def test_statistics_of_a_shifted_task_are_its_own(self):
        source = pictures(2)
        result = fit(replace(source, tasks=tuple(map(darker, source))))
        a, b = (result.learner.tasks[k].tensors["backbone.norm1.running_mean"] for k in (0, 1))
        assert (a - b).abs().max() > 0.1

    def test_the_loss_is_over_the_tasks_own_classes_whatever_the_recipe_says(self):
        stream, batch = pictures(), None
        losses = set()
        for labels in ("all", "seen", "task"):
            result = fit(stream, training=replace(SHORT, epochs=1, labels=labels))
            model, batch = result.model.eval(), stream[1].batch(slice(0, 8))
            result.learner.setting.criterion.begin_task(stream[1])
            loss = result.learner.loss(model, batch)
            twin = F.cross_entropy(model(batch.x)[:, 2:4], batch.y - 2)
            assert torch.allclose(loss, twin, atol=1e-6)
            losses.add(tuple(map(tuple, result.training_loss)))
        assert len(losses) == 1

    @pytest.mark.parametrize("labels", ["all", "seen", "task"])
    def test_and_over_all_of_them_where_tasks_share_some(self, labels):
        stream = toys.images(2)
        shared = replace(stream[1], classes=(1, 2, 3))
        stream = replace(stream, tasks=(stream[0], shared), scenario="task")
        losses = fit(stream, training=replace(SHORT, labels=labels)).training_loss
        assert all(np.array_equal(a, b) for a, b in zip(losses, fit(stream).training_loss, strict=True))

    def test_rows_of_the_head_that_are_of_other_tasks_do_not_move(self):
        result = fit(pictures())
        start = network(pictures()).backbone.linear.weight
        live = result.model.backbone.linear.weight
        assert torch.equal(live[:4], start[:4]) and not torch.equal(live[4:], start[4:])


class TestOrder:
    """A task's tensors depend on that task alone."""

    @pytest.fixture(autouse=True)
    def same_batches(self, monkeypatch):
        def batches(self, task):
            self.orders = getattr(self, "orders", {})
            own = torch.Generator().manual_seed(sum(task.name.encode()))
            generator = self.orders.setdefault(task.name, own)
            rows = torch.randperm(len(task.train), generator=generator)
            yield from rows.split(self.training.batch)

        monkeypatch.setattr(_Loop, "batches", batches)

    def tensors(self, stream: Stream, indices: list[int], **more) -> dict[str, dict[str, torch.Tensor]]:
        tasks = tuple(replace(stream[k], index=i) for i, k in enumerate(indices))
        result = fit(replace(stream, tasks=tasks), **more)
        return {task.name: dict(result.learner.tasks[task.index].tensors) for task in tasks}

    @pytest.mark.parametrize("name", ["factor", "kaiming", "mask", "low rank"])
    def test_alone_first_or_last(self, name):
        stream, rule = pictures(), RULES[name]
        forward, backward = (self.tensors(stream, order, rule=rule) for order in ([0, 1, 2], [2, 1, 0]))
        alone = self.tensors(stream, [2], rule=rule)
        for key, found in forward.items():
            assert equal(found, backward[key]), key
        assert equal(alone["task 2"], forward["task 2"])
        assert not equal(forward["task 1"], forward["task 2"])

    def test_not_so_where_something_is_shared_or_handed_on(self):
        stream = pictures()
        for learner, options in (
            (PerTask(shared=("statistics",)), {}),
            (PerTask(shared=("affine",)), {"affine": True}),
            (PerTask(begin="previous"), {}),
        ):
            forward, backward = (self.tensors(stream, o, learner=learner, options=options) for o in ([0, 1], [1, 0]))
            assert not equal(forward["task 0"], backward["task 0"])
            assert not equal(forward["task 1"], backward["task 1"])


class TestBeginnings:
    """Where a task starts."""

    def starts(self, stream: Stream, begin: str, **more) -> tuple[list[dict[str, torch.Tensor]], PerTask]:
        found = []

        @dataclass
        class Noting(PerTask):
            def begin_task(self, model, task):
                super().begin_task(model, task)
                found.append(dict(model.state(range(len(stream.classes))).tensors))

        result = fit(stream, Noting(begin=begin), **more)
        return found, result.learner

    def test_at_the_backbone(self):
        found, _ = self.starts(pictures(), "backbone")
        start = network(pictures()).state(range(6)).tensors
        assert all(equal(tensors, dict(start)) for tensors in found)

    def test_at_the_previous_task_with_a_fresh_head(self):
        found, learner = self.starts(pictures(), "previous")
        start = network(pictures()).state(range(6)).tensors
        assert equal(found[0], dict(start))
        for t in (1, 2):
            for key, tensor in found[t].items():
                before = start[key] if "linear" in key else learner.tasks[t - 1].tensors[key]
                assert torch.equal(tensor, before), key
            assert not torch.equal(found[t]["gains.conv2/weight/m"], start["gains.conv2/weight/m"])

    @pytest.mark.parametrize("twin", [0, 1])
    def test_at_the_nearest_task(self, twin):
        """Of two earlier ones that which asked the same: whether two sums over the inputs have the same sign."""
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(2, 2, 8, generator=generator)

        def examples(t: int, question: int, rows: int) -> Examples:
            x = torch.randn(rows, 8, generator=generator)
            return Examples(x, 2 * t + ((x @ directions[question].T).prod(1) > 0).long())

        questions = (0, 1, twin)
        tasks = (
            Task(t, f"task {t}", (2 * t, 2 * t + 1), examples(t, q, 256), examples(t, q, 64), Normalize())
            for t, q in enumerate(questions)
        )
        stream = Stream("signs", tuple(tasks), tuple("abcdef"), "task")
        net = Modulated(models.mlp(stream, hidden=(16, 8)), Own())
        found, learner = self.starts(stream, "nearest", model=net, training=replace(LONG, epochs=20, batch=32))
        for key, tensor in found[2].items():
            if key.startswith("gains"):
                assert torch.equal(tensor, learner.tasks[twin].tensors[key])
                assert not torch.equal(tensor, learner.tasks[1 - twin].tensors[key])


class TestInference:
    """Where the task is not given."""

    @pytest.mark.parametrize("infer", ["entropy", "statistics"])
    def test_it_is_found_better_than_by_chance(self, infer):
        source = pictures(4, scenario="class", rows=40)
        stream = replace(source, tasks=tuple(map(darker, source))) if infer == "statistics" else source
        result = fit(stream, PerTask(infer=infer), training=LONG)
        hits, right = 0, 0
        for task in stream:
            with evaluation_mode(result.model):
                answers = result.learner.predict(result.model, task.prepare(task.test.x)).argmax(1)
            hits += int((answers // 2 == task.index).sum())
            right += int((answers == task.test.y).sum())
        assert hits / 40 > 0.4 > 0.25 and right / 40 > 0.25 > 0.125
        assert result.accuracy[-1].mean() == pytest.approx(right / 40)
        assert (result.masked[3] == np.diag(result.masked)).all(), "within a task nothing is forgotten"

    def test_entropy_by_its_definition(self):
        """Task by task and row by row; tasks have different numbers of classes."""
        sizes = [2, 4, 3]
        source = data.split(data.glyphs(characters="AMOXTICHL", per_class=10, size=8), sizes)
        result = fit(source)
        learner, model, x = result.learner, result.model.eval(), torch.cat([batch_of(task) for task in source])
        found = learner.predict(model, x)
        assert found.shape == (len(x), 9)
        for row, own in zip(found, x, strict=True):
            scores, blocks = [], []
            for task in source:
                p = model.call(own[None], learner.tasks[task.index])[0, list(task.classes)].double().softmax(0)
                scores.append(-(p * p.log()).sum() / np.log(len(p)))
                blocks.append(p.log())
            best = int(torch.stack(scores).argmin())
            for k, (task, block) in enumerate(zip(source, blocks, strict=True)):
                expected = block if k == best else block - 20
                assert torch.allclose(row[list(task.classes)].double(), expected, atol=1e-4)
            assert int(row.argmax()) in source[best].classes

    def test_statistics_by_their_definition(self):
        """The nearest task is that whose running statistics the inputs of the norms fit best."""
        stream = pictures(3, scenario="class")
        result = fit(stream, PerTask(infer="statistics"))
        learner, model, x = result.learner, result.model.eval(), torch.cat([batch_of(task) for task in stream])
        distances = []
        for task in stream:
            h, total = x, torch.zeros(len(x))
            for layer in model.folded(learner.tasks[task.index]):
                if isinstance(layer, torch.nn.BatchNorm2d):
                    gap = (h.mean((2, 3)) - layer.running_mean).square() / (layer.running_var + layer.eps)
                    total += gap.mean(1)
                h = layer(h)
            distances.append(total.detach())
            assert torch.allclose(model.compared(x, learner.tasks[task.index])[1], distances[-1], rtol=1e-4)
        nearest = torch.stack(distances).argmin(0)
        assert len(nearest.unique()) > 1
        assert torch.equal(learner.predict(model, x).argmax(1) // 2, nearest)

    def test_before_anything_is_learned_it_is_the_backbone(self):
        stream = pictures(scenario="class")
        net, learner = network(stream).eval(), PerTask()
        learner.start(fit(stream).learner.setting)
        x = batch_of(stream[0])
        assert torch.equal(learner.predict(net, x), net(x))
        assert torch.equal(learner.predict(net, x, stream[1]), net(x))

    def test_classes_of_tasks_to_come_are_never_answered(self):
        stream = pictures(scenario="class")
        learned = replace(stream, tasks=stream.tasks[:2])
        for infer in ("entropy", "statistics"):
            result = fit(learned, PerTask(infer=infer), model=network(stream))
            answers = result.learner.predict(result.model.eval(), torch.cat([batch_of(task) for task in stream]))
            assert answers.shape == (15, 6) and answers.isfinite().all() and (answers.argmax(1) < 4).all()

    def test_domains_have_their_labels_in_common(self):
        result = fit(replace(one_label_space(), scenario="domain"), training=LONG)
        assert result.accuracy[-1].mean() > 0.6


@cache
def learned() -> Result:
    return fit(pictures(7, scenario="class"), training=replace(SHORT, epochs=1))


@dataclass
class Twin(PerTask):
    """Asks every finished task about every row, every time."""

    def predict(self, model, x, task=None):
        if task is not None or not self.tasks:
            return super().predict(model, x, task)
        answers, scores = [], []
        for state in self.tasks.values():
            logits, score = model.call(x, state, shared=self.shared), None
            if self.infer == "statistics":
                logits, score = model.compared(x, state, shared=self.shared)
            answers.append(logits[..., list(state.classes)].log_softmax(-1))
            entropy = F.softmax(answers[-1], -1).mul(-answers[-1]).sum(-1) / np.log(len(state.classes))
            scores.append(entropy.flatten(1).mean(1) if entropy.ndim > 1 else entropy)
            scores[-1] = scores[-1] if score is None else score
        chosen = torch.stack(scores).argmin(0)
        found = answers[0].new_full((*answers[0].shape[:-1], len(self.setting.criterion.first_task)), -40.0)
        for position, (answer, state) in enumerate(zip(answers, self.tasks.values(), strict=True)):
            own, away = list(state.classes), 20.0 * (chosen != position).float()
            found[..., own] = torch.maximum(found[..., own], answer - away.view(-1, *[1] * (answer.ndim - 1)))
        return found


def counted(monkeypatch) -> list[int]:
    """How many times stored tasks have answered so far, in a list of one."""
    calls, call = [0], Modulated.call

    def counting(self, *args, **options):
        calls[0] += 1
        return call(self, *args, **options)

    monkeypatch.setattr(Modulated, "call", counting)
    return calls


class TestWhatIsKept:
    """A finished task answers once about each row: nothing else changes."""

    CASES = (
        ("class", {"infer": "entropy"}, "factor"),
        ("class", {"infer": "statistics"}, "mask"),
        ("domain", {"infer": "entropy"}, "kaiming"),
        ("domain", {"infer": "statistics", "begin": "previous"}, "own"),
        ("class", {"infer": "entropy", "shared": ("statistics",)}, "factor"),
    )

    @pytest.mark.parametrize(("scenario", "settings", "rule"), CASES)
    def test_no_bit_of_a_run(self, scenario, settings, rule, tmp_path):
        stream = pictures(4, scenario="class")
        stream = data.shared_head(stream) if scenario == "domain" else stream
        more = {"model": network(stream, RULES[rule]), "watch": 4}
        plain, kept = quick(stream, Twin(**settings), **more), quick(stream, PerTask(**settings), **more)
        again = resumed(stream, PerTask(**settings), tmp_path / "run", **more)
        for name in ("accuracy", "masked", "losses", "initial"):
            twin = getattr(plain, name).tobytes()
            assert getattr(kept, name).tobytes() == twin == getattr(again, name).tobytes(), name
        assert len(plain.watched) == len(kept.watched) > 4
        for a, b, c in zip(plain.watched, kept.watched, again.watched, strict=True):
            assert a["accuracy"].tobytes() == b["accuracy"].tobytes() == c["accuracy"].tobytes()
        assert toys.same_tree(kept.learner.state_dict(), plain.learner.state_dict())

    def test_no_bit_for_sequences_of_tokens(self):
        stream = replace(toys.tokens(3), scenario="class")
        net = Modulated(toys.small_reader(stream), Modulation(2, 2))
        a, b = (quick(stream, learner, model=net) for learner in (Twin(), PerTask()))
        assert a.losses.tobytes() == b.losses.tobytes() and np.isfinite(a.losses).all()

    @settings(deadline=None, max_examples=10)
    @given(growth=st.lists(st.integers(0, 3), min_size=1, max_size=4), infer=st.sampled_from(["entropy", "statistics"]))
    def test_however_many_tasks_come_between_two_tests(self, growth, infer):
        result, x, kept = learned(), torch.cat([batch_of(task)[:2] for task in pictures(7)]), {}
        learner, twin = PerTask(infer=infer), Twin(infer=infer)
        for rule in (learner, twin):
            rule.start(result.learner.setting)
        for number in np.minimum(1 + np.cumsum(growth), 7):
            learner.tasks = twin.tasks = dict(list(result.learner.tasks.items())[:number])
            with evaluation_mode(result.model), torch.no_grad():
                found = learner.predict(result.model, x, None, kept)
                assert torch.equal(found, learner.predict(result.model, x))
                assert torch.equal(found, twin.predict(result.model, x))
        assert sum(part.numel() for part in kept["answers"]) == len(x) * (2 * 14 + 1), "however many tasks there are"

    def test_a_task_costs_one_answer_for_each_test_set(self, monkeypatch):
        calls, after = counted(monkeypatch), []

        @dataclass
        class Noting(PerTask):
            def begin_task(self, model, task):
                super().begin_task(model, task)
                after.append(calls[0])

        stream = pictures(6, scenario="class")
        fit(stream, Noting(), training=replace(SHORT, epochs=1))
        assert np.diff([*after, calls[0]]).tolist() == [6] * 6
        after.clear()
        fit(stream, Noting(shared=("statistics",)), training=replace(SHORT, epochs=1))
        assert np.diff([*after, calls[0]]).tolist() == [6, 12, 18, 24, 30, 36], "what is shared changes all answers"

    def test_nothing_where_the_logits_are_too_many(self, monkeypatch):
        stream = pictures(4, scenario="class")
        plain = fit(stream)
        monkeypatch.setattr(evaluation, "KEPT", 4 * 10 * 8 - 1)
        calls = counted(monkeypatch)
        assert fit(stream).losses.tobytes() == plain.losses.tobytes() and calls[0] == 4 * (1 + 1 + 2 + 3 + 4)


class TestInARun:
    """With checkpoints, consolidations and factories."""

    @pytest.mark.parametrize("name", ["factor", "kaiming", "eight bits", "mask", "own"])
    def test_it_goes_on_from_a_checkpoint_bit_for_bit(self, name, tmp_path):
        stream = pictures()
        more = {"model": network(stream, RULES[name])}
        plain = quick(stream, PerTask(), **more)
        again = resumed(stream, PerTask(), tmp_path / "run", **more)
        assert_same_run(plain, again)
        for k, state in plain.learner.tasks.items():
            assert again.learner.tasks[k].classes == state.classes
            assert predicted(plain.learner, plain.model, stream[k]) == predicted(again.learner, again.model, stream[k])

    @pytest.mark.parametrize(
        ("learner", "options"),
        [
            (PerTask(begin="previous"), {}),
            (PerTask(begin="nearest", infer="statistics"), {}),
            (PerTask(shared=("statistics", "affine", "head")), {"affine": True}),
        ],
    )
    def test_whatever_a_task_starts_from_and_shares(self, learner, options, tmp_path):
        stream = pictures(scenario="class")
        more = {"model": network(stream, **options)}
        plain = quick(stream, learner, **more)
        assert_same_run(plain, resumed(stream, learner, tmp_path / "run", **more))

    def test_a_task_that_is_interrupted_leaves_nothing(self, tmp_path):
        stream, net = pictures(), network(pictures())
        with pytest.raises(Interrupted):
            quick(stream, interrupted(PerTask(), 1), None, model=net, checkpoint=tmp_path / "run")
        assert equal(dict(net.state_dict()), dict(network(pictures()).state_dict()))

    def test_what_is_deployed_is_what_a_task_keeps(self):
        stream = pictures()
        result = fit(stream, consolidation=WiSEFT(0.5))
        for k, weights in enumerate(result.weights):
            for key, tensor in result.learner.tasks[k].tensors.items():
                rows = list(stream[k].classes) if "linear" in key else slice(None)
                assert torch.equal(tensor, weights[key][rows]), key
        plain = fit(stream)
        assert all(equal(a, b) for a, b in zip(plain.trained, result.trained, strict=True)), "training does not see it"
        assert not equal(dict(plain.learner.tasks[1].tensors), dict(result.learner.tasks[1].tensors))

    def test_a_look_on_the_way_sees_the_task_in_training(self):
        result = fit(pictures(), training=replace(SHORT, epochs=12), watch=6)
        for task in range(3):
            own = [look["accuracy"][task] for look in result.watched if look["learning"] == task]
            assert len(set(own)) > 1 and own[-1] == result.accuracy[task, task]
            assert own[-2] > result.initial[task]

    def test_a_checkpoint_of_another_rule_is_refused(self, tmp_path):
        stream = pictures(2)
        fit(stream, checkpoint=tmp_path / "run")
        with pytest.raises(ValueError, match="is of another run"):
            fit(stream, rule=Modulation(2, 2, interpolation="nearest"), checkpoint=tmp_path / "run")

    def test_a_factory_serves_every_seed(self):
        stream = pictures()
        factory = partial(modulated, model=toys.small_convnet, rule=Modulation(2, 2))
        a, b = (quick(stream, PerTask(), model=factory, seed=seed) for seed in (0, 1))
        assert isinstance(a.model, Modulated) and not equal(a.weights[0], b.weights[0])
        assert "Modulation(m1=2, m2=2" in a.config["model"] and "small_convnet" in a.config["model"]
        twin = fit(stream)
        assert equal(twin.weights[2], a.weights[2])

    @pytest.mark.parametrize("learner", [PerTask(), PerTask(begin="previous"), PerTask(infer="statistics")])
    def test_a_plain_model_is_refused_with_what_to_do(self, learner):
        stream = pictures()
        with pytest.raises(TypeError, match=r"Modulated.*Sequential.*Modulated\(.*Modulation\("):
            quick(stream, learner, model=toys.small_convnet)
        with pytest.raises(TypeError, match="Modulated"):
            learner.begin_task(toys.small_convnet(stream), stream[0])

    def test_other_learners_train_a_modulated_network_as_any_other(self):
        result = quick(pictures(2), Learner(), model=network(pictures(2)), training=replace(SHORT, labels="task"))
        start = network(pictures(2))
        changed = {n for n, p in result.model.named_parameters() if not torch.equal(p, start.get_parameter(n))}
        assert changed == {f"gains.{key}" for key in start.gains} | {"backbone.linear.weight", "backbone.linear.bias"}

    def test_the_learner_and_its_model_can_be_copied(self):
        result = fit(pictures())
        learner, model = copy.deepcopy((result.learner, result.model))
        for task in pictures():
            assert predicted(learner, model, task) == predicted(result.learner, result.model, task)

    def test_the_record_says_how(self):
        assert repr(PerTask()) == "PerTask(infer='entropy', begin='backbone', shared=())"
        assert PerTask(shared=["head"]) == PerTask(shared=("head",))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: PerTask(infer="labels"), "infer: 'labels'.*entropy"),
            (lambda: PerTask(begin="zero"), "begin: 'zero'.*backbone"),
            (lambda: PerTask(shared=("gains",)), r"shared: \('gains',\).*head"),
        ],
    )
    def test_bad_settings_are_named(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_what_cannot_tell_tasks_apart_is_refused(self):
        stream = data.split(data.glyphs(characters="ABCD", per_class=8, size=8), [1, 3])
        with pytest.raises(ValueError, match=r"one class.*has no entropy"):
            fit(stream)
        with pytest.raises(ValueError, match="'frozen' ones are all tasks' alike"):
            fit(pictures(scenario="class"), PerTask(infer="statistics"), options={"statistics": "frozen"})
        with pytest.raises(ValueError, match="'statistics' that are shared"):
            PerTask(infer="statistics", shared=("statistics",))

    def test_statistics_cannot_tell_tasks_apart_where_there_are_none(self):
        stream = toys.stream()
        with pytest.raises(ValueError, match=r"BatchNorm.*entropy"):
            quick(stream, PerTask(infer="statistics"), model=Modulated(models.mlp(stream)))
