"""Every classification model of torchvision: a random element of the derived symmetry keeps the function.

The fast test takes a small member of each family. The slow one takes all 80, at small images where the model allows
it, and writes symmetry_coverage.csv beside this file.
"""

import gc
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as zoo
from torch import nn

from proofs import measure, randomise, write

pytestmark = pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
TABLE = Path(__file__).with_name("symmetry_coverage.csv")
WHOLE = {"resnet", "vgg", "mobilenet", "efficientnet", "mnasnet", "convnext"}
SWIN = {"patch_size": [2, 2], "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": [3, 3]}


def small_swin(block: str) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    merging = swin.PatchMergingV2 if block.endswith("V2") else swin.PatchMerging
    return swin.SwinTransformer(
        **SWIN, stochastic_depth_prob=0.0, num_classes=10, block=getattr(swin, block), downsample_layer=merging
    )


def small_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(12, 24, 1), CNBlockConfig(24, None, 2)], num_classes=10)


def small_vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    net = VGG(make_layers([8, "M", 12, "M", 16], batch_norm=True), num_classes=10)
    net.classifier = nn.Sequential(nn.Linear(16 * 49, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 10))
    return net


SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "convnext": (small_convnext, 32),
    "densenet": (partial(zoo.DenseNet, 6, (2, 3, 2), 12, num_classes=10), 32),
    "efficientnet": (zoo.efficientnet_b0, 32),
    "googlenet": (partial(zoo.googlenet, aux_logits=False, init_weights=False), 32),
    "maxvit": (
        partial(
            zoo.MaxVit, (32, 32), 12, 4, [12, 24], [1, 1], 6, 0.0, squeeze_ratio=0.5, expansion_ratio=2, num_classes=10
        ),
        32,
    ),
    "mnasnet": (partial(zoo.mnasnet0_5, dropout=0.0), 32),
    "mobilenet_v2": (partial(zoo.mobilenet_v2, width_mult=0.35), 32),
    "mobilenet_v3": (zoo.mobilenet_v3_small, 32),
    "regnet": (zoo.regnet_y_400mf, 32),
    "resnet": (zoo.resnet18, 32),
    "resnext": (partial(zoo.ResNet, zoo.resnet.Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4), 32),
    "shufflenet": (zoo.shufflenet_v2_x0_5, 32),
    "squeezenet": (zoo.squeezenet1_1, 32),
    "swin": (partial(small_swin, "SwinTransformerBlock"), 20),
    "swin_v2": (partial(small_swin, "SwinTransformerBlockV2"), 20),
    "vgg": (small_vgg, 32),
    "vit": (partial(zoo.VisionTransformer, 16, 4, 2, 4, 24, 48, num_classes=10), 16),
}


def family(name: str) -> str:
    first = re.sub(r"(_|\d).*", "", name.removeprefix("wide_"))
    return {"resnext": "resnet", "inception": "inception"}.get(first, first)


def row(name: str, model: nn.Module, size: int) -> dict[str, Any]:
    # EfficientNet V2's depth makes larger gains chaotic: rounding alone would then change the output
    randomise(model, gain=1.0 if name.startswith("efficientnet") else 1.5)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return {"family": family(name), "model": name, "image": size, **measure(model, x, "float32", "float64")}


def check(row: dict[str, Any]) -> None:
    assert row["change_float32"] < 1e-4
    assert row["change_float64"] < 1e-10
    assert row["share_moved"] >= (0.99999 if row["family"] in WHOLE else 0.9)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_model_of_each_family(name):
    build, size = SMALL[name]
    check(row(name, build(), size))


def image_size(name: str) -> int:
    """The smallest the model takes, in multiples of 32 (inception_v3: with its auxiliary head)."""
    if name.startswith(("inception", "maxvit")):
        return 299 if name.startswith("inception") else 224
    return {"vit_h_14": 56}.get(name, 32 if name.startswith("vgg") else 64)


def full(name: str) -> nn.Module:
    options: dict = {"num_classes": 20}
    if name.startswith("vit_"):
        options["image_size"] = image_size(name)
    elif name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return zoo.get_model(name, **options)


@pytest.mark.slow
def test_all_models():
    rows = []
    for name in zoo.list_models(module=zoo):
        rows.append(row(name, full(name), image_size(name)))
        gc.collect()
    write(TABLE, rows)
    for measured in rows:
        check(measured)
