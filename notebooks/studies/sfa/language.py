"""Math, then Law, then Code, with a small byte-level transformer; and whether aligned interpolation carries over."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clkit import alignment, data, landscape, models, weights
from clkit.data import Examples, Stream, Text
from clkit.experiments import Comparison, Method
from clkit.language import bits_per_byte, continued
from clkit.training import Result, Training, run

if TYPE_CHECKING:
    import pandas as pd

DOMAINS = ("math", "law", "code")
ORDERS = tuple(permutations(DOMAINS))  # of which each seed takes one, the first the paper's
CONTEXT, POOL = 32, 3200  # bytes of a window; windows of a domain that seeds draw from
WINDOWS = 1200  # that a seed draws of each: 75 steps
MORE = 800  # windows of each domain, beyond those, that `well_read` has read
ADAM = Training(1, 16, 0.005, optimizer="adamw")
PACK = "text.zip"  # in $CLKIT_DATA: real texts
small_gpt = partial(models.gpt, width=32)


def texts(seed: int = 0, *, order: Sequence[str] = (), real: bool = False) -> Stream:
    """The three domains, of each the windows that a seed draws: embedded, or the real ones of $CLKIT_DATA/text.zip.

    They come in an order, by default the seed's own of `ORDERS`.
    """
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for name in DOMAINS:
        found = text(name, real=real)
        rows = torch.randperm(len(found.train), generator=generator)[:WINDOWS]
        drawn[name] = replace(found, train=found.train[rows])
    return data.domains({name: drawn[name] for name in order or ORDERS[seed % len(ORDERS)]})


@cache
def text(name: str, *, real: bool = False, windows: int = POOL) -> Text:
    """One domain at the size of these experiments, made once in a process."""
    path = Path(os.environ.get("CLKIT_DATA", "")) / PACK if real else None
    return data.texts(name, path=path, context=CONTEXT, limit=windows, test_limit=64)


def barriers(seed: int) -> list[dict[str, Any]]:
    """Along the line between two GPTs, as they are and with the second permuted to look like the first.

    Two pairs: "two beginnings", trained on Math from different initialisations; "one after the other", the second went
    on from the first to Law. A row has the pair, matching ("none", "weights", "activations"), identity (the share of
    units that stay), t (0 the first network), and bits (per byte, held-out, a mean over what the pair has learned).
    """
    two, rows = texts(seed, order=DOMAINS[:2]), []
    one = replace(two, tasks=two.tasks[:1])
    first = run(two, small_gpt, training=ADAM, seed=seed, progress=False)
    other = run(one, small_gpt, training=ADAM, seed=seed + 100, progress=False)
    net, inputs = first.model.cpu(), one[0].prepare(one[0].train.x[:256])
    symmetry = alignment.symmetry(net, inputs[:2])
    pairs = {"two beginnings": (other.weights[0], one), "one after the other": (first.weights[1], two)}
    for pair, (moving, stream) in pairs.items():
        for matching in ("none", "weights", "activations"):
            end, identity = moving, 1.0
            if matching != "none":
                seen = inputs if matching == "activations" else None
                found = alignment.align(symmetry, net, first.weights[0], moving, seen, by=matching)
                end = alignment.permute(symmetry, found.permutations, moving)
                identity = sum(found.unmoved.values()) / len(found.unmoved)
            line = landscape.curve(net, (first.weights[0], end), stream, 11)
            bits = bits_per_byte(line.loss).mean(1)
            lead = {"pair": pair, "matching": matching, "identity": identity}
            rows += [lead | {"t": float(t), "bits": float(b)} for t, b in zip(line.ts, bits, strict=True)]
    return rows


def reading(result: Result) -> dict[str, Any]:
    """Held-out bits per byte after the last domain: of each (`bits`), their mean, the earlier ones', the last one's."""
    bits = bits_per_byte(result.losses)[-1]
    means = {"mean_bits": bits.mean(), "old_bits": bits[:-1].mean(), "new_bits": bits[-1]}
    return {"bits": bits.tolist()} | {name: float(value) for name, value in means.items()}


def by_domain(table: "pd.DataFrame") -> "pd.DataFrame":
    """A table of `reading` with a column of bits for each domain, whatever the order that its seed has."""
    rows = [dict(zip(ORDERS[seed % 6], bits, strict=True)) for seed, bits in zip(table.seed, table.bits, strict=True)]
    return table.assign(**{name: [row[name] for row in rows] for name in DOMAINS})


def real_texts(methods: Mapping[str, Method]) -> Comparison:
    """Methods on real texts, GSM8K, the US Code, MBPP and HumanEval, after having read embedded ones: five seeds."""
    streams = {"math, law, code, real texts": partial(texts, real=True)}
    return Comparison(streams, {"gpt 32 x 2, has read": well_read}, methods, ADAM, range(5), reading)


def writes(result: Result, prompts: Sequence[str], length: int = 24) -> "pd.DataFrame":
    """What a byte-level network of a run goes on to write, by the likeliest byte each time: a row a task, by prompt.

    Texts end where the line does, or after `length` bytes; the network sees the last of them, as many as its windows
    have.
    """
    import pandas as pd

    def goes_on(prompt: str, deployed: weights.Weights) -> str:
        x = torch.tensor([list(prompt.encode())])
        found = continued(result.model.cpu(), x, length, context=CONTEXT, weights=deployed)
        return bytes(found[0].tolist()).partition(b"\n")[0].decode(errors="replace")

    rows = [{prompt: goes_on(prompt, deployed) for prompt in prompts} for deployed in result.weights]
    return pd.DataFrame(rows)


def well_read(stream: Stream, *, seed: int = 0) -> nn.Module:
    """A small GPT that has read windows of every embedded domain that no stream here has, mixed."""
    net = small_gpt(stream, seed=seed)
    weights.set_weights(net, _well_read(seed))
    return net


@cache
def _well_read(seed: int) -> weights.Weights:
    found = [text(name, windows=POOL + MORE) for name in DOMAINS]
    x, y = (torch.cat([getattr(one.train, part)[POOL:] for one in found]) for part in ("x", "y"))
    mixed = replace(found[0], name="mixed", train=Examples(x, y))
    return run(data.domains([mixed]), small_gpt, training=ADAM, seed=seed, device="cpu", progress=False).weights[0]
