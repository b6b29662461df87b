"""The table of merges: `MERGES`, a row for each with its paper and its laws, and `merge`, which goes by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from torch import Tensor

from clkit.merging.elected import emr, magmax, pcb
from clkit.merging.sparse import breadcrumbs, dare, dare_ties, della, ties
from clkit.merging.spectral import iso_c, opcm, tsv
from clkit.merging.statistical import fisher, regmean
from clkit.merging.straight import average, greedy_soup, interpolate, model_stock, slerp, task_arithmetic, wise_ft
from clkit.weights import Weights


@dataclass(frozen=True)
class Merge:
    """A row of `MERGES`: a merging function and what is true of it. Calling the row calls the function.

    - `base`: it takes task vectors from a base, so base= must be given; `arity`: it merges exactly so many weights
    - `needs`: the option without which it cannot work, None, "score", "importances" or "grams"
    - `symmetric`: the order of the weights does not matter
    - `shifts`: moving all weights, and the base, moves the result along
    - `homogeneous`: task vectors s times as long, for any s but 0, make the way from the base s times as long; without
      a base, from any point
    - `permutes`: permuting channels, in all weights alike, permutes them in the result
    - `random`: it draws, by the option `seed`
    - `exact`: options at which nothing is left out, so that copies merge to the copy; None if there are none
    - `defaults`: options that make this member of its family; a caller's options come first

    A law with something that `needs` asks for holds if that moves along. Ties in magnitude aside.
    """

    function: Callable[..., dict[str, Tensor]]
    paper: str
    base: bool = False
    arity: int | None = None
    needs: str | None = None
    symmetric: bool = True
    shifts: bool = True
    homogeneous: bool = True
    permutes: bool = True
    random: bool = False
    exact: Mapping[str, object] | None = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, ws: Sequence[Weights], *, base: Weights | None = None, **options: object) -> dict[str, Tensor]:
        """Merges `ws`. A base is needed where `self.base` says so, and ignored elsewhere."""
        options = {**self.defaults, **options}
        if self.needs and self.needs not in options:
            raise ValueError(f"{self.needs}: {self.function.__name__} cannot work without; give {self.needs}=...")
        if not self.base:
            return self.function(ws, **options)
        if base is None:
            raise ValueError(f"base: {self.function.__name__} takes task vectors from a base; give base=weights")
        return self.function(ws, base=base, **options)


DENSE = {"density": 1.0}
DRAWN: Any = {"base": True, "symmetric": False, "permutes": False, "random": True}

MERGES: Mapping[str, Merge] = MappingProxyType(
    {
        "average": Merge(average, "arXiv 2203.05482"),
        "greedy_soup": Merge(greedy_soup, "arXiv 2203.05482", needs="score"),
        "interpolate": Merge(interpolate, "arXiv 2109.01903", arity=2, symmetric=False),
        "wise_ft": Merge(wise_ft, "arXiv 2109.01903", base=True, arity=1, exact={"alpha": 1.0}),
        "slerp": Merge(slerp, "SIGGRAPH 1985", arity=2, symmetric=False, shifts=False, homogeneous=False),
        "task_arithmetic": Merge(task_arithmetic, "arXiv 2212.04089", base=True),
        "model_stock": Merge(model_stock, "arXiv 2403.19522", base=True),
        "ties": Merge(ties, "arXiv 2306.01708", base=True, exact=DENSE),
        "breadcrumbs": Merge(breadcrumbs, "arXiv 2312.06795", base=True, exact={"density": 1.0, "outliers": 0.0}),
        "dare": Merge(dare, "arXiv 2311.03099", exact=DENSE, **DRAWN),
        "dare_ties": Merge(dare_ties, "arXiv 2311.03099", exact=DENSE, **DRAWN),
        "della": Merge(della, "arXiv 2406.11617", exact={"density": 1.0, "epsilon": 0.0}, **DRAWN),
        "magmax": Merge(magmax, "arXiv 2407.06322", base=True),
        "emr": Merge(emr, "arXiv 2405.17461", base=True),
        "pcb": Merge(pcb, "arXiv 2410.02396", base=True, exact=DENSE),
        "fisher": Merge(fisher, "arXiv 2111.09832", needs="importances"),
        "regmean": Merge(regmean, "arXiv 2212.09849", needs="grams"),
        "iso_c": Merge(iso_c, "arXiv 2502.04959", base=True, exact=None),
        "tsv": Merge(tsv, "arXiv 2412.00081", base=True, exact=None),
        "opcm": Merge(opcm, "arXiv 2501.09522", base=True, symmetric=False, exact=None),
    }
)


def merge(name: str, ws: Sequence[Weights], *, base: Weights | None = None, **options: object) -> dict[str, Tensor]:
    """Merges `ws` by the row of `MERGES` called `name`; a ValueError names the closest rows for an unknown one."""
    if name not in MERGES:
        close = get_close_matches(str(name).lower(), MERGES, n=3, cutoff=0.4) or list(MERGES)
        raise ValueError(f"name: there is no merge {name!r}; did you mean one of {close}?")
    return MERGES[name](ws, base=base, **options)
