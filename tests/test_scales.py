"""The scales that no laptop runs: every grid of the profiles "paper" and "real" goes through one epoch on a few images.

Streams, learners, consolidations, measures and networks are the grids' own, on packs of noise with the right names,
sizes and, where the grid depends on it, number of classes. What is smaller: of a function's grids one stream each, and
as many methods as it takes to meet every kind of learner and consolidation once; the first two tasks, one seed, the
measure of the first grid. ResNet-18 is 4 channels wide, torchvision's networks are not pretrained, and CLIP is a small
convolutional encoder.
"""

import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
from dataclasses import fields, is_dataclass, replace
from functools import partial
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

import studies
from clkit import models
from clkit.experiments import Method, Study, study
from clkit.learners import ER, Learner
from studies import awm, clewi, hcmm_streams, sfa

SETS = {"cifar10": (10, 32), "cifar100": (100, 32), "tiny-imagenet": (200, 32), "mnist": (10, 28), "usps": (10, 16)}
SETS |= dict.fromkeys(awm.PAPER, (4, 32)) | {f"pacs48/{domain}": (7, 48) for domain in hcmm_streams.DOMAINS}
GREY = ("mnist", "usps")
FEWER = {
    "studies.awm.IMAGES": 14,
    "studies.awm.TEST_IMAGES": 14,
    "studies.sfa.real.SIZE": 32,
    "studies.sfa.real.TRAIN": 2,
    "studies.sfa.real.TEST": 1,
    "studies.sfa.language.WINDOWS": 64,
}
FEWER |= {"studies.hcmm_streams.PORTIONS": dict.fromkeys(("pacs48", "cifar100"), hcmm_streams.Portions(64, 3, 1, 1, 1))}
WITH_PROFILE = {
    "studies.clewi.main": [partial(clewi.main, "paper", name) for name in clewi.DATASETS],
    "studies.clewi.joint": [partial(clewi.joint, "paper", name) for name in clewi.DATASETS],
    "studies.clewi.small": [lambda: clewi.small("paper", {"ER": Method(ER(50))})],
    "studies.clewi.lengths": [lambda: clewi.lengths("paper")],
    "studies.clewi.wide": [lambda: clewi.small("paper", {"ER": Method(ER(9))}, models={"x2": clewi.wide(2, "paper")})],
    "studies.clewi.curves": [lambda: study(clewi.curves, [0], method="ER", profile="paper")],
    "studies.sfa.images.plane": [lambda: sfa.plane({"": Method(Learner())}, "mnist", profile="paper")],
    "studies.sfa.images.long_streams": [lambda: sfa.long_streams({"": Method(Learner())}, profile="paper")],
    "studies.awm.table": [lambda: awm.table("paper")],
}


def functions():
    """All functions of the studies by their dotted names, where they are defined."""
    for info in pkgutil.walk_packages(studies.__path__, "studies."):
        module = importlib.import_module(info.name)
        for name, function in vars(module).items():
            if inspect.isfunction(function) and function.__module__ == info.name and name[0] != "_":
                yield f"{info.name}.{name}", function


def grids():
    """The grids of both scales by name: those with a profile, and `real` and `paper`, with each part that they name."""
    found = {name: makers for name, makers in WITH_PROFILE.items() if name in dict(functions())}
    for name, function in functions():
        if name.rpartition(".")[2] in ("real", "paper"):
            named = re.findall(r'"([\w-]+)"', function.__doc__ or "")
            parts = named if "part" in inspect.signature(function).parameters else []
            found[name] = [partial(function, part) for part in parts] or [function]
    return found


def test_every_grid_with_a_profile_is_taken_through_an_epoch():
    have = {name for name, function in functions() if "profile" in inspect.signature(function).parameters}
    assert have <= WITH_PROFILE.keys(), "add how each is called to WITH_PROFILE"


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A folder of packs: noise, three images a class to train on and two to test on, and a few lines of text."""
    folder, rng = tmp_path_factory.mktemp("packs"), np.random.default_rng(0)
    for pack in {name.partition("/")[0] for name in SETS}:
        with ZipFile(folder / f"{pack}.zip", "w") as archive:
            for name, (classes, side) in SETS.items():
                inside = name.partition("/")[2] and name.partition("/")[2] + "/"
                for part, count in (("train", 3), ("test", 2)) if name.partition("/")[0] == pack else ():
                    shape = (classes, count, side, side) if name in GREY else (classes, count, side, side, 3)
                    for label, images in enumerate(rng.integers(0, 256, shape, np.uint8)):
                        for i, image in enumerate(images):
                            file = io.BytesIO()
                            Image.fromarray(image).save(file, "BMP")
                            archive.writestr(f"{inside}{part}/{label:03}/{i}.bmp", file.getvalue())
    sums, law = {"question": "2+2?", "answer": "#### 4"}, {"heading": "§ 1", "text": "A vessel is any boat."}
    rows = {f"math/gsm8k_{part}": sums for part in ("train", "test")}
    rows |= {f"law/uscode_{part}": law for part in ("train", "test")} | {"code/mbpp": {"text": "add", "code": "x = 1"}}
    rows |= {"code/humaneval": {"prompt": "def f():", "canonical_solution": " pass"}}
    with ZipFile(folder / "text.zip", "w") as archive:
        for name, row in rows.items():
            archive.writestr(f"{name}.jsonl", (json.dumps(row) + "\n") * 60)
    return folder


def resnet18(stream, *, width=64, seed=0, whole=models.resnet18):
    """ResNet-18 with 4 channels where it has `width`."""
    return whole(stream, width=4, seed=seed)


def small(model):
    """A model whose weights need not be downloaded."""
    if not isinstance(model, partial):
        return model
    options = model.keywords | ({"weights": None} if model.func is models.torchvision else {})
    options |= {"model": small(options["model"])} if callable(options.get("model")) else {}
    return partial(model.func, *model.args, **options)


def forget():
    """Clears what the studies keep of data in a process."""
    for info in pkgutil.walk_packages(studies.__path__, "studies."):
        for thing in vars(importlib.import_module(info.name)).values():
            if hasattr(thing, "cache_clear"):
                thing.cache_clear()


def short(settings):
    """Settings with one epoch wherever they have several."""
    epochs = [f.name for f in fields(settings) if "epochs" in f.name] if is_dataclass(settings) else []
    return replace(settings, **dict.fromkeys(epochs, 1)) if epochs else settings


def kinds(method):
    parts = [method.consolidation, *getattr(method.learner, "parts", [method.learner])]
    return {(type(part), getattr(part, "merge", None)) for part in parts if part is not None}


def begun(seed, source):
    stream = source(seed)
    return replace(stream, tasks=stream.tasks[:2])


def tiny(whole, met):
    """A grid on the first tasks of its first stream, with a method for each kind that is not `met`; one at least."""
    methods = {}
    for name, method in [*whole.methods.items()][::-1]:
        if not methods or kinds(method) - met:
            met |= kinds(method)
            own = {"learner": short(method.learner), "training": method.training and short(method.training)}
            methods[name] = replace(method, **own, model=method.model and small(method.model))
    streams = {name: partial(begun, source=source) for name, source in [*whole.streams.items()][:1]}
    nets = {name: small(model) for name, model in [*whole.models.items()][:1]}
    changed = {"methods": methods, "training": short(whole.training), "seeds": whole.seeds[:1]}
    return replace(whole, streams=streams, models=nets, **changed)


def only_replay(main, *arguments):
    """CLeWI's main grid with ER and its pair, as small as `tiny` makes it."""
    whole = main(*arguments)
    pair = [tiny(replace(whole, methods={name: whole.methods[name]}), set()) for name in ("ER", "ER + CLeWI")]
    return replace(pair[0], methods={**pair[0].methods, **pair[1].methods})


@pytest.mark.parametrize("name", grids())
def test_a_grid_goes_through_an_epoch_on_a_few_images(name, noise, tmp_path, monkeypatch, request):
    monkeypatch.setenv("CLKIT_DATA", str(noise))
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "resnet18", resnet18)
    request.addfinalizer(forget)
    forget()
    for constant, value in FEWER.items():
        module, _, attribute = constant.rpartition(".")
        if module in sys.modules:
            monkeypatch.setattr(sys.modules[module], attribute, value, raising=False)
    clip = hcmm_streams.SETTINGS["cifar100, CLIP"]
    encoder = partial(models.encoder, widths=(4, 4, 4), dim=8)
    monkeypatch.setitem(hcmm_streams.SETTINGS, "cifar100, CLIP", replace(clip, network=encoder))
    met = set()
    for make in grids()[name]:
        made = make()
        for whole in made.values() if isinstance(made, dict) else [made]:
            if isinstance(whole, Study):
                monkeypatch.setattr(clewi, "main", partial(only_replay, clewi.main))
                table = replace(whole, seeds=whole.seeds[:1]).run(jobs=1, store=tmp_path)
            else:
                costly = whole.measure is clewi.plasticity and name != "studies.clewi.main"  # a pass for every class
                measure = None if met or costly else whole.measure  # it is the same for all
                table = replace(tiny(whole, met), measure=measure).run(jobs=1, store=tmp_path)
                assert set(table.method) <= set(whole.methods) and table.acc.between(0, 1).all()
            assert len(table)
