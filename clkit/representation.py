"""What networks represent: features at any layer, how alike two networks' are, how they change when weights merge.

Everything here is pure: models, weights and inputs are left as they were, and results are numbers and tables. A model
is a network, or one linearised (`tangent.Linearized`), whose layers are read at their linearised values. Inputs are
prepared tensors on the model's device.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit import checks, normalization
from clkit.checks import Count, Positive
from clkit.models.features import activations, check_layers, features, with_weights
from clkit.normalization import Moments
from clkit.weights import Weights, lerp

Kernel = Literal["linear", "rbf"]


def hsic(k: Tensor, l: Tensor, *, unbiased: bool = False) -> Tensor:
    """The Hilbert-Schmidt independence criterion of two kernel matrices (..., n, n) of the same examples.

    Biased: tr(K H L H) / (n - 1)^2 with H the centring matrix (Gretton et al. 2005). Leading axes broadcast.

    Unbiased, which is 0 in expectation for independent features and needs 4 examples (Song et al. 2012, eq. 5):
    [tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2 1'K~ L~1 / (n-2)] / (n (n-3)).
    The diagonals of K~ and L~ are 0.
    """
    n = k.shape[-1]
    if not unbiased:
        centred = k - k.mean(-1, keepdim=True)
        centred = centred - centred.mean(-2, keepdim=True)
        return (centred * l).sum((-2, -1)) / (n - 1) ** 2
    k, l = (m - torch.diag_embed(m.diagonal(dim1=-2, dim2=-1)) for m in (k, l))
    sums, others = k.sum(-1), l.sum(-1)
    both = sums.sum(-1) * others.sum(-1) / ((n - 1) * (n - 2))
    return ((k * l).sum((-2, -1)) + both - 2 / (n - 2) * (sums * others).sum(-1)) / (n * (n - 3))


@checks.arguments
def cka(a: Tensor, b: Tensor, *, kernel: Kernel = "linear", bandwidth: Positive = 1.0, unbiased: bool = False) -> float:
    """Centred kernel alignment of features `a` (N, ...) and `b` (N, ...) of the same N examples; 1 is alike.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) in double precision (Kornblith et al. 2019, arXiv 1905.00414), features
    flattened. It does not change with rotations, reflections and a common scale of either's features; the linear one
    is 1 for such a pair. `kernel` "rbf" is exp(-d^2 / (2 s^2)), with s `bandwidth` times the median distance between
    two examples. Biased it is in [0, 1] and large where features outnumber examples; `unbiased` takes that away, can
    be below 0, and needs 4 examples. NaN where one of the features is the same for all examples, or for most ("rbf").

    The linear kernel takes no more memory than the features in double precision: where they are fewer than the examples
    no kernel is made. "rbf" takes 5 N x N numbers, 16 GB for 20,000 examples, and raises ValueError where they are
    not free; `cka_in_batches` needs less.
    """
    _check_rows(4 if unbiased else 2, a, b)
    narrow = kernel == "linear" and max(f[0].numel() for f in (a, b)) < len(a)
    k, l = (_centred(f) if narrow else _gram(f, kernel, bandwidth) for f in (a, b))
    criterion = partial(_linear_hsic if narrow else hsic, unbiased=unbiased)
    return float(_ratio(*(criterion(p, q) for p, q in ((k, l), (k, k), (l, l)))))


@checks.arguments
def cka_in_batches(
    pairs: Iterable[tuple[Tensor, Tensor]], *, kernel: Kernel = "linear", bandwidth: Positive = 1.0
) -> float:
    """Minibatch CKA: the three unbiased HSIC are averaged over batches of features (n, ...), then their ratio is taken.

    Nguyen, Raghu, Kornblith 2021 (arXiv 2010.15327, eq. 4). Its expectation does not depend on the size of the batches,
    which have 4 examples at least and count alike; memory is that of one batch. The median distance of the "rbf"
    kernel is each batch's own. `pairs` may be a generator. Raises ValueError for no pairs and for smaller batches.
    """
    total, count = torch.zeros(3, dtype=torch.float64), 0
    for a, b in pairs:
        _check_rows(4, a, b)
        k, l = (_gram(f, kernel, bandwidth) for f in (a, b))
        total = total + torch.stack([hsic(p, q, unbiased=True) for p, q in ((k, l), (k, k), (l, l))]).cpu()
        count += 1
    if not count:
        raise ValueError("pairs: there are none; pass at least one pair of features")
    return float(_ratio(*(total / count)))


@torch.no_grad()
@checks.arguments
def cka_by_layer(
    first: nn.Module,
    second: nn.Module,
    x: Tensor,
    layers: Sequence[str],
    others: Sequence[str] | None = None,
    *,
    kernel: Kernel = "linear",
    bandwidth: Positive = 1.0,
    batch: Annotated[int, checks.Range(7)] = 128,
) -> pd.DataFrame:
    """Minibatch CKA of every one of `layers` of `first` with every one of `others` (default: the same) of `second`.

    A table with a row for each layer of the first model and a column for each of the second's. Both models run once
    over `x` (N, ...). Its rows are split evenly into batches of at most `batch`, and only kernels of one batch are
    held. Raises ValueError for unknown layers, for layers that do not run, and for fewer than 4 rows.
    """

    names = (list(layers), list(layers if others is None else others))
    for model, wanted in zip((first, second), names, strict=True):
        check_layers(model, wanted)
    _check_rows(4, x)
    cross, own = torch.zeros(*map(len, names), dtype=torch.float64), [torch.zeros(len(n)).double() for n in names]
    for rows in x.tensor_split(-(-len(x) // batch)):
        grams = []
        for model, wanted in zip((first, second), names, strict=True):
            found = activations(model, rows, wanted)
            if missing := [name for name in wanted if name not in found]:
                raise ValueError(f"layers: {missing[0]!r} does not run in the model's forward pass; leave it out")
            grams.append(torch.stack([_gram(found[name], kernel, bandwidth) for name in wanted]))
        cross += torch.stack([hsic(gram, grams[1], unbiased=True) for gram in grams[0]]).cpu()
        for total, gram in zip(own, grams, strict=True):
            total += hsic(gram, gram, unbiased=True).cpu()
    return pd.DataFrame(_ratio(cross, own[0].unsqueeze(1), own[1]).numpy(), index=names[0], columns=names[1])


def distances(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """How far apart two networks' features (N, ...) of the same examples are, each (N,), in double precision.

    "l1": the mean over features of |a - b|. "l2": the root of the mean over features of (a - b)^2, in the same unit.
    "cosine": 1 - cos(a, b), in [0, 2]; two vectors of zeros are at 0, one at 1. Raises ValueError for unequal shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"a, b: features of shapes {tuple(a.shape)} and {tuple(b.shape)}; pass one layer's of both")
    a, b = (f.flatten(1).double() for f in (a, b))
    off = a - b
    zeros = (a == 0).all(1) & (b == 0).all(1)
    cosine = (1 - F.cosine_similarity(a, b)).masked_fill(zeros, 0.0)
    return {"l1": off.abs().mean(1), "l2": off.square().mean(1).sqrt(), "cosine": cosine}


def mismatch(a: Tensor, b: Tensor, labels: Tensor | None = None) -> pd.DataFrame:
    """The means of `distances` over all examples and, with `labels` (N,), over those of each class.

    A table with the columns class ("all", then each label), examples, l1, l2, cosine. For the representation before
    and after a merge: HCMM (arXiv 2509.23592, figure 3). Raises ValueError for unequal shapes, labels among them.
    """

    found = distances(a, b)
    if labels is not None and labels.shape != a.shape[:1]:
        raise ValueError(f"labels: {tuple(labels.shape)} for {len(a)} examples; pass one label for each")
    groups: list[tuple[object, Tensor]] = [("all", torch.ones(len(a), dtype=torch.bool, device=a.device))]
    if labels is not None:
        groups += [(int(c), labels == c) for c in labels.unique()]
    return pd.DataFrame(
        {"class": name, "examples": int(rows.sum())} | {key: float(d[rows].mean()) for key, d in found.items()}
        for name, rows in groups
    )


def _linear_hsic(a: Tensor, b: Tensor, *, unbiased: bool) -> Tensor:
    """`hsic` of the kernels A A' and B B' of centred features (n, f): tr(A A' B B') is the squared length of A'B."""
    n, both = len(a), (a.T @ b).square().sum()
    if not unbiased:
        return both / (n - 1) ** 2
    own, other = a.square().sum(1), b.square().sum(1)  # the diagonals; the rest of a row sums to minus its entry there
    apart = own.sum() * other.sum() / ((n - 1) * (n - 2))
    return (both + apart - n / (n - 2) * (own @ other)) / (n * (n - 3))


def _centred(features: Tensor) -> Tensor:
    """Features (n, ...) without their mean, (n, f), in double precision: no centred kernel changes, and digits stay."""
    rows = features.flatten(1).double()
    largest, rows = rows.abs().max(), rows - rows.mean(0)
    return torch.where(rows.abs().max() > 1e-12 * largest, rows, 0.0)  # what is left of a constant is rounding


def _gram(features: Tensor, kernel: Kernel, bandwidth: float) -> Tensor:
    """The kernel of features (n, ...) with each other, (n, n), in double precision."""
    rows = _centred(features)
    if kernel == "linear":
        return rows @ rows.T
    n = len(rows)
    checks.room(f"a, b: kernels of {n} examples", 40 * n**2, rows.device, "use cka_in_batches, fewer at once")
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    middle = apart[torch.ones(n, n, dtype=torch.bool, device=rows.device).triu(1)].median()
    return torch.exp(-apart.square() / (2 * (bandwidth * middle).square()))


def _ratio(cross: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """NaN where one of the two does not vary."""
    return torch.where((a > 0) & (b > 0), cross / (a.clamp(min=0) * b.clamp(min=0)).sqrt(), torch.nan)


class Embedding(NamedTuple):
    """Where the features lie in the plane, and how alike they are in the space they come from.

    `points` has a row for each model and example: model, class, example (its row in the features), x, y. `agreement`
    has one for each pair of models and class ("all" first): first, second, class, examples, l1, l2, cosine, cka.
    """

    points: pd.DataFrame
    agreement: pd.DataFrame


@checks.arguments
def embed(
    features: Mapping[str, Tensor],
    labels: Tensor,
    classes: Sequence[int] | None = None,
    *,
    method: Literal["tsne", "pca"] = "tsne",
    seed: int = 0,
    perplexity: Positive = 30.0,
) -> Embedding:
    """Embeds the features (N, ...) of the same N examples under several models in one plane, all stacked.

    `features` maps a model's name to what it makes of the examples, `labels` (N,) are theirs; `classes` keeps some of
    them. "tsne" is scikit-learn's, begun from the principal components, "pca" the first two of these. HCMM (arXiv
    2509.23592, figure 5) shows one class before and after a merge so. Distances in such a picture prove nothing: the
    numbers beside it, `mismatch` and linear unbiased `cka` in the features' own space (NaN below 4 examples), do.

    t-SNE keeps three times `perplexity` neighbours a point: memory grows with the points, not with their square. It
    needs more points than `perplexity`, which is lowered to a third of the points where they are few. Raises
    ValueError for features of different shapes, for classes without an example and for fewer than 4 points.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if not features:
        raise ValueError('features: there are none; pass at least one, such as {"before": features(model, x)}')
    shapes = {name: tuple(f.shape) for name, f in features.items()}
    if len(set(shapes.values())) > 1 or next(iter(shapes.values()))[:1] != tuple(labels.shape):
        raise ValueError(f"features: shapes {shapes} for {len(labels)} labels; pass one layer of the same examples")
    wanted = [int(c) for c in (labels.unique() if classes is None else classes)]
    if missing := [c for c in wanted if not (labels == c).any()]:
        raise ValueError(f"classes: {missing[0]} has no example; choose among {labels.unique().tolist()}")
    rows = torch.isin(labels, torch.tensor(wanted, device=labels.device))
    kept = {name: f[rows].flatten(1) for name, f in features.items()}
    own = labels[rows]
    stacked = torch.cat(list(kept.values())).double().cpu().numpy()
    if len(stacked) < 4:
        raise ValueError(f"features: {len(stacked)} points are too few for a picture; keep more examples or classes")
    if method == "tsne":
        near = min(perplexity, (len(stacked) - 1) / 3)
        flat = TSNE(2, perplexity=near, init="pca", random_state=seed).fit_transform(stacked)
    else:
        flat = PCA(2, svd_solver="full").fit_transform(stacked)
    points = pd.DataFrame(
        {
            "model": np.repeat(list(kept), len(own)),
            "class": np.tile(own.cpu().numpy(), len(kept)),
            "example": np.tile(rows.nonzero().squeeze(1).cpu().numpy(), len(kept)),
            "x": flat[:, 0].astype(float),
            "y": flat[:, 1].astype(float),
        }
    )
    return Embedding(points, _agreement(kept, own))


def _agreement(features: Mapping[str, Tensor], labels: Tensor) -> pd.DataFrame:

    tables = []
    for first, second in combinations(features, 2):
        a, b = features[first], features[second]
        table = mismatch(a, b, labels)
        groups = [labels == c if c != "all" else torch.ones_like(labels, dtype=torch.bool) for c in table["class"]]
        table["cka"] = [cka(a[g], b[g], unbiased=True) if int(g.sum()) >= 4 else float("nan") for g in groups]
        table.insert(0, "first", first)
        table.insert(1, "second", second)
        tables.append(table)
    columns = ["first", "second", "class", "examples", "l1", "l2", "cosine", "cka"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


@checks.arguments
def variance_ratio(
    model: nn.Module,
    merged: Weights,
    parents: Sequence[Weights],
    x: Tensor,
    layers: Sequence[str] | None = None,
    *,
    batch: Count = 256,
) -> pd.DataFrame:
    """How much of its parents' activation variance a merged network keeps, layer by layer; 1 is all, 0 collapse.

    The variance of every unit over all examples and positions, averaged over units, divided by the mean of the same
    over `parents`: the measure of variance collapse in REPAIR (Jordan et al., arXiv 2211.08403, figure 2). `layers`
    is as for `activations`. A table with the columns layer, merged, parents, ratio; layers in the order in which they
    run. NaN where the parents do not vary. Raises ValueError for no parents and for fewer than 2 rows of `x` (N, ...).
    """

    if not parents:
        raise ValueError("parents: there are none; pass the weights that were merged")
    _check_rows(2, x)
    found = [_variances(with_weights(model, w), x, layers, batch) for w in (merged, *parents)]
    parts = {"merged": pd.Series(found[0]), "parents": pd.DataFrame(found[1:]).mean()}
    table = pd.DataFrame(parts).rename_axis("layer").reset_index()
    return table.assign(ratio=(table["merged"] / table["parents"]).where(table["parents"] > 0))


def collapse(
    model: nn.Module,
    a: Weights,
    b: Weights,
    x: Tensor,
    t: float = 0.5,
    layers: Sequence[str] | None = None,
    *,
    batch: Count = 256,
) -> pd.DataFrame:
    """The collapse of variance between `a` (t = 0) and `b` (t = 1), and what re-estimation and REPAIR undo of it.

    The table of `variance_ratio` for three networks, told apart by the column variant: "merged", which is
    `lerp(a, b, t)`, "refreshed" and "repaired", what `normalization.refresh` and `normalization.repair` make of it on
    the same inputs.
    """

    merged = lerp(a, b, t)
    variants = {
        "merged": merged,
        "refreshed": normalization.refresh(model, merged, x, batch=batch),
        "repaired": normalization.repair(model, merged, ends=(a, b), t=t, inputs=x, batch=batch),
    }
    tables = [variance_ratio(model, w, (a, b), x, layers, batch=batch) for w in variants.values()]
    return pd.concat(tables, keys=list(variants), names=["variant"]).reset_index("variant").reset_index(drop=True)


@checks.arguments
def correlations(
    model: nn.Module, a: Weights, b: Weights, x: Tensor, layer: str | None = None, *, batch: Count = 256
) -> Tensor:
    """Pearson's correlation of each unit of a layer under weights `a` with each under `b`, (units, units), on `x`.

    Over all examples and positions, added up in double precision batch by batch, so that memory does not grow with
    `x` (N, ...): it is about four times that of the result. A unit that does not vary correlates 0 with all. `layer` is
    as for `features`. Raises ValueError for fewer than 2 rows.
    """
    _check_rows(2, x)
    nets = [with_weights(model, w) for w in (a, b)]
    moments, shift, products = Moments(), torch.zeros(()), torch.zeros(())
    for part in x.split(batch):
        rows = torch.cat([_samples(features(net, part, layer)).double() for net in nets], 1)
        var, mean = torch.var_mean(rows, 0, correction=0)
        shift = shift if moments.count else mean  # for large means would cancel
        moments.add(mean, var, len(rows))
        one, other = (rows - shift).tensor_split(2, 1)
        products = products + one.T @ other
    covariance = products / moments.count - torch.outer(*(moments.mean - shift).tensor_split(2))
    var = torch.where(moments.var() > 1e-12 * moments.mean.square(), moments.var(), 0.0)
    scale = torch.outer(*var.tensor_split(2)).sqrt()
    return torch.where(scale > 0, covariance / scale, 0.0).clamp(-1, 1)


def matched(
    model: nn.Module, a: Weights, b: Weights, x: Tensor, layer: str | None = None, *, batch: Count = 256
) -> pd.DataFrame:
    """The spectrum of correlations between the units of a layer under `a` and under `b`, before and after matching.

    One linear assignment pairs each unit of `a` with one of `b` so that the sum of `correlations` is largest (Li et al.
    2016, arXiv 1511.07543). A table with the columns kind ("as they are": unit i with unit i; "matched"),
    rank (0 for the largest correlation), unit (of `a`), partner (of `b`), correlation.
    """
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


def _check_rows(least: int, *inputs: Tensor) -> None:
    counts = [len(rows) for rows in inputs]
    if len(set(counts)) > 1:
        found = " and ".join(map(str, counts))
        raise ValueError(f"a, b: {found} examples; pass features of the same inputs, in the same order")
    if counts[0] < least:
        raise ValueError(f"x: {counts[0]} examples are too few; give {least} or more")
