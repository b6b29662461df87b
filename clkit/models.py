"""Networks to learn a stream with: factories f(stream, *, seed=0, ...) that take input shape and classes from it.

The same seed gives the same bits on every call, and the global random state is left alone. Networks are float32 on
the CPU, hold every tensor under one name, and end in one `nn.Linear` (torchvision's SqueezeNet in a convolution),
whose inputs are the features of a representation plot. For a factory with fixed options use `functools.partial`:
`partial(models.resnet18, width=16)`.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.data import Stream


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws initial weights on the CPU from `seed`; the random states of all devices stay as they were."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _image_shape(stream: Stream, smallest: int = 1) -> tuple[int, int, int]:
    if len(stream.shape) != 3:
        raise ValueError(
            f"stream: its inputs have shape {stream.shape}, this network takes images (C, H, W); "
            "use models.mlp for vectors"
        )
    channels, height, width = stream.shape
    if min(height, width) < smallest:
        raise ValueError(
            f"stream: images of {height} x {width} are too small for this network; enlarge them to "
            f"{smallest} x {smallest} or use models.convnet"
        )
    return channels, height, width


def _positive(name: str, *values: int) -> None:
    for value in values:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} is not a whole number from 1 on")


def mlp(stream: Stream, hidden: Sequence[int] = (100, 100), *, seed: int = 0) -> nn.Module:
    """A multi-layer perceptron with ReLU on flattened inputs: linear1, relu1, ..., linear.

    No hidden layers, `hidden=()`, make it softmax regression. Token streams are rejected: they need an embedding.
    """
    _positive("hidden", *hidden)
    if stream[0].train.x.dtype == torch.int64:
        raise ValueError(f"stream: {stream.name!r} holds integer tokens, which a perceptron cannot read; use images")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    before = int(torch.Size(stream.shape).numel())
    with _seeded(seed):
        for i, after in enumerate(hidden, 1):
            layers[f"linear{i}"] = nn.Linear(before, after)
            layers[f"relu{i}"] = nn.ReLU()
            before = after
        layers["linear"] = nn.Linear(before, len(stream.classes))
    return nn.Sequential(layers)


def convnet(stream: Stream, widths: Sequence[int] = (32, 64, 64), *, seed: int = 0) -> nn.Module:
    """A small convolutional network: 3x3 convolutions with BatchNorm and ReLU, global average pooling, linear.

    Every second convolution has stride 2. Takes images of any size.
    """
    _positive("widths", *widths)
    before = _image_shape(stream)[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with _seeded(seed):
        for i, after in enumerate(widths, 1):
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, stride=1 + (i % 2 == 0), padding=1, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(after)
            layers[f"relu{i}"] = nn.ReLU()
            before = after
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(before, len(stream.classes))
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(after)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, after, H / stride, W / stride)."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet18(stream: Stream, width: int = 64, *, seed: int = 0) -> nn.Module:
    """ResNet-18 with the stem for small images: 3x3 at stride 1, no max pooling; stages of width, 2, 4, 8 times width.

    Width 64 and 100 classes make 11,220,132 parameters, as in CLeWI (arXiv 2404.04002). Images of 8 x 8 pixels or more.
    """
    _positive("width", width)
    channels = _image_shape(stream, smallest=8)[0]
    with _seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(channels, width, 3, padding=1, bias=False), norm=nn.BatchNorm2d(width), relu=nn.ReLU()
        )
        before = width
        for stage in range(4):
            after, stride = width * 2**stage, 1 if stage == 0 else 2
            layers[f"stage{stage + 1}"] = nn.Sequential(BasicBlock(before, after, stride), BasicBlock(after, after, 1))
            before = after
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(before, len(stream.classes))
    return nn.Sequential(layers)


class Attention(nn.Module):
    """Multi-head self-attention; query, key, value and output are a linear layer each."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, dim) to the same."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block that normalises before attention and before its perceptron of 4 times the width."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, dim) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class Embedding(nn.Module):
    """Cuts images into patches, embeds them linearly and adds a learned position to each."""

    def __init__(self, channels: int, tokens: int, patch: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, tokens, dim)."""
        return self.conv(x).flatten(2).transpose(1, 2) + self.position


class MeanTokens(nn.Module):
    """Averages over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, dim) to (N, dim)."""
        return x.mean(1)


def vit(stream: Stream, patch: int = 4, dim: int = 64, depth: int = 2, heads: int = 4, *, seed: int = 0) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al. 2021): patches, pre-norm blocks, mean over tokens, linear.

    It has LayerNorm only and no class token. `patch` divides both sides of the images, `heads` divides `dim`.
    """
    _positive("patch, dim, depth, heads", patch, dim, depth, heads)
    channels, height, width = _image_shape(stream)
    if height % patch or width % patch:
        raise ValueError(f"patch: {patch} does not divide images of {height} x {width}; choose a common divisor")
    if dim % heads:
        raise ValueError(f"heads: {heads} does not divide dim = {dim}; choose a divisor")
    tokens = (height // patch) * (width // patch)
    with _seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict(embedding=Embedding(channels, tokens, patch, dim))
        for i in range(1, depth + 1):
            layers[f"block{i}"] = Block(dim, heads)
        layers["norm"] = nn.LayerNorm(dim)
        layers["mean"] = MeanTokens()
        layers["linear"] = nn.Linear(dim, len(stream.classes))
    return nn.Sequential(layers)


def torchvision(stream: Stream, name: str, weights: Path | str | None = None, *, seed: int = 0) -> nn.Module:
    """Any classification model of torchvision.models by name, its head resized to the stream's classes.

    `weights` is None (fresh), the name of a set that torchvision offers ("DEFAULT", "IMAGENET1K_V1"; downloaded on
    first use) or a safetensors file with the state dict of the model. A head for another number of classes is left
    fresh; every other tensor must match. Grey images: the first convolution's kernels are summed over their three
    input channels, which is the function of the grey image repeated in three. Auxiliary heads (GoogLeNet, Inception)
    are left out, and no input transform but the stream's own normalisation is applied. ViT and MaxViT are built for
    the stream's image size.
    """
    import torchvision.models as zoo

    names = zoo.list_models(module=zoo)
    if name not in names:
        close = get_close_matches(str(name).lower(), names, n=4, cutoff=0.5)
        raise ValueError(f"name: torchvision has no classification model {name!r}; did you mean {close or names}?")
    channels, height, width = _image_shape(stream)
    if channels not in (1, 3):
        raise ValueError(
            f"stream: images have {channels} channels, torchvision's models take 1 or 3; use models.convnet"
        )
    options: dict[str, object] = {"num_classes": len(stream.classes)}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options["image_size"] = height
    elif name.startswith("maxvit"):
        options["input_size"] = (height, width)
    try:
        with _seeded(seed):
            model = zoo.get_model(name, **options)
        _check_takes(model, (3, height, width))
    except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"stream: {name} cannot take {stream.shape} inputs ({error}); resize the images") from error
    if weights is not None:
        _load_all_but_head(model, _pretrained(name, weights), len(stream.classes), name)
    if channels == 1:
        _take_grey(model)
    return model


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


@torch.no_grad()
def _take_grey(model: nn.Module) -> None:
    """Sums the first convolution over its input channels, in place."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.weight = nn.Parameter(first.weight.sum(1, keepdim=True))
    first.in_channels = 1


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


def features(model: nn.Module, x: Tensor, *, batch: int = 512) -> Tensor:
    """The inputs of the last linear layer that `model` runs, in evaluation mode: what it represents `x` by.

    `x` (N, ...) is prepared input on the model's device; the features are (N, F), or (N, L, F) for tokens. The
    model's modes are restored. Raises ValueError for a model without a linear layer and for empty `x`.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError(f"model: {type(model).__name__} has no nn.Linear, whose inputs would be its features")
    if not len(x):
        raise ValueError("x: there are no rows; pass at least one")
    _positive("batch", batch)
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.__setitem__(slice(None), args)) for m in linears]
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    parts = []
    try:
        with torch.no_grad():
            for rows in x.split(batch):
                model(rows)
                parts.append(seen[0])
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return torch.cat(parts)
