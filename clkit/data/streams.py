"""From datasets to streams: new classes, new domains, permuted pixels, turned images, contradicting answers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from clkit import checks
from clkit.data.augment import NO_AUGMENT, Normalize
from clkit.data.core import Dataset, Examples, Stream, Task, changed

Disjoint = Literal["class", "task"]  # the scenarios whose tasks have classes of their own


@checks.arguments
def split(
    dataset: Dataset,
    tasks: int | Sequence[int] = 5,
    *,
    order: int | Sequence[int | str] | None = None,
    scenario: Disjoint = "class",
) -> Stream:
    """Part a dataset's classes into tasks, each with all examples of its classes.

    `tasks` is a number of tasks or the number of classes of each. Tasks of a number have equally many classes; where
    they do not divide, the first ones have one more. `order` is the order of the classes: the dataset's, a shuffle by
    a seed (an int), or a list of ids or names; classes missing from a list are left out. Labels keep their ids,
    whatever the order, and examples their order. `scenario` is "class", or "task" where the task is given when testing.

    Raises ValueError for fewer classes than tasks, sizes that do not sum to the classes, and unknown or repeated ones.
    """
    ids = _order(dataset, order)
    count = len(ids)
    sizes = [count // tasks + (i < count % tasks) for i in range(tasks)] if isinstance(tasks, int) else tasks
    if min(sizes, default=0) < 1 or sum(sizes) != count:
        remedy = f"pass a number from 1 to {count}, or sizes from 1 that sum to {count}"
        raise ValueError(f"tasks: {tasks} for {count} classes of {dataset.name!r}; {remedy}")
    steps = []
    for index, (start, stop) in enumerate(pairwise(accumulate(sizes, initial=0))):
        classes = tuple(ids[start:stop])
        names = [dataset.classes[label] for label in classes]
        name = ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]}"
        wanted = torch.tensor(classes, device=dataset.train.y.device)
        train, test = (part[torch.isin(part.y, wanted)] for part in (dataset.train, dataset.test))
        steps.append(Task(index, name, classes, train, test, dataset.normalize, dataset.augment))
    return Stream(f"{dataset.name}-{len(sizes)}", tuple(steps), dataset.classes, scenario)


@checks.arguments
def domains(datasets: Mapping[str, Dataset] | Sequence[Dataset], *, normalize: Normalize | None = None) -> Stream:
    """Line up datasets with the same classes as tasks: each brings new inputs (domain-incremental).

    A mapping names the tasks, a list takes the datasets' names. All are normalised alike, by default as the first:
    what comes later is not known when training starts, and rows kept from one task must fit the next.

    Raises ValueError for no datasets, equal names, other classes, and inputs of different shapes or dtypes.
    """
    named = _named(datasets)
    (first, dataset), *_ = named.items()
    for name, other in named.items():
        if other.classes != dataset.classes:
            differing = sorted(set(other.classes) ^ set(dataset.classes))[:5] or "their order"
            remedy = "use the same, or series() for classes of their own"
            raise ValueError(f"datasets: {name!r} differs from {first!r} in classes ({differing}); {remedy}")
    return _line("+".join(named), list(named.items()), normalize or dataset.normalize)


@checks.arguments
def series(
    datasets: Mapping[str, Dataset] | Sequence[Dataset],
    *,
    scenario: Disjoint = "task",
    normalize: Normalize | None = None,
) -> Stream:
    """Line up datasets with classes of their own as tasks: each brings new inputs and new classes.

    Labels follow each other: those of a dataset begin where the last one's end. Its class "b" in the task "greek" is
    named "greek/b". Names and normalisation are as in `domains`. `scenario` is "task", where the task is given when
    testing, or "class".

    Raises ValueError for no datasets, equal names, and inputs of different shapes or dtypes.
    """
    named = _named(datasets)
    normalize = normalize or next(iter(named.values())).normalize
    tasks, classes = [], []
    for name, dataset in named.items():
        ids = torch.arange(len(dataset.classes)) + len(classes)
        classes += [f"{name}/{label}" for label in dataset.classes]
        train, test = (_relabelled(part, ids) for part in (dataset.train, dataset.test))
        tasks.append(Task(len(tasks), name, tuple(ids.tolist()), train, test, normalize, dataset.augment))
    return Stream("+".join(named), tuple(tasks), tuple(classes), scenario)


@checks.arguments
def permuted(dataset: Dataset, tasks: checks.Count = 10, *, share: checks.Share = 1.0, seed: int = 0) -> Stream:
    """Shuffle the pixels of all images by another permutation in each task; the first task keeps them in place.

    With a `share` below 1 that share of the pixels, drawn anew in each task, changes places and the others stay: the
    smaller it is, the more alike the tasks. The channels of a pixel stay together; of inputs without pixels (N, D), the
    values are shuffled. Augmentation is off, since no neighbours remain. Task k's permutation is
    `permutations(pixels, tasks, share=share, seed=seed)[k]`.
    """
    axis = min(2, dataset.train.x.ndim - 1)
    pixels = dataset.train.x.flatten(axis).shape[axis]

    def shuffled(examples: Examples, order: Tensor) -> Examples:
        x = examples.x.flatten(axis)
        return Examples(x.index_select(axis, order.to(x.device)).view_as(examples.x), examples.y)

    plain = replace(dataset, augment=NO_AUGMENT)
    orders = permutations(pixels, tasks, share=share, seed=seed)
    views = [plain, *(changed(plain, partial(shuffled, order=order)) for order in orders[1:])]
    part = f"-{share:g}" if share < 1 else ""
    return _line(f"{dataset.name}-permuted-{tasks}{part}", [(f"permutation {i}", view) for i, view in enumerate(views)])


def permutations(size: int, tasks: int, *, share: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Draw the pixel orders (size,) of `permuted`: the identity, then random ones; pixel i was pixel order[i]."""
    generator, orders = torch.Generator().manual_seed(seed), [torch.arange(size)]
    for _ in range(tasks - 1):
        drawn, order = torch.randperm(size, generator=generator)[: round(share * size)], torch.arange(size)
        order[drawn.sort().values] = drawn
        orders.append(order)
    return orders


@checks.arguments
def rotated(dataset: Dataset, angles: Sequence[float] = (0, 20, 40, 60, 80)) -> Stream:
    """Turn all images by an angle for each task, in degrees, counterclockwise; corners are filled with zeros.

    Raises ValueError without angles, and for inputs that are no images (N, C, H, W).
    """
    if not len(angles):
        raise ValueError("angles: (); pass one for each task")
    if dataset.train.x.ndim != 4:
        shape = tuple(dataset.train.x.shape[1:])
        raise ValueError(f"dataset: {dataset.name!r} has inputs of shape {shape}; rotate images (C, H, W)")
    views = [(f"{angle:g} degrees", changed(dataset, partial(_turned, angle=angle))) for angle in angles]
    return _line(f"{dataset.name}-rotated-{len(angles)}", views)


def shared_head(stream: Stream) -> Stream:
    """Give all tasks of a class-incremental stream the same labels: a task's i-th class becomes class i.

    What was told apart by separate outputs now conflicts in one head (domain-incremental). The new classes are named
    after those that they stand for. Raises ValueError where tasks differ in their number of classes.
    """
    counts = {len(task.classes) for task in stream}
    if len(counts) > 1:
        raise ValueError(f"stream: the tasks of {stream.name!r} have {sorted(counts)} classes; use tasks of equal size")
    names = ["/".join(stream.classes[c] for c in same) for same in zip(*(t.classes for t in stream), strict=True)]
    tasks = []
    for task in stream:
        ids = torch.zeros(len(stream.classes), dtype=torch.int64)
        ids[list(task.classes)] = torch.arange(len(names))
        tasks.append(changed(task, partial(_relabelled, ids=ids), classes=tuple(range(len(names)))))
    return Stream(f"{stream.name}-shared", tuple(tasks), tuple(names), "domain")


@checks.arguments
def conflicting(dataset: Dataset, conflict: checks.Share = 1.0, *, marked: bool = False, seed: int = 0) -> Stream:
    """Ask two questions with two answers each about the same images, the second against the first for some classes.

    The first task's label is 1 for classes of even id. The second's is 1 for the first half of the ids, which has
    little to do with that. For a share `conflict` of the classes, drawn by `seed`, it is the opposite of the first's
    instead. So labels stay functions of the image, and at 1 the tasks contradict each other in every one. One head
    serves both (domain-incremental). The images, the same in both tasks, and their order are the dataset's own; only
    the choice of the classes is random. `marked` images (C, H + 1, W) have one more row of pixels at the bottom. It
    is dark in the first task and bright in the second, so that a network exists that answers both. They are not
    augmented.

    Raises ValueError for token targets, and where `marked` asks for images and there are none.
    """
    if marked and dataset.train.x.ndim != 4:
        raise ValueError(f"marked: {dataset.name!r} has no images to mark; pass marked=False")
    if dataset.train.y.ndim > 1:
        raise ValueError(f"dataset: {dataset.name!r} has token targets; ask about examples with one label each")
    count = len(dataset.classes)
    ids = torch.arange(count)
    first = 1 - ids % 2
    against = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: round(conflict * count)]
    second = (ids < count / 2).long().index_put((against,), 1 - first[against])

    asked = replace(dataset, augment=NO_AUGMENT) if marked else dataset

    def answered(examples: Examples, answers: Tensor, mark: int) -> Examples:
        x = examples.x
        if marked:
            bright = 255 if x.dtype == torch.uint8 else 1
            x = torch.cat([x, torch.full_like(x[:, :, :1], bright * mark)], 2)
        return _relabelled(Examples(x, examples.y), answers)

    views = [
        (name, changed(asked, partial(answered, answers=answers, mark=mark), classes=("no", "yes")))
        for name, answers, mark in (("even", first, 0), ("small", second, 1))
    ]
    return _line(f"{dataset.name}-conflict-{conflict:g}", views)


def _line(name: str, views: Sequence[tuple[str, Dataset]], normalize: Normalize | None = None) -> Stream:
    """Make a task of each dataset, by its name; all have the classes of the first (domain-incremental)."""
    labels = views[0][1].classes
    tasks = (
        Task(i, task, tuple(range(len(labels))), view.train, view.test, normalize or view.normalize, view.augment)
        for i, (task, view) in enumerate(views)
    )
    return Stream(name, tuple(tasks), labels, "domain")


def _named(datasets: Mapping[str, Dataset] | Sequence[Dataset]) -> dict[str, Dataset]:
    """The datasets that become tasks, by name; raises unless they differ in name and agree in the dtype of inputs."""
    named = dict(datasets) if isinstance(datasets, Mapping) else {dataset.name: dataset for dataset in datasets}
    if not named or len(named) < len(datasets):
        raise ValueError(f"datasets: {list(named)}; pass at least one, each by its own name")
    dtypes = {name: dataset.train.x.dtype for name, dataset in named.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"datasets: inputs are {dtypes}; convert them alike, to bytes or to floats in [0, 1]")
    return named


def _order(dataset: Dataset, order: int | Sequence[int | str] | None) -> list[int]:
    """The ids of the classes that a split parts, in its order."""
    known = dataset.classes
    if order is None:
        return list(range(len(known)))
    if isinstance(order, int):
        return torch.randperm(len(known), generator=torch.Generator().manual_seed(order)).tolist()
    ids = [known.index(checks.choice("order", c, known)) if isinstance(c, str) else c for c in order]
    wrong = sorted({label for label in ids if ids.count(label) > 1 or not 0 <= label < len(known)})
    if wrong:
        remedy = f"pass each id from 0 to {len(known) - 1} once at most"
        raise ValueError(f"order: classes {wrong[:5]} come twice or are not in {dataset.name!r}; {remedy}")
    return ids


def _relabelled(examples: Examples, ids: Tensor) -> Examples:
    """Give the examples of class i the label ids[i]; targets without a loss (-100) stay."""
    y = examples.y
    return Examples(examples.x, torch.where(y < 0, y, ids.to(y.device)[y.clamp(min=0)]))


def _turned(examples: Examples, angle: float) -> Examples:
    """Turn images (N, C, H, W) by degrees."""
    x = examples.x
    if angle % 360 == 0:
        return examples
    turn = torch.deg2rad(torch.tensor(float(angle)))
    height, width = x.shape[2:]
    rows = [[turn.cos(), -turn.sin() * height / width, 0.0], [turn.sin() * width / height, turn.cos(), 0.0]]
    theta = torch.tensor(rows, device=x.device)[None]
    out = torch.empty_like(x)
    for source, target in zip(x.split(2048), out.split(2048), strict=True):
        grid = affine_grid(theta, [1, *x.shape[1:]], align_corners=False).expand(len(source), -1, -1, -1)
        view = grid_sample(source.float(), grid, align_corners=False)
        target.copy_(view if x.is_floating_point() else view.round_())
    return Examples(out, examples.y)
