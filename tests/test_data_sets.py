"""Datasets: embedded, rendered, from folders and zips, and torchvision's (stood in for by fakes)."""

import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from clkit import data
from clkit.data import images as decoding

# --- embedded ---


def test_digits_are_bytes_with_a_fixed_stratified_quarter_held_out(digits: data.Dataset):
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.train.x.shape[1:] == (1, 8, 8) and digits.train.x.dtype == torch.uint8
    assert digits.train.x.max() == 255
    counts = [torch.bincount(part.y) for part in (digits.train, digits.test)]
    assert torch.equal(counts[1], (sum(counts) / 4).round().long())
    together = torch.cat([digits.train.x, digits.test.x]).flatten(1).unique(dim=0)
    assert len(together) == 1797, "no example in both parts"
    assert data.digits() is digits


def test_glyphs_follow_their_arguments_and_are_drawn_once():
    one = data.glyphs("digits", per_class=8)
    assert one is data.glyphs("digits", per_class=8)
    assert one.classes == tuple("0123456789") and one.name == "glyphs-digits"
    assert one.train.x.shape == (80, 1, 28, 28) and one.train.x.dtype == torch.uint8
    assert torch.bincount(one.test.y).tolist() == [2] * 10
    other = data.glyphs("digits", per_class=8, seed=1)
    assert not torch.equal(one.train.x, other.train.x)
    assert data.glyphs("digits", per_class=4, size=16).train.x.shape == (40, 1, 16, 16)


def test_glyphs_without_jitter_are_the_fonts_own():
    still = data.glyphs("latin", fonts=["sans", "mono"], per_class=4, jitter=0)
    x = still.train.x.view(52, 4, -1)
    assert torch.equal(x[:, 0], x[:, 2]) and torch.equal(x[:, 1], x[:, 3])
    assert not torch.equal(x[:, 0], x[:, 1])
    assert (x.amax(2) > 200).all(), "each is drawn in full strength"
    assert len(x[:, 0].unique(dim=0)) == 52, "each differs"
    assert not still.train.x[:, :, [0, -1]].any(), "none is cut off"


def test_a_script_keeps_its_characters_and_a_joint_set_drops_look_alikes():
    def classes(script: str) -> set[str]:
        return set(data.glyphs(script, per_class=1).classes)

    assert {"o", "O", "x", "X"} <= classes("latin")
    assert {"Α", "Ο", "ο"} <= classes("greek")
    joint = classes("latin+greek+cyrillic")
    assert {"A", "O", "B", "Ω", "Ж", "я".upper()} <= joint
    assert not {"Α", "А", "o", "ο", "о", "Β", "В", "x", "х", "К"} & joint
    assert len(classes("all")) > 300
    assert len(data.SCRIPTS) == 8


def test_the_order_of_scripts_decides_which_look_alike_stays():
    assert "Α" in data.glyphs(["greek", "latin"], per_class=1).classes
    assert "A" not in data.glyphs(["greek", "latin"], per_class=1).classes


def test_fonts_serve_as_domains():
    stream = data.domains({font: data.glyphs(fonts=font, per_class=2) for font in ("sans", "serif-bold")})
    assert len(stream) == 2 and stream.shape == (1, 28, 28)
    assert not torch.equal(stream[0].train.x, stream[1].train.x)
    assert all(len(data.glyphs("math", fonts=font, per_class=1).classes) == 86 for font in ("sans", "mono"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"script": "lattin"}, "script: 'lattin' is unknown; .*did you mean 'latin'"),
        ({"script": "latin+greec"}, "did you mean 'greek'"),
        ({"script": []}, "at least one"),
        ({"fonts": "sans-bald"}, "did you mean 'sans-bold'"),
        ({"per_class": 0}, "per_class: 0; give a whole number, at least 1"),
        ({"jitter": 3}, r"jitter: 3; give a number in \[0, 2\]"),
        ({"characters": "ab漢"}, "leave out.*漢"),
        ({"characters": "aba"}, "each once"),
    ],
)
def test_bad_glyphs_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        data.glyphs(**arguments)


# --- folders ---


def picture(seed: int, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def pixels(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.array(picture(seed))).permute(2, 0, 1)


def plant(root: Path, *paths: str, **options) -> Path:
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture(seed, **options).save(root / path)
    return root


PARTED = [f"{part}/{label}/{i}.png" for part in ("train", "test") for label in ("dog", "cat") for i in (10, 2, 1)]
PLAIN = [f"{label}/{i}.png" for label in ("dog", "cat") for i in range(8)]


def zipped(root: Path, target: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, inside + file.relative_to(root).as_posix())
    return target


def same(a: data.Dataset, b: data.Dataset) -> bool:
    parts = [(getattr(d, part).x, getattr(d, part).y) for part in ("train", "test") for d in (a, b)]
    pairs = [*zip(parts[0], parts[1], strict=True), *zip(parts[2], parts[3], strict=True)]
    return a.classes == b.classes and all(torch.equal(x, y) for x, y in pairs)


def test_a_folder_is_read_in_natural_order_with_alphabetical_classes(tmp_path: Path):
    dataset = data.folder(plant(tmp_path, *PARTED))
    assert dataset.classes == ("cat", "dog") and dataset.name == tmp_path.stem
    assert dataset.train.x.shape == (6, 3, 5, 6) and dataset.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(dataset.train.x[0], pixels(PARTED.index("train/cat/1.png")))
    assert torch.equal(dataset.test.x[-1], pixels(PARTED.index("test/dog/10.png")))
    assert dataset.normalize == data.Normalize.of(dataset.train.x)


def test_a_zip_equals_its_folder_also_with_a_folder_around_it_all(tmp_path: Path):
    root = plant(tmp_path / "tree", *PARTED)
    (root / ".hidden.png").write_bytes(b"no image")
    (root / "README.txt").write_text("text")
    plain = data.folder(root)
    assert same(plain, data.folder(zipped(root, tmp_path / "a.zip")))
    assert same(plain, data.folder(str(zipped(root, tmp_path / "b.zip", "pack/v1/"))))


def test_without_a_test_part_a_quarter_is_held_out(tmp_path: Path):
    root = plant(tmp_path, *PLAIN)
    dataset = data.folder(root)
    assert torch.bincount(dataset.train.y).tolist() == [6, 6] and torch.bincount(dataset.test.y).tolist() == [2, 2]
    every = {tuple(x.flatten().tolist()) for part in (dataset.train, dataset.test) for x in part.x}
    assert len(every) == 16
    assert same(dataset, data.folder(root)) and not same(dataset, data.folder(root, seed=1))


def test_limit_keeps_the_first_of_each_class_in_both_parts(tmp_path: Path):
    root = plant(tmp_path, *PARTED)
    every, two = data.folder(root), data.folder(root, limit=2)
    assert torch.equal(two.train.x, every.train.x[[0, 1, 3, 4]])
    assert torch.equal(two.test.x, every.test.x[[0, 1, 3, 4]])


@pytest.mark.parametrize("pattern", ["{}/{}/{}.png", "{}/train/{}/{}.png"])
def test_domains_are_chosen_or_read_together(tmp_path: Path, pattern: str):
    files = [pattern.format(d, label, i) for d in ("photo", "sketch") for label in "ab" for i in range(4)]
    plant(tmp_path, *files)
    both = data.folders(tmp_path)
    assert list(both) == ["photo", "sketch"] and both["photo"].name.endswith("-photo")
    assert same(both["sketch"], data.folder(tmp_path, domain="sketch"))
    assert len(data.domains(both)) == 2
    with pytest.raises(ValueError, match="domain: None is unknown; choose one of photo, sketch"):
        data.folder(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'photo'"):
        data.folder(tmp_path, domain="foto")


def test_grey_and_colour(tmp_path: Path):
    root = plant(tmp_path, *PLAIN, mode="L")
    assert data.folder(root).train.x.shape[1] == 1
    assert data.folder(root, grey=False).train.x.shape[1] == 3
    picture(0).save(root / "cat" / "0.png")
    mixed = data.folder(root)
    assert mixed.train.x.shape[1] == 3
    assert data.folder(root, grey=True).train.x.shape[1] == 1


def test_size_scales_to_fill_a_square_and_cuts_around_the_centre(tmp_path: Path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    for i in range(8):
        for label in "ab":
            (tmp_path / label).mkdir(exist_ok=True)
            Image.fromarray(wide if i % 2 else wide[:, 8:16]).save(tmp_path / label / f"{i}.png")
    x = data.folder(tmp_path, size=4).train.x
    assert x.shape[1:] == (3, 4, 4)
    assert (x[:, :, :, 1:3] > 190).all()


def test_decoding_in_threads_changes_nothing():
    one, many = (
        decoding.decode({str(i): partial(picture, i) for i in range(20)}, threaded=threaded)
        for threaded in (False, True)
    )
    assert torch.equal(one, many)


def test_orientation_is_honoured(tmp_path: Path):
    exif = Image.Exif()
    exif[0x112] = 6  # turn a quarter clockwise to view
    plain = plant(tmp_path, *PLAIN)
    picture(0).save(plain / "cat" / "0.png", exif=exif)
    x = decoding.decode({"turned": lambda: Image.open(plain / "cat" / "0.png")})
    assert torch.equal(x[0], pixels(0).rot90(-1, (1, 2)))


def test_what_took_long_is_stored_and_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path / "cache"))
    root = plant(tmp_path / "tree", *PLAIN)
    first = data.folder(root)
    assert not (tmp_path / "cache").exists(), "quick decoding leaves no file"
    monkeypatch.setattr(decoding, "SLOW", 0.0)
    data.folder(root)
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_pixels", None)  # decoding would fail
        assert same(first, data.folder(root))
    picture(99).save(root / "cat" / "0.png", compress_level=0)
    assert not same(first, data.folder(root))


def test_images_are_read_where_they_cannot_be_kept_and_the_log_says_so(tmp_path: Path, monkeypatch, caplog):
    root = plant(tmp_path / "tree", *PLAIN)
    plain = data.folder(root)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(decoding, "SLOW", 0.0)
    assert same(plain, data.folder(root))
    assert str(tmp_path / "file") in caplog.text and "not kept" in caplog.text


def test_bad_folders_are_refused(tmp_path: Path):
    def refuses(message: str, path: Path, **options) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            data.folder(path, **options)

    refuses("none cannot be read .*; give a directory or zip that can be", tmp_path / "none")
    (tmp_path / "text.zip").write_text("no zip")
    refuses("text.zip' cannot be read .*not a zip", tmp_path / "text.zip")
    whole = zipped(plant(tmp_path / "whole", *PLAIN), tmp_path / "whole.zip").read_bytes()
    for i, content in enumerate((b"", whole[:-30], whole[40:], whole[:60] + whole[200:])):
        (tmp_path / f"half{i}.zip").write_bytes(content)
        refuses(rf"half{i}\.zip.* cannot be read", tmp_path / f"half{i}.zip")
    (tmp_path / "empty").mkdir()
    refuses("has no images; expected CLASS/image", tmp_path / "empty")
    refuses("one class", plant(tmp_path / "one", "a/1.png", "a/2.png"))
    refuses("has 1 example", plant(tmp_path / "single", "a/1.png", "b/1.png", "b/2.png"))
    refuses(r"folders around 'c\.png' do not fit", plant(tmp_path / "flat", "a/1.png", "b/1.png", "c.png"))
    refuses(
        r"classes \['b'\] in one part only; give each to both",
        plant(tmp_path / "half", "train/a/1.png", "train/b/1.png", "test/a/1.png"),
    )
    good = plant(tmp_path / "good", *PLAIN)
    refuses("domain: 'photo' is unknown; choose one of None", good, domain="photo")
    refuses("size: 0; give a whole number in", good, size=0)
    refuses("limit: 0; give a whole number, at least 1", good, limit=0)
    with pytest.raises(ValueError, match="use folder"):
        data.folders(good)
    picture(0, (9, 9)).save(good / "dog" / "3.png")
    refuses(r"size: None, but .* is 6x5 and .*3\.png 9x9; pass a size", good)
    (good / "dog" / "3.png").write_bytes((good / "dog" / "2.png").read_bytes()[:60])
    refuses(r"3\.png cannot be read as an image", good)
    Image.fromarray(np.zeros((5, 6), np.uint16)).save(good / "dog" / "3.png")
    refuses("more than 8 bits", good)


# --- torchvision, stood in for by fakes ---


class Fake:
    """What torchvision's small sets look like: an array and targets."""

    shape: tuple[int, ...] = (6, 5)

    def __init__(self, root: Path, *, download: bool, train: bool) -> None:
        if not (root / "here").exists():
            if not download:
                raise RuntimeError("Dataset not found.")
            (root / "here").touch()
        self.data = torch.arange(20).to(torch.uint8).view(20, 1, 1).expand(20, 6, 5) + 100 * train
        self.targets = [i % 2 for i in range(20)]
        self.classes = ["0 - zero", "1 - one"]


class FakeColour:
    def __init__(self, root: Path, *, download: bool, split: str) -> None:
        self.data = np.zeros((20, 3, 8, 8), np.uint8)
        self.labels = np.arange(20) % 10


class FakeLarge:
    """What torchvision's sets of image files look like: images of any size, read one by one."""

    classes = ("ant", "bee")

    def __init__(self, root: Path, *, download: bool, split: str = "") -> None:
        self.split = split

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return picture(index, (40 + index, 50)), index % 2


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    for kind, fake in {"MNIST": Fake, "SVHN": FakeColour, "Flowers102": FakeLarge, "EuroSAT": FakeLarge}.items():
        monkeypatch.setattr(datasets, kind, fake)


@pytest.mark.usefixtures("fakes")
def test_torchvision_sets_are_downloaded_only_if_missing(tmp_path: Path):
    with pytest.raises(ValueError, match=r"name: MNIST is not in .*; pass download=True"):
        data.load("mnist", tmp_path, download=False)
    dataset = data.load("mnist", tmp_path)
    assert dataset.classes == ("0 - zero", "1 - one")
    assert (
        dataset.train.x.shape == (20, 1, 6, 5) and dataset.train.x[3, 0, 0, 0] == 103 and dataset.test.x[3].max() == 3
    )
    assert same(dataset, data.load("mnist", tmp_path, download=False))
    assert data.load("mnist", tmp_path, size=4).train.x.shape == (20, 1, 4, 4)


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("Error downloading"), KeyboardInterrupt()])
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(error, tmp_path: Path, monkeypatch):
    from torchvision import datasets

    class Broken:
        """Takes a file for whole where it is there, as most of torchvision's sets do."""

        def __init__(self, root: Path, *, download: bool, train: bool) -> None:
            if not (root / "MNIST" / "raw" / "half").exists():
                if not download:
                    raise RuntimeError("Dataset not found.")
                (root / "MNIST" / "raw").mkdir(parents=True)
                (root / "MNIST" / "raw" / "half").write_bytes(b"half")
                raise error

    monkeypatch.setattr(datasets, "MNIST", Broken)
    plant(tmp_path / "sets", "other/0.png")
    for _ in range(2):
        with pytest.raises((KeyboardInterrupt, ValueError)) as raised:
            data.load("mnist", tmp_path / "sets")
        left = {file.name for file in (tmp_path / "sets").rglob("*")}
        assert left == {"other", "0.png", "download.lock"}  # the lock is for those who wait
        wanted = ["name: MNIST cannot be downloaded to", str(tmp_path / "sets"), str(error), "connect", "$CLKIT_DATA"]
        assert raised.value is error or all(words in str(raised.value) for words in wanted)


@pytest.mark.usefixtures("fakes")
def test_a_folder_of_downloads_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/.* cannot be written"):
        data.load("mnist", tmp_path / "file")


@pytest.mark.usefixtures("fakes")
def test_torchvision_sets_of_all_kinds_become_bytes(tmp_path: Path):
    svhn = data.load("svhn", tmp_path)
    assert svhn.train.x.shape == (20, 3, 8, 8) and svhn.classes == tuple("0123456789")
    flowers = data.load("flowers102", tmp_path, size=16)
    assert flowers.train.x.shape == (16, 3, 16, 16) and len(flowers.test) == 8, "the validation part is for training"
    assert flowers.train.y.tolist() == [0, 1] * 8 and flowers.augment == data.Augment(crop=2, flip=True)
    eurosat = data.load("eurosat", tmp_path)
    assert eurosat.test.x.shape == (2, 3, 64, 64) and len(eurosat.train) == 6


def test_colour_arrays_and_letters_on_their_side_are_put_right():
    from clkit.data.images import _examples

    array = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    x = _examples(SimpleNamespace(data=array, targets=[0, 1]), (), False, None).x
    assert torch.equal(x, torch.from_numpy(array).permute(0, 3, 1, 2)) and x.is_contiguous()
    lying = type("EMNIST", (SimpleNamespace,), {})(data=torch.arange(8).view(2, 2, 2), targets=[0, 1])
    assert _examples(lying, (), False, None).x[0, 0].tolist() == [[0, 2], [1, 3]]


def test_every_torchvision_name_exists_and_unknown_ones_are_refused():
    from torchvision import datasets

    assert all(hasattr(datasets, source.kind) for source in data.TORCHVISION.values())
    with pytest.raises(ValueError, match=r"name: 'cifar-10' is unknown; .*did you mean 'cifar10'"):
        data.load("cifar-10")
    with pytest.raises(ValueError, match="size: 0"):
        data.load("mnist", size=0)


@pytest.mark.usefixtures("fakes")
def test_a_limit_keeps_the_first_of_each_class_of_torchvisions_too(tmp_path: Path):
    every, two = data.load("mnist", tmp_path), data.load("mnist", tmp_path, limit=2)
    assert torch.equal(two.train.x, every.train.x[:4]) and two.test.y.tolist() == [0, 1, 0, 1]


@pytest.mark.usefixtures("fakes")
def test_a_pack_of_the_name_comes_before_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLKIT_DATA", str(tmp_path / "packs"))
    (tmp_path / "packs").mkdir()
    zipped(plant(tmp_path / "tree", *PARTED), tmp_path / "packs" / "cifar10.zip")
    pack, usual = data.folder(tmp_path / "tree"), data.Augment(crop=4, flip=True)
    found = data.load("cifar10")
    assert same(found, pack) and found.name == "cifar10" and found.augment == usual
    assert same(data.load("cifar10", limit=2), data.folder(tmp_path / "tree", limit=2))
    assert data.load("cifar10", size=4, augment=data.NO_AUGMENT).augment == data.NO_AUGMENT
    plant(tmp_path / "packs" / "own", *(f"photo/{file}" for file in PLAIN), *(f"sketch/{file}" for file in PLAIN))
    photo = data.load("own/photo")
    assert photo.classes == ("cat", "dog") and photo.name == "own-photo" and photo.augment == usual
    assert same(photo, data.folder(tmp_path / "packs" / "own", domain="photo"))
    plant(tmp_path / "packs" / "mnist", *PARTED)
    assert data.load("mnist").train.x.shape[2:] == (5, 6), "the pack"
    assert data.load("mnist", tmp_path).train.x.shape[2:] == (6, 5), "torchvision's, where its folder is given"
    with pytest.raises(ValueError, match="domain: None is unknown; choose one of photo, sketch"):
        data.load("own")
    with pytest.raises(ValueError, match=r"name: 'one' is unknown; .* or a pack in \$CLKIT_DATA"):
        data.load("one")


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_the_first_of_each_class_are_counted_one_by_one(skip: int):
    y = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(skip))
    seen, expected = dict.fromkeys(range(4), 0), []
    for row, label in enumerate(y.tolist()):
        expected += [row] if skip <= seen[label] < skip + 3 else []
        seen[label] += 1
    assert data.first_of_each(y, 3, skip).tolist() == expected


# --- real packs ---


@pytest.mark.packs("usps", "mnist")
def test_mnist_and_usps_are_two_domains_of_digits(packs: Path):
    mnist, usps = data.folder(packs / "mnist.zip", size=16, limit=20), data.folder(packs / "usps.zip", limit=20)
    stream = data.domains([mnist, usps])
    assert stream.shape == (1, 16, 16) and stream.classes == tuple("0123456789")
    assert [len(task.train) for task in stream] == [200, 200]


@pytest.mark.packs("usps")
def test_a_linear_model_reads_usps(packs: Path):
    from sklearn.linear_model import RidgeClassifier

    usps = data.folder(packs / "usps.zip")
    assert (len(usps.train), len(usps.test)) == (7291, 2007)
    train, test = (part.x.flatten(1).double().numpy() / 255 for part in (usps.train, usps.test))
    assert RidgeClassifier(alpha=10.0).fit(train, usps.train.y).score(test, usps.test.y) > 0.85


@pytest.mark.packs("pacs48")
def test_pacs_has_four_domains_of_seven_classes(packs: Path):
    stream = data.domains(data.folders(packs / "pacs48.zip", limit=5))
    assert [task.name for task in stream] == ["art_painting", "cartoon", "photo", "sketch"]
    assert stream.shape == (3, 48, 48) and len(stream.classes) == 7
