"""How alike the features of networks are on the same inputs: kernel alignment, distances, one picture of all."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit import checks
from clkit.checks import Positive, Range
from clkit.models import activations
from clkit.models.features import check_layers

if TYPE_CHECKING:
    from pandas import DataFrame

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

    Memory is that of N x N kernels; `cka_in_batches` needs less.
    """
    _check_rows(a, b, 4 if unbiased else 2)
    k, l = (_gram(f, kernel, bandwidth) for f in (a, b))
    return float(_ratio(*(hsic(p, q, unbiased=unbiased) for p, q in ((k, l), (k, k), (l, l)))))


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
        _check_rows(a, b, 4)
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
    batch: Annotated[int, Range(7)] = 128,
) -> "DataFrame":
    """Minibatch CKA of every one of `layers` of `first` with every one of `others` (default: the same) of `second`.

    A table with a row for each layer of the first model and a column for each of the second's. Both models run once
    over `x` (N, ...). Its rows are split evenly into batches of at most `batch`, and only kernels of one batch are
    held. Raises ValueError for unknown layers, for layers that do not run, and for fewer than 4 rows.
    """
    import pandas as pd

    names = (list(layers), list(layers if others is None else others))
    for model, wanted in zip((first, second), names, strict=True):
        check_layers(model, wanted)
    if len(x) < 4:
        raise ValueError(f"x: {len(x)} rows are too few; give 4 or more")
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


def mismatch(a: Tensor, b: Tensor, labels: Tensor | None = None) -> "DataFrame":
    """The means of `distances` over all examples and, with `labels` (N,), over those of each class.

    A table with the columns class ("all", then each label), examples, l1, l2, cosine. For the representation before
    and after a merge: HCMM (arXiv 2509.23592, figure 3). Raises ValueError for unequal shapes, labels among them.
    """
    import pandas as pd

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


def _check_rows(a: Tensor, b: Tensor, least: int) -> None:
    if len(a) != len(b):
        raise ValueError(f"a, b: {len(a)} and {len(b)} examples; pass features of the same inputs, in the same order")
    if len(a) < least:
        raise ValueError(f"a, b: {len(a)} examples are too few; give {least} or more")


def _gram(features: Tensor, kernel: Kernel, bandwidth: float) -> Tensor:
    """The kernel of features (n, ...) with each other, (n, n), in double precision."""
    rows = features.flatten(1).double()
    largest, rows = rows.abs().max(), rows - rows.mean(0)  # which changes no centred kernel and keeps digits
    rows = torch.where(rows.abs().max() > 1e-12 * largest, rows, 0.0)  # what is left of a constant is rounding
    if kernel == "linear":
        return rows @ rows.T
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    n = len(rows)
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

    points: "DataFrame"
    agreement: "DataFrame"


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

    t-SNE needs more points than `perplexity`, which is lowered to a third of the points where they are few. Raises
    ValueError for features of different shapes, for classes without an example and for fewer than 4 points.
    """
    import pandas as pd
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


def _agreement(features: Mapping[str, Tensor], labels: Tensor) -> "DataFrame":
    import pandas as pd

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
