"""What CLeWI's released runs gave, from which the paper's tables are made, and our gains beside theirs.

Means and standard deviations over 5 seeds (ddof 0) in percent; the forgetting measure FM divides by the number of
tasks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clkit.experiments.statistics import difference

if TYPE_CHECKING:
    import pandas as pd

DATASETS = ("cifar10", "cifar100", "tiny-imagenet")
PAIRS = ("ER", "A-GEM", "ER-ACE", "MIR", "BiC", "DER++")

# method: (average accuracy, its spread, FM, its spread) on each of DATASETS
PUBLISHED = {
    "joint": ((91.79, 0.36, 0, 0), (70.54, 0.75, 0, 0), (58.34, 0.24, 0, 0)),
    "fine-tuning": ((19.37, 0.32, 77.77, 0.85), (9.07, 0.10, 80.57, 0.41), (3.92, 0.27, 74.75, 1.34)),
    "online EWC": ((17.21, 2.89, 69.94, 3.98), (8.86, 0.51, 76.05, 0.43), (3.71, 0.23, 70.14, 1.60)),
    "SI": ((19.28, 0.40, 78.11, 0.38), (6.36, 0.53, 36.99, 1.32), (3.64, 0.40, 67.97, 2.10)),
    "iCaRL": ((58.98, 1.21, 25.27, 4.72), (46.91, 0.66, 25.56, 0.57), (19.69, 0.37, 20.24, 0.54)),
    "GDumb": ((39.70, 1.57, 0.66, 0.65), (9.99, 0.68, 0.00, 0.00), (3.20, 0.31, 0.22, 0.15)),
    "ER": ((53.22, 2.98, 44.02, 3.59), (22.45, 1.26, 65.59, 1.07), (6.44, 0.38, 75.88, 0.23)),
    "ER + CLeWI": ((62.80, 2.31, 31.80, 2.61), (40.31, 1.08, 12.81, 0.79), (11.68, 0.45, 66.82, 0.49)),
    "A-GEM": ((21.88, 1.15, 75.63, 0.96), (9.17, 0.18, 80.33, 0.34), (3.62, 0.54, 73.61, 3.29)),
    "A-GEM + CLeWI": ((34.74, 4.05, 4.16, 1.92), (22.75, 1.41, 39.07, 2.26), (6.80, 0.40, 60.22, 1.17)),
    "ER-ACE": ((70.63, 1.15, 10.11, 0.95), (37.75, 1.23, 35.15, 1.33), (15.98, 1.64, 42.47, 2.43)),
    "ER-ACE + CLeWI": ((64.22, 2.50, 4.84, 0.67), (36.97, 0.55, 17.72, 0.76), (19.15, 0.72, 19.70, 0.88)),
    "MIR": ((48.17, 3.23, 49.02, 3.72), (21.96, 1.13, 66.07, 0.95), (6.25, 0.41, 76.06, 0.30)),
    "MIR + CLeWI": ((73.06, 0.74, 6.71, 0.84), (40.06, 0.84, 13.54, 0.54), (19.75, 0.56, 25.47, 0.43)),
    "BiC": ((69.63, 2.28, 22.04, 3.04), (37.55, 1.64, 44.42, 1.87), (7.09, 0.78, 71.47, 0.87)),
    "BiC + CLeWI": ((51.15, 9.53, 26.48, 4.96), (39.46, 1.34, 33.46, 1.46), (7.35, 1.40, 65.34, 0.79)),
    "DER++": ((70.13, 1.16, 21.11, 1.46), (36.64, 1.59, 48.06, 2.62), (13.52, 1.53, 55.68, 4.36)),
    "DER++ + CLeWI": ((71.82, 2.11, 11.21, 2.16), (38.16, 1.86, 14.32, 1.95), (16.61, 0.87, 25.17, 6.34)),
}
# the weight of the old network in each pair, and the learning rates, on each of DATASETS
ALPHA = {
    "ER": (0.3, 0.5, 0.2),
    "A-GEM": (0.5, 0.5, 0.5),
    "ER-ACE": (0.3, 0.2, 0.3),
    "MIR": (0.5, 0.5, 0.5),
    "BiC": (0.5, 0.5, 0.5),
    "DER++": (0.2, 0.2, 0.2),
}
RATE = {
    "joint": (0.03, 0.0392, 0.03),
    "fine-tuning": (0.1, 0.0565, 0.03),
    "online EWC": (0.03, 0.01, 0.03),
    "SI": (0.03, 0.01, 0.03),
    "iCaRL": (0.1, 0.3, 0.03),
    "GDumb": (0.05, 0.05, 0.05),
    "ER": (0.1, 0.1, 0.03),
    "ER + CLeWI": (0.1, 0.1, 0.1),
    "A-GEM": (0.03, 0.05, 0.01),
    "A-GEM + CLeWI": (0.03, 0.03, 0.03),
    "ER-ACE": (0.03, 0.03, 0.03),
    "ER-ACE + CLeWI": (0.03, 0.03, 0.03),
    "MIR": (0.1, 0.0918, 0.1),
    "MIR + CLeWI": (0.03, 0.03, 0.03),
    "BiC": (0.03, 0.03, 0.03),
    "BiC + CLeWI": (0.03, 0.03, 0.03),
    "DER++": (0.03, 0.03, 0.03),
    "DER++ + CLeWI": (0.1, 0.1, 0.1),
}


def published(dataset: str) -> "pd.DataFrame":
    """The released runs' main table on one of DATASETS: a row a method, acc and FM with their spreads, shares of 1."""
    import pandas as pd

    numbers = {name: values[DATASETS.index(dataset)] for name, values in PUBLISHED.items()}
    return pd.DataFrame.from_dict(numbers, "index", columns=["acc", "acc_std", "fm", "fm_std"]) / 100


def side_by_side(tables: Mapping[str, "pd.DataFrame"]) -> "pd.DataFrame":
    """Main tables in the paper's shape: a row a method, "average accuracy ± spread (FM)" in percent by name of table.

    FM is the paper's, forgetting times (T - 1) / T; spreads have n - 1 in the denominator. A table is one of runs, with
    the stream's number of tasks in its name, or what `published` gives.
    """
    import pandas as pd

    columns = {}
    for title, table in tables.items():
        if "fm" in table:
            values = table.rename(columns={"acc_std": "std"})
        else:
            tasks = table.stream.str.extract(r"(\d+) tasks")[0].astype(int)
            runs = table.assign(fm=table.forgetting * (tasks - 1) / tasks).groupby("method", sort=False)
            values = pd.DataFrame({"acc": runs.acc.mean(), "std": runs.acc.std(), "fm": runs.fm.mean()})
        columns[title] = {
            name: f"{100 * row['acc']:.1f} ± {100 * row['std']:.1f} ({100 * row['fm']:.1f})"
            for name, row in values.iterrows()
        }
    return pd.DataFrame(columns).reindex(list(PUBLISHED)).fillna("")


def gains(table: "pd.DataFrame", kind: str = "CLeWI", level: float = 0.95) -> "pd.DataFrame":
    """What CLeWI adds to each learner of a main table, seed by seed, beside what was published.

    A row a learner that has a pair `<learner> + <kind>`: its average accuracy `alone`; the mean `gain` over the seeds
    with the ends of Student's `level` interval, `lower` and `upper`; `verdict`, "gains", "loses", or "open" where 0 is
    in the interval; `less`, by how much forgetting falls; the published gains on each of DATASETS (NaN where there is
    none); and the learner's own weight_change, fisher_trace and plasticity, where the table has them.
    """
    import pandas as pd

    wide = {value: table.pivot(index="seed", columns="method", values=value) for value in ("acc", "forgetting")}
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(table.method):
        pair = f"{name} + {kind}"
        if pair not in wide["acc"]:
            continue
        gap = difference(wide["acc"][pair] - wide["acc"][name], level)
        row: dict[str, Any] = {"alone": wide["acc"][name].mean(), "gain": gap.mean}
        row |= {"lower": gap.lower, "upper": gap.upper, "verdict": gap.verdict}
        row["less"] = (wide["forgetting"][name] - wide["forgetting"][pair]).mean()
        for place, dataset in enumerate(DATASETS):
            acc = [PUBLISHED[n][place][0] if name in PAIRS else float("nan") for n in (f"{name} + CLeWI", name)]
            row[dataset] = (acc[0] - acc[1]) / 100
        own = [column for column in ("weight_change", "fisher_trace", "plasticity") if column in table]
        rows[name] = row | table[table.method == name][own].mean().to_dict()
    return pd.DataFrame.from_dict(rows, orient="index")
