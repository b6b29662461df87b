"""Examples, tasks, batches and streams; normalisation and augmentation against slow twins."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clkit.data import (
    NO_AUGMENT,
    Augment,
    Batch,
    Dataset,
    Examples,
    Normalize,
    Stream,
    Task,
    conflicting,
    permuted,
    split,
    transfer,
)
from clkit.data.transfer import Lane

FEW = settings(max_examples=25, deadline=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 12, shape: tuple[int, ...] = (3, 6, 5), seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=seeded(seed), dtype=torch.uint8)


def toy(classes: int = 4, each: int = 3, **changes: object) -> Dataset:
    y = torch.arange(classes).repeat(each)
    train, test = Examples(images(len(y)), y), Examples(images(len(y), seed=1), y)
    return replace(Dataset("toy", train, test, tuple(f"c{i}" for i in range(classes))), **changes)


def slow_augment(augment: Augment, x: Tensor, crop: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
    """One image at a time, with slices: pad and cut, mirror, then move with the border repeated."""
    height, width, pad = *x.shape[2:], augment.crop
    out = []
    for i, image in enumerate(x):
        padded = torch.zeros(x.shape[1], height + 2 * pad, width + 2 * pad, dtype=x.dtype)
        padded[:, pad : pad + height, pad : pad + width] = image
        top, left = int(crop[0, i]) + pad, int(crop[1, i]) + pad
        image = padded[:, top : top + height, left : left + width]
        image = image.flip(2) if flip[i] else image
        rows = [min(max(r + int(shift[0, i]), 0), height - 1) for r in range(height)]
        columns = [min(max(c + int(shift[1, i]), 0), width - 1) for c in range(width)]
        out.append(image[:, rows][:, :, columns])
    return torch.stack(out)


augments = st.builds(Augment, crop=st.integers(0, 7), flip=st.booleans(), shift=st.integers(0, 7))


@FEW
@given(augments, st.integers(0, 99), st.sampled_from([(1, 4, 7), (3, 6, 5)]))
def test_augmentation_equals_the_slow_reference(augment: Augment, seed: int, shape: tuple[int, ...]):
    x = images(8, shape, seed)
    drawn = augment.draw(8, seeded(seed))
    assert torch.equal(augment(x, seeded(seed)), slow_augment(augment, x, *drawn))


@FEW
@given(augments, st.integers(0, 99))
def test_augmentation_is_fixed_by_its_generator_and_leaves_its_input(augment: Augment, seed: int):
    x = images(16)
    before = x.clone()
    assert torch.equal(augment(x, seeded(seed)), augment(x, seeded(seed)))
    assert torch.equal(x, before)


def test_augmentation_reaches_its_whole_range_and_no_more():
    crop, flip, shift = Augment(crop=2, flip=True, shift=1).draw(2000, seeded())
    assert crop.unique().tolist() == [-2, -1, 0, 1, 2]
    assert shift.unique().tolist() == [-1, 0, 1]
    assert 0.4 < flip.double().mean() < 0.6
    assert not Augment(crop=2).draw(2000, seeded())[1].any()


def test_augmentation_off_draws_nothing():
    generator = seeded()
    x = images()
    assert torch.equal(NO_AUGMENT(x, generator), x)
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_augmentation_keeps_float_images_and_gives_new_memory():
    x = images().double()
    out = Augment(flip=True)(x, seeded())
    assert out.dtype == torch.float64
    assert out.data_ptr() != x.data_ptr()


@FEW
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.1, 2)), min_size=3, max_size=3), st.integers(0, 9))
def test_normalisation_can_be_undone(channels: list[tuple[float, float]], seed: int):
    mean, std = zip(*channels, strict=True)
    x = images(seed=seed)
    out = Normalize(mean, std)(x)
    undone = out * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert torch.equal((undone * 255).round().to(torch.uint8), x)


def test_normalisation_equals_torchvision_and_keeps_floats_and_tokens():
    from torchvision.transforms.functional import normalize

    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x = images()
    torch.testing.assert_close(Normalize(mean, std)(x), normalize(x / 255, mean, std))
    double = x.double() / 255
    torch.testing.assert_close(Normalize(mean, std)(double), normalize(double, mean, std))
    tokens = torch.randint(0, 9, (4, 7), generator=seeded())
    assert torch.equal(Normalize((3.0,), (2.0,))(tokens), tokens)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float64])
def test_complex_inputs_keep_both_parts(dtype, asked):
    x = torch.randn(4, 2, 3, 3, dtype=dtype, generator=seeded())
    found = Normalize((0.5, 1.0), (2.0, 4.0))(x, asked)
    std, mean = torch.tensor([2.0, 4.0]).view(-1, 1, 1), torch.tensor([0.5, 1.0]).view(-1, 1, 1)
    assert found.dtype == dtype and torch.allclose(found, (x - mean) / std)
    part = Examples(x, torch.zeros(4, dtype=torch.int64))
    assert Task(0, "waves", (0,), part, part).batch([0, 1]).x.equal(x[:2])


def test_normalisation_measures_bytes_and_floats_alike():
    x = images(50)
    measured = Normalize.of(x)
    assert measured == Normalize.of(x.double() / 255)
    out = measured(x)
    assert out.mean((0, 2, 3)).abs().max() < 1e-3
    assert (out.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3
    assert Normalize.of(torch.zeros(5, 1, 2, 2, dtype=torch.uint8)) == Normalize((0.0,), (1.0,))


def test_normalisation_first_used_in_inference_mode_serves_training():
    normalize = Normalize((0.123,), (0.456,))
    with torch.inference_mode():
        normalize(torch.zeros(1, 1, 2, 2))
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    normalize(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((1, 1, 2, 2), 1 / 0.456))


def test_examples_take_rows():
    examples = toy().train
    rows = torch.tensor([3, 1])
    assert torch.equal(examples[rows].x, examples.x[rows])
    assert torch.equal(examples[[3, 1]].y, examples.y[rows])
    assert len(examples[2:5]) == 3
    assert repr(examples) == "Examples(12 of (3, 6, 5), uint8, cpu)"


def test_tokens_and_targets_pass_through_with_ignored_positions():
    x = torch.randint(0, 5, (6, 8), generator=seeded())
    y = x.roll(-1, 1)
    y[:, -1] = -100
    tokens = Examples(x, y)
    task = Task(0, "text", tuple(range(5)), tokens, tokens)
    batch = task.batch([0, 2], seeded())
    assert torch.equal(batch.x, x[[0, 2]]) and torch.equal(batch.y, y[[0, 2]])


def task_of(dataset: Dataset, **changes: object) -> Task:
    return replace(split(dataset, 1)[0], **changes)


def test_a_task_prepares_with_and_without_augmentation():
    task = task_of(toy(), augment=Augment(crop=2, flip=True), normalize=Normalize((0.5,), (0.5,)))
    x = task.train.x
    assert torch.equal(task.prepare(x), task.normalize(x))
    assert torch.equal(task.prepare(x, seeded(3)), task.normalize(task.augment(x, seeded(3))))


def test_a_batch_joins_rows_of_a_memory_prepared_as_its_own():
    task = task_of(toy(), augment=Augment(crop=2, flip=True))
    generator = seeded(5)
    batch = task.batch(slice(0, 4), generator)
    old, labels = images(3, seed=9), torch.tensor([1, 2, 3])
    joined = batch.join(old, labels)

    twin = seeded(5)
    expected = torch.cat([task.prepare(task.train.x[:4], twin), task.prepare(old, twin)])
    assert torch.equal(joined.x, expected)
    assert joined.y.tolist() == [*batch.y.tolist(), 1, 2, 3]
    assert joined.size == 4 and torch.equal(joined.raw, task.train.x[:4])
    assert len(batch.x) == 4

    plain = task.batch(slice(0, 4)).join(old, labels)
    assert torch.equal(plain.x[4:], task.prepare(old))


@given(st.lists(st.integers(1, 5), max_size=3), st.sets(st.integers(0, 3)), st.booleans(), st.booleans())
@FEW
def test_when_the_inputs_are_asked_for_changes_none(sizes, looks, moved, last):
    """Joined rows are prepared at once; the twin prepares each part by itself, in the order of the draws."""
    task = task_of(toy(), augment=Augment(crop=2, flip=True, shift=1) if moved else NO_AUGMENT)
    layout = torch.channels_last if last else None
    batch = task.batch(torch.tensor([4, 0, 7]), seeded(3), layout=layout)
    twin, drawn = [], seeded(3)
    for step, raw in enumerate([task.train.x[[4, 0, 7]], *(images(size, seed=size) for size in sizes)]):
        twin.append(task.prepare(raw, drawn))
        batch = batch.join(raw, torch.zeros(len(raw), dtype=torch.int64)) if step else batch
        if step in looks:
            assert len(batch.x) == len(batch.y)
    assert torch.equal(batch.x, torch.cat(twin)) and batch.size == 3
    assert layout is None or batch.x.is_contiguous(memory_format=layout)


ROWS = {
    "bytes": images,
    "floats": lambda n: images(n) / 255,
    "doubles": lambda n: images(n).double(),
    "truths": lambda n: images(n) > 99,
}


@pytest.mark.parametrize("old", [*ROWS])
@pytest.mark.parametrize("when", ["always", "never", "later", "no more"])
def test_rows_of_another_kind_are_prepared_as_the_others_are(old, when):
    """Bytes beside what a generator of images makes, and rows that are moved beside rows that are not."""
    task = task_of(toy(), augment=Augment(crop=2, flip=True), normalize=Normalize((0.5,), (0.25,)))
    first, later = when in ("always", "no more"), when in ("always", "later")
    drawn, twin = seeded(2), seeded(2)
    batch = task.batch(slice(0, 3), drawn if first else None)
    batch.generator = drawn if later else None
    more = [ROWS[old](2), images(1)]
    for raw in more:
        batch = batch.join(raw, torch.zeros(len(raw), dtype=torch.int64))
    own = task.prepare(task.train.x[:3], twin if first else None)
    assert torch.equal(batch.x, torch.cat([own, *(task.prepare(raw, twin if later else None) for raw in more)]))


def test_inputs_that_are_given_stay_when_rows_are_joined():
    batch = task_of(toy()).batch(slice(0, 4))
    mixed = replace(batch, x=batch.x / 2).join(images(2), torch.tensor([1, 2]))
    assert torch.equal(mixed.x[:4], batch.x / 2) and torch.equal(mixed.x[4:], batch.prepare(images(2)))
    with torch.inference_mode():
        first = task_of(toy()).batch(slice(0, 4))
        assert len(first.x) == 4
    assert not first.x.is_inference() and torch.equal(first.x, batch.x)
    with pytest.raises(AttributeError, match="batch: it has no 'z'"):
        _ = batch.z


def test_a_stream_is_a_sequence_that_knows_its_shape():
    stream = split(toy(), 2)
    assert len(stream) == 2 and [task.index for task in stream] == [0, 1] and stream[-1] is stream.tasks[1]
    assert stream.shape == (3, 6, 5) and stream.device == torch.device("cpu")
    assert repr(stream) == "Stream('toy-2', 2 tasks, class-incremental, 4 classes, inputs (3, 6, 5))"
    assert stream.to("cpu") is stream


@pytest.mark.gpu
def test_a_stream_moves_to_the_gpu_or_to_pinned_memory(monkeypatch: pytest.MonkeyPatch):
    stream = conflicting(toy(augment=Augment(crop=2, flip=True)))
    moved = stream.to("cuda")
    assert moved.device.type == "cuda" and moved.fingerprint == stream.fingerprint
    assert moved[0].train.x.data_ptr() == moved[1].train.x.data_ptr()
    rows = torch.arange(4)
    torch.testing.assert_close(
        moved[1].batch(rows.cuda(), seeded()).x.cpu(), stream[1].batch(rows, seeded()).x, rtol=0, atol=1e-6
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1))
    pinned = stream.to("cuda")
    assert pinned.device.type == "cpu" and pinned[0].train.x.is_pinned()
    assert pinned[1].batch(rows, seeded(), device="cuda").x.is_cuda
    assert pinned.fingerprint == stream.fingerprint
    batches = [pinned[1].batch(torch.tensor([i % 6, i % 5]), device="cuda") for i in range(50)]
    assert all(torch.equal(b.raw.cpu(), stream[1].train.x[[i % 6, i % 5]]) for i, b in enumerate(batches))
    assert all(torch.equal(b.y.cpu(), stream[1].train.y[[i % 6, i % 5]]) for i, b in enumerate(batches))


def test_rows_of_pinned_memory_move_on_a_stream_of_their_own_two_batches_at_a_time(monkeypatch: pytest.MonkeyPatch):
    log = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, call: str):
            return lambda *others: log.append((self.name, call, *(other.name for other in others)))

    @contextmanager
    def on(stream):
        log.append(stream.name)
        yield
        log.append("off")

    names, empty = iter("ab"), torch.empty
    fakes = {"Stream": lambda device: Noted("side"), "Event": lambda: Noted(next(names)), "stream": on}
    for name, fake in (fakes | {"current_stream": lambda device: Noted("own")}).items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def pinned(*shape, pin_memory, **more):
        log.append("pinned")
        assert pin_memory
        return empty(*shape, **more)

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(("kept", stream.name)))
    x, y, lane = torch.arange(12).view(6, 2), torch.arange(6), Lane(torch.device("cpu"))
    for turn in ("b", "a", "b"):
        rows = torch.randperm(6)[:4]
        moved = lane((x, y), rows)
        assert torch.equal(moved[0], x[rows]) and torch.equal(moved[1], y[rows])
        begun, copied = [(turn, "synchronize"), (turn, "record", "own")], ["side", "pinned", "pinned", "off"]
        assert log == [*begun, *copied, ("own", "wait_stream", "side"), ("kept", "own"), ("kept", "own")]
        log.clear()


def test_rows_go_the_plain_way_unless_they_are_pinned_and_a_gpu_wants_them(monkeypatch: pytest.MonkeyPatch):
    x, y, ways = torch.arange(12).view(6, 2), torch.arange(6), []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(transfer, "_lane", lambda device: lambda tensors, rows: ways.append((device.type, rows)) or [])
    for rows in (slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.arange(6) % 5 == 1):
        for device in (None, "cpu", torch.device("cpu")):
            assert all(map(torch.equal, transfer.rows_of((x, y), rows, device), (x[rows], y[rows])))
    assert not ways and transfer.rows_of((x, y), torch.tensor([1, 2]), "cuda") == [] and ways[0][0] == "cuda"


def test_the_fingerprint_follows_content_and_settings_alone():
    stream = split(toy(), 2)
    again = split(toy(), 2)
    assert stream.fingerprint == again.fingerprint == replace(stream, name="other").fingerprint
    other = toy()
    other.train.x[0, 0, 0, 0] ^= 1
    changed = [
        split(other, 2),
        split(toy(), 4),
        split(toy(), 2, scenario="task"),
        split(toy(), 2, order=[1, 0, 2, 3]),
        split(toy(augment=Augment(crop=1)), 2),
        split(toy(normalize=Normalize((0.5,), (1.0,))), 2),
        permuted(toy(), 2),
    ]
    assert len({stream.fingerprint, *(s.fingerprint for s in changed)}) == len(changed) + 1


def test_bad_examples_are_refused():
    x, y = images(), torch.arange(12) % 4
    with pytest.raises(TypeError, match=r"y: it holds numbers that are not whole, torch\.float32"):
        Examples(x, y + 0.5)
    with pytest.raises(TypeError, match=r"x: .* no tensor or array of numbers"):
        Examples([["a"], ["b"]], [0, 1])
    with pytest.raises(TypeError, match=r"x: it has the layout torch.sparse_coo on cpu; pass x.to_dense\(\)"):
        Examples(x.to_sparse(), y)
    assert not Examples(x.float().requires_grad_() * 2, y).x.requires_grad
    with pytest.raises(ValueError, match="12 rows and y has no"):
        Examples(x, 3)
    with pytest.raises(ValueError, match="12 rows and y has 11"):
        Examples(x, y[:11])
    with pytest.raises(ValueError, match=r"x\[:, None\]"):
        Examples(torch.zeros(12), y)
    with pytest.raises(ValueError, match=r"a token; of one-hot rows, y.argmax\(1\)"):
        Examples(x, torch.nn.functional.one_hot(y))
    with pytest.raises(ValueError, match=r"(?s)train: .*; give an instance of Examples"):
        Dataset("d", (x, y), (x, y), tuple("abcd"))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.float64, torch.bool, np.int16, np.uint64, list])
def test_labels_and_inputs_are_taken_as_people_have_them(kind):
    x, y = images(), torch.arange(12) % 2
    if kind is list:
        made = Examples(x.tolist(), y.tolist())
    else:
        made = Examples(x.numpy(), y.to(kind) if isinstance(kind, torch.dtype) else y.numpy().astype(kind))
    assert torch.equal(made.x, x) and torch.equal(made.y, y) and made.y.dtype == torch.int64


@pytest.mark.parametrize("shape", [(6, 5, 3), (28, 28, 1), (8, 9, 4), (1, 6, 5), (3, 6, 5), (4, 4, 3), (64, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_channels_that_come_last_are_refused_where_there_is_no_other_reading(shape, dtype):
    x, y = images(12, shape).to(dtype) // 2, torch.arange(12) % 4
    make = lambda: Dataset("x", Examples(x, y), Examples(x, y), tuple("abcd"))  # noqa: E731
    if shape[2] in (1, 3, 4) and shape[0] not in (1, 3, 4, 64):
        with pytest.raises(ValueError, match=r"dataset 'x': images .* have their channels last; pass x\.permute\(0, 3"):
            make()
        task = task_of(toy())
        with pytest.raises(ValueError, match=r"task 0 .* channels last"):
            replace(task, train=Examples(x, y), test=Examples(x, y))
    else:
        make()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_bytes_of_another_dtype_are_refused_unless_they_are_normalised_as_such(dtype):
    x, y = images(12).to(dtype), torch.arange(12) % 4
    make = lambda normalize: Dataset("x", Examples(x, y), Examples(x, y), tuple("abcd"), normalize)  # noqa: E731
    with pytest.raises(ValueError, match=r"dataset 'x': images from 0.* to 255.* are torch\..*; pass bytes as x\.to"):
        make(Normalize())
    if dtype.is_floating_point:
        make(Normalize.of(x))
        x /= 255
        make(Normalize())


@pytest.mark.parametrize("label", [-1, 4, 10**12])
def test_labels_out_of_range_are_refused(label: int):
    good = toy()
    y = good.train.y.clone()
    y[2] = label
    with pytest.raises(ValueError, match=rf"train labels \[{label}\] are not among its 4 classes"):
        replace(good, train=Examples(good.train.x, y))
    with pytest.raises(ValueError, match="test labels"):
        replace(good, test=Examples(good.train.x, y))


def test_bad_datasets_tasks_and_streams_are_refused():
    good, task = toy(), task_of(toy())
    cases = [
        (lambda: replace(good, test=good.test[:0]), "no test examples"),
        (lambda: replace(good, classes=("a", "b", "b", "c")), r"names \['b'\] twice; give each its own name"),
        (lambda: replace(good, test=Examples(good.test.x[:, :1], good.test.y)), "convert them alike"),
        (lambda: replace(good, test=Examples(good.test.x.float(), good.test.y)), "convert them alike"),
        (lambda: replace(task, classes=()), "at least one"),
        (lambda: replace(task, classes=(0, 1, 2, 2)), "distinct"),
        (lambda: replace(task, classes=(0, 1, 2)), r"labels \[3\]"),
        (lambda: Stream("s", (), ("a",)), "tasks: stream 's' has none; pass at least one"),
        (
            lambda: Stream("s", (task,), good.classes, "cls"),
            "scenario: 'cls' is unknown; choose one of class, domain",
        ),
        (lambda: Stream("s", (replace(task, index=1),), good.classes), "number from 0"),
        (lambda: Stream("s", (task,), good.classes[:3]), "names 3; name all"),
        (
            lambda: Stream("s", (task, replace(task, index=1, normalize=Normalize((1.0,), (1.0,)))), good.classes),
            "unlike",
        ),
        (lambda: Normalize((0.0,), (0.0,)), r"std: \(0.0,\); give several, each a number, above 0"),
        (lambda: Normalize((0.0, 1.0), (1.0,)), "every channel"),
        (lambda: Normalize((0.0, 0.0), (1.0, 1.0))(images()), "2 channels and the input 3"),
        (lambda: Augment(crop=-1), "crop: -1; give a whole number, at least 0, pixels"),
        (lambda: Augment(flip=True)(torch.zeros(4, 9), seeded()), "needs images"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_a_batch_of_the_host_is_prepared_where_it_is_asked_for():
    batch = task_of(toy()).batch([0, 1], device="cpu")
    assert isinstance(batch, Batch) and batch.x.device.type == "cpu" and batch.x.dtype == torch.float32
