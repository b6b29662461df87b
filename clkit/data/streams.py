"""From datasets to streams: new classes, new domains, permuted pixels, turned images, everything so far."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from clkit import checks
from clkit.data.augment import NO_AUGMENT, Normalize
from clkit.data.core import Dataset, Examples, Scenario, Stream, Task


def split(
    dataset: Dataset,
    tasks: int | Sequence[int] = 5,
    *,
    order: int | Sequence[int | str] | None = None,
    scenario: Scenario = "class",
) -> Stream:
    """Part a dataset's classes into tasks, each with all examples of its classes.

    `tasks` is a number of tasks, with equally many classes each (the first have one more where they do not divide), or
    the number of classes of each task. `order` is the order of the classes: that of the dataset, a shuffle by a seed
    (an int), or a list of ids or names; classes missing from a list are left out. Labels keep their ids, whatever the
    order, and examples their order. `scenario` is "class", or "task" where the task is given when testing. Raises
    ValueError for fewer classes than tasks.
    """
    if scenario not in ("class", "task"):
        raise ValueError(f"scenario={scenario!r}: a split is 'class' or 'task'; for 'domain' use domains()")
    ids = _order(dataset, order)
    if isinstance(tasks, int):
        if not 1 <= tasks <= len(ids):
            raise ValueError(f"tasks={tasks} for {len(ids)} classes of {dataset.name!r}: use 1 to {len(ids)} tasks")
        sizes = [len(ids) // tasks + (i < len(ids) % tasks) for i in range(tasks)]
    else:
        sizes = list(tasks)
        if min(sizes, default=0) < 1 or sum(sizes) != len(ids):
            raise ValueError(
                f"tasks={sizes} for {len(ids)} classes of {dataset.name!r}: pass sizes from 1 that sum to it"
            )
    steps = []
    for index, (start, stop) in enumerate(pairwise(accumulate(sizes, initial=0))):
        classes = tuple(ids[start:stop])
        names = [dataset.classes[label] for label in classes]
        name = ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]}"
        train, test = _only(dataset.train, classes), _only(dataset.test, classes)
        steps.append(Task(index, name, classes, train, test, dataset.normalize, dataset.augment))
    return Stream(f"{dataset.name}-{len(sizes)}", tuple(steps), dataset.classes, scenario)


def domains(datasets: Mapping[str, Dataset] | Sequence[Dataset], *, normalize: Normalize | None = None) -> Stream:
    """Line up datasets with the same classes as tasks: each brings new inputs (domain-incremental).

    A mapping names the tasks, a list takes the datasets' names. All are normalised alike, by default as the first:
    what comes later is not known when training starts, and rows kept from one task must fit the next.
    """
    named = _named(datasets)
    first = next(iter(named.values()))
    for name, dataset in named.items():
        if dataset.classes != first.classes:
            other = sorted(set(dataset.classes) ^ set(first.classes))[:5] or "their order"
            raise ValueError(
                f"datasets: {name!r} differs from {next(iter(named))!r} in classes ({other}): use the same; "
                "for classes of their own use series()"
            )
    classes, normalize = tuple(range(len(first.classes))), normalize or first.normalize
    tasks = (
        Task(index, name, classes, dataset.train, dataset.test, normalize, dataset.augment)
        for index, (name, dataset) in enumerate(named.items())
    )
    return Stream("+".join(named), tuple(tasks), first.classes, "domain")


def series(
    datasets: Mapping[str, Dataset] | Sequence[Dataset],
    *,
    scenario: Scenario = "task",
    normalize: Normalize | None = None,
) -> Stream:
    """Line up datasets with classes of their own as tasks: each brings new inputs and new classes.

    Labels follow each other: those of a dataset begin where the last one's end, and its class "b" in the task "greek"
    is named "greek/b". Names and normalisation are as in `domains`. `scenario` is "task", where the task is given when
    testing, or "class". Raises ValueError for inputs of different shapes or dtypes.
    """
    if scenario not in ("class", "task"):
        raise ValueError(f"scenario={scenario!r}: a series is 'task' or 'class'; for 'domain' use domains()")
    named = _named(datasets)
    normalize = normalize or next(iter(named.values())).normalize
    ends = accumulate((len(dataset.classes) for dataset in named.values()), initial=0)

    def after(examples: Examples, start: int) -> Examples:
        return Examples(examples.x, torch.where(examples.y < 0, examples.y, examples.y + start))  # -100 stays

    tasks = (
        Task(index, name, tuple(range(start, stop)), after(dataset.train, start), after(dataset.test, start),
             normalize, dataset.augment)
        for index, ((name, dataset), (start, stop)) in enumerate(zip(named.items(), pairwise(ends), strict=True))
    )  # fmt: skip
    classes = (f"{name}/{label}" for name, dataset in named.items() for label in dataset.classes)
    return Stream("+".join(named), tuple(tasks), tuple(classes), scenario)


def permuted(dataset: Dataset, tasks: int = 10, *, share: float = 1.0, seed: int = 0) -> Stream:
    """Shuffle the pixels of all images by another permutation in each task; the first task keeps them in place.

    With a `share` below 1 that share of the pixels, drawn anew in each task, changes places and the others stay: the
    smaller it is, the more alike the tasks. The channels of a pixel stay together; of inputs without pixels (N, D), the
    values are shuffled. Augmentation is off: neighbours are none any more. Task k's permutation is
    `permutations(pixels, tasks, share=share, seed=seed)[k]`.
    """
    if tasks < 1:
        raise ValueError(f"tasks={tasks}: pass at least 1")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: pass the share of the pixels to shuffle, from 0 to 1")
    axis = min(2, dataset.train.x.ndim - 1)
    pixels = dataset.train.x[0].numel() if axis == 1 else dataset.train.x[0, 0].numel()

    def shuffle(examples: Examples, order: Tensor) -> Examples:
        x = examples.x.flatten(axis)
        return Examples(x.index_select(axis, order.to(x.device)).view_as(examples.x), examples.y)

    steps = []
    for index, order in enumerate(permutations(pixels, tasks, share=share, seed=seed)):
        train, test = (shuffle(part, order) if index else part for part in (dataset.train, dataset.test))
        classes = tuple(range(len(dataset.classes)))
        steps.append(Task(index, f"permutation {index}", classes, train, test, dataset.normalize, NO_AUGMENT))
    part = f"-{share:g}" if share < 1 else ""
    return Stream(f"{dataset.name}-permuted-{tasks}{part}", tuple(steps), dataset.classes, "domain")


def permutations(size: int, tasks: int, *, share: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Draw the pixel orders of `permuted`: the identity, then random ones; pixel i of a task was pixel order[i]."""
    generator, orders = torch.Generator().manual_seed(seed), [torch.arange(size)]
    for _ in range(tasks - 1):
        drawn, order = torch.randperm(size, generator=generator)[: round(share * size)], torch.arange(size)
        order[drawn.sort().values] = drawn
        orders.append(order)
    return orders


def rotated(dataset: Dataset, angles: Sequence[float] = (0, 20, 40, 60, 80)) -> Stream:
    """Turn all images by an angle for each task, in degrees, counterclockwise; corners are filled with zeros."""
    if not len(angles):
        raise ValueError("angles=[]: pass one for each task")
    if dataset.train.x.ndim != 4:
        raise ValueError(
            f"dataset {dataset.name!r} has inputs {tuple(dataset.train.x.shape[1:])}: rotate images (C, H, W)"
        )
    classes = tuple(range(len(dataset.classes)))
    tasks = (
        Task(
            index,
            f"{angle:g} degrees",
            classes,
            Examples(_turn(dataset.train.x, angle), dataset.train.y),
            Examples(_turn(dataset.test.x, angle), dataset.test.y),
            dataset.normalize,
            dataset.augment,
        )
        for index, angle in enumerate(angles)
    )
    return Stream(f"{dataset.name}-rotated-{len(angles)}", tuple(tasks), dataset.classes, "domain")


def shared_head(stream: Stream) -> Stream:
    """Give all tasks of a class-incremental stream the same labels: a task's i-th class becomes class i.

    What was told apart by separate outputs now conflicts in one head (domain-incremental). Every task needs as many
    classes; the new classes are named after those that they stand for.
    """
    counts = {len(task.classes) for task in stream}
    if len(counts) > 1:
        raise ValueError(f"stream {stream.name!r}: tasks have {sorted(counts)} classes: use tasks of equal size")
    names = ["/".join(stream.classes[c] for c in same) for same in zip(*(t.classes for t in stream), strict=True)]

    def renamed(examples: Examples, classes: tuple[int, ...]) -> Examples:
        place = torch.zeros(len(stream.classes), dtype=torch.int64, device=examples.y.device)
        place[list(classes)] = torch.arange(len(classes), device=place.device)
        y = examples.y
        return Examples(examples.x, torch.where(y < 0, y, place[y.clamp(min=0)]))  # -100 stays

    tasks = (
        replace(task, classes=tuple(range(len(names))), train=renamed(task.train, task.classes),
                test=renamed(task.test, task.classes))
        for task in stream
    )  # fmt: skip
    return Stream(f"{stream.name}-shared", tuple(tasks), tuple(names), "domain")


def conflicting(dataset: Dataset, conflict: float = 1.0, *, marked: bool = False, seed: int = 0) -> Stream:
    """Ask two questions with two answers each about the same images, the second against the first for some classes.

    The first task's label is 1 for classes of even id. The second's is 1 for the first half of the ids, which has
    little to do with that, but for a share `conflict` of the classes, drawn by `seed`, where it is the opposite of the
    first's. So labels stay functions of the image, and at 1 the tasks contradict each other in every one. One head
    serves both (domain-incremental). The images, the same in both tasks, and their order are the dataset's own; only
    the choice of the classes is random. `marked` images have one more row of pixels at the bottom, dark in the first
    task and bright in the second, and are not augmented: then a network exists that answers both.
    """
    if not 0 <= conflict <= 1:
        raise ValueError(f"conflict={conflict}: pass the share of classes that contradict, from 0 to 1")
    if marked and dataset.train.x.ndim != 4:
        raise ValueError(f"dataset {dataset.name!r} has no images to mark: pass marked=False")
    if dataset.train.y.ndim > 1:
        raise ValueError(f"dataset {dataset.name!r} has token targets: ask about examples with one label each")
    count = len(dataset.classes)
    ids = torch.arange(count)
    first = 1 - ids % 2
    against = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: round(conflict * count)]
    second = (ids < count / 2).long().index_put((against,), 1 - first[against])

    def asked(examples: Examples, answers: Tensor, mark: int) -> Examples:
        x, answers = examples.x, answers.to(examples.y.device)
        if marked:
            bright = 255 if x.dtype == torch.uint8 else 1
            x = torch.cat([x, torch.full_like(x[:, :, :1], bright * mark)], 2)
        return Examples(x, answers[examples.y])

    tasks = (
        Task(index, name, (0, 1), asked(dataset.train, answers, index), asked(dataset.test, answers, index),
             dataset.normalize, NO_AUGMENT if marked else dataset.augment)
        for index, (name, answers) in enumerate({"even": first, "small": second}.items())
    )  # fmt: skip
    return Stream(f"{dataset.name}-conflict-{conflict:g}", tuple(tasks), ("no", "yes"), "domain")


def cumulative(stream: Stream) -> Stream:
    """Let task t train on the data of all tasks up to t, for joint training; the test data stay those of task t.

    The classes of task t become those of all tasks up to t, so a mask to the task's classes is wider than in the
    stream itself. The training data are stored once, however many tasks share them.
    """
    train = Examples(*(torch.cat([getattr(task.train, part) for task in stream]) for part in ("x", "y")))
    ends = accumulate(len(task.train) for task in stream)
    classes = accumulate((task.classes for task in stream), lambda seen, new: tuple(dict.fromkeys(seen + new)))
    tasks = (
        replace(task, classes=seen, train=train[:end]) for task, end, seen in zip(stream, ends, classes, strict=True)
    )
    return replace(stream, name=f"{stream.name}-cumulative", tasks=tuple(tasks))


def _named(datasets: Mapping[str, Dataset] | Sequence[Dataset]) -> dict[str, Dataset]:
    """The datasets that become tasks, by name; raises unless they differ in name and agree in the dtype of inputs."""
    named = dict(datasets) if isinstance(datasets, Mapping) else {dataset.name: dataset for dataset in datasets}
    if not named or len(named) < len(datasets):
        raise ValueError(f"datasets={list(named)}: pass at least one, each by its own name")
    dtypes = {name: dataset.train.x.dtype for name, dataset in named.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"datasets: inputs are {dtypes}: convert them alike, to bytes or to floats in [0, 1]")
    return named


def _order(dataset: Dataset, order: int | Sequence[int | str] | None) -> list[int]:
    count = len(dataset.classes)
    if order is None:
        return list(range(count))
    if isinstance(order, int):
        return torch.randperm(count, generator=torch.Generator().manual_seed(order)).tolist()
    ids = []
    for label in order:
        if isinstance(label, str):
            label = dataset.classes.index(checks.choice("order", label, dataset.classes))
        if not 0 <= label < count:
            raise ValueError(f"order: class {label} is not among the {count} of {dataset.name!r}: use 0 to {count - 1}")
        ids.append(label)
    if len(set(ids)) < len(ids):
        twice = sorted({label for label in ids if ids.count(label) > 1})
        raise ValueError(f"order names classes {twice[:5]} twice: pass each class once")
    return ids


def _only(examples: Examples, classes: tuple[int, ...]) -> Examples:
    """Keep the examples of some classes, in their order."""
    wanted = torch.tensor(classes, device=examples.y.device)
    return examples[torch.isin(examples.y, wanted)]


def _turn(x: Tensor, angle: float) -> Tensor:
    if angle % 360 == 0:
        return x
    turn = torch.deg2rad(torch.tensor(float(angle)))
    height, width = x.shape[2:]
    rows = [[turn.cos(), -turn.sin() * height / width, 0.0], [turn.sin() * width / height, turn.cos(), 0.0]]
    theta = torch.tensor(rows, device=x.device)[None]
    out = torch.empty_like(x)
    for source, target in zip(x.split(2048), out.split(2048), strict=True):
        grid = affine_grid(theta, [1, *x.shape[1:]], align_corners=False).expand(len(source), -1, -1, -1)
        view = grid_sample(source.float(), grid, align_corners=False)
        target.copy_(view if x.is_floating_point() else view.round_())
    return out
