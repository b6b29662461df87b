"""Math, then Law, then Code, with a small byte-level transformer; and whether aligned interpolation carries over."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clkit import alignment, data, landscape, models, weights
from clkit.data import Examples, Stream, Text
from clkit.experiments import Comparison
from clkit.language import bits_per_byte, continued, exact_match
from clkit.training import Result, Training, run

if TYPE_CHECKING:
    import pandas as pd

DOMAINS = ("math", "law", "code")
WINDOWS, CONTEXT = 3200, 32  # of each domain: 100 steps an epoch
MORE = 1600  # windows behind those of a domain, for a network that has read before
ADAM = Training(4, 32, 0.002, optimizer="adamw")
PACK = "text.zip"  # in $CLKIT_DATA: real texts


def texts(seed: int = 0, *, order: Sequence[str] = DOMAINS, real: bool = False) -> Stream:
    """The three domains in an order, for any seed: embedded texts, or the real ones of $CLKIT_DATA/text.zip."""
    return data.domains({name: text(name, real=real) for name in order})


@cache
def text(name: str, *, real: bool = False, windows: int = WINDOWS) -> Text:
    """One domain at the size of these experiments, made once in a process."""
    path = Path(os.environ.get("CLKIT_DATA", "")) / PACK if real else None
    return data.texts(name, path=path, context=CONTEXT, limit=windows)


def barriers(seed: int) -> list[dict[str, Any]]:
    """Along the line between two GPTs, as they are and with the second permuted to look like the first.

    Two pairs: "two beginnings", trained on Math from different initialisations; "one after the other", the second went
    on from the first to Law. A row has the pair, matching ("none", "weights", "activations"), identity (the share of
    units that stay), t (0 the first network), and bits (per byte, held-out, a mean over what the pair has learned).
    """
    two, rows = texts(order=DOMAINS[:2]), []
    one = replace(two, tasks=two.tasks[:1])
    first = run(two, models.gpt, training=ADAM, seed=seed, progress=False)
    other = run(one, models.gpt, training=ADAM, seed=seed + 100, progress=False)
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


def reading(result: Result, sums: bool = True) -> dict[str, Any]:
    """Held-out bits per byte (rows: after a task; columns: on a task), and the share of sums that are exactly right.

    `bits` and `exact` are lists in the order of learning, `exact` without `sums` is empty; of the last row of `bits`,
    `mean_bits` is the mean, `old_bits` that of all but the last task, `new_bits` the last one.
    """
    bits = bits_per_byte(result.losses)
    exact = [exact_match(result.model, text("math"), weights=w, limit=200) for w in result.weights if sums]
    last = {"mean_bits": bits[-1].mean(), "old_bits": bits[-1, :-1].mean(), "new_bits": bits[-1, -1]}
    return {"bits": bits.tolist(), "exact": exact} | {name: float(value) for name, value in last.items()}


def final_bits(table: "pd.DataFrame", whole: Comparison) -> "pd.DataFrame":
    """A table of runs with what each knew at its end, its domains in the order of its comparison's stream.

    The columns math, law and code are bits per byte after the last task, whatever the order; `sums` is the share of
    sums that are right then, `once` just after Math was learned; blank where sums were not asked for.
    """
    import pandas as pd

    rows = []
    for stream, bits, exact in zip(table["stream"], table["bits"], table["exact"], strict=True):
        order = getattr(whole.streams[stream], "keywords", {}).get("order", DOMAINS)
        sums = exact or [float("nan")] * len(order)
        known = {"sums": sums[-1], "once": sums[order.index("math")]}
        rows.append(dict(zip(order, bits[-1], strict=True)) | known)
    return table.join(pd.DataFrame(rows, index=table.index))


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
    """`models.gpt` that has read windows of every domain that no stream here has: two epochs of the three, mixed."""
    net = models.gpt(stream, seed=seed)
    weights.set_weights(net, _well_read(seed))
    return net


@cache
def _well_read(seed: int) -> weights.Weights:
    found = [text(name, windows=WINDOWS + MORE) for name in DOMAINS]
    x, y = (torch.cat([getattr(one.train, part)[WINDOWS:] for one in found]) for part in ("x", "y"))
    mixed = replace(found[0], name="mixed", train=Examples(x, y))
    training = replace(ADAM, epochs=2)
    return run(data.domains([mixed]), models.gpt, training=training, seed=seed, device="cpu", progress=False).weights[0]
