"""Math, then Law, then Code, with a small byte-level transformer; and whether aligned interpolation carries over."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import permutations
from typing import TYPE_CHECKING, Any

from clkit import data, models
from clkit.consolidation import SFA, CLeWI, Merging, WiSEFT
from clkit.data import Stream, Text
from clkit.evaluation import bits_per_byte, exact_match
from clkit.experiments.grid import Grid
from clkit.experiments.plan import Method
from clkit.learners import ER, EWC, L2, DataBuffer, Joint, Learner
from clkit.training import Result, Training

if TYPE_CHECKING:
    import pandas as pd

DOMAINS = ("math", "law", "code")
WINDOWS, CONTEXT = 3200, 32  # of each domain: 100 steps an epoch
ADAM = Training(4, 32, 0.002, optimizer="adamw")


def texts(order: Sequence[str] = DOMAINS, *, path: str | None = None) -> Stream:
    """The three domains in an order, as streams of bytes: embedded texts, or those of a folder or zip."""
    return data.domains({name: text(name, path=path) for name in order})


@cache
def text(name: str, *, path: str | None = None) -> Text:
    """One domain at the size of these experiments, made once in a process."""
    return data.texts(name, path=path, context=CONTEXT, limit=WINDOWS, test_limit=256)  # pyright: ignore[reportArgumentType]


def language(path: str | None = None) -> Grid:
    """Math, Law, Code: SFA over p and beta, and what it is compared with; bits per byte and exact-match arithmetic."""
    methods = {"fine-tuning": Method(Learner()), "joint": Method(Joint())}
    for p in (0.1, 0.25, 1.0):
        for beta in (0.1, 0.2, 0.3, 0.5):
            methods[f"SFA p={p:g} β={beta:g}"] = Method(Learner(), SFA(p, beta))
    methods |= {f"L2 λ={s:g}": Method(L2(s)) for s in (0.01, 0.03, 0.1)}
    methods |= {f"EWC λ={s:g}": Method(EWC(s, samples=256)) for s in (10.0, 100.0, 1000.0)}
    methods |= {f"buffer {s:.0%}": Method(DataBuffer(s)) for s in (0.01, 0.05, 0.1)}
    alone: dict[str, Any] = {"training": "independent"}
    methods |= {
        "WiSE-FT from the base": Method(Learner(), WiSEFT(0.5, old="base")),
        "task arithmetic": Method(Learner(), Merging("task_arithmetic", {"scale": 0.5}, **alone)),
        "TIES": Method(Learner(), Merging("ties", {"scale": 1.0}, **alone)),
        "mean of sequential": Method(Learner(), Merging("average")),
    }
    name = "math, law, code" + (", real texts" if path else "")
    return Grid({name: partial(_texts, DOMAINS, path)}, {"gpt 64 x 2": models.gpt}, methods, ADAM, range(3), reading)


def orders() -> Grid:
    """All six orders of the three domains."""
    methods = {
        "fine-tuning": Method(Learner()),
        "SFA p=1 β=0.3": Method(Learner(), SFA(1.0, 0.3)),
        "SFA p=0.25 β=0.2": Method(Learner(), SFA(0.25, 0.2)),
        "SFA p=0.25 β=0.5": Method(Learner(), SFA(0.25, 0.5)),
    }
    streams = {", ".join(order): partial(_texts, order, None) for order in permutations(DOMAINS)}
    return Grid(streams, {"gpt 64 x 2": models.gpt}, methods, ADAM, range(2), reading)


def aligned() -> Grid:
    """CLeWI on transformers: replay with and without merging, and with and without the permutation.

    The byte-level GPT on the three domains, and a small vision transformer on the digits, both by the symmetry derived
    from their graphs.
    """
    rule = ER(50)
    methods = {"ER": Method(rule)} | {
        f"CLeWI α={alpha:g}, {name}": Method(rule, CLeWI(alpha, align=align, refresh=False, points=0))
        for alpha in (0.1, 0.3, 0.5)
        for name, align in (("aligned", "activations"), ("by weights", "weights"), ("not aligned", None))
    }
    digits = {"digits, 5 tasks": partial(_digits)}
    vit = partial(models.vit, patch=2, dim=48, depth=2)
    return Grid(digits, {"vit 48 x 2": vit}, methods, Training(15, 32, 0.002, optimizer="adamw"), range(3), None)


def aligned_text() -> Grid:
    """`aligned` for the byte-level GPT: a memory of 50 windows."""
    grid = aligned()
    methods = {n: m for n, m in grid.methods.items() if "0.1" not in n}
    made: Mapping[str, Callable[[int], Stream]] = {"math, law, code": partial(_texts, DOMAINS, None)}
    return Grid(made, {"gpt 64 x 2": models.gpt}, methods, ADAM, range(2), reading)


def reading(result: Result) -> dict[str, Any]:
    """Held-out bits per byte (rows: after a task; columns: on a task), and the share of sums that are exactly right.

    `bits` and `exact` are lists in the order of learning; `mean_bits` is the mean of the last row.
    """
    bits = bits_per_byte(result.losses)
    sums = [exact_match(result.model, text("math"), weights=w, limit=200) for w in result.weights]
    return {"bits": bits.tolist(), "exact": sums, "mean_bits": float(bits[-1].mean()), "last_bits": float(bits[-1, -1])}


def final_bits(table: "pd.DataFrame", order: Sequence[str] = DOMAINS) -> "pd.DataFrame":
    """Bits per byte on each domain after the last task, exact matches then, and their mean: a row a method."""
    import pandas as pd

    last = pd.DataFrame([row[-1] for row in table.bits], columns=list(order), index=table.index)
    full = last.assign(mean=table.mean_bits, exact=[e[-1] for e in table.exact], method=table.method)
    return full.groupby("method", sort=False).mean()


def _texts(order: Sequence[str], path: str | None, seed: int) -> Stream:
    return texts(order, path=path)


def _digits(seed: int) -> Stream:
    return data.split(data.digits(), 5)
