"""Networks to learn a stream with: factories f(stream, *, seed=0, ...) that take input shape and classes from it.

The same seed gives the same bits on every call, and the global random state is left alone. Networks are float32 on
the CPU, hold every tensor under one name, and end in one `nn.Linear` (torchvision's SqueezeNet in a convolution),
whose inputs are the features of a representation plot. For a factory with fixed options use `functools.partial`:
`partial(models.resnet18, width=16)`.
"""

from clkit.models.features import activations, features, with_weights
from clkit.models.networks import (
    Attention, BasicBlock, Block, CosineHead, MeanTokens, PatchEmbedding, TokenEmbedding,
    convnet, encoder, gpt, mlp, prototypes, resnet18, vit, with_prototypes,
)  # fmt: skip
from clkit.models.pretrained import CausalLM, clip, efficientnet_lite0, huggingface, torchvision


for _factory in (clip, convnet, efficientnet_lite0, encoder, gpt, huggingface, mlp, resnet18, torchvision, vit):
    _factory.__module__ = __name__  # the record of a run names a factory by where users find it
