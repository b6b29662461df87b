"""Small networks of our own: perceptrons, convolutional networks, transformers, and an encoder under a frozen head.

The encoder stands in for CLIP and its zero-shot text head (`models.clip`) and needs no download. What is learned later
are the encoder's weights alone, and every class has its output from the start.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit import checks
from clkit.checks import Count
from clkit.data import Stream
from clkit.modules import TURN, evaluation_mode


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws initial weights on the CPU from `seed`; the random states of all devices stay as they were."""
    with TURN, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def image_shape(stream: Stream, smallest: int = 1, channels: Collection[int] = ()) -> tuple[int, int, int]:
    """Channels, height and width of a stream's images.

    `channels` lists the numbers of channels that a network takes (default: any). Raises ValueError for inputs that
    are no images, for images with a side below `smallest`, and for other numbers of channels.
    """
    if len(stream.shape) != 3:
        raise ValueError(f"stream: inputs {stream.shape} are no images (C, H, W); use models.mlp for vectors")
    own, height, width = stream.shape
    if channels and own not in channels:
        takes = " or ".join(map(str, channels))
        raise ValueError(f"stream: images have {own} channels, this network takes {takes}; use models.convnet")
    if min(height, width) < smallest:
        size = f"{smallest} x {smallest}"
        raise ValueError(f"stream: images of {height} x {width} are too small; enlarge them to {size}")
    return own, height, width


def context_length(stream: Stream) -> int:
    """The number L of tokens in each of a stream's inputs (N, L); raises ValueError for other inputs."""
    dtype = stream[0].train.x.dtype
    if len(stream.shape) != 1 or dtype != torch.int64:
        remedy = "use data.texts with the model's tokenizer, or models.vit for images"
        raise ValueError(f"stream: inputs {stream.shape} of {dtype} are no integer tokens (L,); {remedy}")
    return stream.shape[0]


@torch.no_grad()
def take_grey(model: nn.Module) -> None:
    """Sums the first convolution over its input channels, in place: the function of a grey image repeated in three."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.weight = nn.Parameter(first.weight.sum(1, keepdim=True))
    first.in_channels = 1


SCALE = 20.0  # of the cosines that are a frozen head's logits


@checks.arguments
def mlp(stream: Stream, hidden: tuple[Count, ...] = (100, 100), *, seed: int = 0) -> nn.Module:
    """A multi-layer perceptron with ReLU on flattened inputs (N, ...): linear1, relu1, ..., linear.

    No hidden layers, `hidden=()`, make it softmax regression. Raises ValueError for streams of tokens, which need an
    embedding.
    """
    if stream[0].train.x.dtype == torch.int64:
        raise ValueError(f"stream: {stream.name!r} holds integer tokens, which a perceptron cannot read; use images")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    before = int(torch.Size(stream.shape).numel())
    with seeded(seed):
        for i, after in enumerate(hidden, 1):
            layers[f"linear{i}"] = nn.Linear(before, after)
            layers[f"relu{i}"] = nn.ReLU()
            before = after
        layers["linear"] = nn.Linear(before, len(stream.classes))
    return nn.Sequential(layers)


@checks.arguments
def convnet(stream: Stream, widths: tuple[Count, ...] = (32, 64, 64), *, seed: int = 0) -> nn.Module:
    """A small convolutional network: 3x3 convolutions with BatchNorm and ReLU, global average pooling, linear.

    Every second convolution has stride 2. Takes images of any size.
    """
    before = image_shape(stream)[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with seeded(seed):
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


@checks.arguments
def resnet18(stream: Stream, width: Count = 64, *, seed: int = 0) -> nn.Module:
    """ResNet-18 with the stem for small images: 3x3 at stride 1, no max pooling; stages of width, 2, 4, 8 times width.

    Width 64 and 100 classes make 11,220,132 parameters, as in CLeWI (arXiv 2404.04002). Images of 8 x 8 pixels or more.
    """
    channels = image_shape(stream, smallest=8)[0]
    with seeded(seed):
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
    """Multi-head self-attention; query, key, value and output are a linear layer each.

    With `causal`, no token sees those after it.
    """

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, dim) to the same."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block that normalises before attention and before its perceptron of 4 times the width."""

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, dim) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class PatchEmbedding(nn.Module):
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


@checks.arguments
def vit(
    stream: Stream, patch: Count = 4, dim: Count = 64, depth: Count = 2, heads: Count = 4, *, seed: int = 0
) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al. 2021): patches, pre-norm blocks, mean over tokens, linear.

    It has LayerNorm only and no class token. Raises ValueError unless `patch` divides both sides of the images, and
    `heads` divides `dim`.
    """
    channels, height, width = image_shape(stream)
    if height % patch or width % patch:
        raise ValueError(f"patch: {patch} does not divide images of {height} x {width}; choose a common divisor")
    _check_heads(heads, "dim", dim)
    tokens = (height // patch) * (width // patch)
    with seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict(embedding=PatchEmbedding(channels, tokens, patch, dim))
        for i in range(1, depth + 1):
            layers[f"block{i}"] = Block(dim, heads)
        layers["norm"] = nn.LayerNorm(dim)
        layers["mean"] = MeanTokens()
        layers["linear"] = nn.Linear(dim, len(stream.classes))
    return nn.Sequential(layers)


class TokenEmbedding(nn.Module):
    """Embeds tokens and adds a learned position to each; sequences are as long as `context` or shorter."""

    def __init__(self, tokens: int, context: int, dim: int):
        super().__init__()
        self.context = context
        self.token = nn.Embedding(tokens, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, context, dim))
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L) int64 to (N, L, dim); raises ValueError for longer sequences."""
        if x.shape[1] > self.context:
            raise ValueError(f"x: {x.shape[1]} tokens are more than the context of {self.context}; keep the last ones")
        return self.token(x) + self.position[:, : x.shape[1]]


@checks.arguments
def gpt(stream: Stream, width: Count = 64, depth: Count = 2, heads: Count = 4, *, seed: int = 0) -> nn.Module:
    """A small GPT, from tokens (N, L) to logits (N, L, C) of the next ones: embedding, causal blocks, norm, linear.

    The layout of GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, a last LayerNorm. The head has a
    bias and weights of its own, and there is no dropout. The context is the length of the stream's inputs; shorter
    sequences work too. Raises ValueError for inputs that are no tokens, and unless `heads` divides `width`.
    """
    context, classes = context_length(stream), len(stream.classes)
    _check_heads(heads, "width", width)
    with seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict(embedding=TokenEmbedding(classes, context, width))
        for i in range(1, depth + 1):
            layers[f"block{i}"] = Block(width, heads, causal=True)
        layers["norm"] = nn.LayerNorm(width)
        layers["linear"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


class CosineHead(nn.Linear):
    """Features (N, F) to logits (N, C): `scale` times the cosine with each class's row of the weight."""

    def __init__(self, features: int, classes: int, scale: float = SCALE) -> None:
        super().__init__(features, classes, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """The features as they are: both sides are normalised here."""
        return self.scale * F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1))

    def extra_repr(self) -> str:
        """The sizes and the scale."""
        return f"{super().extra_repr()}, scale={self.scale:g}"


@checks.arguments
def encoder(stream: Stream, widths: tuple[Count, ...] = (16, 32, 64), dim: Count = 64, *, seed: int = 0) -> nn.Module:
    """A convolutional encoder of images to `dim` features, without batch statistics, under a `CosineHead`.

    3x3 convolutions at stride 2 with GroupNorm (4 groups) and GELU, average pooling to 2 x 2, and a projection without
    a bias: `encoder` and `head` of what is returned. Images of any size. Raises ValueError unless the widths are
    multiples of 4.
    """
    if any(width % 4 for width in widths):
        raise ValueError(f"widths: {widths}; give multiples of 4, the number of groups that are normalised")
    before = image_shape(stream)[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with seeded(seed):
        for i, after in enumerate(widths, 1):
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers[f"norm{i}"] = nn.GroupNorm(4, after)
            layers[f"gelu{i}"] = nn.GELU()
            before = after
        layers["pool"] = nn.AdaptiveAvgPool2d(2)
        layers["flatten"] = nn.Flatten()
        layers["projection"] = nn.Linear(4 * before, dim, bias=False)
        head = CosineHead(dim, len(stream.classes))
    return nn.Sequential(OrderedDict(encoder=nn.Sequential(layers), head=head))


@torch.no_grad()
def prototypes(encoder: nn.Module, x: Tensor, y: Tensor, *, batch: int = 512) -> Tensor:
    """The direction (C, F) of every class: its examples' features, each of length 1, averaged, and of length 1 again.

    `x` (N, ...) are prepared inputs on the encoder's device, `y` (N,) their labels. Raises ValueError for a class,
    from 0 to the largest label, without an example.
    CLIP's zero-shot head averages a class's prompts so (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
    """
    classes = int(y.max()) + 1 if len(y) else 0
    counts = torch.bincount(y, minlength=classes)
    if not classes or not counts.all():
        missing = (counts == 0).nonzero().flatten().tolist()[:5]
        raise ValueError(f"y: classes {missing} have no example among {len(y)}; give at least one of each")
    with evaluation_mode(encoder):
        found = torch.cat([F.normalize(encoder(part), dim=-1) for part in x.split(batch)])
    return F.normalize(found.new_zeros(classes, found.shape[1]).index_add_(0, y, found), dim=-1)


def with_prototypes(encoder: nn.Module, directions: Tensor, scale: float = SCALE) -> nn.Module:
    """An encoder under a frozen head that knows every class's direction (C, F): only the encoder is trained.

    The network is `encoder` and `head`; the encoder is not copied.
    """
    classes, features = directions.shape
    with seeded(0), torch.no_grad():
        head = CosineHead(features, classes, scale).to(directions)
        head.weight.copy_(directions)
    return nn.Sequential(OrderedDict(encoder=encoder, head=head.requires_grad_(False)))


def _check_heads(heads: int, name: str, width: int) -> None:
    if width % heads:
        raise ValueError(f"heads: {heads} does not divide {name} = {width}; choose a divisor")
