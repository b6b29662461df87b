"""CLIP as a network to learn a stream with: open_clip's own where it is installed, and a stand-in for it everywhere."""

import importlib
import json
import shutil
import sys
from collections import OrderedDict
from functools import partial
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import toys
from clkit import data, models, representation
from clkit.consolidation import HCMM
from clkit.consolidation.hcmm import projections
from clkit.tangent import Linearized
from clkit.training import Training, label
from clkit.weights import equal, get_weights, set_weights

WIDTH, DIM, PATCH = 16, 12, 8
CLASSES = ("red_fox", "owl", "great_white", "newt")
TEMPLATES = ("a photo of a {}.", "the {}", "{} or {}")
ADAM = Training(epochs=3, batch=8, lr=3e-3, optimizer="adamw", labels="task")


def pictures(shape=(3, 16, 16), classes=CLASSES) -> data.Stream:
    """Two classes a task, each a noisy picture of its own."""
    g = torch.Generator().manual_seed(0)
    plates = torch.randint(0, 200, (len(classes), *shape), generator=g)

    def examples(t: int, count: int) -> data.Examples:
        y = 2 * t + torch.arange(count) % 2
        return data.Examples((plates[y] + torch.randint(0, 55, (count, *shape), generator=g)).to(torch.uint8), y)

    norm = data.Normalize((0.45,), (0.27,))
    parts = [data.Task(t, f"task {t}", (2 * t, 2 * t + 1), examples(t, 24), examples(t, 10), norm) for t in (0, 1)]
    return data.Stream("pictures", tuple(parts), tuple(classes))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Tower(nn.Module):
    """The shape of open_clip's image transformer: a class token, attention, and a matrix from the right."""

    def __init__(self, size, quick):
        super().__init__()
        self.image_size, self.grid = size, (size[0] // PATCH, size[1] // PATCH)
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(1, WIDTH, 2, 2))
        self.norm, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        act = QuickGELU() if quick else nn.GELU()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), act, nn.Linear(2 * WIDTH, WIDTH))
        self.proj = nn.Parameter(WIDTH**-0.5 * torch.randn(WIDTH, DIM))

    def forward(self, x):
        x = self.conv1(x) + F.interpolate(self.positional_embedding, self.grid, mode="nearest")
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x.flatten(2).mT], 1)
        x = x + self.attn(*3 * [self.norm(x)], need_weights=False)[0]
        x = self.ln_post((x + self.mlp(x))[:, 0])
        return x if self.proj is None else x @ self.proj


class Both(nn.Module):
    """An image tower and a reader of bytes."""

    def __init__(self, size, quick):
        super().__init__()
        self.visual, self.token_embedding = Tower(size, quick), nn.Embedding(256, DIM)
        self.dropout, self.logit_scale = nn.Dropout(0.5), nn.Parameter(torch.tensor(2.66))

    def encode_image(self, x):
        return self.visual(x)

    def encode_text(self, tokens):
        places = torch.arange(1.0, 1 + tokens.shape[1])[:, None].sin()
        return self.dropout(self.token_embedding(tokens) * places).mean(1)


def fake(tag_file) -> ModuleType:
    """What `models.clip` uses of open_clip, for one small model."""
    module = ModuleType("open_clip")
    configs = {"tiny": {}, "tiny-quickgelu": {}, "rn": {"layers": [1, 1]}, "timm": {"timm_model_name": "convnext"}}

    def create_model(
        name, pretrained=None, precision="fp32", force_quick_gelu=False, force_image_size=None, weights_only=False
    ) -> nn.Module:
        quick = force_quick_gelu or name.endswith("quickgelu")
        model = Both(force_image_size or (16, 16), quick)
        if pretrained:
            path = str(tag_file() if pretrained == "mine" else pretrained)
            model.load_state_dict(
                load_file(path) if path.endswith("safetensors") else torch.load(path, weights_only=weights_only)
            )
        return model

    def tokenizer(texts):
        return torch.stack([F.pad(torch.tensor(list(t.encode())), (0, 64 - len(t))) for t in texts])

    functions = {
        "create_model": create_model,
        "get_tokenizer": lambda name: tokenizer,
        "list_models": lambda: list(configs),
        "get_model_config": lambda name: {"vision_cfg": {"patch_size": PATCH, **configs[name]}},
        "get_pretrained_cfg": lambda name, tag: {"quick_gelu": True} if tag == "mine" else {},
        "list_pretrained_tags_by_model": lambda name: ["mine"],
    }
    module.__dict__.update(functions)
    return module


def real(folder, tag_file, patch: pytest.MonkeyPatch) -> ModuleType:
    """open_clip itself, with a small model that has a tag of its own."""
    module = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "layers": 2, "width": WIDTH, "head_width": 8, "patch_size": PATCH}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    tiny = {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text}
    resnet = {**tiny, "vision_cfg": {**vision, "layers": [1, 1, 1, 1]}}
    timm = {**tiny, "vision_cfg": {"timm_model_name": "convnext_atto", "image_size": 32}}
    for name, config in {
        "tiny": tiny,
        "tiny-quickgelu": {**tiny, "quick_gelu": True},
        "rn": resnet,
        "timm": timm,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    module.add_model_config(folder)
    known = importlib.import_module("open_clip.pretrained")._PRETRAINED
    patch.setitem(known, "tiny", {"mine": {"quick_gelu": True}})
    patch.setattr(importlib.import_module("open_clip.factory"), "download_pretrained", lambda *_, **__: str(tag_file()))
    return module


class Package:
    """A package, a file of weights for its model "tiny", and that model whole."""

    def __init__(self, kind, folder, patch):
        self.file = folder / "weights.safetensors"
        self.module = fake(lambda: self.file) if kind == "fake" else real(folder, lambda: self.file, patch)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            state = self.module.create_model("tiny").state_dict()
        save_file({n: t.contiguous() for n, t in state.items()}, self.file)

    def whole(self, name="tiny", size=(16, 16)) -> nn.Module:
        return self.module.create_model(name, pretrained=str(self.file), force_image_size=size).eval()

    def clip(self, stream=None, name="tiny", **more) -> nn.Module:
        return models.clip(pictures() if stream is None else stream, name, **{"weights": self.file} | more)


@pytest.fixture(scope="module", params=["fake", "open_clip"])
def package(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        made = Package(request.param, tmp_path_factory.mktemp("clip"), patch)
        patch.setitem(sys.modules, "open_clip", made.module)
        yield made


def inputs(stream, count=6):
    return stream[0].prepare(stream[0].train.x[:count])


def by_hand(package, words, templates):
    """The class directions (C, F), prompt by prompt."""
    model, tokenizer, rows = package.whole(), package.module.get_tokenizer("tiny"), []
    with torch.no_grad():
        for word in words:
            prompts = [model.encode_text(tokenizer([t.replace("{}", word)]))[0] for t in templates]
            mean = sum(p / p.norm() for p in prompts) / len(prompts)
            rows.append(mean / mean.norm())
    return torch.stack(rows)


class TestModel:
    @pytest.mark.parametrize("shape", [(3, 16, 16), (1, 16, 16), (3, 24, 16), (1, 9, 35)])
    def test_features_are_the_towers(self, package, shape):
        stream = pictures(shape)
        net, x = package.clip(stream), inputs(stream)
        with torch.no_grad():
            wanted = package.whole(size=shape[1:]).encode_image(x.expand(-1, 3, -1, -1))
            torch.testing.assert_close(net.eval().encoder(x), wanted, rtol=1e-4, atol=1e-5)
            assert wanted.std(0).min() > 1e-3, "all images look alike"
        for read in (models.features, representation.features):
            torch.testing.assert_close(read(net, x), wanted, rtol=1e-4, atol=1e-5)
        assert tuple(net.encoder.tower.image_size) == shape[1:]

    @pytest.mark.parametrize("templates", [("a photo of a {}.",), TEMPLATES])
    def test_logits_are_the_zero_shot_classifiers(self, package, templates):
        net, whole, x = package.clip(templates=templates), package.whole(), inputs(pictures())
        rows = by_hand(package, ["red fox", "owl", "great white", "newt"], templates)
        torch.testing.assert_close(net.head.weight, rows, rtol=1e-4, atol=1e-6)
        assert (rows @ rows.T).fill_diagonal_(0).max() < 0.9999, "all classes look alike"
        with torch.no_grad():
            image = whole.encode_image(x)
            logits = whole.logit_scale.exp() * (image / image.norm(dim=1, keepdim=True)) @ rows.T
            torch.testing.assert_close(net.eval()(x), logits, rtol=1e-4, atol=1e-4)

    def test_default_prompts_and_other_words(self, package):
        rows = by_hand(package, ["red fox", "owl", "great white", "newt"], ["a photo of a {}."])
        torch.testing.assert_close(package.clip().head.weight, rows, rtol=1e-4, atol=1e-6)
        words = ["{brace}", "b_c", "d", "e"]
        rows = by_hand(package, words, ["a photo of a {}."])
        torch.testing.assert_close(package.clip(classes=words).head.weight, rows, rtol=1e-4, atol=1e-6)

    def test_many_prompts_go_in_parts(self, package):
        stream = pictures(classes=[f"thing_{i}" for i in range(130)])
        rows = by_hand(package, [f"thing {i}" for i in (0, 63, 64, 129)], TEMPLATES[:2])
        net = package.clip(stream, templates=TEMPLATES[:2])
        torch.testing.assert_close(net.head.weight[[0, 63, 64, 129]], rows, rtol=1e-4, atol=1e-6)

    def test_what_it_is_made_of(self, package):
        state = torch.get_rng_state()
        first, second = package.clip(seed=0), package.clip(seed=1)
        assert torch.equal(state, torch.get_rng_state()) and equal(get_weights(first), get_weights(second))
        weights = get_weights(first)
        matrix = first.encoder.projection
        assert type(matrix) is nn.Linear and matrix.bias is None and matrix.weight.shape == (DIM, WIDTH)
        visual = {n: p for n, p in package.whole().visual.named_parameters()}
        assert torch.equal(matrix.weight, visual.pop("proj").T) and matrix.weight.is_contiguous()
        own = {f"encoder.tower.{n}" for n in visual} | {"encoder.projection.weight", "head.weight"}
        assert weights.keys() == own and all(t.dtype == torch.float32 for t in weights.values())
        assert isinstance(first.head, models.CosineHead) and not first.head.weight.requires_grad
        assert all(p.requires_grad for p in first.encoder.parameters())
        assert first.head.scale == pytest.approx(float(package.whole().logit_scale.detach().exp()))

    def test_a_tag_brings_its_activation_along(self, package):
        x = inputs(pictures())
        tagged, named, plain = (
            models.features(net, x)
            for net in (package.clip(weights="mine"), package.clip(name="tiny-quickgelu"), package.clip())
        )
        assert torch.equal(tagged, named) and not torch.allclose(tagged, plain, rtol=1e-4)

    def test_a_file_counts_before_a_tag(self, package, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        known = importlib.import_module("open_clip").get_pretrained_cfg
        monkeypatch.setattr(package.module, "get_pretrained_cfg", lambda name, tag: known(name, "mine"))
        save_file({n: 2 * t for n, t in load_file(package.file).items()}, tmp_path / "mine.safetensors")
        nets = (package.clip(), package.clip(weights="mine.safetensors"))
        once, twice = (net.encoder.projection.weight for net in nets)
        assert torch.equal(twice, 2 * once)


def linearised(stream, *, seed=0, package):
    net = package.clip(stream, seed=seed)
    return nn.Sequential(OrderedDict(encoder=Linearized(net.encoder), head=net.head))


class TestLearning:
    def test_the_linearised_encoder_is_the_first_order_expansion(self, package):
        stream = pictures()
        net, x = package.clip(stream).double().eval(), inputs(stream).double()
        lin = Linearized(net.encoder)
        with torch.no_grad():
            torch.testing.assert_close(lin(x), net.encoder(x))
            start = get_weights(net.encoder)
            g = torch.Generator().manual_seed(1)
            move = {n: torch.randn(t.shape, generator=g, dtype=t.dtype) for n, t in start.items()}
            ends = []
            for step in (1e-4, -1e-4):
                set_weights(net.encoder, {n: t + step * move[n] for n, t in start.items()})
                ends.append(net.encoder(x))
            set_weights(lin, {n: t + 1e-2 * move[n] for n, t in start.items()})
            push = lin(x) - lin.network(x)
        torch.testing.assert_close(push, (ends[0] - ends[1]) / 2e-4 * 1e-2, rtol=1e-4, atol=1e-6)
        assert push.abs().max() > 1e-2

    @pytest.mark.parametrize("factory", ["plain", "linearised"])
    def test_hcmm_trains_merges_and_corrects_it(self, package, factory):
        factory = partial(package.clip if factory == "plain" else partial(linearised, package=package))
        stream = pictures()
        net = factory(stream)
        assert projections(net, inputs(stream))[1] == "encoder.projection.weight"
        start = get_weights(net)
        result = toys.quick(stream, None, HCMM(correction="ridge"), model=factory, training=ADAM)
        again = toys.quick(stream, None, HCMM(correction="ridge"), model=factory, training=ADAM)
        assert all(map(equal, result.weights, again.weights))
        for weights in result.weights:
            assert torch.equal(weights["head.weight"], start["head.weight"])
            assert not equal(weights, start)
        before, after = result.reports[1]["mismatch"]
        assert 0 < after < before
        assert all(losses[-3:].mean() < losses[:3].mean() for losses in result.training_loss)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"stream": toys.stream()}, r"inputs \(6,\) are no images"),
            ({"stream": pictures((2, 16, 16))}, "2 channels, this network takes 1 or 3"),
            ({"stream": pictures((3, 16, 7))}, "16 x 7 are too small; enlarge them to 8 x 8"),
            ({"name": "tinny"}, "name: 'tinny' is unknown; .* did you mean 'tiny'"),
            ({"name": "rn"}, "image tower of rn is no transformer"),
            ({"name": "timm"}, "image tower of timm is no transformer"),
            ({"weights": "theirs"}, "weights: 'theirs' is unknown; choose one of mine or a file"),
            ({"weights": "/no/such.pt"}, "'/no/such.pt' is unknown; .* or a file"),
            ({"templates": "a {}"}, "templates: 'a {}'; give several, each a text"),
            ({"templates": ()}, r"templates: \(\)"),
            ({"templates": ("a {}", "photo")}, "templates: .*'photo'"),
            ({"classes": ["a", "b"]}, r"classes: \('a', 'b'\) for 4 classes"),
            ({"classes": "abcd"}, "classes: 'abcd'; give several, each a text"),
        ],
    )
    def test_bad_input_names_itself_and_the_remedy(self, package, change, message, monkeypatch):
        def never(*_, **__):
            raise AssertionError("work started")

        monkeypatch.setattr(package.module, "create_model", never)
        with pytest.raises(ValueError, match=message):
            package.clip(**change)

    def test_weights_that_do_not_fit(self, package, tmp_path):
        state = load_file(package.file)
        save_file({n: t for n, t in state.items() if n != "visual.proj"}, tmp_path / "less.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
        for name in ("less.safetensors", "broken.safetensors"):
            with pytest.raises(ValueError, match=r"not loaded into tiny .*; give a safetensors file") as caught:
                package.clip(weights=tmp_path / name)
            assert len(str(caught.value)) < 700

    def test_pickles_are_refused_and_what_a_tag_downloads_runs_nothing(self, package, tmp_path, monkeypatch):
        class Canary:
            def __reduce__(self):
                return open, (str(tmp_path / "run"), "w")

        for name in ("w.pt", "w.bin", "w.pth", "w"):
            torch.save({"visual.proj": Canary()}, tmp_path / name)
            with pytest.raises(ValueError, match=r"weights: .* is no .safetensors file; save it as one, pickles could"):
                package.clip(weights=tmp_path / name)
        shutil.copy(tmp_path / "w.pt", tmp_path / "w.safetensors")  # a pickle by another name
        monkeypatch.setattr(package, "file", tmp_path / "w.pt")
        for weights in (tmp_path / "w.safetensors", "mine"):
            with pytest.raises(ValueError, match="are not loaded into tiny"):
                package.clip(weights=weights)
        assert not (tmp_path / "run").exists()

    def test_without_the_package_the_remedy_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "open_clip", None)
        with pytest.raises(ImportError, match=r"pip install 'clkit\[clip\]'"):
            models.clip(pictures())


def test_it_is_on_record_under_the_name_that_users_import():
    assert label(models.clip) == "clkit.models.clip"
