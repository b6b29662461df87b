"""The ledger: every table and figure of the four papers, what was published, what stands here, and the verdict.

`published/ledger.toml` names the items, and the stored results and claims that answer them; numbers and verdicts are
read from these files. `python -m studies.ledger` writes what is made of it anew: the ledger of README.md, and the
gallery of figures, figures/README.md.
"""

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clkit import checks, store
from clkit.experiments import repository

ROWS = tomllib.loads(Path(__file__).with_name("published").joinpath("ledger.toml").read_text(encoding="utf-8"))
SCALES = ("fast", "real", "paper")
PAPERS = {"C": "CLeWI", "A": "AWM", "S": "SFA", "H": "HCMM"}
SHORT = ("item", "published", "fast", "real", "claims")
HEAD = ("item", "published", *SCALES, "seeds", "verdict", "what it would take")
MARKS = "<!-- ledger -->\n", "<!-- end of ledger -->\n"


def table(root: Path | None = None, *, headline: bool = False) -> pd.DataFrame:
    """The ledger, or with `headline` its short form: a row an item, numbered as in the notebook.

    Columns: what it is and what was published; what is stored at each of `SCALES`, means over `seeds`; the claims'
    verdicts with effects and 95 % intervals, or the reason why there is none; what it would take at the paper's scale.
    """
    figures = (root or repository()) / "figures"
    rows = {key: row for key, row in ROWS.items() if "headline" in row or not headline}
    return pd.DataFrame([_row(row, figures) for row in rows.values()], list(rows), list(HEAD))


def short(root: Path | None = None) -> pd.DataFrame:
    """The headlines in brief: a row an item, of those methods alone that its `headline` lists.

    Columns: what it is and what was published; means at the fast and the real scale; how many claims hold, do not hold
    and are open.
    """
    figures = (root or repository()) / "figures"
    rows = {key: row for key, row in ROWS.items() if "headline" in row}
    papers = [PAPERS.get(key[0], "CLeWI") for key in rows]
    return pd.DataFrame([_short(row, figures) for row in rows.values()], papers, list(SHORT))


def _short(row: Mapping[str, Any], figures: Path) -> list[str]:
    means = []
    for scale in ("fast", "real"):
        only = [name for name in row["headline"] if name in row.get(scale, {}).get("only", row["headline"])]
        means.append(_means(figures, **{**row[scale], "only": only})[0] if scale in row and only else "-")
    told = Counter(claimed(key, figures).split("**")[1] for key in row.get("claims", []))
    words = {"holds": ("holds", "hold"), "does not hold": ("does not", "do not"), "open": ("open", "open")}
    counts = [f"{told[verdict]} {one if told[verdict] == 1 else more}" for verdict, (one, more) in words.items()]
    return [row["item"], row.get("published", "-"), *means, ", ".join(text for text in counts if text[0] != "0")]


def _row(row: Mapping[str, Any], figures: Path) -> list[str]:
    found = {scale: _means(figures, **row[scale]) if scale in row else ("", 0) for scale in SCALES}
    seeds = ", ".join(str(n) for _, n in found.values() if n)
    told = [claimed(key, figures) for key in row.get("claims", [])] + ([row["reason"]] if "reason" in row else [])
    means = [text or "-" for text, _ in found.values()]
    return [row["item"], row.get("published", "-"), *means, seeds or "-", "; ".join(told), row.get("needs", "-")]


def _means(figures: Path, file: str, value: str = "acc", by: str = "method", **options: Any) -> tuple[str, int]:
    """Means of a stored table's column by the labels of another, in percent unless `unit` is "", and how many seeds."""
    stored = store.read_json(figures / f"{file}.json")["data"]["table"]
    rows: Any = pd.DataFrame(stored["data"], columns=stored["columns"])
    for column, label in options.get("where", {}).items():
        rows = rows[rows[column] == label]
    means = rows.groupby(by, sort=False)[value].mean()
    labels = [checks.choice(f"{file}: {by}", label, means.index) for label in options.get("only", means.index)]
    if not labels:
        raise ValueError(f"{file}: no rows where {options['where']}; name labels of the table")
    shown = [
        f"{100 * means[label]:.1f}" if options.get("unit", "%") == "%" else f"{means[label]:.3g}" for label in labels
    ]
    pairs = [f"{label} {number}" for label, number in zip(labels, shown, strict=True)]
    return ", ".join(pairs), rows["seed"].nunique() if "seed" in rows else 1


def claims(root: Path | None = None) -> pd.DataFrame:
    """All claims of all notebooks, a row each, as they are recorded.

    `gaps` are their effects seed by seed, `claimed` the ends between which the effect should lie. `inside` is how far
    it lies from the nearer end, in half-widths of its interval: 1 where the interval ends there, below 0 outside.
    """
    columns = ["key", "text", "paper", "scale", "effect", "lower", "upper", "n", "verdict", "gaps", "claimed"]
    parts = []
    for file in sorted(((root or repository()) / "figures").glob("*-claims.json")):
        rows = pd.DataFrame(store.read_json(file)["claims"], columns=columns)
        parts.append(rows.assign(notebook=file.stem.removesuffix("-claims")))
    found = pd.concat(parts, ignore_index=True).reindex(columns=["notebook", *columns])
    gaps = [
        min(math.inf if low is None else effect - low, math.inf if high is None else high - effect)
        for effect, (low, high) in zip(found["effect"], found["claimed"], strict=True)
    ]
    width = (found.upper - found.lower).astype(float)
    return found.assign(inside=2 * np.array(gaps) / width)


def claimed(key: str, figures: Path) -> str:
    """A claim's sentence, verdict, effect and interval, by "notebook: key"."""
    notebook, _, name = key.partition(": ")
    rows = {row["key"]: row for row in store.read_json(figures / f"{notebook}-claims.json")["claims"]}
    row = rows[checks.choice(f"claims: {notebook}", name, rows)]
    ends = "no interval" if row["lower"] is None else f"[{row['lower']:.3f}, {row['upper']:.3f}]"
    numbers = f"{row['effect']:.3f} {ends}, {row['n']} seed{'s' * (row['n'] > 1)}"
    scale = "" if row["scale"] == "fast" else f", {row['scale']}"
    return f"**{row['verdict']}**: {row['text']} ({numbers}{scale})"


def markdown(rows: pd.DataFrame) -> str:
    """A table for GitHub and notebooks."""
    lines = [
        ["", *rows.columns],
        ["---"] * (1 + len(rows.columns)),
        *rows.reset_index().astype(str).to_numpy().tolist(),
    ]
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in lines)


def gallery(root: Path) -> str:
    """Every figure under the heading of its notebook that it belongs to, and the papers' figures with their files."""
    text = "# Figures\n\nMade by `python -m studies.ledger` from the notebooks and `published/ledger.toml`.\n\n"
    text += "## The papers' figures\n\n| | figure | here |\n| --- | --- | --- |\n"
    for key, row in ROWS.items():
        if names := row.get("figures"):
            links = ", ".join(f"[{name}]({name}.png)" for name in names)
            text += f"| {PAPERS.get(key[0], 'CLeWI')} | {row['item']} | {links} |\n"
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        found = list(_captions(path))
        text += f"\n## [{path.stem}](../notebooks/{path.name})\n\n" if found else ""
        text += "".join(f"![{caption}]({path.stem}-{name}.png)\n*{caption}*\n\n" for name, caption in found)
    return text


def _captions(path: Path) -> Iterator[tuple[str, str]]:
    """The names of a notebook's figures, each with the heading above it."""
    heading = ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ (.+)$", source, re.M) or [heading])[-1]
        for name in re.findall(r'page\.save\(\s*[^"]*?"([a-z0-9-]+)"', source) if cell["cell_type"] == "code" else ():
            yield name, f"{heading}: {name.replace('-', ' ')}"


def pages(root: Path) -> dict[Path, str]:
    """The files that are made of the ledger, with what they should hold."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(MARKS[0])
    made = before + MARKS[0] + markdown(short(root)) + MARKS[1] + rest.split(MARKS[1])[1]
    return {root / "README.md": made, root / "figures" / "README.md": gallery(root)}


if __name__ == "__main__":
    for file, content in pages(repository()).items():
        store.write_text(file, content)
