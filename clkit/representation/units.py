"""What merging does to single units: how much of their variance is left, and which of two networks' units are alike."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from clkit import checks, normalization
from clkit.checks import Count
from clkit.models import activations, features, with_weights
from clkit.normalization import Moments
from clkit.weights import Weights, lerp

if TYPE_CHECKING:
    from pandas import DataFrame


@checks.arguments
def variance_ratio(
    model: nn.Module,
    merged: Weights,
    parents: Sequence[Weights],
    x: Tensor,
    layers: Sequence[str] | None = None,
    *,
    batch: Count = 256,
) -> "DataFrame":
    """How much of its parents' activation variance a merged network keeps, layer by layer; 1 is all, 0 collapse.

    The variance of every unit over all examples and positions, averaged over units, divided by the mean of the same
    over `parents`: the measure of variance collapse in REPAIR (Jordan et al., arXiv 2211.08403, figure 2). `layers`
    is as for `activations`. A table with the columns layer, merged, parents, ratio; layers in the order in which they
    run. NaN where the parents do not vary. Raises ValueError for no parents and for fewer than 2 rows of `x` (N, ...).
    """
    import pandas as pd

    if not parents:
        raise ValueError("parents: there are none; pass the weights that were merged")
    _check_rows(x)
    found = [_variances(with_weights(model, w), x, layers, batch) for w in (merged, *parents)]
    own, others = found[0], {name: float(np.mean([f[name] for f in found[1:]])) for name in found[0]}
    return pd.DataFrame(
        {
            "layer": list(own),
            "merged": list(own.values()),
            "parents": list(others.values()),
            "ratio": [own[name] / others[name] if others[name] else float("nan") for name in own],
        }
    )


def collapse(
    model: nn.Module,
    a: Weights,
    b: Weights,
    x: Tensor,
    t: float = 0.5,
    layers: Sequence[str] | None = None,
    *,
    batch: Count = 256,
) -> "DataFrame":
    """The collapse of variance between `a` (t = 0) and `b` (t = 1), and what re-estimation and REPAIR undo of it.

    The table of `variance_ratio` for three networks, told apart by the column variant: "merged", which is
    `lerp(a, b, t)`, "refreshed" and "repaired", what `normalization.refresh` and `normalization.repair` make of it on
    the same inputs.
    """
    import pandas as pd

    merged = lerp(a, b, t)
    variants = {
        "merged": merged,
        "refreshed": normalization.refresh(model, merged, x, batch=batch),
        "repaired": normalization.repair(model, merged, ends=(a, b), t=t, inputs=x, batch=batch),
    }
    tables = [variance_ratio(model, w, (a, b), x, layers, batch=batch) for w in variants.values()]
    for name, table in zip(variants, tables, strict=True):
        table.insert(0, "variant", name)
    return pd.concat(tables, ignore_index=True)


@checks.arguments
def correlations(
    model: nn.Module, a: Weights, b: Weights, x: Tensor, layer: str | None = None, *, batch: Count = 256
) -> Tensor:
    """Pearson's correlation of each unit of a layer under weights `a` with each under `b`, (units, units), on `x`.

    Over all examples and positions, added up in double precision batch by batch, so that memory does not grow with
    `x` (N, ...). A unit that does not vary correlates 0 with all. `layer` is as for `features`. Raises ValueError for
    fewer than 2 rows.
    """
    _check_rows(x)
    nets = [with_weights(model, w) for w in (a, b)]
    shift, count, units = torch.zeros(()), 0, 0
    sums, products = torch.zeros(()), torch.zeros(())
    for part in x.split(batch):
        rows = torch.cat([_samples(features(net, part, layer)).double() for net in nets], 1)
        if not count:
            shift, units = rows.mean(0), rows.shape[1] // 2
            sums, products = torch.zeros_like(shift), rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - shift
        count, sums, products = count + len(rows), sums + rows.sum(0), products.addmm_(rows.T, rows)
    mean = sums / count
    covariance = products / count - torch.outer(mean, mean)
    var = covariance.diagonal()
    var = torch.where(var > 1e-12 * (shift + mean).square(), var, 0.0)
    scale = torch.outer(var[:units], var[units:]).sqrt()
    return torch.where(scale > 0, covariance[:units, units:] / scale, 0.0).clamp(-1, 1)


def matched(
    model: nn.Module, a: Weights, b: Weights, x: Tensor, layer: str | None = None, *, batch: Count = 256
) -> "DataFrame":
    """The spectrum of correlations between the units of a layer under `a` and under `b`, before and after matching.

    One linear assignment pairs each unit of `a` with one of `b` so that the sum of `correlations` is largest (Li et al.
    2016, arXiv 1511.07543). A table with the columns kind ("as they are": unit i with unit i; "matched"),
    rank (0 for the largest correlation), unit (of `a`), partner (of `b`), correlation.
    """
    import pandas as pd
    from scipy.optimize import linear_sum_assignment

    matrix = correlations(model, a, b, x, layer, batch=batch).cpu().numpy()
    units = np.arange(len(matrix))
    tables = []
    for kind, partners in (("as they are", units), ("matched", linear_sum_assignment(matrix, maximize=True)[1])):
        found = matrix[units, partners]
        order = np.argsort(-found, kind="stable")
        columns = {"unit": units[order], "partner": partners[order], "correlation": found[order]}
        tables.append(pd.DataFrame({"kind": kind, "rank": units} | columns))
    return pd.concat(tables, ignore_index=True)


def _variances(model: nn.Module, x: Tensor, layers: Sequence[str] | None, batch: int) -> dict[str, float]:
    """The variance over samples, averaged over units, by layer, in the order in which layers run."""
    found: dict[str, Moments] = {}
    for part in x.split(batch):
        for name, activation in activations(model, part, layers).items():
            rows = _samples(activation).double()
            var, mean = torch.var_mean(rows, 0, correction=0)
            found.setdefault(name, Moments()).add(mean, var, len(rows))
    return {name: float(moments.var().mean()) for name, moments in found.items()}


def _samples(activation: Tensor) -> Tensor:
    """An activation as rows of units: places of images (N, C, H, W) and tokens (N, L, F) are samples of their own."""
    if activation.ndim == 1:
        return activation.unsqueeze(1)
    return (activation.movedim(1, -1) if activation.ndim > 3 else activation).flatten(0, -2)


def _check_rows(x: Tensor) -> None:
    if len(x) < 2:
        raise ValueError(f"x: {len(x)} rows are too few; give 2 or more")
