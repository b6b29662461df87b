"""Small transformers: a ViT on images and a GPT on tokens, made of the same blocks."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.data import Stream
from clkit.models.common import image_shape, positive, seeded


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
    positive("patch, dim, depth, heads", patch, dim, depth, heads)
    channels, height, width = image_shape(stream)
    if height % patch or width % patch:
        raise ValueError(f"patch: {patch} does not divide images of {height} x {width}; choose a common divisor")
    _check_heads(heads, "dim", dim)
    tokens = (height // patch) * (width // patch)
    with seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict(embedding=Embedding(channels, tokens, patch, dim))
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
        """(N, L) int64 to (N, L, dim)."""
        if x.shape[1] > self.context:
            raise ValueError(f"x: {x.shape[1]} tokens are more than the context of {self.context}; keep the last ones")
        return self.token(x) + self.position[:, : x.shape[1]]


def gpt(stream: Stream, width: int = 64, depth: int = 2, heads: int = 4, *, seed: int = 0) -> nn.Module:
    """A small GPT, from tokens (N, L) to logits (N, L, C) of the next ones: embedding, causal blocks, norm, linear.

    The layout of GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, a last LayerNorm. The head has a
    bias and weights of its own, and there is no dropout. The context is the length of the stream's inputs; shorter
    sequences work too. `heads` divides `width`.
    """
    positive("width, depth, heads", width, depth, heads)
    if len(stream.shape) != 1 or stream[0].train.x.dtype != torch.int64:
        raise ValueError(
            f"stream: {stream.name!r} has inputs {stream.shape} of {stream[0].train.x.dtype}, a GPT reads integer "
            "tokens (L,); use data.texts, or models.vit for images"
        )
    _check_heads(heads, "width", width)
    classes = len(stream.classes)
    with seeded(seed):
        layers: OrderedDict[str, nn.Module] = OrderedDict(embedding=TokenEmbedding(classes, stream.shape[0], width))
        for i in range(1, depth + 1):
            layers[f"block{i}"] = Block(width, heads, causal=True)
        layers["norm"] = nn.LayerNorm(width)
        layers["linear"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


def _check_heads(heads: int, name: str, width: int) -> None:
    if width % heads:
        raise ValueError(f"heads: {heads} does not divide {name} = {width}; choose a divisor")
