"""Learners against the rule of the code that CLeWI's tables come from, and what released code does otherwise.

ER, ER-ACE, online EWC and BiC go step by step. Of each switch for the behaviour of released code there is a test of
what differs, and in which direction.

A run is recorded: the rows of every step, those replayed beside them, and the weights after it. The twin starts at the
same weights and sees the same rows. Its loss is written out row by row and class by class, its step by hand.
"""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import toys
from clkit import merging, models, weights
from clkit.consolidation import CLeWI, Context
from clkit.data import Stream
from clkit.evaluation import outputs
from clkit.learners import AGEM, ER, ERACE, BiC, OnlineEWC
from clkit.modules import hooked
from clkit.training import Training
from clkit.weights import get_weights
from studies import clewi
from test_resume import assert_goes_on

LR = 0.05


def recorded(rule, training, **settings):
    """The steps of a run of a learner, as dicts, the learner as it ended, and the stream."""
    steps = []

    class Recorded(rule):
        def replayed(self, model, batch):
            joined = super().replayed(model, batch)
            steps.append({"task": batch.task.index, "rows": batch.rows, "x": joined.x, "y": joined.y})
            steps[-1]["size"] = batch.size
            return joined

        def after_step(self, model, batch):
            super().after_step(model, batch)
            held = self.apart[batch.rows] if isinstance(self, BiC) else torch.zeros(batch.size, dtype=torch.bool)
            steps[-1] |= {"after": get_weights(model), "held": held}
            steps[-1]["seen"] = self.store.seen if isinstance(self, ER) else 0

        def calibrate(self, model, task):
            super().calibrate(model, task)
            if isinstance(self, BiC):
                steps[-1] |= {"validation": self.held_out(task), "correction": self.correction.clone()}

    stream = toys.stream(tasks=3)
    result = toys.quick(stream, Recorded(**settings), training=training)
    return steps, result.learner, stream


def follow(steps, stream, loss, end=None):
    """Goes the way of the recorded steps with a twin's own losses, and asks for the same weights after each."""
    net = toys.models.mlp(stream, seed=0)
    for i, step in enumerate(steps):
        value = loss(net, step)
        gradients = torch.autograd.grad(value, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p -= LR * g
        for name, p in net.named_parameters():
            assert torch.allclose(p, step["after"][name], atol=1e-6, rtol=0), (i, name)
        if end is not None and (i + 1 == len(steps) or steps[i + 1]["task"] != step["task"]):
            end(net, step)
    assert {step["task"] for step in steps} == {0, 1, 2}


def surprise(logits, label, rivals):
    """Minus the log of a class's share among its rivals."""
    return torch.stack([logits[c] for c in rivals]).logsumexp(0) - logits[label]


def mean(values):
    return torch.stack(list(values)).mean()


def training(**more):
    return Training(epochs=2, batch=7, lr=LR, **more)


def test_er():
    steps, learner, stream = recorded(ER, training(), memory=12)

    def loss(net, step):
        return mean(surprise(z, y, range(6)) for z, y in zip(net(step["x"]), step["y"].tolist(), strict=True))

    follow(steps, stream, loss)
    offered = torch.tensor([step["size"] for step in steps]).cumsum(0)
    assert [step["seen"] for step in steps] == offered.tolist(), "after every step, in every epoch"
    assert len(steps[0]["y"]) == 7 and len(steps[1]["y"]) == 14
    assert len(learner.store) == 12


def test_er_ace():
    steps, _, stream = recorded(ERACE, training(), memory=12)
    seen: set[int] = set()

    def loss(net, step):
        n, present = step["size"], set(step["y"][: step["size"]].tolist())
        seen.update(present)
        rivals = range(6)
        if step["task"] > 0:
            rivals = [c for c in range(6) if c in present or c >= max(seen)]
        logits, y = net(step["x"]), step["y"].tolist()
        value = mean(surprise(z, label, rivals) for z, label in zip(logits[:n], y[:n], strict=True))
        if step["task"] > 0:
            value = value + mean(surprise(z, label, range(6)) for z, label in zip(logits[n:], y[n:], strict=True))
        assert (len(y) > n) == (step["task"] > 0)
        return value

    follow(steps, stream, loss)


def test_online_ewc():
    steps, _, stream = recorded(OnlineEWC, training(), strength=40.0, gamma=0.9, labels="weighted")
    state: dict[str, dict[str, torch.Tensor]] = {}

    def loss(net, step):
        value = mean(surprise(z, y, range(6)) for z, y in zip(net(step["x"]), step["y"].tolist(), strict=True))
        for name, p in net.named_parameters() if state else ():
            value = value + 40.0 * (state["fisher"][name] * (p - state["anchor"][name]) ** 2).sum()
        return value

    def end(net, step):
        rows = stream[step["task"]].train
        new = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        for x, y in zip(stream[0].prepare(rows.x), rows.y.tolist(), strict=True):
            log_p = -surprise(net(x[None])[0], y, range(6))
            gradients = torch.autograd.grad(log_p, list(net.parameters()))
            for name, g in zip(new, gradients, strict=True):
                new[name] += log_p.exp().detach() * g**2 / len(rows)
        old = state.get("fisher", {name: 0.0 for name in new})
        state["fisher"] = {name: 0.9 * old[name] + new[name] for name in new}
        state["anchor"] = {name: p.detach().clone() for name, p in net.named_parameters()}

    follow(steps, stream, loss, end)


def test_bic():
    steps, _, stream = recorded(BiC, training(labels="seen"), memory=24, weighting="mammoth", bias_epochs=250)
    state: dict = {}

    def loss(net, step):
        t, logits, y = step["task"], net(step["x"]), step["y"].tolist()
        trained = [i for i in range(len(y)) if i >= step["size"] or not step["held"][i]]
        value = mean(surprise(logits[i], y[i], range(2 * t + 2)) for i in trained)
        if t == 0:
            return value
        with torch.no_grad():
            taught = state["teacher"](step["x"]).clone()
            if t > 1:
                taught[:, 2 * t - 2 : 2 * t] = taught[:, 2 * t - 2 : 2 * t] * state["ab"][0] + state["ab"][1]
        distances = []
        for i in trained:
            target, log_p = (taught[i, : 2 * t] / 2).softmax(0), (logits[i, : 2 * t] / 2).log_softmax(0)
            distances.append(-sum(target[c] * log_p[c] for c in range(2 * t)))
        share = 1 / (t + 1)
        return (1 - share) * value + share * mean(distances) * 2 * 2

    def end(net, step):
        t, rows = step["task"], step["validation"]
        if t > 0:
            ab = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
            with torch.no_grad():
                logits = net(rows.x).double()
            optimizer = torch.optim.Adam([ab], lr=0.001)
            for _ in range(250):
                for z, y in zip(logits.split(7), rows.y.split(7), strict=True):
                    optimizer.zero_grad()
                    corrected = torch.cat([z[:, : 2 * t], z[:, 2 * t : 2 * t + 2] * ab[0] + ab[1]], 1)
                    torch.nn.functional.cross_entropy(corrected, y).backward()
                    optimizer.step()
            state["ab"] = ab.detach().float()
            assert torch.allclose(step["correction"][:, 2 * t], state["ab"], atol=1e-6)
            assert (step["correction"][:, : 2 * t] == torch.tensor([[1.0], [0.0]])).all()
        state["teacher"] = copy.deepcopy(net)

    follow(steps, stream, loss, end)
    assert abs(state["ab"][0] - 1) > 1e-3


def pictures() -> Stream:
    """The toy's images at the 8 x 8 pixels that a ResNet takes."""
    source = toys.images()
    parts = (replace(t, train=larger(t.train), test=larger(t.test)) for t in source)
    return Stream("pictures", tuple(parts), source.classes)


def larger(part):
    return replace(part, x=nn.functional.pad(part.x, (1, 1, 1, 1)))


class TestDroppedJunctures:
    net = partial(models.resnet18, width=4)

    def context(self, seed=1) -> Context:
        """Two networks that began apart (or one, of seed 0), on the rows of the first task."""
        stream = pictures()
        old, new = (toys.quick(replace(stream, tasks=stream.tasks[:1]), model=self.net, seed=s) for s in (0, seed))
        x = stream[0].prepare(stream[0].train.x)
        given = {"model": old.model, "previous": old.weights[0], "current": new.weights[0], "inputs": x}
        return Context(**given)

    def test_the_old_networks_function_is_kept_with_the_juncture_and_changes_without(self):
        context = self.context()
        before = copy.deepcopy(get_weights(context.model))
        moved, report = clewi.DroppedJunctures().aligned(context)
        assert weights.equal(get_weights(context.model), before) and list(moved) == list(context.previous)
        assert report["kept"] < 1e-5 and report["dropped"] > 0.05
        logits, dropped = (outputs(context.model, w, context.inputs) for w in (context.previous, moved))
        change = (dropped - logits).abs().max() / (logits.max() - logits.min())
        assert float(change) == pytest.approx(report["dropped"], abs=1e-5)

    def test_nothing_is_dropped_where_both_ends_are_permuted_alike(self):
        moved, report = clewi.DroppedJunctures().aligned(self.context(seed=0))
        assert report["identity"] == 1.0 and report["dropped"] < 1e-5
        assert weights.equal(moved, self.context().previous)

    def test_it_is_part_of_a_run_on_its_network_alone(self):
        rule, training = clewi.DroppedJunctures(0.3), Training(epochs=1, batch=12)
        stream = replace(pictures(), tasks=pictures().tasks[:2])
        result = toys.quick(stream, ER(memory=9), rule, model=self.net, training=training)
        assert result.reports[0] == {} and {"kept", "dropped", "alpha"} <= result.reports[1].keys()
        for model in (toys.small_convnet, models.vit):
            with pytest.raises(ValueError, match="no stem before an identity shortcut"):
                toys.quick(pictures(), ER(memory=9), rule, model=model)


class TestCumulative:
    def noted(self, kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """BatchNorm's running means after the first merge, means of each batch since, and running means in the end."""
        start, batches, end = [], [], []

        class Noted(kind):
            def on_consolidated(self, model, task):
                super().on_consolidated(model, task)
                if task.index == 1:
                    start.append(model.norm1.running_mean.clone())

            def loss(self, model, batch):
                with hooked([(model.norm1, lambda norm, x, out: batches.append(x[0].detach().mean((0, 2, 3))))]):
                    return super().loss(model, batch)

            def after_training(self, model, task):
                super().after_training(model, task)
                end[:] = [model.norm1.running_mean.clone()]

        training = Training(epochs=2, batch=8)
        toys.quick(toys.images(), Noted(memory=40), CLeWI(0.3), model=toys.small_convnet, training=training)
        return start[0], torch.stack(batches[-6:]), end[0]

    def test_statistics_are_means_of_the_memory_and_all_batches_since(self):
        start, batches, end = self.noted(clewi.Cumulative)
        assert torch.allclose(end, (2 * start + batches.sum(0)) / 8, atol=1e-5), "a memory of 40 is two batches"

    def test_by_default_they_follow_the_last_batches(self):
        start, batches, end = self.noted(ER)
        for batch in batches:
            start = 0.9 * start + 0.1 * batch
        assert torch.allclose(end, start, atol=1e-5)

    def test_the_first_task_is_that_of_er_and_a_resumed_run_goes_on_without_momentum(self, tmp_path):
        more = {"model": toys.small_convnet, "training": Training(epochs=2, batch=8)}
        result, _ = assert_goes_on(
            toys.images(4), clewi.Cumulative(memory=9), CLeWI(0.3), (1, 3), tmp_path / "run", **more
        )
        plain = toys.quick(toys.images(4), ER(memory=9), CLeWI(0.3), **more)
        assert weights.equal(result.trained[1], plain.trained[1])
        assert not weights.equal(result.trained[2], plain.trained[2])
        assert vars(result.model.norm1)["momentum"] is None and vars(plain.model.norm1)["momentum"] == 0.1


def test_a_gem_whose_memory_is_filled_by_a_batch_merges_blind_to_the_newest_task():
    """The merge sees rows of earlier tasks alone, and loses more of the newest one."""
    last = {}
    for fill in ("task", "batch"):
        learner = AGEM(memory=40, fill=fill)
        last[fill] = toys.quick(toys.images(), learner, CLeWI(0.5), model=toys.small_convnet).losses[-1, -1]
    assert last["batch"] > last["task"]


def test_opcm_as_released_keeps_what_only_begins_or_only_ends_in_leading_directions():
    base, first = {"w": torch.zeros(2, 2)}, {"w": torch.diag(torch.tensor([3.0, 1.0]))}
    then = {"w": torch.tensor([[0.0, 2.0], [0.0, 1.0]])}
    paper, released = (
        merging.opcm([first, then], base=base, alpha=0.8, projection=kind)["w"] for kind in ("paper", "released")
    )
    whole = first["w"] + then["w"]
    assert torch.allclose(paper / paper.norm(), first["w"] / first["w"].norm(), atol=1e-6), "all of it is taken out"
    assert torch.allclose(released / released.norm(), whole / whole.norm(), atol=1e-6), "all of it stays"
    inside = {"w": torch.tensor([[2.0, 0.0], [0.0, 0.0]])}
    for kind in ("paper", "released"):
        merged = merging.opcm([first, inside], base=base, alpha=0.8, projection=kind)["w"]
        assert torch.allclose(merged / merged.norm(), first["w"] / first["w"].norm(), atol=1e-6), (
            "begins and ends there"
        )
