"""Merging: several weights of one architecture into one. Pure functions, and a table of them, `MERGES`.

Every function is called as f(ws, **options), or f(ws, base=base, **options) where task vectors are taken from a base.
Parameters are merged. BatchNorm's statistics are averaged: re-estimate them afterwards with `normalization.refresh`.
Counters are dropped. Names and shapes must agree; inputs are not modified; the result is new and has the dtypes and
devices of the base, or of the first weights. Sums are made in single precision at least and rounded once. ValueError is
raised for no weights, for a NaN or an infinity in an input, for a result that its dtype cannot hold, and for an option
outside the range that its annotation gives.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from clkit import checks
from clkit.merging.averages import (
    average, check_importances, fisher_merge, greedy_soup, interpolate, model_stock, regmean, slerp, task_arithmetic,
    wise_ft,
)  # fmt: skip
from clkit.merging.entrywise import breadcrumbs, dare, dare_ties, della, emr, magmax, pcb, ties
from clkit.merging.pieces import TaskVectors, on_parameters
from clkit.merging.spectral import iso_c, opcm, tsv
from clkit.weights import Weights


@dataclass(frozen=True)
class Merge:
    """A row of `MERGES`: a merging function and what is true of it. Calling the row calls the function.

    A merge of your own is a function and, to go by name, a row, in a module that worker processes import, too:

    ```python
    def median(ws, *, base, scale=1.0):
        return TaskVectors(ws, base).merge(lambda piece, part: part.median(0).values, scale)

    MERGES["median"] = Merge(median, "our own")
    run(stream, models.convnet, ER(), Merging("median", {"scale": 0.5}))
    ```

    The function gets a list of weights, parameters alone, and options by keyword. It gives a new mapping of the same
    names and shapes, and leaves its inputs as they are. The rest is seen to by `pieces.on_parameters`, which the row
    applies: statistics are averaged, inputs and result checked, options held to their annotated ranges. Its signature
    says more:

    - a parameter `base`: task vectors are taken from a base, so base= must be given (`row.base`)
    - another parameter without a default: the option that it cannot work without (`row.needs`). `Merging` knows three:
      "score", which maps weights to a number, "importances" and "grams", a mapping for each of the weights, as
      `curvature.fisher` and `curvature.grams` give them
    - a parameter `seed`: it draws (`row.random`), and depends on the seed alone

    The rest is for the row to say, and what the contract suite (tests/test_merging.py) checks:

    - `paper`: where it comes from; `arity`: it merges exactly so many weights. Of `Merging` a merge of one
      gets the current weights; a merge of two the previous and the current ones; any other those of all tasks
    - `symmetric`: the order of the weights does not matter
    - `shifts`: moving all weights, and the base, moves the result along
    - `homogeneous`: task vectors s times as long, for any s but 0, make the way from the base s times as long; without
      a base, from any point
    - `permutes`: permuting channels, in all weights alike, permutes them in the result
    - `exact`: options at which nothing is left out, so that copies merge to the copy; None if there are none

    These laws hold up to ties in magnitude, and move what `needs` asks for along with the weights.
    """

    function: Callable[..., dict[str, Tensor]]
    paper: str = ""
    arity: int | None = None
    symmetric: bool = True
    shifts: bool = True
    homogeneous: bool = True
    permutes: bool = True
    exact: Mapping[str, object] | None = field(default_factory=dict)

    @property
    def base(self) -> bool:
        """Whether task vectors are taken from a base."""
        return "base" in self._options()

    @property
    def random(self) -> bool:
        """Whether it draws."""
        return "seed" in self._options()

    @property
    def needs(self) -> str | None:
        """The option, but for a base, that it cannot work without."""
        required = [name for name, option in self._options().items() if option.default is option.empty]
        return next((name for name in required if name != "base"), None)

    def check(self, options: Mapping[str, object]) -> None:
        """Raises ValueError, before any work, for options that the function does not take or that are out of range.

        What a partial function holds is checked, too.
        """
        first = next(iter(inspect.signature(self.function).parameters), None)
        if first is None:
            raise ValueError(f"merge: {self.function!r:.80} takes no weights; give a function f(ws, **options)")
        for name in sorted({first, "base"} & options.keys()):
            raise ValueError(f"options: {name!r} is given by whoever calls the merge; leave it out")
        held = self.function.keywords if isinstance(self.function, partial) else {}
        checks.options(self.function, {**held, **options})

    def __call__(self, ws: Sequence[Weights], *, base: Weights | None = None, **options: object) -> dict[str, Tensor]:
        """Merges `ws`. A base is needed where `self.base` says so, and ignored elsewhere.

        Raises ValueError where the base, or what the merge `needs`, is missing.
        """
        if self.needs and self.needs not in options:
            raise ValueError(f"{self.needs}: this merge cannot work without; give {self.needs}=...")
        if self.base and base is None:
            raise ValueError("base: this merge takes task vectors from a base; give base=weights")
        return on_parameters(number=self.arity)(self.function)(ws, **options, **({"base": base} if self.base else {}))

    def _options(self) -> dict[str, inspect.Parameter]:
        """What the function takes by name, besides the weights."""
        _, *options = inspect.signature(self.function).parameters.items()
        return {name: option for name, option in options if option.kind is not option.VAR_KEYWORD}


DENSE = {"density": 1.0}

MERGES: dict[str, Merge] = {
    "average": Merge(average, "arXiv 2203.05482"),
    "greedy_soup": Merge(greedy_soup, "arXiv 2203.05482"),
    "interpolate": Merge(interpolate, "arXiv 2109.01903", arity=2, symmetric=False),
    "wise_ft": Merge(wise_ft, "arXiv 2109.01903", arity=1, exact={"alpha": 1.0}),
    "slerp": Merge(slerp, "SIGGRAPH 1985", arity=2, symmetric=False, shifts=False, homogeneous=False),
    "task_arithmetic": Merge(task_arithmetic, "arXiv 2212.04089"),
    "model_stock": Merge(model_stock, "arXiv 2403.19522"),
    "ties": Merge(ties, "arXiv 2306.01708", exact=DENSE),
    "breadcrumbs": Merge(breadcrumbs, "arXiv 2312.06795", exact={"density": 1.0, "outliers": 0.0}),
    "dare": Merge(dare, "arXiv 2311.03099", symmetric=False, permutes=False, exact=DENSE),
    "dare_ties": Merge(dare_ties, "arXiv 2311.03099", symmetric=False, permutes=False, exact=DENSE),
    "della": Merge(della, "arXiv 2406.11617", symmetric=False, permutes=False, exact={"density": 1.0, "epsilon": 0.0}),
    "magmax": Merge(magmax, "arXiv 2407.06322"),
    "emr": Merge(emr, "arXiv 2405.17461"),
    "pcb": Merge(pcb, "arXiv 2410.02396", exact=DENSE),
    "fisher": Merge(fisher_merge, "arXiv 2111.09832"),
    "regmean": Merge(regmean, "arXiv 2212.09849"),
    "iso_c": Merge(iso_c, "arXiv 2502.04959", exact=None),
    "tsv": Merge(tsv, "arXiv 2412.00081", exact=None),
    "opcm": Merge(opcm, "arXiv 2501.09522", symmetric=False, exact=None),
}


def merge(name: str, ws: Sequence[Weights], *, base: Weights | None = None, **options: object) -> dict[str, Tensor]:
    """Merges `ws` by the row of `MERGES` called `name`: weights of the same names and shapes.

    Raises ValueError that names the closest rows for an unknown one.
    """
    return MERGES[checks.choice("name", name, MERGES)](ws, base=base, **options)
