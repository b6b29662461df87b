"""The learner that every rule starts from: plain fine-tuning, and the hooks that a rule overrides."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit import checks
from clkit.data import IGNORED, Batch, Examples, Stream, Task
from clkit.modulation import TaskState

LabelSpace = Literal["all", "seen", "task"]
CONTEXT_ROWS = 1000
PLAIN = (bool, int, float, str)
_KIND = "kind of value"
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (tuple, dict, Examples, TaskState)}


class Criterion:
    """Cross entropy over the label space of a step's loss: all classes, those seen so far, or the row's own task's.

    Logits are (N, C) with labels (N,), or (N, L, C) with (N, L). With "task" every row competes among the classes of
    the task that its label belongs to, so replayed rows keep to their own task. A class outside a row's label space
    gets no gradient from it, and a target of -100 carries no loss.
    """

    def __init__(self, stream: Stream, labels: LabelSpace, smoothing: float, device: torch.device) -> None:
        self.smoothing = smoothing
        self.labels: LabelSpace = labels
        tasks, classes = len(stream), len(stream.classes)
        member = torch.zeros(tasks, classes, dtype=torch.bool)
        for task in stream:
            member[task.index, list(task.classes)] = True
        self.member = member.to(device)
        self.first_task = member.to(torch.uint8).argmax(0).to(device)
        self.labelled = stream[0].train.y[:1]  # one row's labels, to see of what kind they are
        self.task = 0

    def begin_task(self, task: Task) -> None:
        """Makes the classes of `task` count as seen."""
        self.task = task.index

    def space(self, y: Tensor) -> Tensor | None:
        """The classes that each label of `y` competes with, as a mask that broadcasts to the logits; None for all."""
        if self.labels == "all":
            return None
        if self.labels == "seen":
            return self.member[: self.task + 1].any(0)
        return self.member[self.first_task[y.clamp(min=0)]]

    def __call__(self, logits: Tensor, y: Tensor, reduction: str = "mean", *, among: Tensor | None = None) -> Tensor:
        """The loss of logits against labels; `reduction` as in torch: "mean", "sum" or "none".

        `among` is a mask of classes (C,), all labels in it, to which the label space is narrowed.
        """
        space = self.space(y)
        if among is not None:
            space = among if space is None else space & among
        if space is None:
            flat = logits.flatten(0, -2), y.flatten()
            return F.cross_entropy(*flat, reduction=reduction, label_smoothing=self.smoothing)
        log_p = logits.masked_fill(~space, float("-inf")).log_softmax(-1)
        hit = -log_p.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        if self.smoothing:
            space = space.expand_as(log_p)
            spread = -log_p.masked_fill(~space, 0).sum(-1) / space.sum(-1)
            hit = (1 - self.smoothing) * hit + self.smoothing * spread
        counts = y != IGNORED
        hit = hit.masked_fill(~counts, 0)
        if reduction == "mean":
            return hit.sum() / counts.sum()
        return hit.sum() if reduction == "sum" else hit.flatten()


@dataclass(eq=False)
class Setting:
    """What a learner gets before the first task: its own generator, the loss and sizes."""

    generator: torch.Generator
    criterion: Criterion
    classes: int
    batch: int
    holdout: float
    """The share of a memory that is kept from replay, for choosing settings by; what a consolidation asks for."""


@dataclass
class Learner:
    """Plain fine-tuning: a step minimises the loss of its batch and nothing is remembered.

    A rule overrides the one to three hooks it changes. What `__init__` takes are its settings, kept as attributes of
    the same names: they are compared, and its repr is the record. What training changes begins in `start`, and is named
    in `state`. `run` works on a copy, so one learner serves many runs. A rule of one's own, a dataclass or not:

    ```python
    class Slow(Learner):
        state = ("slow",)

        def __init__(self, decay=0.99):
            self.decay = decay

        def start(self, setting):
            super().start(setting)
            self.slow = {}

        def after_step(self, model, batch):
            now = get_weights(model)
            self.slow = lerp(now, self.slow or now, self.decay)
    ```
    """

    state: ClassVar[tuple[str, ...]] = ()
    """The attributes that a checkpoint keeps, beside those that the classes it derives from name.

    Each is None, a tensor, a number, a text, `Examples`, a `TaskState`, or a list, tuple or dict of such. What `start`
    makes with `state_dict` and `load_state_dict`, a `Memory` or a module for example, is restored in place.
    Attributes that are numbers or texts are kept without being named.
    """
    remembers: ClassVar[bool] = False
    """Whether a memory is kept, a part of which can be held out of replay."""

    __post_init__ = checks.fields

    def __init_subclass__(cls) -> None:
        """Lets a class inherit repr and equality where `@dataclass` would write them anew, for its fields alone."""
        for name in ("__repr__", "__eq__"):
            setattr(cls, name, getattr(cls, name))

    def __repr__(self) -> str:
        names = inspect.signature(type(self)).parameters
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and repr(self) == repr(other)

    def start(self, setting: Setting) -> None:
        """Called once before the first task, with everything a rule may need to set itself up.

        Raises ValueError if rows are to be held out of a memory and the rule keeps none.
        """
        if setting.holdout and not self.remembers:
            wanted = f"holdout: the consolidation asks for {setting.holdout:g} of a memory and {self!r} keeps none"
            raise ValueError(f"{wanted}; use a learner with a memory, such as ER, or a consolidation without a holdout")
        self.setting = setting

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Called after `start` with two prepared inputs; raises ValueError for a network that the rule cannot use."""

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Called before the first step on `task`; the model holds the weights that training goes on from."""

    def replayed(self, model: nn.Module, batch: Batch) -> Batch:
        """What the loss is over: the batch, to which a rule may join rows that it kept."""
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a step minimises: a scalar."""
        joined = self.replayed(model, batch)
        return self.setting.criterion(model(joined.x), joined.y)

    def adjust_gradients(self, model: nn.Module, batch: Batch) -> None:
        """Called between the backward pass and the optimizer's step, to change the gradients in place."""

    def after_step(self, model: nn.Module, batch: Batch) -> None:
        """Called after the optimizer's step, to fill a memory for example."""

    def after_training(self, model: nn.Module, task: Task) -> None:
        """Called after the last step on `task`, its data still at hand and the weights as trained."""

    def on_consolidated(self, model: nn.Module, task: Task) -> None:
        """Called with the weights that training goes on from: where anchors and teachers are taken."""

    def calibrate(self, model: nn.Module, task: Task) -> None:
        """Called with the deployed weights; may change only what `predict` uses."""

    def predict(self, model: nn.Module, x: Tensor, task: Task | None = None) -> Tensor:
        """Logits for prepared inputs; `task` is given in task-incremental evaluation alone.

        A rule may take `kept`, too, to keep in it what it need not compute again: see `evaluation.evaluate`.
        """
        return model(x)

    def examples(self, task: Task) -> Examples:
        """What a consolidation may look at, prepared: the memory, else 1,000 evenly spaced rows of this task's data."""
        return self._evenly(task, task.train)

    def held_out(self, task: Task) -> Examples | None:
        """Prepared examples that no step has trained on, for choosing settings by; None if there are none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, numbers, texts and what `state` names, as a tree that a file can hold.

        The tree is of the learner's own tensors, numbers, texts, None, lists, and dicts with texts as keys. Raises
        TypeError on what it cannot hold.
        """
        state = {name: _packed(name, getattr(self, name)) for name in self._state_names()}
        return {"generator": self.setting.generator.get_state(), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores, after `start`, what `state_dict` of a learner of the same settings gave, bit for bit.

        Raises TypeError where an object's state was kept and `start` has made no object to take it.
        """
        self.setting.generator.set_state(state["generator"])
        for name in state.keys() - {"generator"}:
            setattr(self, name, _unpacked(name, state[name], getattr(self, name, None)))

    def _state_names(self) -> list[str]:
        named = [name for kind in reversed(type(self).__mro__) for name in vars(kind).get("state", ())]
        return [*named, *(name for name, value in vars(self).items() if type(value) in PLAIN and name not in named)]

    def _prepared(self, task: Task, examples: Examples, rows: Tensor | None = None) -> Examples:
        """Examples, or the given rows of them, on the device as a model takes them: normalised and not augmented."""
        some = examples if rows is None else examples[rows.to(examples.x.device)]
        some = some.to(self.setting.generator.device)
        return Examples(task.prepare(some.x), some.y)

    def _evenly(self, task: Task, kept: Examples) -> Examples:
        """1,000 evenly spaced rows of what was kept, or all if they are fewer, prepared."""
        return self._prepared(task, kept, torch.linspace(0, len(kept) - 1, min(CONTEXT_ROWS, len(kept))).long())


def _packed(name: str, value: Any) -> Any:
    """A value, part of what `name` names in a state, as a tree that a file can hold."""
    if hasattr(value, "load_state_dict"):
        return {_KIND: "state_dict", "parts": _packed(name, value.state_dict())}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _packed(name, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_packed(name, item) for item in value]
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return value
    if type(value) not in _KINDS.values():
        known = "tensors, numbers, texts, examples, lists or dicts of them, or what has state_dict and load_state_dict"
        raise TypeError(f"state: {name!r} holds a {type(value).__name__}; give {known}")
    parts = value if isinstance(value, tuple) else value.items() if isinstance(value, dict) else vars(value).values()
    return {_KIND: type(value).__name__, "parts": [_packed(name, part) for part in parts]}


def _unpacked(name: str, tree: Any, owner: Any = None) -> Any:
    """What `_packed` made a tree of; the state of an object goes into the object itself, its `owner`."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, list):
        return [_unpacked(name, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _KIND not in tree:
        return {key: _unpacked(name, item) for key, item in tree.items()}
    if tree[_KIND] == "state_dict":
        if not hasattr(owner, "load_state_dict"):
            raise TypeError(f"state: {name!r} is {owner!r} and takes no state; make the object in `start`")
        owner.load_state_dict(_unpacked(name, tree["parts"]))
        return owner
    kind, parts = _KINDS[tree[_KIND]], _unpacked(name, tree["parts"])
    return kind(parts) if kind in (tuple, dict) else kind(*parts)
