"""Folders and zips of images as people have them: layouts, leftovers, transparency, and what is refused by name."""

import os
import random
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clkit import data
from clkit.data import images as reading

Read = Callable[..., Any]


def colour(path: str) -> tuple[int, int, int]:
    """Each path has an image of its own colour, by which it is found again."""
    drawn = random.Random(path)
    return drawn.randrange(256), drawn.randrange(256), drawn.randrange(256)


def plant(root: Path, *paths: str) -> Path:
    """Writes an image where a path ends in .png, a folder where it ends in a slash, else a file that is no image."""
    for path in paths:
        place = root / path
        (place if path.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
        if path.endswith(".png"):
            Image.new("RGB", (2, 2), colour(path)).save(place)
        elif not path.endswith("/"):
            place.write_bytes(b"no image")
    return root


def zipped(root: Path, target: Path, *, folders: bool = True) -> Path:
    places = [place for place in root.rglob("*") if folders or place.is_file()]
    random.Random(0).shuffle(places)
    with zipfile.ZipFile(target, "w") as archive:
        for place in places:
            archive.write(place, place.relative_to(root))
    return target


@pytest.fixture(params=["directory", "zip"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Read:
    """Plants a tree and reads it, as a directory or as a zip."""

    def folder(*paths: str, reader: Callable = data.folder, **options) -> Any:
        root = plant(tmp_path / "tree", *paths)
        return reader(root if request.param == "directory" else zipped(root, tmp_path / "tree.zip"), **options)

    return folder


def seen(part: data.Examples, classes: tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The class and the colour of each image."""
    return [(classes[y], tuple(x[:, 0, 0].tolist())) for x, y in zip(part.x, part.y.tolist(), strict=True)]


def expected(*paths: str, label: int = -2) -> list[tuple[str, tuple[int, ...]]]:
    return [(path.split("/")[label], colour(path)) for path in paths]


def tree(pattern: str, names: str = "ab", count: int = 2) -> list[str]:
    return [pattern.format(name) + f"/{i}.png" for name in names for i in range(count)]


TRAINING = ("train", "Train", "TRAIN", "training", "Training", "training_set", "trainset")
TESTING = (
    "test",
    "Test",
    "TESTING",
    "testing",
    "val",
    "Val",
    "valid",
    "validation",
    "Eval",
    "evaluation",
    "dev",
    "DEV",
    "test_set",
)


@pytest.mark.parametrize("pattern", ["{part}/{{}}", "{{}}/{part}", "pack/{part}/{{}}", "pack/{part}/images/{{}}"])
@pytest.mark.parametrize(
    ("train", "test"), [*(("train", test) for test in TESTING), *((train, "Test") for train in TRAINING)]
)
def test_parts_have_many_names(pattern: str, train: str, test: str, tmp_path: Path):
    first, second = (tree(pattern.format(part=part)) for part in (train, test))
    dataset = data.folder(plant(tmp_path, *first, *second))
    label = 0 if pattern.startswith("{{") else -2
    assert dataset.classes == ("a", "b")
    assert seen(dataset.train, dataset.classes) == expected(*first, label=label)
    assert seen(dataset.test, dataset.classes) == expected(*second, label=label)


@pytest.mark.parametrize(
    ("there", "held"), [("test val dev", "test"), ("valid Dev", "valid"), ("Testing eval", "Testing")]
)
def test_of_several_test_parts_the_first_is_taken(read: Read, there: str, held: str):
    parts = {part: tree(f"{part}/{{}}") for part in ("train", *there.split())}
    dataset = read(*(path for paths in parts.values() for path in paths))
    assert seen(dataset.train, dataset.classes) == expected(*parts["train"])
    assert seen(dataset.test, dataset.classes) == expected(*parts[held])


@pytest.mark.parametrize("pattern", ["{domain}/{part}/{{}}", "{part}/{domain}/{{}}", "{domain}/{{}}/{part}"])
def test_domains_have_parts_anywhere(read: Read, pattern: str):
    paths = {(d, p): tree(pattern.format(domain=d, part=p)) for d in ("photo", "ink") for p in ("Training", "dev")}
    both = read(*(path for found in paths.values() for path in found), reader=data.folders)
    assert list(both) == ["ink", "photo"]
    for name, dataset in both.items():
        label = 1 if pattern.endswith("{part}") else -2
        assert seen(dataset.train, dataset.classes) == expected(*paths[name, "Training"], label=label)
        assert seen(dataset.test, dataset.classes) == expected(*paths[name, "dev"], label=label)


@pytest.mark.parametrize("word", ["train", "Training", "test", "val", "dev"])
def test_a_class_may_be_called_like_a_part(read: Read, word: str):
    names = ("bus", "car", word, "plane")
    assert read(*(f"{name}/{i}.png" for name in names for i in range(2))).classes == tuple(
        sorted(names, key=reading._natural)
    )


@pytest.mark.parametrize("pattern", ["{}/{{}}", "{{}}/{}"])
def test_a_class_within_parts_may_be_called_like_a_part(read: Read, pattern: str):
    paths = [f"{pattern.format(part).format(name)}/0.png" for part in ("train", "test") for name in ("car", "train")]
    assert read(*paths).classes == ("car", "train")


CLASSES = ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
PARTS = [f"{part}/{path}" for part in ("train", "test") for path in CLASSES]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/0.png", "test/0.png", "car/0.png"], r"has \['test', 'train'\] beside \['car'\], parts or not; remove"),
        ([*PARTS, "extra/a/0.png"], r"has \['test', 'train'\] beside \['extra'\]"),
        (["train/a/0.png", "train/b/0.png", "unlabeled/a/0.png"], r"\['train'\] beside \['unlabeled'\]"),
        ([*PARTS, "Train/a/0.png"], r"has 'train' and 'Train' for its train part|has 'Train' and 'train'"),
        ([*PARTS, "training/a/5.png"], "has 'train' and 'training' for its train part; join or rename them"),
        ([*PARTS, "val/a/0.png", "eval/a/0.png"], "has '(val|eval)' and '(val|eval)' for its val part"),
        (["train/val/0.png", "train/test/0.png"], "folders around 'train/test/0.png' do not fit"),
        (["train/0.png", "test/0.png"], "folders around 'test/0.png' do not fit"),
        ([*PARTS, "stray.png"], "folders around 'stray.png' do not fit"),
        ([*CLASSES, "a/more/5.png"], "folders around 'a/more/5.png' do not fit"),
        ([*PARTS, "unlabeled/0.png"], "folders around 'unlabeled/0.png' do not fit"),
        ([*CLASSES, "c/"], "has no images in 'c'; add readable ones or remove it"),
        ([*CLASSES, "c/x.npy"], "has no images in 'c'"),
        ([*CLASSES, "c/.keep"], "has no images in 'c'"),
        ([*CLASSES, "checkpoints/model.pt"], "has no images in 'checkpoints'"),
        ([*PARTS, "train/c/", "test/c/0.png"], "has no images in 'train/c'"),
        ([f"train/{path}" for path in CLASSES] + ["Test/"], "has no images in 'Test'"),
        ([f"{name}/{path}" for name in ("photo", "ink") for path in CLASSES] + ["ink/c/"], "no images in 'ink/c'"),
        ([*PARTS, "test/c/0.png"], r"has classes \['c'\] in one part only"),
        (["train/Cat/0.png", "train/b/0.png", "test/cat/0.png", "test/b/0.png"], r"'Cat', 'cat'.* spelled alike"),
        (["test/a/0.png", "test/b/0.png"], "has no images in a folder 'train', only in .'test'.; add it"),
        (["x/test/a/0.png", "x/val/b/0.png"], "no images in a folder 'train'"),
    ],
)  # fmt: skip
def test_what_is_in_doubt_is_refused_by_name(read: Read, paths: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        read(*paths)


LEFTOVERS = (
    ".DS_Store", "Thumbs.db", "README.md", "labels.csv", ".cache/9.png", "__MACOSX/._9.png", "__MACOSX/a/9.png",
    "train/.ipynb_checkpoints/9.png", "train/a/Thumbs.db", "train/a/._0.png", "test/b/notes/x.txt",
    "annotations/a.xml", "annotations/a/0.xml", "extra/", "unlabeled/", "checkpoints/model.pt", "train/notes.txt",
)  # fmt: skip


def test_leftovers_without_images_change_nothing(read: Read):
    dataset = read(*PARTS, *LEFTOVERS)
    assert dataset.classes == ("a", "b")
    assert seen(dataset.train, dataset.classes) == expected(*PARTS[:4])
    assert seen(dataset.test, dataset.classes) == expected(*PARTS[4:])


def test_names_that_unicode_writes_in_two_ways_are_one(read: Read):
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    dataset = read(f"train/{one}/0.png", "train/tea/0.png", f"test/{two}/0.png", "test/tea/0.png")
    assert dataset.classes == (one, "tea") and len(dataset.test) == 2
    assert len(data.domains({"x": dataset, "y": dataset})) == 2


def test_letters_of_two_cases_are_two_classes(read: Read):
    assert read(*(f"{part}/{name}/0.png" for part in ("train", "test") for name in "Aa")).classes == ("A", "a")


def test_a_zip_from_elsewhere(tmp_path: Path):
    root = plant(tmp_path / "tree", *PARTS)
    for name, change in {"dotted": "./{}", "windows": "pack/{}", "rooted": "/{}"}.items():
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for path in PARTS:
                inside = change.format(path)
                archive.writestr(
                    zipfile.ZipInfo(inside.replace("/", "\\") if name == "windows" else inside),
                    (root / path).read_bytes(),
                )
        dataset = data.folder(tmp_path / f"{name}.zip")
        assert seen(dataset.train, dataset.classes) == expected(*PARTS[:4])
    assert data.folder(zipped(root, tmp_path / "bare.zip", folders=False)).classes == ("a", "b")


def test_links_are_followed_and_broken_and_endless_ones_named(tmp_path: Path):
    plant(tmp_path / "else", "0.png", "1.png")
    root = plant(tmp_path / "tree", "a/0.png", "a/1.png", ".#lock/")
    (root / "b").symlink_to(tmp_path / "else")
    (root / ".#0.png").symlink_to("nobody@nowhere")
    assert data.folder(root).classes == ("a", "b")
    (root / "a" / "2.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"a/2\.png' cannot be read .*; give a directory or zip that can be"):
        data.folder(root)
    (root / "a" / "2.png").unlink()
    (root / "a" / "again").symlink_to(root / "a")
    with pytest.raises(ValueError, match="again"):
        data.folder(root)


def test_links_that_lead_back_are_refused_before_their_paths_multiply(tmp_path: Path):
    root = plant(tmp_path / "tree", *CLASSES)
    for name in ("back", "again", "more"):
        (root / "a" / name).symlink_to(root)
    with pytest.raises(ValueError, match=r"a link leads back to a folder above it.*; give a directory or zip"):
        data.folder(root)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("pipe", "it is a pipe, a device"), ("device", "it is a pipe, a device"), ("folder", "no such file|1 example")],
)
def test_what_is_no_file_is_refused_and_not_waited_for(kind: str, message: str, tmp_path: Path):
    root = plant(tmp_path / "tree", *CLASSES)
    for place in (root / "a" / "0.png", tmp_path / "pack.zip"):
        place.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "device":
            place.symlink_to("/dev/zero")
        elif place.suffix != ".zip":
            place.mkdir()
    for place in (root, tmp_path / "pack.zip"):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            data.folder(place)


def test_what_unpacks_to_more_than_the_limit_is_refused_with_the_limit(tmp_path: Path, monkeypatch):
    root = plant(tmp_path / "tree", *CLASSES)
    Image.new("L", (400, 400)).save(root / "a" / "0.png")
    (root / "zeros.txt").write_bytes(bytes(10**6))
    with zipfile.ZipFile(tmp_path / "tree.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for place in root.rglob("*"):
            archive.write(place, place.relative_to(root))
    with monkeypatch.context() as patch:
        patch.setattr(reading, "SMALL", 10**5)
        with pytest.raises(ValueError, match=r"unpacks to 1,00\d,\d+ bytes, the limit for a zip of its size is \d+,"):
            data.folder(tmp_path / "tree.zip")
        with pytest.raises(ValueError, match=r"a/0\.png .*all 4 like it would take 640,000 bytes, the limit is \d+,"):
            patch.setattr(reading, "RATIO", 1)
            data.folder(root)
        patch.setattr(reading, "PIXELS", 300 * 300)
        with pytest.raises(ValueError, match=r"a/0\.png .*400 x 400 pixels, the limit is 90,000"):
            data.folder(root, size=4)
        patch.setattr(reading, "FILES", 5)
        with pytest.raises(ValueError, match="more than 5 files"):
            data.folder(root, size=4)
    assert len(data.folder(tmp_path / "tree.zip", size=4).train) == 2


def test_an_entry_unpacks_to_no_more_than_its_zip_says(tmp_path: Path, monkeypatch):
    """The size that a header gives is a lie: reading stops there, and the checksum tells."""
    with zipfile.ZipFile(tmp_path / "lie.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(5_000_000))
    content = (tmp_path / "lie.zip").read_bytes().replace((5_000_000).to_bytes(4, "little"), (9).to_bytes(4, "little"))
    (tmp_path / "lie.zip").write_bytes(content)
    file = reading.files(tmp_path / "lie.zip")["a/0.png"]
    with pytest.raises(ValueError, match=r"path: 'a/0.png' of .*lie.zip cannot be read .*; pack it again"):
        file.read()
    assert file.size == 9


def test_a_password_and_an_unknown_compression_are_named(tmp_path: Path):
    content = zipped(plant(tmp_path / "tree", *CLASSES), tmp_path / "tree.zip").read_bytes()
    for place, value in ((6, 1), (8, 99)):  # of a local header: flags, method
        odd = bytearray(content)
        for mark, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
            at = -1
            while (at := odd.find(mark, at + 1)) >= 0:
                odd[at + place + shift] = value
        (tmp_path / "odd.zip").write_bytes(odd)
        with pytest.raises(ValueError, match=r"of .*odd.zip cannot be read .*; pack it again, without a password"):
            data.folder(tmp_path / "odd.zip")


NAMES = ["10", "2", "02", "a", "A", "b1", "b01", "b10", "é", "ß"]


@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_that_of_the_names_however_they_are_listed(seed: int, tmp_path, monkeypatch: pytest.MonkeyPatch):
    root = plant(tmp_path / "tree", *(f"{name}/{i}.png" for name in NAMES for i in ("1", "01", "10", "2")))
    plain, shuffled, scan = data.folder(root), random.Random(seed), os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: shuffled.sample(found := list(scan(place)), len(found)))
    again = data.folder(root)
    assert again.classes == plain.classes == ("02", "2", "10", "A", "a", "b01", "b1", "b10", "ß", "é")
    assert torch.equal(plain.train.x, again.train.x) and torch.equal(plain.test.x, again.test.x)


def test_the_order_does_not_depend_on_hashes(tmp_path: Path):
    """A set of texts has another order in every process; keys that are equal would pass it on."""
    keys = [reading._natural(name) for name in ("1", "01", "001", "a1", "a01")]
    assert len({tuple(map(str, key)) for key in keys}) == len(sorted(keys)) == 5
    assert all(one != other for i, one in enumerate(keys) for other in keys[:i])


# --- what the files hold ---


def strokes(level: int, ground: int, mode: str) -> Image.Image:
    """A stroke of a grey level on a ground that is transparent, in any mode that can say so."""
    seen = np.zeros((6, 6), np.uint8)
    seen[:, 2] = 255
    ink = np.where(seen, np.uint8(level), np.uint8(ground))
    image = Image.fromarray(ink)
    if mode == "PA":
        image = Image.merge("PA", [image, Image.fromarray(seen)])
        image.putpalette([value for value in range(256) for _ in range(3)])
        return image
    if mode in ("RGBA", "LA"):
        return Image.merge("RGBA", [image] * 3 + [Image.fromarray(seen)]).convert(mode)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
@pytest.mark.parametrize(("level", "ground"), [(0, "white"), (255, "black"), (0, "grey"), (255, "grey")])
def test_transparency_is_laid_on_a_ground(mode: str, level: int, ground: reading.Ground, tmp_path: Path):
    """The transparent pixels are stored as another level, which must not be seen."""
    image, stored = strokes(level, 99, mode), {"L": 99, "RGB": (99, 99, 99), "P": None}
    if mode == "P":
        colours = image.convert("P").convert("RGB").quantize(4)
        stored["P"] = int(np.asarray(colours)[0, 0])
        image = colours
    extra = {"transparency": stored[mode]} if mode in stored else {}
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            image.save(tmp_path / name / f"{i}.png", **extra)
    x = data.folder(tmp_path, ground=ground).train.x[0]
    under = {"white": 255, "grey": 128, "black": 0}[ground]
    assert x.shape[0] == (1 if mode in ("L", "LA") else 3)
    assert (x[:, :, 2] == level).all() and (x[:, :, :2] == under).all()


def pixels(image: Image.Image, **options) -> torch.Tensor:
    return reading.decode({"it": lambda: image}, **options)


@pytest.mark.parametrize(("level", "ground"), [(255, "white"), (0, "black")])
def test_what_does_not_show_on_its_ground_is_refused(level: int, ground: reading.Ground):
    for mode in ("RGBA", "LA", "PA"):
        with pytest.raises(ValueError, match=f"transparency it does not show on ground='{ground}'; pass"):
            pixels(strokes(level, 99, mode), ground=ground)
    assert len(pixels(strokes(level, 99, "RGBA"), ground="grey").unique()) == 2
    clear = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    assert (pixels(clear) == 255).all(), "an empty page"


def test_an_unknown_ground_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="ground: 'whit' is unknown; choose one of white, grey, black"):
        data.folder(plant(tmp_path, *CLASSES), ground="whit")  # pyright: ignore[reportArgumentType]


GREYS = np.arange(36, dtype=np.uint8).reshape(6, 6) * 7


def test_modes_of_eight_bits_and_fewer_are_read_right(tmp_path: Path):
    grey, rgb = Image.fromarray(GREYS), Image.merge("RGB", [Image.fromarray(GREYS // k) for k in (1, 2, 3)])
    assert torch.equal(pixels(grey)[0, 0], torch.from_numpy(GREYS))
    assert torch.equal(pixels(grey.convert("1"))[0, 0].unique(), torch.tensor([0, 255], dtype=torch.uint8))
    plain = pixels(rgb)[0]
    assert np.array_equal(plain.permute(1, 2, 0).numpy(), np.asarray(rgb))
    assert torch.equal(pixels(rgb.convert("P", palette=Image.Palette.ADAPTIVE))[0], plain)
    inks = [*(Image.eval(channel, lambda value: 255 - value) for channel in rgb.split()), Image.new("L", (6, 6))]
    assert torch.equal(pixels(Image.merge("CMYK", inks))[0], plain)
    rgb.convert("RGBA").save(tmp_path / "opaque.png")
    assert torch.equal(pixels(Image.open(tmp_path / "opaque.png"))[0], plain)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_honoured(suffix: str, turn: int, tmp_path: Path):
    image = Image.new("RGB", (16, 32), "black")
    image.paste("white", (0, 0, 8, 8))  # the upper left corner, as stored
    exif = Image.Exif()
    exif[0x112] = turn
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    x = pixels(Image.open(tmp_path / f"x.{suffix}"))[0, 0]
    corners = {(0, 0): x[2, 2], (0, 1): x[2, -3], (1, 0): x[-3, 2], (1, 1): x[-3, -3]}
    where = max(corners, key=lambda corner: int(corners[corner]))
    right = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    assert where == right[turn] and x.shape == ((32, 16) if turn < 5 else (16, 32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: place.write_bytes(b""), "identify|broken|truncated|size"),
        (lambda place: place.write_bytes(b"GIF89a"), "identify|broken|truncated|size"),
        (lambda place: Image.fromarray(np.zeros((6, 6), np.uint16)).save(place, format="PNG"), "more than 8 bits"),
        (lambda place: Image.fromarray(np.zeros((6, 6), np.float32)).save(place, format="TIFF"), "mode F .*8 bits"),
        (lambda place: Image.fromarray(np.zeros((6, 6), np.int32)).save(place, format="TIFF"), "mode I .*8 bits"),
        *(
            (lambda place, kind=kind: Image.new("P", (6, 6)).save(
                place, format=kind, save_all=True, append_images=[Image.new("RGB", (6, 6), "red")]), "several frames")
            for kind in ("GIF", "PNG", "WEBP", "TIFF")
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_single_picture_of_bytes_are_named(make, message: str, tmp_path: Path):
    root = plant(tmp_path / "tree", *CLASSES)
    make(root / "b" / "1.png")
    for place in (root, zipped(root, tmp_path / "tree.zip")):
        with pytest.raises(ValueError, match=rf"b/1\.png cannot be read as an image \(.*{message}"):
            data.folder(place)


def test_what_phones_add_to_a_picture_is_no_second_frame(tmp_path: Path):
    image = Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / "x.mpo", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    (tmp_path / "x.mpo").rename(tmp_path / "x.jpg")
    assert pixels(Image.open(tmp_path / "x.jpg"))[0, :, 0, 0].tolist()[0] > 200


# --- any tree ---

CASES = st.sampled_from([str.lower, str.upper, str.title])
WORDS = [
    st.sampled_from([w for w in reading.PARTS if (reading.PARTS[w] == "train") == train]) for train in (True, False)
]
LEFT = (
    ".DS_Store", "Thumbs.db", "README", "extra/", "__MACOSX/a/0.png", "notes/x.txt",
    "stray.png", "unlabeled/0.png", "extra/a/0.png", "tRain/a/7.png",
)  # fmt: skip
LAYOUT = ("{c}", "{p}/{c}", "{c}/{p}", "{d}/{c}", "{d}/{p}/{c}", "{p}/{d}/{c}", "pack/{p}/{c}")
NAMED = st.lists(st.sampled_from(["a", "b", "Train", "test", "10", "9"]), min_size=2, max_size=4, unique=True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tree_is_read_as_drawn_or_refused_by_name(tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject):
    classes, layout = draw.draw(NAMED), draw.draw(st.sampled_from(LAYOUT))
    train, test = (draw.draw(CASES)(draw.draw(word)) for word in WORDS)
    domains, left = ["ink", "photo"], draw.draw(st.lists(st.sampled_from(LEFT), max_size=3))
    paths = {
        (part, domain, name): [f"{layout.format(p=part, c=name, d=domain)}/{i}.png" for i in range(2)]
        for part in (train, test)
        for domain in domains
        for name in classes
    }
    drawn = {path for found in paths.values() for path in found}
    root = plant(tmp_path_factory.mktemp("tree"), *drawn, *left)
    place = zipped(root, tmp_path_factory.mktemp("zip") / "tree.zip") if draw.draw(st.booleans()) else root
    domain = "ink" if "{d}" in layout else None
    try:
        dataset = data.folder(place, domain=domain)
    except ValueError as error:
        assert any(repr(name)[1:-1] in str(error) for path in (*drawn, *left) for name in path.rstrip("/").split("/"))
        words = {"Train", "test"} & set(classes)
        doubt = words == set(classes) or (words and "{p}" not in layout)
        images = [path for path in left if path.endswith(".png") and not path.startswith("__")]
        assert images or doubt or {"extra/", "notes/x.txt"} & set(left), f"refused without a reason: {error}"
        return
    assert dataset.classes == tuple(sorted(classes, key=reading._natural))
    whole = {entry for part in (dataset.train, dataset.test) for entry in seen(part, dataset.classes)}
    own = {key: {(key[2], colour(path)) for path in found} for key, found in paths.items()}
    inside = {key: entries for key, entries in own.items() if domain in (None, key[1])}
    assert whole == set().union(*inside.values())
    if "{p}" in layout:
        assert set(seen(dataset.test, dataset.classes)) == set().union(*(v for k, v in inside.items() if k[0] == test))


@pytest.mark.parametrize("field", ["comment", "name", "hidden"])
def test_no_entry_of_a_zip_is_lost_by_a_flipped_bit(field, tmp_path):
    """In the directory at its end: an entry reaches over the next, has the name of another, or is hidden."""
    place = zipped(plant(tmp_path / "tree", "n/0.png", "n/1.png", "b/0.png", "b/1.png"), tmp_path / "tree.zip")
    assert data.folder(place).classes == ("b", "n")
    whole = bytearray(place.read_bytes())
    entry = whole.rindex(b"PK\1\2", 0, whole.rindex(b"n/1.png"))
    at, bit = {"comment": (entry + 33, 1), "name": (entry + 46 + 2, 1), "hidden": (entry + 46, 64)}[field]
    whole[at] ^= bit
    place.write_bytes(whole)
    with pytest.raises(ValueError, match=r"path: .*tree.zip"):
        data.folder(place)
