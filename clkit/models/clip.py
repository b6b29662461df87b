"""CLIP: the image tower of an open_clip model, under a frozen head whose classes are known by their names."""

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.data import Stream
from clkit.models.common import image_shape, seeded, take_grey
from clkit.models.cosine import with_prototypes
from clkit.weights import evaluation_mode

TEMPLATES = ("a photo of a {}.",)
PROMPTS = 256  # that the text tower reads at once


def clip(
    stream: Stream,
    name: str = "ViT-B-16-quickgelu",
    weights: str | PathLike[str] = "openai",
    *,
    templates: Sequence[str] = TEMPLATES,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> nn.Module:
    """CLIP's image tower as `encoder`, in float32, and its zero-shot classifier as a frozen `head`: a `CosineHead`.

    HCMM's network (arXiv 2509.23592). The encoder is a `tower` and its last matrix, an `nn.Linear` named `projection`;
    the paper linearises it alone: `Sequential(OrderedDict(encoder=Linearized(net.encoder), head=net.head))`. A class's
    direction is the mean over `templates` of its prompts' embeddings, each of length 1, and of length 1 again (Radford
    et al. 2021, arXiv 2103.00020, section 3.1.4); the scale is exp of CLIP's own. The text tower is then dropped.

    - `name` is an architecture of open_clip with an image transformer; "-quickgelu" is the activation that OpenAI's
      weights need, which a tag brings along and a file does not.
    - `weights` is a file with the state dict of the model, or one of open_clip's tags, downloaded on first use.
    - `templates` have {} for the class. CLIP's 80: `[t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]`.
    - `classes` name the stream's classes in words, in its order; default: its own, with spaces for underscores.

    Nothing is drawn from `seed`. The image size is the stream's, and where the model was made for another (most for
    224: load images with `size=224`), its embeddings of positions are interpolated. Inputs are normalised by the
    stream, so give it the constants of the weights: `replace(dataset, normalize=data.Normalize(
    open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))`, for grey images one of each. For those the first
    convolution's kernels are summed over their three input channels. For `run`: `partial(models.clip, weights="file")`.

    Raises ImportError without open_clip, and ValueError for inputs that are no images or smaller than a patch, for
    names and weights that open_clip does not know or that do not fit, and for prompts that cannot be made.
    """
    prompts = _prompts(stream, templates, classes)
    channels, height, width = image_shape(stream)
    if channels not in (1, 3):
        raise ValueError(f"stream: images have {channels} channels, CLIP takes 1 or 3; use models.encoder")
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise ImportError(f"name={name!r} needs open_clip: pip install 'clkit[clip]'") from error
    image_shape(stream, smallest=_patch(open_clip, name))
    source = _source(open_clip, name, weights)
    with seeded(seed):
        try:
            model = open_clip.create_model(name, precision="fp32", force_image_size=(height, width), **source)
        except Exception as error:  # whatever the formats' readers raise
            raise ValueError(
                f"weights: {str(weights)!r} are not loaded into {name} ({shorten(str(error), 160)}); give a file of "
                "tensors (.safetensors, .bin, .pt) with that model's state dict, or connect for open_clip to download"
            ) from error
        tower: Any = model.visual
        projection = nn.Linear(*tower.proj.shape, bias=False)
    with torch.no_grad():
        projection.weight.copy_(tower.proj.T)
    tower.proj = None
    if channels == 1:
        take_grey(tower)
    directions = _directions(model, open_clip.get_tokenizer(name)(prompts), len(stream.classes))
    encoder = nn.Sequential(OrderedDict(tower=tower, projection=projection))
    return with_prototypes(encoder, directions, float(model.logit_scale.detach().exp()))


def _prompts(stream: Stream, templates: Sequence[str], classes: Sequence[str] | None) -> list[str]:
    """The prompts of all classes, class by class."""
    names = [label.replace("_", " ") for label in stream.classes] if classes is None else list(classes)
    if isinstance(classes, str) or len(names) != len(stream.classes):
        raise ValueError(f"classes: {classes!r} for {len(stream.classes)} classes; give each of the stream's its words")
    if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
        raise ValueError(f"templates: {templates!r}; give a list of prompts with {{}} for the class, like {TEMPLATES}")
    return [template.replace("{}", words) for words in names for template in templates]


def _patch(open_clip: Any, name: str) -> int:
    """The side of a patch of an architecture's image transformer; raises ValueError where there is none."""
    known = open_clip.list_models()
    if name not in known:
        close = get_close_matches(str(name), known, 4, cutoff=0.5)
        raise ValueError(f"name: open_clip has no model {name!r}; did you mean one of {close or known}?")
    tower = open_clip.get_model_config(name)["vision_cfg"]
    if tower.get("timm_model_name") or tower.get("output_tokens") or not isinstance(tower.get("layers", 12), int):
        raise ValueError(
            f"name: the image tower of {name} is no transformer of open_clip's own that ends in one projection; use "
            "one whose is, for example 'ViT-B-16-quickgelu'"
        )
    return tower.get("patch_size", 16)


def _source(open_clip: Any, name: str, weights: str | PathLike[str]) -> dict[str, Any]:
    """What open_clip is told about the weights: a file, or a tag with the activation that its weights need."""
    if Path(weights).is_file():
        return {"pretrained": str(Path(weights).resolve())}  # no tag, whatever the file is called
    if not (tag := open_clip.get_pretrained_cfg(name, str(weights))):
        offered = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"weights: {str(weights)!r} is neither a file nor a tag that open_clip has for {name}; give a file, or one "
            f"of {offered}"
        )
    return {"pretrained": str(weights), "force_quick_gelu": tag.get("quick_gelu", False)}


@torch.no_grad()
def _directions(model: Any, tokens: Tensor, classes: int) -> Tensor:
    """The direction (C, F) of every class, from the tokens (C * templates, L) of its prompts."""
    with evaluation_mode(model):
        found = torch.cat([F.normalize(model.encode_text(part), dim=-1) for part in tokens.split(PROMPTS)])
    return F.normalize(found.unflatten(0, (classes, -1)).mean(1), dim=-1)
