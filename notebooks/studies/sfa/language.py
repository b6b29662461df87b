"""Math, then Law, then Code, with a small byte-level transformer; and whether aligned interpolation carries over."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clkit import alignment, data, landscape, models, weights
from clkit.consolidation import SFA, CLeWI, Merging, WiSEFT
from clkit.data import Examples, Stream, Text
from clkit.evaluation import bits_per_byte, continued, exact_match
from clkit.experiments import Comparison, Method
from clkit.learners import ER, EWC, L2, DataBuffer, Joint, Learner
from clkit.training import Result, Training, run
from studies.sfa.grids import knobs

if TYPE_CHECKING:
    import pandas as pd

DOMAINS = ("math", "law", "code")
WINDOWS, CONTEXT = 3200, 32  # of each domain: 100 steps an epoch
MORE = 1600  # windows behind those of a domain, for a network that has read before
ADAM = Training(4, 32, 0.002, optimizer="adamw")
PACK = "text.zip"  # in $CLKIT_DATA: real texts


def texts(order: Sequence[str] = DOMAINS, *, real: bool = False) -> Stream:
    """The three domains in an order, as streams of bytes: embedded texts, or the real ones of $CLKIT_DATA/text.zip."""
    return data.domains({name: text(name, real=real) for name in order})


@cache
def text(name: str, *, real: bool = False, windows: int = WINDOWS) -> Text:
    """One domain at the size of these experiments, made once in a process."""
    path = Path(os.environ.get("CLKIT_DATA", "")) / PACK if real else None
    return data.texts(name, path=path, context=CONTEXT, limit=windows)


def three_domains() -> Comparison:
    """Math, Law, Code: SFA over p and beta, and what it is compared with; bits per byte and exact-match arithmetic."""
    methods = {"fine-tuning": Method(Learner()), "joint": Method(Joint())}
    methods |= _averaging({0.1: (0.1, 0.2, 0.5), 0.25: (0.1, 0.2, 0.3, 0.5, 0.7), 1.0: (0.1, 0.2, 0.3, 0.5, 0.7)})
    methods |= {f"L2 λ={s:g}": Method(L2(s)) for s in (0.01, 0.03, 0.1)}
    methods |= {f"EWC λ={s:g}": Method(EWC(s, samples=256)) for s in (10.0, 100.0, 1000.0)}
    methods |= {f"buffer {s:.0%}": Method(DataBuffer(s)) for s in (0.01, 0.05, 0.1)} | _posthoc()
    return Comparison({"math, law, code": partial(_texts, DOMAINS)}, GPT, methods, ADAM, range(1), reading)


def from_base() -> Comparison:
    """The same stream from a network that has read a little of everything: merges of fine-tuned networks assume one."""
    every = three_domains()
    kept = ("fine-tuning", "joint", "L2 λ=0.03", "EWC λ=100", "EWC λ=1000", "buffer 1%", "buffer 5%")
    methods = {name: every.methods[name] for name in kept} | _posthoc()
    methods |= _averaging({0.25: (0.2, 0.5, 0.7), 1.0: (0.2, 0.5, 0.7)})
    return replace(every, models={"gpt 64 x 2, has read": well_read}, methods=methods)


def orders() -> Comparison:
    """All six orders of the three domains."""
    kept = ("fine-tuning", "SFA p=0.25 β=0.5", "SFA p=1 β=0.5", "EWC λ=100")
    methods = {name: three_domains().methods[name] for name in kept}
    streams = {", ".join(order): partial(_texts, order) for order in permutations(DOMAINS)}
    return replace(three_domains(), streams=streams, methods=methods)


def real_texts() -> Comparison:
    """GSM8K, the US Code, MBPP and HumanEval in the place of the embedded texts; fewer methods."""
    kept = ("fine-tuning", "joint", "SFA p=0.25 β=0.2", "SFA p=0.25 β=0.5", "SFA p=1 β=0.5", "EWC λ=10", "EWC λ=100",
            "buffer 5%")  # fmt: skip
    methods = {name: three_domains().methods[name] for name in kept}
    streams = {"math, law, code, real texts": partial(_texts, DOMAINS, real=True)}
    return replace(three_domains(), streams=streams, methods=methods, measure=partial(reading, sums=False))


def aligned() -> Comparison:
    """CLeWI on a small vision transformer, by the symmetry derived from its graph: replay with and without merging."""
    rule = ER(50)
    ways: dict[str, Any] = {"by activations": "activations", "by weights": "weights", "not aligned": None}
    methods = {"ER": Method(rule)} | {
        f"CLeWI α={alpha:g}, {name}": Method(rule, CLeWI(alpha, align=align, refresh=False))
        for alpha in (0.1, 0.3, 0.5)
        for name, align in ways.items()
    }
    vit = partial(models.vit, patch=2, dim=48, depth=2)
    training = Training(15, 32, 0.002, optimizer="adamw")
    return Comparison({"digits, 5 tasks": _digits}, {"vit 48 x 2": vit}, methods, training, range(3))


def aligned_text() -> Comparison:
    """`aligned` for the byte-level GPT: Math, Law, Code with a memory of 50 windows."""
    chosen = ("ER", "CLeWI α=0.3, by activations", "CLeWI α=0.3, not aligned")
    methods = aligned().methods
    return replace(three_domains(), methods={name: methods[name] for name in chosen})


def barriers(seeds: Sequence[int] = range(2)) -> "pd.DataFrame":
    """Along the line between two GPTs, as they are and with the second permuted to look like the first.

    Two pairs: "two beginnings", trained on Math from different initialisations; "one after the other", the second went
    on from the first to Law. Columns: pair, matching ("none", "weights", "activations"), seed, t (0 the first network),
    bits (per byte, held-out, a mean over what the pair has learned), identity (the share of units that stay).
    """
    import pandas as pd

    two, rows = texts(DOMAINS[:2]), []
    one = replace(two, tasks=two.tasks[:1])
    for seed in seeds:
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
                    identity = sum(found.identity.values()) / len(found.identity)
                line = landscape.curve(net, (first.weights[0], end), stream, 11)
                lead = {"pair": pair, "matching": matching, "seed": seed, "identity": identity}
                bits = bits_per_byte(line.loss).mean(1)
                rows += [lead | {"t": float(t), "bits": float(b)} for t, b in zip(line.ts, bits, strict=True)]
    return pd.DataFrame(rows)


def reading(result: Result, sums: bool = True) -> dict[str, Any]:
    """Held-out bits per byte (rows: after a task; columns: on a task), and the share of sums that are exactly right.

    `bits` and `exact` are lists in the order of learning, `exact` without `sums` is empty; of the last row of `bits`,
    `mean_bits` is the mean, `old_bits` that of all but the last task, `new_bits` the last one.
    """
    bits = bits_per_byte(result.losses)
    exact = [exact_match(result.model, text("math"), weights=w, limit=200) for w in result.weights if sums]
    last = {"mean_bits": bits[-1].mean(), "old_bits": bits[-1, :-1].mean(), "new_bits": bits[-1, -1]}
    return {"bits": bits.tolist(), "exact": exact} | {name: float(value) for name, value in last.items()}


def final_bits(table: "pd.DataFrame", grid: Comparison) -> "pd.DataFrame":
    """A table of runs with its knobs, the line of a figure that a row lies on, and what it knew at its end.

    The columns math, law and code are bits per byte after the last task, whatever the order; `sums` is the share of
    sums that are right then, `once` just after Math was learned; blank where sums were not asked for.
    """
    import pandas as pd

    rows, full = [], knobs(table, grid)
    for row in full.to_dict(orient="records"):
        order, rule = row["stream"].split(", ")[: len(DOMAINS)], grid.methods[row["method"]].consolidation
        lines = {"SFA": f"SFA p = {row['p']:g}" if row["p"] < 1 else "WiSE-FT (p = 1)", "data buffer": "buffer"}
        line = row["method"] if isinstance(rule, Merging | WiSEFT) else lines.get(row["kind"], row["kind"])
        sums = row["exact"] or [float("nan")] * len(order)
        known = {"line": line, "sums": sums[-1], "once": sums[order.index("math")]}
        rows.append(dict(zip(order, row["bits"][-1], strict=True)) | known)
    return full.join(pd.DataFrame(rows, index=full.index))


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


def _averaging(betas: Mapping[float, Sequence[float]]) -> dict[str, Method]:
    return {f"SFA p={p:g} β={beta:g}": Method(Learner(), SFA(p, beta)) for p, some in betas.items() for beta in some}


def _posthoc() -> dict[str, Method]:
    alone: dict[str, Any] = {"training": "independent"}
    return {
        "WiSE-FT from the base": Method(Learner(), WiSEFT(0.5, old="base")),
        "task arithmetic": Method(Learner(), Merging("task_arithmetic", {"scale": 0.5}, **alone)),
        "TIES": Method(Learner(), Merging("ties", {"scale": 1.0}, **alone)),
    }


def _texts(order: Sequence[str], seed: int, *, real: bool = False) -> Stream:
    return texts(order, real=real)


def _digits(seed: int) -> Stream:
    return data.split(data.digits(), 5)


GPT: Mapping[str, Callable[..., nn.Module]] = {"gpt 64 x 2": models.gpt}
