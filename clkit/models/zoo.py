"""torchvision's classification models by name."""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clkit.data import Stream
from clkit.models.common import image_shape, seeded, take_grey


def torchvision(
    stream: Stream, name: str, weights: Path | str | None = None, *, seed: int = 0, **options: Any
) -> nn.Module:
    """Any classification model of torchvision.models by name, its head resized to the stream's classes.

    `weights` is None (fresh), the name of a set that torchvision offers ("DEFAULT", "IMAGENET1K_V1"; downloaded on
    first use) or a safetensors file with the state dict of the model. A head for another number of classes is left
    fresh; every other tensor must match. Grey images: the first convolution's kernels are summed over their three
    input channels, which is the function of the grey image repeated in three. Auxiliary heads (GoogLeNet, Inception)
    are left out, and no input transform but the stream's own normalisation is applied. ViT and MaxViT are built for
    the stream's image size. `options` go to torchvision's constructor, as in
    `torchvision(stream, "mobilenet_v2", width_mult=0.35)`; for others a TypeError names those that it takes.
    """
    import torchvision.models as zoo

    names = zoo.list_models(module=zoo)
    if name not in names:
        close = get_close_matches(str(name).lower(), names, n=4, cutoff=0.5)
        raise ValueError(f"name: torchvision has no classification model {name!r}; did you mean {close or names}?")
    channels, height, width = image_shape(stream)
    if channels not in (1, 3):
        raise ValueError(
            f"stream: images have {channels} channels, torchvision's models take 1 or 3; use models.convnet"
        )
    own: dict[str, Any] = {"num_classes": len(stream.classes)}
    if name in ("googlenet", "inception_v3"):
        own |= {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        own["image_size"] = height
    elif name.startswith("maxvit"):
        own["input_size"] = (height, width)
    if decided := sorted(own.keys() & options.keys()):
        raise TypeError(f"options: {decided} are set here; leave them out, {name} takes {_options(name, own)}")
    try:
        with seeded(seed):
            model = zoo.get_model(name, **own, **options)
        _check_takes(model, (3, height, width))
    except TypeError as error:
        known = _options(name, own)
        raise TypeError(f"options: {options} do not make a {name} ({error}); torchvision takes {known}") from error
    except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
        made = f"{name} with {options}" if options else name
        raise ValueError(f"stream: {made} cannot take {stream.shape} inputs ({error}); resize the images") from error
    if weights is not None:
        _load_all_but_head(model, _pretrained(name, weights), len(stream.classes), name)
    if channels == 1:
        take_grey(model)
    return model


def _options(name: str, own: Mapping[str, Any]) -> list[str]:
    """The names of the options that torchvision's constructor of a model takes, apart from our `own`."""
    import torchvision.models as zoo

    with seeded(0):
        parameters = inspect.signature(type(zoo.get_model(name, **own))).parameters.values()
    return [p.name for p in parameters if p.default is not p.empty and p.name not in own]


def _pretrained(name: str, weights: Path | str) -> dict[str, Tensor]:
    import torchvision.models as zoo
    from safetensors.torch import load_file

    if Path(weights).is_file():
        return load_file(weights)
    offered = zoo.get_model_weights(name).__members__
    if str(weights) not in offered:
        close = get_close_matches(str(weights).upper(), offered, n=2)
        raise ValueError(
            f"weights: {str(weights)!r} is neither a file nor a set for {name}; "
            f"torchvision offers {close or ['DEFAULT', *offered]}"
        )
    return dict(offered[str(weights)].get_state_dict(progress=False, check_hash=True))


def _load_all_but_head(model: nn.Module, state: dict[str, Tensor], classes: int, name: str) -> None:
    """Loads `state`; tensors that differ from the model's in the number of classes alone stay fresh."""
    own = model.state_dict()
    state = {key: value for key, value in state.items() if not key.lower().startswith("aux")}
    head = {
        key
        for key, value in state.items()
        if key in own and value.shape != own[key].shape and own[key].shape == (classes, *value.shape[1:])
    }
    wrong = [k for k in sorted(own.keys() | state.keys()) if k not in head and not _fits(k, own, state)]
    if wrong or len({len(state[key]) for key in head}) > 1:
        raise ValueError(
            f"weights: {len(wrong) or len(head)} tensors do not fit {name} for this stream, first "
            f"{(wrong or sorted(head))[:3]}; give weights of the same architecture and image size"
        )
    model.load_state_dict(state | {key: own[key] for key in head})


def _fits(key: str, own: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    return key in own and key in state and own[key].shape == state[key].shape


def _check_takes(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Runs the model on shapes alone; raises what the model raises."""
    tensors = {k: v.to("meta") for k, v in [*model.named_parameters(), *model.named_buffers()]}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            torch.func.functional_call(model, tensors, torch.zeros(1, *shape, device="meta"))
    finally:
        model.train(training)
