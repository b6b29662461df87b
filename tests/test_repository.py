"""What a reader of the repository meets: the README's example runs, the notebooks hold the outputs they should."""

import ast
import csv
import importlib.util
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
KERNEL = (ROOT / "clkit" / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path, *kinds: str) -> list[dict]:
    """The cells of these kinds, of code if none is named."""
    book = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in book["cells"] if cell["cell_type"] in (kinds or ("code",))]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def words(markdown: str) -> int:
    """The words of a text cell that are read: without code in fences, formulas, tags and the targets of links."""
    hidden = r"```.*?```|\$\$.*?\$\$|\$.*?\$|<[^>]*>|\]\([^)]*\)"
    return len(re.findall(r"\w[^\s|]*", re.sub(hidden, " ", markdown, flags=re.S)))


def code_lines(source: str) -> int:
    """The lines of a cell but for its imports."""
    imports = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
    return len(source.splitlines()) - sum(n.end_lineno - n.lineno + 1 for n in imports if n.end_lineno)


def test_the_readmes_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.S)
    assert example
    exec(example[1].replace("epochs=10", "epochs=1"), {})
    er, merged = (ast.literal_eval(line) for line in capsys.readouterr().out.splitlines())
    assert er.keys() == merged.keys() and er != merged


def test_ci_runs_the_readmes_test_command():
    block = re.search(r"<!-- test command -->\n```bash\n(.*?)\n```", README, re.S)
    assert block and block[1].endswith("&& .venv/bin/pytest")
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()


def test_ci_gpu_writes_the_headlines_table_and_goes_on_from_its_store(tmp_path):
    """On as few images of noise as make a memory and tasks."""
    generator = np.random.default_rng(0)
    for part, count in {"train": 6, "test": 2}.items():
        for place in [tmp_path / "cifar10" / part / f"{k}" / f"{i}.png" for k in range(10) for i in range(count)]:
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(place)
    env = os.environ | {"CLKIT_CACHE": str(tmp_path / "cache"), "CLKIT_DATA": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])
    command = [sys.executable, str(ROOT / ".ci" / "gpu"), str(tmp_path), "--headline", "--seeds", "1", "--jobs", "1"]
    for _ in range(2):
        out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        table = (tmp_path / "headline.csv").read_text().splitlines()
        records = {path: path.read_bytes() for path in (tmp_path / "cache" / "gpu").glob("*.json")}
        assert "a few images" in out and [row.split(",")[0] for row in table] == ["method", "ER", "ER + CLeWI"]
        assert len(records) == 2
    assert json.loads((tmp_path / "headline.json").read_text())["gain"][0]["n"] == 1


def test_ci_measures_what_its_file_does_not_have(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("measures", ROOT / ".ci" / "measures.py")
    assert spec and spec.loader
    measures, file, done = importlib.util.module_from_spec(spec), tmp_path / "measures", []
    spec.loader.exec_module(measures)
    if not measures.GPU:
        rows = [*measures.merges(), *measures.tangent()]
        assert all(row.keys() == {"name", "unit", "ours", "theirs", "ratio"} and row["ratio"] > 0 for row in rows)
        assert len(rows) == 6 and measures.replay(2, True) > 0 and measures.passes(2, True) > 0

    def part(name):
        done.append(name)
        return [measures.row(name, "GB", 3, 2)]

    parts = {"one": lambda: part("one"), "bad": lambda: 1 / 0, "two": lambda: part("two")}
    monkeypatch.setattr(measures, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["measures", str(file), "bad", "one"])
    assert measures.main() == 1 and done == ["one"]
    monkeypatch.setattr(sys, "argv", ["measures", str(file)])
    parts["bad"] = lambda: part("mended")
    assert measures.main() == 0 and done == ["one", "mended", "two"]
    assert list(json.loads(file.read_text())["parts"]) == ["one", "bad", "two"]
    assert "    1.50  mended: 3 and 2 GB" in capsys.readouterr().out
    file.write_text(file.read_text().replace('"device": "', '"device": "another than '))
    assert measures.main() == 0 and done[3:] == ["one", "mended", "two"]


def code_lines_of_a_file(path: Path) -> int:
    """Lines with a token that is neither a comment nor part of a docstring."""
    source, skipped = path.read_text(encoding="utf-8"), {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
    skipped |= {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in skipped]
    lines = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_the_reading_order_is_short_and_needs_no_looking_ahead():
    part = KERNEL[KERNEL.index("<!-- reading order -->") : KERNEL.index("<!-- end -->")]
    paths = re.findall(r"^\d+\. `([\w/.]+)`", part, re.M)
    assert len(paths) == 12 and sum(code_lines_of_a_file(ROOT / path) for path in paths) <= 1650
    names = [path.removesuffix(".py").replace("/", ".") for path in paths]
    for i, path in enumerate(paths):
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.module in names[i + 1 :]), (path, node.module)


def test_every_module_is_on_the_kernels_page():
    files = [p for p in (ROOT / "clkit").iterdir() if p.name[0] not in "._" and p.suffix != ".md"]
    assert {p.name.removesuffix(".py") for p in files} <= set(re.findall(r"`(\w+)`", KERNEL))


def test_the_front_page_is_short():
    assert (
        len(README.splitlines()) <= 200 and max(map(len, re.sub(r"^\|.*$", "", README, flags=re.M).splitlines())) <= 130
    )


def test_names_are_exported_by_no_list():
    files = [*(ROOT / "clkit").rglob("*.py"), *(ROOT / "notebooks" / "studies").rglob("*.py")]
    assert not [path for path in files if "__all__" in path.read_text(encoding="utf-8")]


def test_every_figure_of_the_text_is_there():
    pages = [ROOT / name for name in ("README.md", "clkit/README.md", "notebooks/clusters.md", "notebooks/ways-in.md")]
    texts = [(path.parent, path.read_text(encoding="utf-8")) for path in pages]
    texts += [(path.parent, text(cell)) for path in NOTEBOOKS for cell in cells(path, "markdown")]
    for folder, content in texts:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", content):
            assert (folder / link).exists(), link


def test_one_run_has_one_result_in_all_figures():
    """Runs of equal settings give equal numbers, whichever notebook they were made for."""
    results, files = {}, {}
    for path in sorted((ROOT / "figures").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row.get("hash") and row.get("acc"):
                    results.setdefault(row["hash"], set()).add((row["acc"], row.get("forgetting")))
                    files.setdefault(row["hash"], set()).add(path.name)
    shared = [files[key] for key, found in results.items() if len(files[key]) > 1]
    assert any({"03-clewi-parts.csv", "03-clewi-choice.csv"} <= names for names in shared)
    assert not {key: (found, files[key]) for key, found in results.items() if len(found) > 1}


def test_the_first_and_the_clewi_notebook_show_one_run():
    """ER and CLeWI on digits, alone and over seeds: one configuration, one code, one number."""
    first, then = (
        json.loads((ROOT / "figures" / f"{n}-matrices.json").read_text()) for n in ("00-start-here", "03-clewi")
    )
    assert first["config"] == then["config"]
    assert [first["data"][name] for name in ("ER", "ER + CLeWI")] == [then["data"][name] for name in ("ER", "CLeWI")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_it_is_stored_as_executed(self, path):
        for cell in cells(path):
            assert cell["execution_count"] is not None, text(cell)
            assert all(output["output_type"] != "error" for output in cell["outputs"])

    def test_compared_cells_have_something_to_compare(self, path):
        compared = [cell for cell in cells(path) if "nbval-check-output" in cell["metadata"].get("tags", [])]
        assert len(compared) >= 2
        assert all(cell["outputs"] for cell in compared)

    def test_its_parameters_are_literals(self, path):
        parameters = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
        assert len(parameters) == 1
        for statement in ast.parse(text(parameters[0])).body:
            assert isinstance(statement, ast.Assign)
            ast.literal_eval(statement.value)

    def test_its_page_knows_its_parameters(self, path):
        """With these values the claims were recorded; a notebook with others only reports."""
        [parameters] = [text(cell) for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
        values: dict = {}
        exec(parameters, values)
        del values["__builtins__"]
        [opened] = [text(cell) for cell in cells(path) if "experiments.page(" in text(cell)]
        passed = ", ".join(f"{name}={name}" for name in values)
        assert f'page = experiments.page("{path.stem}", {passed})' in opened
        assert f"{', '.join(values)} = page.parameters.values()" in opened
        record = json.loads((ROOT / "figures" / f"{path.stem}-claims.json").read_text(encoding="utf-8"))
        assert record["parameters"] == values

    def test_it_takes_no_number_out_of_a_name(self, path):
        parsing = r"\.str\.(split|r?partition|extract|extractall|removeprefix|removesuffix|replace|match|fullmatch)\("
        parsing += r"|\.filter\((like|regex)=|\.remove(prefix|suffix)\(|method\.astype\(float\)|2\.776"
        assert not [line for cell in cells(path) for line in text(cell).splitlines() if re.search(parsing, line)]

    def test_it_reads_well(self, path):
        lines = {cell["id"]: code_lines(text(cell)) for cell in cells(path)}
        assert path.stat().st_size < 300_000
        assert statistics.median(lines.values()) <= 8 and max(lines.values()) <= 18
        asked = [cell["id"] for cell in cells(path) if "exercise" in cell["metadata"].get("tags", [])]
        assert sum(n for cell, n in lines.items() if cell not in asked) <= 255  # grids are shown, at each scale
        definitions = sum(text(cell).count("\ndef ") + text(cell).startswith("def ") for cell in cells(path))
        assert definitions <= 3

    def test_it_teaches_alone(self, path):
        """Goals, what comes before, minutes; short cells; five questions; its words; cells beside the point folded."""
        every = {cell["id"]: cell for cell in cells(path, "markdown", "code")}
        told = {name: text(every[name]) for name in ("goals", "recall", "words")}
        leads = re.findall(r"^\*\*(Afterwards you can|Before:|Time:)", told["goals"], re.M)
        assert leads == ["Afterwards you can", "Before:", "Time:"]
        assert re.search(r"\*\*Time:\*\* about \d+ minutes for you, .*for the machine\.", told["goals"])
        asked = re.findall(r"<details><summary>.+?</summary>(.+?)</details>", told["recall"], re.S)
        assert told["recall"].startswith("## Recall") and len(asked) == 5 and all(map(str.strip, asked))
        assert (
            told["words"].startswith("## Words\n")
            and 5 <= len(re.findall(r"^\| (?!word|-)", told["words"], re.M)) <= 10
        )
        texts = {name: text(cell) for name, cell in every.items() if cell["cell_type"] == "markdown"}
        assert not {name: words(said) for name, said in texts.items() if words(said) > 150}
        assert not {name for name, said in texts.items() if len(re.findall(r"^##? ", said, re.M)) > 1}
        assert any(cell["metadata"].get("jupyter", {}).get("source_hidden") for cell in every.values())
        assert any(re.search(r"^(\w+ = )?interact\.(handles|explorer)\(", text(cell), re.M) for cell in cells(path))
