from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from clkit import models
from clkit.data import characters
from clkit.training import Training, evaluate, run
from clkit.weights import equal, get_weights
from studies import pretraining
from studies.awm import BACKBONES, latin, pretrained, pretrained_accuracy
from studies.pretraining import Recipe, restored

TINY = Recipe(partial(models.convnet, widths=(4, 8)), Training(epochs=1, lr=0.1), partial(latin, per_class=3, size=10))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("it was trained again")

    return lambda: monkeypatch.setattr(pretraining, "run", refuse)


def test_a_backbone_is_what_the_training_loop_makes_and_is_read_back_bit_for_bit(tmp_path, no_training):
    made, record = restored(TINY, 3, tmp_path)
    by_hand = run(TINY.source(3), TINY.build, training=TINY.training, seed=3, device="cpu", progress=False)
    assert equal(get_weights(made), by_hand.weights[0]) and record["accuracy"] == by_hand.accuracy[0, 0]
    assert not equal(get_weights(made), get_weights(TINY.build(TINY.source(3), seed=3)))
    no_training()
    again, same = restored(TINY, 3, tmp_path)
    assert again is not made and equal(get_weights(again), get_weights(made))
    assert {k: same[k] for k in ("accuracy", "seconds", "configuration")} == {
        k: record[k] for k in ("accuracy", "seconds", "configuration")
    }


@pytest.mark.parametrize(
    ("recipe", "seed"),
    [
        (TINY, 1),
        (replace(TINY, source=partial(latin, per_class=4, size=10)), 0),
        (replace(TINY, source=partial(latin, per_class=3, size=12)), 0),
        (replace(TINY, training=Training(epochs=1, lr=0.2)), 0),
        (replace(TINY, build=partial(models.convnet, widths=(4, 9))), 0),
    ],
)
def test_every_setting_makes_a_file_of_its_own(tmp_path, recipe, seed):
    first, _ = restored(TINY, 0, tmp_path)
    before = files(tmp_path)
    assert [name.partition(".")[2] for name in before] == ["json", "safetensors"]
    other, _ = restored(recipe, seed, tmp_path)
    assert len(files(tmp_path)) == 4 and set(before) < set(files(tmp_path))
    assert not equal(get_weights(first), get_weights(other))


@pytest.mark.parametrize("name", ["source_digest", "torch"])
def test_changed_code_and_another_torch_make_a_backbone_anew(tmp_path, monkeypatch, name):
    restored(TINY, 0, tmp_path)
    if name == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    else:
        monkeypatch.setattr(pretraining, name, lambda: "other code")
    restored(TINY, 0, tmp_path)
    assert len(files(tmp_path)) == 4


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flip, None])
@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_damaged_file_is_named_and_made_anew(tmp_path, caplog, kind, damage):
    made, record = restored(TINY, 0, tmp_path)
    (path,) = tmp_path.glob(f"*.{kind}")
    whole = path.read_bytes()
    if damage:
        path.write_bytes(damage(whole))
    else:
        path.unlink()
    again, other = restored(TINY, 0, tmp_path)
    assert equal(get_weights(again), get_weights(made)) and other["accuracy"] == record["accuracy"]
    assert (path.stem in caplog.text and "damaged" in caplog.text) or (kind == "json" and damage is None)
    assert kind == "json" or path.read_bytes() == whole


def test_pretraining_draws_latin_alone(tmp_path, monkeypatch):
    drawn, ink = set(), characters._ink
    monkeypatch.setattr(characters, "_ink", lambda font, character: drawn.add(character) or ink(font, character))
    characters._draw.cache_clear()
    restored(TINY, 0, tmp_path)
    assert drawn == set(characters.SCRIPTS["latin"])


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("name", "convolutions", "norms", "linears"),
    [("mobilenet_v2", 52, 52, 1), ("resnet18", 20, 20, 1), ("vit", 1, 0, 4 * 6 + 1)],
)
def test_the_architectures_are_those_of_the_paper_made_narrow(name, convolutions, norms, linears):
    recipe = BACKBONES[name]
    stream = latin(per_class=1)
    model = recipe.build(stream, seed=0)
    assert stream.shape == (1, 28, 28) and stream.classes == tuple(characters.SCRIPTS["latin"])
    counts = [len(modules(model, kind)) for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear)]
    assert counts == [convolutions, norms, linears]
    assert modules(model, nn.Linear)[-1].out_features == 52 and sum(p.numel() for p in model.parameters()) < 1e6


def test_a_backbone_comes_by_name_from_the_cache_and_reaches_the_accuracy_on_record(tmp_path, monkeypatch, no_training):
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path))
    monkeypatch.setitem(BACKBONES, "vit", TINY)
    model = pretrained("vit", seed=5)
    no_training()
    assert len(files(tmp_path / "backbones")) == 2
    assert pretrained_accuracy("vit", seed=5) == evaluate(model, TINY.source(5)).accuracy[0]
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_an_unknown_name_is_met_with_the_known_ones():
    with pytest.raises(ValueError, match=r"name: 'mobilenet_v3' is unknown; .*did you mean 'mobilenet_v2'"):
        pretrained("mobilenet_v3")
    with pytest.raises(ValueError, match=r"name: 'alexnet' is unknown; .*resnet18, vit"):
        pretrained_accuracy("alexnet")
