"""ER, ER-ACE, online EWC and BiC against the rule of the code that CLeWI's tables come from, step by step.

A run is recorded: the rows of every step, those replayed beside them, and the weights after it. The twin starts at the
same weights and sees the same rows. Its loss is written out row by row and class by class, its step by hand.
"""

import copy

import torch

import toys
from clkit.learners import ER, ERACE, BiC, OnlineEWC
from clkit.training import Training
from clkit.weights import get_weights

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
