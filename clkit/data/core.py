"""The types that carry data: examples, datasets, tasks and streams as tensors on a device.

Examples stay raw (uint8 images, integer tokens) until a step needs them; `Task.prepare` augments and normalises a
batch where its tensors live. There are no loader processes and there is no per-example Python.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from clkit import checks, store
from clkit.data.augment import BYTES, NO_AUGMENT, Augment, Moves, Normalize, as_labels, as_tensor, check_images
from clkit.data.transfer import rows_of

Scenario = Literal["class", "domain", "task"]
Rows = Tensor | slice | list[int]
IGNORED = -100  # the target that cross_entropy skips
FITS = 0.6  # share of a GPU's free memory that the data may take


@dataclass(frozen=True, eq=False)
class Examples:
    """Raw inputs `x` (N, ...) with their labels `y`: int64, (N,), or the shape of `x` for token targets (N, L).

    Images are (N, C, H, W), uint8 where they come from 8-bit files; tokens are int64, and a target of -100 carries
    no loss. Indexing takes rows (a tensor, a slice, a list) and gives Examples. Arrays and lists become tensors, and
    labels that are whole numbers of another type int64.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", as_tensor("x", self.x))
        object.__setattr__(self, "y", as_labels(as_tensor("y", self.y)))
        if self.x.ndim < 2:
            raise ValueError(f"x: the shape is {tuple(self.x.shape)}; it needs a row per example, so pass x[:, None]")
        if self.y.shape[:1] != self.x.shape[:1]:
            count = len(self.y) if self.y.ndim else "no"
            raise ValueError(f"y: x has {len(self.x)} rows and y has {count}; pass one label for each row of x")
        if self.y.ndim != 1 and self.y.shape != self.x.shape:
            shapes = f"{tuple(self.y.shape)} and that of x {tuple(self.x.shape)}"
            raise ValueError(f"y: the shape is {shapes}; pass one label a row or a token; of one-hot rows, y.argmax(1)")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Rows) -> "Examples":
        return Examples(self.x[rows], self.y[rows])

    def __repr__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        return f"Examples({len(self)} of {tuple(self.x.shape[1:])}, {dtype}, {self.x.device})"

    @staticmethod
    def cat(parts: Sequence["Examples"]) -> "Examples":
        """Put examples one behind the other."""
        return Examples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))

    def to(self, device: torch.device | str) -> "Examples":
        """Copy to a device; the same tensors where they are there already."""
        return Examples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples of one set; label `i` is the class named `classes[i]`."""

    name: str
    train: Examples
    test: Examples
    classes: tuple[str, ...]
    normalize: Normalize = BYTES
    augment: Augment = NO_AUGMENT

    def __post_init__(self) -> None:
        checks.fields(self)
        if len(set(self.classes)) < len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ValueError(f"classes: dataset {self.name!r} names {twice[:5]} twice; give each its own name")
        check_examples(f"dataset {self.name!r}", self, tuple(range(len(self.classes))))


@dataclass(frozen=True, eq=False)
class Task:
    """One step of a stream: what is trained on, what is tested on, and the label ids (`classes`) it is about.

    Labels keep their ids of the dataset throughout a stream, so `stream.classes[label]` names a class in every task.
    `dtype` is that of prepared inputs other than tokens; None is their own floating one, else float32.
    """

    index: int
    name: str
    classes: tuple[int, ...]
    train: Examples
    test: Examples
    normalize: Normalize = BYTES
    augment: Augment = NO_AUGMENT
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        checks.fields(self)
        check_examples(f"task {self.index} ({self.name!r})", self, self.classes)

    @cached_property
    def facts(self) -> list[Any]:
        """What is learned in words and hashes: classes, normalisation, augmentation, every example and label."""
        hashes = [store.hash_tensor(t) for part in (self.train, self.test) for t in (part.x, part.y)]
        return [store.describe((self.classes, self.normalize, self.augment), "task"), *hashes]

    def prepare(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Turn raw rows into a model's input, on their own device; with a generator, augment them first."""
        if generator is not None:
            x = self.augment(x, generator)
        return self.normalize(x, self.dtype)

    def batch(
        self,
        rows: Rows,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        layout: torch.memory_format | None = None,
        epoch: int = 0,
        lr: float = 0.0,
    ) -> "Batch":
        """Training rows as a batch, augmented with a generator, on `device` (default: where the data are).

        Row numbers count from 0. `layout` is the memory format of the inputs (default: as they come); `epoch` and `lr`
        are the step's.
        """
        raw, y = rows_of((self.train.x, self.train.y), rows, device)
        parts = ((raw, self.augment.drawn(raw, generator)),)
        return Batch(LATER, y, raw, self, generator, epoch, rows, lr, layout, parts)


@dataclass(eq=False)
class Batch:
    """What one step sees: prepared inputs `x` with labels `y`, and the current task's rows as stored (`raw`).

    After `join`, `x` and `y` hold the joined rows too, behind the current ones; `raw` and `size` do not change, so
    `x[:size]`, `y[:size]` are the current task's. `epoch` counts the passes over the task's data from 0; `rows` says
    which rows of `task.train` the current ones are; `lr` is the step's learning rate.

    `x` is made when it is first asked for, of all rows at once: of `parts`, raw rows with the moves that augmentation
    drew for them, in the memory format `layout`. Until then raw rows, joined ones too, and `task` must stay as they
    are: a change to them would count.
    """

    x: Tensor
    y: Tensor
    raw: Tensor
    task: Task
    generator: torch.Generator | None = None
    epoch: int = 0
    rows: Rows | None = None
    lr: float = 0.0
    layout: torch.memory_format | None = None
    parts: tuple[tuple[Tensor, Moves | None], ...] = ()

    def __post_init__(self) -> None:
        if self.x is LATER:
            del self.x

    def __getattr__(self, name: str) -> Any:
        if name != "x":
            raise AttributeError(f"batch: it has no {name!r}")
        with torch.inference_mode(False):  # training needs the inputs too, wherever they are first asked for
            self.x = made = self._made(self.parts)
        return made

    @property
    def size(self) -> int:
        """The number of rows of the current task."""
        return len(self.raw)

    def prepare(self, raw: Tensor) -> Tensor:
        """Turn raw rows into inputs as the batch's own were: on its device, in its layout, augmented if it was."""
        return self._made((self._part(raw),))

    def join(self, raw: Tensor, y: Tensor) -> "Batch":
        """Append rows from a memory, prepared as the batch's own."""
        y = torch.cat([self.y, y.to(self.y.device, non_blocking=True)])
        if "x" in vars(self):
            return replace(self, x=torch.cat([self.x, self.prepare(raw)]), y=y)
        return replace(self, x=LATER, y=y, parts=(*self.parts, self._part(raw)))

    def _part(self, raw: Tensor) -> tuple[Tensor, Moves | None]:
        raw = raw.to(self.raw.device, non_blocking=True)
        return raw, self.task.augment.drawn(raw, self.generator)

    def _made(self, parts: tuple[tuple[Tensor, Moves | None], ...]) -> Tensor:
        if len({(raw.dtype, moves is None) for raw, moves in parts}) > 1:  # bytes are divided by 255, floats are not
            return torch.cat([self._made((part,)) for part in parts])
        raws, moves = [raw for raw, _ in parts], [moves for _, moves in parts]
        raw = torch.cat(raws) if len(raws) > 1 else raws[0]
        if moves[0] is not None:
            raw = self.task.augment.apply(raw, *(torch.cat(same, -1) for same in zip(*moves, strict=True)))
        x = self.task.prepare(raw)
        if self.layout is None:
            return x
        return torch.empty_like(x, memory_format=self.layout).copy_(x)  # `contiguous` leaves one channel as it is


LATER: Any = None  # inputs that are made when they are asked for


@dataclass(frozen=True, eq=False, repr=False)
class Stream:
    """Tasks in the order in which they are learned; `classes` names all labels, whichever task they come in.

    `scenario` says what a task brings. "class": new classes, told apart from all others. "task": new classes, told
    apart within their task, which is given. "domain": the same classes, new inputs. All tasks share the shape of an
    input and the normalisation, so that rows kept from one task can be prepared in another.
    """

    name: str
    tasks: tuple[Task, ...]
    classes: tuple[str, ...]
    scenario: Scenario = "class"
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        checks.fields(self)
        if not self.tasks:
            raise ValueError(f"tasks: stream {self.name!r} has none; pass at least one")
        first, known = self.tasks[0], len(self.classes)
        shape = tuple(first.train.x.shape[1:])
        object.__setattr__(self, "shape", shape)
        for position, task in enumerate(self.tasks):
            own = tuple(task.train.x.shape[1:])
            faults = {
                f"has index {task.index}; number from 0": task.index != position,
                f"has class {max(task.classes)} and the stream names {known}; name all": max(task.classes) >= known,
                f"has inputs {own}, task 0 {shape}; resize or convert them alike (size=, grey=)": own != shape,
                "is normalised unlike task 0; use one Normalize": task.normalize != first.normalize,
                "has other classes than task 0; use scenario='class'": (
                    self.scenario == "domain" and task.classes != first.classes
                ),
            }
            for fault, found in faults.items():
                if found:
                    raise ValueError(f"tasks: {position} ({task.name!r}) {fault}")

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]

    def __repr__(self) -> str:
        return (
            f"Stream({self.name!r}, {len(self)} tasks, {self.scenario}-incremental, {len(self.classes)} classes, "
            f"inputs {self.shape})"
        )

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        return self.tasks[0].train.x.device

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what is learned: every example, label, class, the normalisation and augmentation; not the names."""
        return store.digest([repr((self.scenario, self.classes)), *(fact for task in self for fact in task.facts)])

    def given(self, dtype: torch.dtype | None) -> "Stream":
        """The same tasks, whose prepared inputs have a model's dtype."""
        if all(task.dtype is dtype for task in self.tasks):
            return self
        tasks = tuple(map(copy.copy, self.tasks))  # without checking their examples again
        for task in tasks:
            object.__setattr__(task, "dtype", dtype)
        return replace(self, tasks=tasks)

    def to(self, device: torch.device | str) -> "Stream":
        """Copy all examples to a device; if they do not fit on a GPU, to pinned host memory instead.

        They fit if they take at most 60 % of the GPU's free memory. From pinned memory, `Task.batch(rows, ...,
        device=...)` moves the rows of a batch. Tensors that share storage still do afterwards.
        """
        device = torch.device(device)
        tensors = [t for task in self.tasks for part in (task.train, task.test) for t in (part.x, part.y)]
        if all(t.device.type == device.type and device.index in (None, t.device.index) for t in tensors):
            return self
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        size = sum(storage.nbytes() for storage in storages.values())
        pin = device.type == "cuda" and size > FITS * torch.cuda.mem_get_info(device)[0]
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in moved:
                flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
                moved[storage.data_ptr()] = flat.cpu().pin_memory() if pin else flat.to(device)
            return moved[storage.data_ptr()].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        tasks = (changed(task, lambda part: Examples(move(part.x), move(part.y))) for task in self.tasks)
        return replace(self, tasks=tuple(tasks))


def cuts(rows: int, batch: int) -> range:
    """Where so many rows are cut into batches, by one less number than there are batches.

    A last row that would be alone has no batch statistics: it joins the batch before.
    """
    return range(batch, rows - (batch > 1), batch)


Owner = TypeVar("Owner", Dataset, Task)


def changed(owner: Owner, change: Callable[[Examples], Examples], **others: Any) -> Owner:
    """Change the training and test examples of a dataset or task alike, and replace its fields named in `others`."""
    return replace(owner, train=change(owner.train), test=change(owner.test), **others)


def check_examples(owner: str, data: Dataset | Task, classes: tuple[int, ...]) -> None:
    """Raise unless both parts have examples, inputs of one shape and dtype, and only labels among `classes`.

    Images must have their channels first, and bytes be uint8.
    """
    train, test = data.train, data.test
    if not classes or min(classes) < 0 or len(set(classes)) < len(classes):
        raise ValueError(f"{owner}: classes {classes}; pass distinct label ids from 0, at least one")
    for part, examples in (("train", train), ("test", test)):
        if not len(examples):
            raise ValueError(f"{owner} has no {part} examples; give it some, or leave out its classes {classes[:5]}")
        y = examples.y.flatten()
        y = y[y != IGNORED] if examples.y.ndim > 1 else y
        counts = torch.bincount(y.clamp(0, max(classes) + 1), minlength=max(classes) + 2)
        counts[list(classes)] = 0
        if counts.any() or (len(y) and y.min() < 0):
            odd = y[~torch.isin(y, torch.tensor(classes, device=y.device))].unique()[:5].tolist()
            raise ValueError(f"{owner}: {part} labels {odd} are not among its {len(classes)} classes, counted from 0")
    if train.x.shape[1:] != test.x.shape[1:] or train.x.dtype != test.x.dtype:
        kinds = " and ".join(f"{tuple(part.x.shape[1:])} {part.x.dtype}" for part in (train, test))
        raise ValueError(f"{owner}: train inputs and test inputs are {kinds}; convert them alike")
    if train.x.ndim == 4:
        check_images(owner, train.x, data.normalize)
