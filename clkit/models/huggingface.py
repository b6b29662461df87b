"""Causal language models of Hugging Face that are on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clkit.data import Stream
from clkit.data.texts import local_only
from clkit.models.common import seeded


class CausalLM(nn.Module):
    """A causal model of transformers as a plain network: tokens (N, L) to logits (N, L, C) of the next ones."""

    def __init__(self, model: nn.Module, classes: int):
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, x: Tensor) -> Tensor:
        """(N, L) int64 to (N, L, C); tokens that pad the model's vocabulary are left out."""
        return self.model(input_ids=x, use_cache=False).logits[..., : self.classes]


def huggingface(stream: Stream, path: Path | str, *, seed: int = 0) -> nn.Module:
    """A causal language model from a folder that `save_pretrained` of transformers wrote, in float32.

    The stream's tokens are those of the model's own tokenizer: `data.texts(..., tokenizer=path)`. Nothing is
    downloaded. Dropout is what the folder's configuration says. `seed` draws weights that the folder lacks. Tied
    weights stay tied, and `get_weights` has them once. For `run`: `partial(models.huggingface, path=path)`.

    Raises ImportError without transformers, and ValueError for a folder without a model, for tokens that the model
    does not have and for windows that are longer than its context.
    """
    transformers = local_only("path", path)
    if len(stream.shape) != 1 or stream[0].train.x.dtype != torch.int64:
        raise ValueError(
            f"stream: {stream.name!r} has inputs {stream.shape} of {stream[0].train.x.dtype}, a language model reads "
            "integer tokens (L,); use data.texts(..., tokenizer=path)"
        )
    try:
        with seeded(seed), _quiet(transformers):
            model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"path: {path} has no causal language model ({error}); save one there") from error
    sizes, classes = model.config.get_text_config(), len(stream.classes)
    if sizes.vocab_size < classes:
        raise ValueError(
            f"stream: it has {classes} tokens, the model {sizes.vocab_size}; use data.texts(..., tokenizer=path) with "
            "the model's own tokenizer"
        )
    longest = getattr(sizes, "max_position_embeddings", None)
    if longest is not None and longest < stream.shape[0]:
        raise ValueError(f"stream: windows of {stream.shape[0]} tokens, the model takes {longest}; lower context")
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
