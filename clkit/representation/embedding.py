"""One picture of several networks' features: a joint embedding in the plane, and the numbers that it illustrates."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clkit import checks
from clkit.checks import Positive
from clkit.representation.similarity import cka, mismatch

if TYPE_CHECKING:
    from pandas import DataFrame


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
