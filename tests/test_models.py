from functools import partial
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clkit import models
from clkit.data import Examples, Stream, Task
from clkit.training import label
from clkit.weights import get_weights, live_tensors

OWN = [
    models.mlp,
    partial(models.mlp, hidden=()),
    models.convnet,
    partial(models.resnet18, width=4),
    partial(models.vit, dim=16),
]


def stream(shape=(1, 8, 8), classes=10, dtype=torch.uint8):
    part = Examples(torch.zeros(classes, *shape, dtype=dtype), torch.arange(classes))
    return Stream("toy", (Task(0, "all", tuple(range(classes)), part, part),), tuple(map(str, range(classes))))


def tokens(length=12, classes=256):
    x = torch.randint(0, classes, (20, length), generator=torch.Generator().manual_seed(0))
    part = Examples(x, x)
    return Stream("tokens", (Task(0, "all", tuple(range(classes)), part, part),), tuple(map(str, range(classes))))


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("factory", OWN)
def test_factories_take_shape_and_classes_from_the_stream(factory):
    for shape, classes in (((1, 8, 8), 10), ((3, 16, 12), 3)):
        logits = factory(stream(shape, classes))(torch.rand(5, *shape))
        assert logits.shape == (5, classes) and logits.isfinite().all()


@pytest.mark.parametrize("factory", OWN)
def test_a_seed_gives_its_bits_and_leaves_the_global_state(factory):
    state = torch.get_rng_state()
    a, b, c = (get_weights(factory(stream(), seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("factory", OWN)
def test_no_tensor_has_two_names(factory):
    model = factory(stream())
    floating = [k for k, v in model.state_dict().items() if v.is_floating_point()]
    assert list(live_tensors(model)) == floating


@pytest.mark.parametrize("factory", OWN)
def test_features_are_what_the_last_linear_layer_sees(factory):
    model, x = factory(stream()).train(), torch.rand(7, 1, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = models.features(model, x, batch=3)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    assert not last._forward_pre_hooks
    torch.testing.assert_close(last(found), model.eval()(x))
    torch.testing.assert_close(found, models.features(model, x))


def test_features_follow_the_order_in_which_layers_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.body(x).relu())

    model, x = Backwards(), torch.rand(2, 4)
    torch.testing.assert_close(models.features(model, x), model.body(x).relu())


@pytest.mark.parametrize(("classes", "parameters"), [(10, 11_173_962), (100, 11_220_132)])
def test_resnet18_has_the_parameters_of_the_papers(classes, parameters):
    assert count(models.resnet18(stream((3, 32, 32), classes))) == parameters


def test_resnet18_halves_three_times():
    model = models.resnet18(stream((3, 32, 32)), width=2)
    shapes = []
    for stage in (model.stage1, model.stage2, model.stage3, model.stage4):
        stage.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape[1:])))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4)]


def test_factories_are_on_record_under_the_name_that_users_import():
    for name in (
        "mlp",
        "convnet",
        "resnet18",
        "vit",
        "gpt",
        "torchvision",
        "huggingface",
        "clip",
        "efficientnet_lite0",
    ):
        assert label(getattr(models, name)) == f"clkit.models.{name}"


@pytest.mark.parametrize("length", [12, 11, 1])
def test_a_gpt_takes_sequences_up_to_its_context(length):
    toy = tokens(classes=50)
    model = models.gpt(toy, 16, 1, 2)
    assert model(toy[0].train.x[:, :length]).shape == (20, length, 50)
    assert models.features(model, toy[0].train.x[:, :length]).shape == (20, length, 16)
    with pytest.raises(ValueError, match="13 tokens are more than the context of 12"):
        model(torch.zeros(1, 13, dtype=torch.int64))


def test_a_gpt_has_a_seeds_bits_and_the_parameters_of_its_layout():
    a, b, c = (get_weights(models.gpt(tokens(), seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["linear.weight"], c["linear.weight"])
    block = 4 * (64 * 64 + 64) + 64 * 256 + 256 + 256 * 64 + 64 + 4 * 64
    assert sum(t.numel() for t in a.values()) == 256 * 64 + 12 * 64 + 2 * block + 2 * 64 + 64 * 256 + 256


@pytest.mark.parametrize("j", [0, 1, 7, 11])
def test_a_gpt_does_not_see_what_comes(j):
    toy = tokens()
    model, x = models.gpt(toy, 16, 2, 2), toy[0].train.x.clone()
    before = model(x)
    x[:, j] = (x[:, j] + 1) % 256
    after = model(x)
    assert torch.equal(before[:, :j], after[:, :j])
    assert not torch.isclose(before[:, j:], after[:, j:]).all(-1).any()


def test_causal_attention_is_a_mask_of_minus_infinity():
    layer, x = models.Attention(8, 2, causal=True).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    query, key, value = (part(x).view(3, 5, 2, 4).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    scores = query @ key.mT / 2 + torch.full((5, 5), float("-inf")).triu(1)
    torch.testing.assert_close(layer(x), layer.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)))


def test_the_default_device_of_the_caller_does_not_move_a_model():
    toy = stream()
    with torch.device("meta"):
        model = models.convnet(toy)
    assert {t.device.type for t in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.convnet(stream((12,), dtype=torch.float32)), "use models.mlp"),
        (lambda: models.mlp(stream((12,), dtype=torch.int64)), "tokens"),
        (
            lambda: models.mlp(stream(), hidden=(10, 0)),
            r"hidden: \(10, 0\); give several, each a whole number",
        ),
        (lambda: models.convnet(stream(), widths=(-3,)), r"widths: \(-3,\); give"),
        (lambda: models.resnet18(stream((1, 7, 9))), "7 x 9 are too small"),
        (lambda: models.resnet18(stream(), width=0.5), "width: 0.5; give a whole number"),
        (lambda: models.vit(stream(), patch=3), "patch: 3 does not divide"),
        (lambda: models.vit(stream(), heads=5), "heads: 5 does not divide"),
        (lambda: models.gpt(stream()), "no integer tokens .* or models.vit for images"),
        (lambda: models.gpt(stream((12,), dtype=torch.float32)), "no integer tokens"),
        (lambda: models.gpt(tokens(), width=10), "heads: 4 does not divide width = 10"),
        (lambda: models.gpt(tokens(), depth=0), "depth: 0; give a whole number, at least 1"),
        (lambda: models.features(nn.ReLU(), torch.zeros(2, 3)), "no nn.Linear"),
        (lambda: models.features(nn.Linear(3, 2), torch.zeros(0, 3)), "no rows"),
        (lambda: models.torchvision(stream((3, 64, 64)), "resnet81"), "name: 'resnet81' is unknown; .*'resnet18'"),
        (lambda: models.torchvision(stream((2, 64, 64)), "resnet18"), "2 channels"),
        (lambda: models.torchvision(stream((3, 8, 8)), "alexnet"), "resize the images"),
        (lambda: models.torchvision(stream((3, 60, 60)), "vit_b_16"), "resize the images"),
        (lambda: models.torchvision(stream((3, 32, 32)), "resnet18", "imagenet1k"), "IMAGENET1K_V1"),
        (
            lambda: models.torchvision(stream((3, 32, 32)), "resnet18", "none.safetensors"),
            "'none.safetensors' is unknown; .*safetensors file",
        ),
    ],
)
def test_bad_input_names_itself_and_the_remedy(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "shufflenet_v2_x0_5", "squeezenet1_1", "vit_b_32"])
def test_torchvision_models_learn_any_stream(name):
    state = torch.get_rng_state()
    model = models.torchvision(stream((3, 64, 64), 7), name, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    model.eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_options_go_to_torchvisions_constructor():
    narrow = models.torchvision(stream((1, 32, 32), 7), "mobilenet_v2", width_mult=0.35, dropout=0.5, seed=1)
    from torchvision.models import mobilenet_v2

    reference = {k: v.shape for k, v in mobilenet_v2(num_classes=7, width_mult=0.35).state_dict().items()}
    shapes = {k: v.shape for k, v in narrow.state_dict().items()}
    assert shapes == reference | {"features.0.0.weight": torch.Size([16, 1, 3, 3])}
    assert [m.p for m in narrow.modules() if isinstance(m, nn.Dropout)] == [0.5]


def test_options_that_torchvision_does_not_take_are_named_with_those_it_takes():
    toy, state = stream((3, 32, 32)), torch.get_rng_state()
    with pytest.raises(TypeError, match=r"options: .*'widht_mult': 0.5.*takes \['width_mult', .*'dropout'\]"):
        models.torchvision(toy, "mobilenet_v2", widht_mult=0.5)
    with pytest.raises(TypeError, match=r"options: .*width_mult': 'wide'"):
        models.torchvision(toy, "mobilenet_v2", width_mult="wide")
    with pytest.raises(TypeError, match=r"multiple values for .*'num_classes'.*takes .*'width_per_group'"):
        models.torchvision(toy, "resnet18", num_classes=3)
    with pytest.raises(ValueError, match=r"mobilenet_v2 with \{'width_mult': -1.*\} cannot take"):
        models.torchvision(toy, "mobilenet_v2", width_mult=-1, round_nearest=-8)
    assert torch.equal(torch.get_rng_state(), state)


def test_grey_images_are_seen_as_if_repeated_in_three_channels():
    x = torch.rand(2, 1, 32, 32)
    grey, color = (models.torchvision(stream((c, 32, 32), 5), "mobilenet_v3_small", seed=2).eval() for c in (1, 3))
    with torch.no_grad():
        torch.testing.assert_close(grey(x), color(x.expand(-1, 3, -1, -1)))


def test_a_file_gives_all_but_a_head_of_other_size(tmp_path):
    source = models.torchvision(stream((3, 32, 32), 9), "resnet18", seed=5)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    same = models.torchvision(stream((3, 32, 32), 9), "resnet18", tmp_path / "w.safetensors", seed=6)
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in source.state_dict().items())
    other = models.torchvision(stream((1, 32, 32), 4), "resnet18", str(tmp_path / "w.safetensors"), seed=6)
    fresh = models.torchvision(stream((1, 32, 32), 4), "resnet18", seed=6)
    assert torch.equal(other.conv1.weight, source.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(other.fc.weight, fresh.fc.weight)
    assert torch.equal(other.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    with pytest.raises(ValueError, match="do not fit mobilenet_v2"):
        models.torchvision(stream((3, 32, 32), 9), "mobilenet_v2", tmp_path / "w.safetensors")


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("invalid hash value")])
def test_weights_that_cannot_be_downloaded_say_where_they_should_lie(error, monkeypatch):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fails)
    with pytest.raises(
        ValueError, match=r"weights: resnet18's 'DEFAULT' cannot be downloaded .* put https://.*pth at /"
    ):
        models.torchvision(stream((3, 32, 32)), "resnet18", "DEFAULT")
