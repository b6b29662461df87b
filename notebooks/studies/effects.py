"""Effects of claims, from tables of runs to a number for each seed."""

from collections.abc import Sequence

import pandas as pd


def mean_gain(rows: pd.DataFrame, names: Sequence[str], base: str) -> pd.Series:
    """How much the methods of these names gain over `base`, on average over them."""
    acc = rows.pivot(index="seed", columns="method", values="acc")
    return acc[list(names)].mean(axis=1) - acc[base]
