"""What a language model knows of a text: bits per byte, the likeliest continuation, and problems answered exactly."""

from collections.abc import Sequence
from math import log

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from clkit import checks
from clkit.data import Problem, Text
from clkit.evaluation import EVALUATION_BATCH, check_logits
from clkit.modules import called, evaluation_mode, unwrapped
from clkit.weights import Weights, check_same, live_tensors


@torch.no_grad()
def continued(model: nn.Module, x: Tensor, length: int, *, context: int, weights: Weights | None = None) -> Tensor:
    """The `length` tokens (N, length) by which a model continues prompts `x` (N, L), the likeliest one each time.

    The model, tokens (N, L) to logits (N, L, C), sees the last `context` tokens. `weights` on its device take the place
    of its own. In evaluation mode; the model stays as it is. Raises FloatingPointError for logits that are not finite.
    """
    start, model, wrong = x.shape[1], unwrapped(model), torch.zeros((), dtype=torch.long, device=x.device)
    with evaluation_mode(model):
        for _ in range(length):
            logits = called(model, weights or {}, (x[:, -context:],))
            x = torch.cat([x, logits[:, -1:].argmax(-1)], 1)
            wrong += (~logits[:, -1].isfinite()).sum()
    check_logits(float(wrong), "the continuation of a prompt")
    return x[:, start:]


def bits_per_byte(losses: ArrayLike, bytes_per_token: float | Sequence[float] = 1.0) -> np.ndarray:
    """Test losses in nats per token as bits per byte of the text: loss / (ln 2 * bytes_per_token), elementwise.

    `losses` (..., tasks), such as the matrix `result.losses` of a run. `bytes_per_token` is 1 where tokens are bytes,
    else one number for each task: `[text.bytes_per_token for text in datasets]`. Makes models comparable that read
    the same text in other tokens. One that knows nothing of bytes has 8. Raises ValueError for numbers not above 0.
    """
    width = np.asarray(bytes_per_token, dtype=np.float64)
    if not (width > 0).all():
        raise ValueError(f"bytes_per_token: {bytes_per_token} must be positive; use 1 for bytes, else the texts' own")
    return np.asarray(losses, dtype=np.float64) / (log(2) * width)


@checks.arguments
def exact_match(
    model: nn.Module,
    text: Text,
    *,
    weights: Weights | None = None,
    limit: checks.Count | None = None,
    batch: checks.Count = EVALUATION_BATCH,
) -> float:
    """The share, in [0, 1], of a text's held-out problems that a model answers exactly, by greedy decoding.

    A model, tokens (N, L) to logits (N, L, C), is shown a prompt. It goes on for as many tokens as the longest of the
    solutions has, as in `continued`; it sees as many of the last tokens as the text's windows have. Its answer is the
    rest of the line behind the first marker; a line that does not end is no answer. Steps before the marker are not
    judged. Prompts of equal length go through together, `batch` at a time, without padding. `weights` take the place of
    the model's own; `limit` asks about the first so many problems. The model stays as it is. Raises ValueError for a
    text without problems, and for weights of another model.
    """
    if not text.problems:
        raise ValueError(f"text: {text.name!r} has no problems to answer; use data.texts('math')")
    if weights is not None:
        check_same(live_tensors(model), weights, names=("the model", "weights"))
    problems = text.problems[:limit]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    own = {name: tensor.to(device) for name, tensor in (weights or {}).items()}
    length = max(len(text.encode(problem.solution)) for problem in problems)
    groups: dict[int, list[tuple[Problem, list[int]]]] = {}
    for problem in problems:
        prompt = text.encode(problem.prompt)
        groups.setdefault(len(prompt), []).append((problem, prompt))
    right = 0
    for group in groups.values():
        for start in range(0, len(group), batch):
            asked, prompts = zip(*group[start : start + batch], strict=True)
            x = torch.tensor(prompts, device=device)
            found = continued(model, x, length, context=text.train.x.shape[1], weights=own).tolist()
            right += sum(p.answer_in(text.decode(f)) == p.answer for p, f in zip(asked, found, strict=True))
    return right / len(problems)
