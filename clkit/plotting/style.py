"""Colours, labels and the look of all figures."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Okabe and Ito's palette, which people with colour-vision deficiencies can tell apart, and three of Tol's.
BLACK, GREY, BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#000000", "#999999", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
WINE, OLIVE, INDIGO = "#882255", "#999933", "#332288"
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, WINE, OLIVE, INDIGO, GREY, YELLOW)

COLOURS: Mapping[str, str] = {
    "fine-tuning": GREY,
    "joint": BLACK,
    "ER": SKY,
    "CLeWI": BLUE,
    "ER + CLeWI": BLUE,
    "SFA": "#00734F",
    "AWM": PURPLE,
    "HCMM": RED,
    "WiSE-FT": ORANGE,
    "memory only": "#E3DACD",
    "ER-ACE": "#117777",
    "A-GEM": "#DDCC77",
    "GEM": "#1B4D3E",
    "MIR": "#99DDFF",
    "DER": "#6A5ACD",
    "DER++": INDIGO,
    "GDumb": "#B07A45",
    "iCaRL": "#AA4499",
    "BiC": "#CC3311",
    "L2": "#FFE135",
    "decoupled L2": "#C9A227",
    "data buffer": "#5E3C99",
    "EWC": OLIVE,
    "online EWC": "#A8E05F",
    "SI": "#F4A582",
    "MAS": "#663311",
    "LwF": WINE,
    "per task": "#7570B3",
    "class-incremental": "#BB5566",
    "domain-incremental": "#DDAA33",
    "task-incremental": "#004488",
    "average": "#BBBBBB",
    "task_arithmetic": ORANGE,
    "model_stock": "#7F5539",
    "ties": BLUE,
    "dare": SKY,
    "dare_ties": "#44AA99",
    "della": WINE,
    "pcb": INDIGO,
    "magmax": GREEN,
    "regmean": "#DDCC77",
    "iso_c": "#E377C2",
    "tsv": RED,
    "emr, masked": BLACK,
    "plain": GREY,
    "aligned": ORANGE,
    "plain, re-estimated": SKY,
    "aligned, re-estimated": BLUE,
    "plain, restored": SKY,
    "aligned, restored": BLUE,
}

LABELS: Mapping[str, str] = {
    "acc": "average accuracy (%)",
    "accuracy": "test accuracy (%)",
    "loss": "test loss",
    "last": "accuracy on the last task (%)",
    "forgetting": "forgetting (%)",
    "plasticity": "plasticity: accuracy just after learning (%)",
    "bwt": "backward transfer (%)",
    "fwt": "forward transfer (%)",
    "alpha": "α: weight of the old network",
    "strength": "strength of the pull",
    "old": "accuracy on earlier tasks (%)",
    "new": "accuracy on the newest task (%)",
    "beta": "β: weight of the old network",
    "p": "p: interval between merges, share of a task",
}

RC: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "lines.linewidth": 2.0,
    "lines.markersize": 4.5,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.6,
    "legend.fontsize": 8,
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "clkit",
}
THIN: Mapping[str, Any] = {"linewidth": 0.7, "alpha": 0.45}


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, for axes that are made inside."""
    import matplotlib as mpl

    with mpl.rc_context(RC):
        yield


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: its own if it has one, else the first of the palette that is still free here."""
    names = list(dict.fromkeys(names))
    taken = {COLOURS[name] for name in names if name in COLOURS}
    free = [c for c in PALETTE if c not in taken] or list(PALETTE)
    others = [name for name in names if name not in COLOURS]
    fresh = {name: free[i % len(free)] for i, name in enumerate(others)}
    return {name: COLOURS.get(name) or fresh[name] for name in names}
