"""The ledger, the gallery and the README say what the result files say; every number of the texts stands in a file."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from clkit import store
from clkit.experiments import difference
from studies import ledger
from test_repository import KERNEL, NOTEBOOKS, README, ROOT, cells, text

NUMBER = r"(?<![\w.,])\d+\.\d+(?!\w|\.\d)|(?<![\w.])\d+(?:\.\d+)?(?= ?%)"
APART = r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|<code>.*?</code>|^\|.*?$|\d{4}\.\d{5}"
APART += r"|<!-- (\w+) -->.*?<!-- end of \1"


def test_every_row_has_a_verdict_or_a_reason_and_names_what_is_there():
    whole = ledger.table(ROOT)  # reading raises for a file, a label or a claim that is missing
    assert not whole.verdict[whole.verdict == ""].size
    figures = {name for row in ledger.ROWS.values() for name in row.get("figures", [])}
    assert not {name for name in figures if not (ROOT / "figures" / f"{name}.png").is_file()}
    known = {"item", "published", *ledger.SCALES, "figures", "claims", "reason", "needs", "headline"}
    assert not {name for row in ledger.ROWS.values() for name in row} - known


def test_a_row_that_names_what_is_not_there_is_refused_and_one_seed_has_no_interval(tmp_path):
    one = {"key": "a", "text": "it gains", "scale": "real", "effect": 0.1, "lower": None, "upper": None, "n": 1}
    one |= {"paper": "", "verdict": "open", "gaps": [0.1], "claimed": [0, None]}
    (tmp_path / "figures").mkdir()
    store.write_json(tmp_path / "figures/03-x-claims.json", {"claims": [one]})
    table = {"columns": ["method", "seed", "acc"], "data": [["ER", 0, 0.5]]}
    store.write_json(tmp_path / "figures/03-x-runs.json", {"data": {"table": table}})
    assert ledger.claimed("03-x: a", tmp_path / "figures") == "**open**: it gains (0.100 no interval, 1 seed, real)"
    assert ledger.claims(tmp_path).inside.isna().all()
    with pytest.raises(ValueError, match="claims: 03-x: 'b' is unknown"):
        ledger.claimed("03-x: b", tmp_path / "figures")
    with pytest.raises(ValueError, match="03-x-runs: method: 'ERR' is unknown"):
        ledger._means(tmp_path / "figures", "03-x-runs", only=["ERR"])
    with pytest.raises(ValueError, match="03-x-runs: no rows where"):
        ledger._means(tmp_path / "figures", "03-x-runs", where={"method": "none"})


def test_a_number_at_the_end_of_a_sentence_counts():
    assert numbers("It is 0.85. Then 3.5, version 1.2.3, and 14 %.") == ["0.85", "3.5", "14"]


def test_every_table_and_figure_of_the_papers_has_a_row():
    rows = {re.match(r"[A-Z]\d+", key)[0] for key in ledger.ROWS}  # type: ignore[index]
    counts = {"C": 5, "F": 6, "A": 9, "S": 11, "H": 12}
    assert rows == {f"{letter}{i}" for letter, count in counts.items() for i in range(1, count + 1)}


@pytest.mark.parametrize("name", ["README.md", "figures/README.md"])
def test_what_is_made_of_the_ledger_is_as_committed(name):
    assert (ROOT / name).read_text(encoding="utf-8") == ledger.pages(ROOT)[ROOT / name], "python -m studies.ledger"


def numbers(content: str) -> list[str]:
    """The decimal numbers and percentages of a text, but those in code, formulas, links and tables."""
    return re.findall(NUMBER, re.sub(APART, "", content, flags=re.S | re.M))


def settings(content: str) -> set[float]:
    """The numbers that stand in code or data."""
    return {float(found) for found in re.findall(r"(?<![\w.])\d+\.?\d*(?:e-?\d+)?", content)}


def stored(stem: str) -> set[float]:
    """The numbers of a notebook's result files."""
    files = [*(ROOT / "figures").glob(f"{stem}-*.json"), *(ROOT / "figures").glob(f"{stem}-*.csv")]
    return set().union(*(settings(file.read_text(encoding="utf-8")) for file in files))


def is_told(number: str, known: set[float]) -> bool:
    """Whether a number is one of those known, as it is or in percent, to its own rounding."""
    digits = len(number.partition(".")[2])
    return any(round(k, digits) == float(number) or round(100 * k, digits) == float(number) for k in known)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_number_of_a_text_is_a_setting_or_stands_in_a_file(path):
    """Settings stand in the notebook's code; what was published, in the studies' folder of that name."""
    published = "".join(f.read_text(encoding="utf-8") for f in (ROOT / "notebooks/studies/published").iterdir())
    texts = [text(cell) for cell in cells(path, "markdown")]
    code = "".join(text(cell) for cell in cells(path)) + "".join(re.findall(r"```.*?```", "".join(texts), re.S))
    known = settings(code + published) | {0.95, 1.0}
    left = [(number, content) for content in texts for number in numbers(content) if not is_told(number, known)]
    results = stored(path.stem) if left else set()
    typed = [(number, content[:60]) for number, content in left if not is_told(number, results)]
    assert not typed


def test_every_number_of_the_front_pages_stands_in_a_file():
    table = pd.read_csv(ROOT / "figures" / "bfloat16.csv").pivot(index="seed", columns="precision")
    gap = difference(table.acc.bfloat16 - table.acc.float32)
    faster = table.seconds.float32.mean() / table.seconds.bfloat16.mean()
    known = {gap.mean, -gap.lower, gap.upper, faster, 0.95, 3.11}
    assert not [number for number in numbers(README + KERNEL) if not is_told(number, known)]
    assert json.loads(Path(ROOT / "figures" / "bench.json").read_text())
