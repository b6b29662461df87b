"""Streams: what a task holds, and what all of them hold together."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from clkit import data
from clkit.data import Augment, Dataset, Examples, Normalize, Stream

FEW = settings(max_examples=25, deadline=None)


def numbered(classes: int = 6, rows: int = 40, shape: tuple[int, ...] = (1, 4, 4), name: str = "toy") -> Dataset:
    """A dataset whose inputs all differ, in a random order of labels."""
    generator = torch.Generator().manual_seed(classes)

    def part(first: int) -> Examples:
        x = torch.zeros(rows, *shape, dtype=torch.int32)
        x.view(rows, -1)[:] = torch.arange(x[0].numel()) + 1000 * torch.arange(first, first + rows)[:, None]
        y = torch.cat([torch.arange(classes), torch.randint(0, classes, (rows - classes,), generator=generator)])
        return Examples(x.float(), y[torch.randperm(rows, generator=generator)])

    return Dataset(name, part(0), part(rows), tuple(f"c{i}" for i in range(classes)), augment=Augment(crop=1))


def tokens() -> Dataset:
    """The toy sequences as a dataset."""
    stream = toys.tokens()
    return Dataset("tokens", stream[0].train, stream[0].test, stream.classes)


def rows(examples: Examples) -> list[tuple[float, int]]:
    return list(zip(examples.x.flatten(1)[:, 0].tolist(), examples.y.tolist(), strict=True))


@FEW
@given(st.integers(2, 8), st.data())
def test_a_split_partitions_the_classes_and_the_examples(classes: int, draw: st.DataObject):
    dataset = numbered(classes)
    tasks = draw.draw(st.integers(1, classes))
    order = draw.draw(st.one_of(st.none(), st.integers(0, 99), st.permutations(range(classes))))
    stream = data.split(dataset, tasks, order=order)
    assert sorted(label for task in stream for label in task.classes) == list(range(classes))
    sizes = [len(task.classes) for task in stream]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    for name in ("train", "test"):
        parts = [rows(getattr(task, name)) for task in stream]
        assert sorted(row for part in parts for row in part) == sorted(rows(getattr(dataset, name)))
        assert all(set(y for _, y in part) <= set(task.classes) for part, task in zip(parts, stream, strict=True))
        assert all(part == sorted(part) for part in parts), "examples keep their order"


def test_a_split_takes_sizes_names_and_subsets():
    dataset = numbered()
    assert [task.classes for task in data.split(dataset, [3, 1, 2])] == [(0, 1, 2), (3,), (4, 5)]
    stream = data.split(dataset, 2, order=["c5", 0, "c2"], scenario="task")
    assert [task.classes for task in stream] == [(5, 0), (2,)]
    assert [task.name for task in stream] == ["c5, c0", "c2"]
    assert stream.scenario == "task" and stream.classes == dataset.classes
    assert data.split(dataset, 1)[0].name == "c0 ... c5"


def test_a_seed_fixes_the_order_of_the_classes():
    dataset = numbered(8)
    orders = {seed: [task.classes for task in data.split(dataset, 4, order=seed)] for seed in (1, 2)}
    assert orders[1] == [task.classes for task in data.split(dataset, 4, order=1)] != orders[2]


@FEW
@given(st.integers(1, 4), st.integers(0, 99), st.sampled_from([(1, 4, 4), (3, 2, 3), (12,)]))
def test_permuted_pixels_can_be_put_back(tasks: int, seed: int, shape: tuple[int, ...]):
    dataset = numbered(shape=shape)
    stream = data.permuted(dataset, tasks, seed=seed)
    pixels = dataset.train.x[0].numel() // (shape[0] if len(shape) == 3 else 1)
    orders = data.permutations(pixels, tasks, seed=seed)
    assert torch.equal(stream[0].train.x, dataset.train.x)
    for task, order in zip(stream, orders, strict=True):
        assert sorted(order.tolist()) == list(range(pixels))
        for part in ("train", "test"):
            x = getattr(task, part).x
            back = x.flatten(2)[..., order.argsort()] if x.ndim == 4 else x[:, order.argsort()]
            assert torch.equal(back.view_as(x), getattr(dataset, part).x)
            assert torch.equal(getattr(task, part).y, getattr(dataset, part).y)
        assert task.augment == data.NO_AUGMENT


def test_permutations_do_not_depend_on_how_many_follow():
    few, many = data.permutations(9, 3, seed=1), data.permutations(9, 5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(few, many[:3], strict=True))


@FEW
@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
def test_a_share_of_the_pixels_changes_places(size: int, share: float, seed: int):
    orders = data.permutations(size, 3, share=share, seed=seed)
    whole = data.permutations(size, 3, seed=seed)
    for order, full in zip(orders[1:], whole[1:], strict=True):
        moved = order != torch.arange(size)
        assert sorted(order.tolist()) == list(range(size)) and moved.sum() <= round(share * size)
        assert set(order[moved].tolist()) <= set(full[: round(share * size)].tolist()), "a larger share adds pixels"
    assert torch.equal(orders[0], torch.arange(size))


def test_the_whole_share_is_what_a_generator_draws():
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randperm(30, generator=generator) for _ in range(4)]
    orders = data.permutations(30, 5, share=1.0, seed=5)[1:]
    assert all(torch.equal(a, b) for a, b in zip(orders, drawn, strict=True))


def test_every_pixel_is_as_likely_to_move_and_goes_anywhere():
    orders = torch.stack([data.permutations(8, 2, share=0.5, seed=seed)[1] for seed in range(2000)])
    moved = (orders != torch.arange(8)).float().mean(0)
    assert (moved - 3 / 8).abs().max() < 0.05, "of four drawn pixels one stays by chance"
    places = torch.stack([(orders == i).float().mean(0) for i in range(8)])
    assert (places[~torch.eye(8, dtype=torch.bool)] - 3 / 8 / 7).abs().max() < 0.03


def test_no_share_changes_nothing_and_the_name_tells():
    dataset = numbered()
    still, half, whole = (data.permuted(dataset, 3, share=share) for share in (0.0, 0.5, 1.0))
    assert all(torch.equal(task.train.x, dataset.train.x) for task in still)
    assert (half.name, whole.name) == ("toy-permuted-3-0.5", "toy-permuted-3")
    assert whole.fingerprint == data.permuted(dataset, 3).fingerprint != half.fingerprint


@FEW
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_shared_head_numbers_classes_by_their_place_in_the_task(tasks: int, each: int, seed: int):
    stream = data.split(numbered(tasks * each), tasks, order=seed)
    shared = data.shared_head(stream)
    assert shared.scenario == "domain" and len(shared.classes) == each
    for task, own in zip(shared, stream, strict=True):
        assert task.classes == tuple(range(each)) and task.name == own.name
        for part in ("train", "test"):
            new, old = getattr(task, part), getattr(own, part)
            assert new.x is old.x and [own.classes[y] for y in new.y] == old.y.tolist()
    for i, name in enumerate(shared.classes):
        assert name == "/".join(stream.classes[task.classes[i]] for task in stream)


def test_even_then_odd_in_one_head_is_half_the_digit(digits: Dataset):
    stream = data.split(digits, 2, order=[0, 2, 4, 6, 8, 1, 3, 5, 7, 9], scenario="task")
    shared = data.shared_head(stream)
    assert all(torch.equal(a.train.y, b.train.y // 2) for a, b in zip(shared, stream, strict=True))
    assert shared.classes == ("0/1", "2/3", "4/5", "6/7", "8/9")


def test_a_shared_head_leaves_targets_without_a_loss():
    shared = data.shared_head(toys.tokens())
    for task, own in zip(shared, toys.tokens(), strict=True):
        assert torch.equal(task.train.y == -100, own.train.y == -100)
        assert torch.equal(task.train.y[:, :-1], own.train.y[:, :-1] % 4)


class TestConflicting:
    """Two questions about the same images."""

    @staticmethod
    def answers(stream: Stream, dataset: Dataset) -> list[list[int]]:
        """The answer for each class in each task, which must be one."""
        for task in stream:
            pairs = set(zip(dataset.train.y.tolist(), task.train.y.tolist(), strict=True))
            pairs |= set(zip(dataset.test.y.tolist(), task.test.y.tolist(), strict=True))
            assert len(pairs) == len(dataset.classes)
            yield [y for _, y in sorted(pairs)]

    @FEW
    @given(st.integers(2, 9), st.floats(0, 1), st.integers(0, 99))
    def test_labels_are_functions_of_the_class_and_conflict_in_a_share(self, classes: int, conflict: float, seed: int):
        dataset = numbered(classes)
        stream = data.conflicting(dataset, conflict, seed=seed)
        first, second = self.answers(stream, dataset)
        free = self.answers(data.conflicting(dataset, 0.0, seed=seed), dataset)
        assert first == [1 - c % 2 for c in range(classes)] == next(free)
        small = next(free)
        assert small == [int(c < classes / 2) for c in range(classes)]
        against = [a != b for a, b in zip(first, second, strict=True)]
        assert sum(against) >= round(conflict * classes)
        assert all(b == s or opposed for b, s, opposed in zip(second, small, against, strict=True))
        more = list(self.answers(data.conflicting(dataset, (1 + conflict) / 2, seed=seed), dataset))[1]
        assert all(b != a for a, b, opposed in zip(first, more, against, strict=True) if opposed or conflict == 1)

    def test_at_1_every_label_is_the_opposite(self, digits: Dataset):
        stream = data.conflicting(digits, conflict=1.0)
        for part in ("train", "test"):
            a, b = (getattr(task, part) for task in stream)
            assert torch.equal(a.y, 1 - b.y) and torch.equal(a.x, b.x) and a.x is getattr(digits, part).x

    def test_at_0_the_questions_have_little_to_do_with_each_other(self, digits: Dataset):
        a, b = (task.train.y.float() for task in data.conflicting(digits, conflict=0.0))
        assert torch.equal(b, (digits.train.y < 5).float())
        assert 0.1 < torch.corrcoef(torch.stack([a, b]))[0, 1] < 0.3, "three of the five small digits are even"

    def test_the_seed_chooses_the_classes(self):
        dataset = numbered(8)
        made = {seed: list(self.answers(data.conflicting(dataset, 0.5, seed=seed), dataset)) for seed in range(20)}
        assert (
            len({tuple(second) for _, second in made.values()}) > 3 and len({tuple(a) for a, _ in made.values()}) == 1
        )

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_a_mark_tells_the_tasks_apart(self, dtype: torch.dtype):
        dataset = numbered()
        parts = (Examples((part.x % 7).to(dtype), part.y) for part in (dataset.train, dataset.test))
        dataset = Dataset("toy", *parts, dataset.classes, augment=Augment(crop=1))
        stream = data.conflicting(dataset, 0.5, marked=True)
        assert stream.shape == (1, 5, 4)
        for task, mark in zip(stream, (0, 255 if dtype == torch.uint8 else 1), strict=True):
            for part in ("train", "test"):
                x = getattr(task, part).x
                assert torch.equal(x[:, :, :-1], getattr(dataset, part).x) and (x[:, :, -1:] == mark).all()
            assert task.augment == data.NO_AUGMENT
        assert data.conflicting(dataset, 0.5)[1].augment == dataset.augment


def test_rotations_turn_counterclockwise():
    x = torch.randint(0, 256, (5, 2, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    part = Examples(x, torch.arange(5))
    dataset = Dataset("toy", part, part, tuple("abcde"))
    stream = data.rotated(dataset, (0, 90, 180, 270, 360, 450))
    for task, turns in zip(stream, (0, 1, 2, 3, 4, 5), strict=True):
        assert torch.equal(task.train.x, x.rot90(turns, (2, 3)))
    assert [task.name for task in stream][:2] == ["0 degrees", "90 degrees"] and stream.scenario == "domain"


def test_a_rotation_keeps_the_proportions_of_oblong_images():
    x = torch.zeros(1, 1, 21, 41)
    x[0, 0, 10, 20:27] = 1.0  # an arm of 6 pixels to the right of the centre
    part = Examples(x.expand(2, -1, -1, -1).clone(), torch.arange(2))
    turned = data.rotated(Dataset("bar", part, part, ("a", "b")), [90])[0].train.x[0, 0]
    torch.testing.assert_close(turned[4:11, 20], torch.ones(7), atol=1e-4, rtol=0)
    assert turned.sum() < 7.1


def test_domains_are_named_and_normalised_as_the_first():
    one, two = numbered(name="one"), replace(numbered(name="two"), normalize=Normalize((0.5,), (0.5,)))
    stream = data.domains([one, two])
    assert [task.name for task in stream] == ["one", "two"] and stream.scenario == "domain"
    assert {task.normalize for task in stream} == {one.normalize}
    named = data.domains({"a": two, "b": one}, normalize=Normalize((0.1,), (1.0,)))
    assert [task.name for task in named] == ["a", "b"] and named[1].normalize == Normalize((0.1,), (1.0,))
    assert rows(named[0].train) == rows(two.train)


@FEW
@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.sampled_from(["task", "class"]))
def test_a_series_numbers_the_classes_on(sizes: list[int], scenario: str):
    sets = {f"set {i}": numbered(size) for i, size in enumerate(sizes)}
    stream = data.series(sets, scenario=scenario)
    assert stream.scenario == scenario and [task.name for task in stream] == list(sets)
    assert [label for task in stream for label in task.classes] == list(range(sum(sizes)))
    for task, (name, dataset) in zip(stream, sets.items(), strict=True):
        assert tuple(stream.classes[label] for label in task.classes) == tuple(f"{name}/{c}" for c in dataset.classes)
        for part in ("train", "test"):
            new, old = getattr(task, part), getattr(dataset, part)
            assert new.x is old.x and [task.classes[y] for y in old.y] == new.y.tolist()
        assert task.augment == dataset.augment


def test_a_series_is_normalised_as_the_first_and_a_list_takes_names():
    one, two = numbered(3, name="one"), replace(numbered(5, name="two"), normalize=Normalize((0.5,), (0.5,)))
    stream = data.series([two, one])
    assert stream.name == "two+one" and stream.scenario == "task" and stream.classes[5] == "one/c0"
    assert {task.normalize for task in stream} == {two.normalize}
    assert data.series([two, one], normalize=Normalize((0.1,), (1.0,)))[0].normalize == Normalize((0.1,), (1.0,))


def test_a_series_leaves_targets_without_a_loss():
    stream = data.series({"a": tokens(), "b": tokens()})
    a, b = (task.train.y for task in stream)
    assert torch.equal(a == -100, b == -100) and (a == -100).any()
    assert torch.equal(a[:, :-1] + 8, b[:, :-1])


def test_streams_leave_their_dataset_alone():
    dataset = numbered()
    before = dataset.train.x.clone()
    for stream in (
        data.split(dataset, 3),
        data.permuted(dataset, 3),
        data.rotated(dataset),
        data.domains([dataset]),
        data.series({"a": dataset, "b": dataset}),
        data.shared_head(data.split(dataset, 3)),
        data.conflicting(dataset, marked=True),
    ):
        assert isinstance(stream, Stream)
    assert torch.equal(dataset.train.x, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: data.split(d, 7), "tasks: 7 for 6 classes of 'toy'; pass a number from 1 to 6"),
        (lambda d: data.split(d, 0), "tasks: 0 for 6 classes"),
        (lambda d: data.split(d, [2, 2]), r"tasks: \(2, 2\) for 6 classes.* sizes from 1 that sum to 6"),
        (lambda d: data.split(d, [6, 0]), "sizes from 1"),
        (lambda d: data.split(d, 2, scenario="domain"), "scenario: 'domain' is unknown; choose one of class, task"),
        (lambda d: data.split(d, 2, order=["c1", "C1"]), "order: 'C1' is unknown; .*did you mean 'c"),
        (
            lambda d: data.split(d, 2, order=[0, 6]),
            r"order: classes \[6\] come twice or are not in 'toy'; pass each id from 0 to 5",
        ),
        (lambda d: data.split(d, 2, order=[0, "c0"]), r"order: classes \[0\] come twice .*once at most"),
        (lambda d: data.permuted(d, 0), "tasks: 0; give a whole number, at least 1"),
        (lambda d: data.permuted(d, share=1.5), r"share: 1.5; give a number in \[0, 1\]"),
        (lambda d: data.shared_head(data.split(d, [4, 2])), r"\[2, 4\] classes; use tasks of equal size"),
        (lambda d: data.conflicting(d, -0.5), r"conflict: -0.5; give a number in \[0, 1\]"),
        (lambda d: data.conflicting(numbered(shape=(9,)), marked=True), "no images to mark"),
        (lambda d: data.conflicting(tokens()), "has token targets"),
        (lambda d: data.rotated(d, []), "one for each task"),
        (lambda d: data.rotated(numbered(shape=(9,))), r"rotate images"),
        (lambda d: data.domains([]), "at least one"),
        (lambda d: data.domains([d, d]), "each by its own name"),
        (lambda d: data.domains({"a": d, "b": numbered(5)}), r"'b' differs from 'a' in classes \(\['c5'\]\)"),
        (lambda d: data.domains({"a": d, "b": numbered(shape=(1, 5, 5))}), "resize"),
        (lambda d: data.series([d, d]), "each by its own name"),
        (lambda d: data.series({}), "at least one"),
        (lambda d: data.series([d], scenario="domain"), "scenario: 'domain' is unknown; choose one of class, task"),
        (
            lambda d: data.series({"a": d, "b": numbered(5, shape=(1, 5, 5))}),
            r"\(1, 5, 5\), task 0 \(1, 4, 4\); resize",
        ),
        (lambda d: data.series({"a": d, "b": tokens()}), "torch.float32, 'b': torch.int64.*convert them alike"),
        (lambda d: data.domains({"a": d, "b": tokens()}), "convert them alike"),
    ],
)
def test_bad_streams_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make(numbered())
