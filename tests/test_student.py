"""The folder of a class: what `clkit student` writes, what it refuses, and a notebook executed from inside of it."""

import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from clkit import cli
from clkit.experiments import Handout, execute, repository, student, teaching
from test_repository import NOTEBOOKS, ROOT, cells, text

GOALS = """**Afterwards you can** count.
**Before:** nothing.
**Time:** about 20 minutes for you, half a minute for the machine."""
TEXT = """<details><summary>Why</summary>

Two is one more.

```python
a = 2
```

Or so.

```python
a = 1 + 1
```
</details>

**2. Build.** See [the picture](../figures/a-b.png), [more](more.md), [the web](https://web.org),
[this](01-one.ipynb)."""
RECALL = """## Recall

<details><summary>What is one?</summary>A number.</details>

<details><summary>And two?</summary>

Another.
</details>"""


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """A repository with two notebooks, what they read and link to, and more; the working folder is in it."""
    root = tmp_path / "repository"
    for name in (
        "pyproject.toml",
        "README.md",
        "clkit/__init__.py",
        "clkit/__pycache__/a.pyc",
        "notebooks/studies/a.csv",
    ):
        write(root / name)
    for name in ("studies/__init__.py", "other/a.py", "lonely.py"):
        write(root / "notebooks" / name)
    write(root / "notebooks" / "more.md", "[its picture](../figures/more.png), [nothing](lost.md), [out](../../out.md)")
    write(root / "out.md")
    for name, content in {"a-runs.json": {"results": 1}, "a-claims.json": {"claims": []}, "a-b.json": {}}.items():
        write(root / "figures" / name, json.dumps(content))
    for name in ("a-b.png", "more.png", "c.png"):
        write(root / "figures" / name, name)
    exercise = new_code_cell(
        "a = 1  # your turn: a number\nprint(a)", execution_count=3, metadata={"tags": ["exercise"]}
    )
    exercise.outputs = [nbformat.v4.new_output("stream", text="1\n")]
    book = [new_markdown_cell(GOALS), exercise, new_markdown_cell(TEXT), new_markdown_cell(RECALL)]
    nbformat.write(new_notebook(cells=book), root / "notebooks" / "00-zero.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# One")]), root / "notebooks" / "01-one.ipynb")
    monkeypatch.chdir(root / "notebooks")
    return root


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def sources(folder, name="00-zero"):
    return [cell.source for cell in nbformat.read(folder / "notebooks" / f"{name}.ipynb", 4).cells]


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_class_gets_exercises_and_a_teacher_their_solutions(lesson, tmp_path, capsys):
    assert cli.main(["student", "00", "--out", str(tmp_path / "class")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"00-zero +1 +20 +half a minute\n", out) and "class/README.md" in out
    assert cli.main(["student", "00", "--out", str(tmp_path / "teacher"), "--solutions"]) == 0
    asked = "**2. Build.** See [the picture]"
    goals, exercise, below, recall = sources(tmp_path / "class")
    assert (goals, exercise) == (GOALS, "a = 1  # your turn: a number\nprint(a)") and below.startswith(asked)
    assert recall == "## Recall\n\n1. What is one?\n\n1. And two?"
    _, exercise, below, recall = sources(tmp_path / "teacher")
    assert exercise == "a = 2\nprint(a)" and recall == RECALL
    assert below.startswith(
        "<details><summary>Why</summary>\n\nTwo is one more.\n\nOr so.\n\n```python\na = 1 + 1\n```"
    )
    for half in ("class", "teacher"):
        book = nbformat.read(tmp_path / half / "notebooks" / "00-zero.ipynb", 4)
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)
        nbformat.validate(book)


def test_the_folder_has_what_notebooks_read_and_link_to_and_no_more(lesson, tmp_path):
    write(lesson / "tests" / "a.csv")
    book = nbformat.read(lesson / "notebooks" / "00-zero.ipynb", 4)
    book.cells.append(new_code_cell('open(page.root / "tests" / "a.csv")'))
    nbformat.write(book, lesson / "notebooks" / "00-zero.ipynb")
    assert student([lesson / "notebooks" / "00-zero.ipynb"], tmp_path / "class") == [
        Handout("00-zero", 1, "20", "half a minute")
    ]
    beside = {"README.md", "pyproject.toml", teaching.RECORD, "clkit/__init__.py", "notebooks/00-zero.ipynb"}
    beside |= {"notebooks/studies/__init__.py", "notebooks/studies/a.csv", "notebooks/more.md", "tests/a.csv"}
    beside |= {f"figures/{name}" for name in ("a-runs.json", "a-claims.json", "a-b.png", "more.png")}
    assert files(tmp_path / "class") == beside
    assert repository(tmp_path / "class" / "notebooks") == tmp_path / "class"
    assert "| 00-zero | 1 | 20 | half a minute |" in (tmp_path / "class" / "README.md").read_text()


def test_what_is_there_stays_or_is_refused(lesson, tmp_path):
    folder, zero, one = tmp_path / "class", *sorted((lesson / "notebooks").glob("*.ipynb"))
    student([zero], folder)
    student([one], folder)  # a second notebook beside the first
    student([zero, one], folder)
    told = (folder / "README.md").read_text()
    assert "00-zero" in told and "| 01-one | 0 | - | - |" in told and len(sources(folder)) == 4
    with pytest.raises(ValueError, match=r"out: .*class is without solutions; give another folder"):
        student([zero], folder, solutions=True)
    (folder / "notebooks" / "00-zero.ipynb").write_text("a student's work")
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    (lesson / "clkit" / "__init__.py").write_text("# a new version")
    with pytest.raises(ValueError, match=r"out: .*00-zero.ipynb was changed since .*; give a new folder"):
        student([zero, one], folder)
    assert before == {name: (folder / name).read_bytes() for name in files(folder)}
    student([one], folder)
    assert (folder / "clkit" / "__init__.py").read_text() == "# a new version"
    assert (folder / "notebooks" / "00-zero.ipynb").read_text() == "a student's work"


SOLUTION = "<details><summary>A solution</summary>\n\n```python\na = 42\n```\n</details>"
OPEN, LOUD = SOLUTION.replace("<details>", "<details open>"), SOLUTION.replace("details", "DETAILS")
INNER = f"<details><summary>More</summary>\n{SOLUTION}\nOr 42.\n</details>"
ASKED = "<details>\n<summary>How many?</summary>42</details>"
ATTACHED = {"attachments": {"42.txt": {"text/plain": "42"}, "one.txt": {"text/plain": "1"}}}


def handed_out(cells, lesson, folder, **options):
    """The cells of a notebook as it is handed out."""
    exercise = new_code_cell("a = 1  # your turn", id="task", metadata={"tags": ["exercise"], "answer": "a = 42"})
    book = new_notebook(cells=[exercise, *cells])
    for cell in book.cells:
        cell.id = cell.id.replace("42", "43")
    nbformat.write(book, lesson / "notebooks" / "02-two.ipynb")
    student([lesson / "notebooks" / "02-two.ipynb"], folder, **options)
    return (folder / "notebooks" / "02-two.ipynb").read_text()


@pytest.mark.parametrize(
    "below",
    [
        [OPEN], [LOUD], [INNER], [SOLUTION.removesuffix("</details>")], [SOLUTION, "More.", "<details>42</details>"],
        [SOLUTION, new_code_cell("b = 1"), f"Well.\n\n# Recall\n\n{ASKED}"], [SOLUTION, "## Recall", ASKED],
        [new_markdown_cell(f"![](attachment:one.txt) {SOLUTION}", **ATTACHED)],
    ],
    ids=["open", "loud", "inner", "unclosed", "later", "any heading", "apart", "attached"],
)  # fmt: skip
def test_nothing_of_a_solution_or_an_answer_is_left_however_it_is_folded(lesson, tmp_path, below):
    cells = [new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in below]
    given = handed_out(cells, lesson, tmp_path / "class")
    assert "42" not in given and ("How many?" in given) == ("How many?" in str(below))
    assert ("one.txt" in given) == ("attachment" in str(below))
    assert '"a = 42"' in handed_out(cells, lesson, tmp_path / "teacher", solutions=True)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([new_code_cell("b = 1"), new_markdown_cell(SOLUTION)], "exercise task of 02-two has no solution below"),
        ([new_markdown_cell("Think."), new_markdown_cell(SOLUTION)], "in the next cell"),
        (
            [
                new_markdown_cell(SOLUTION),
                new_code_cell("%time a = 1  # your turn", id="odd", metadata={"tags": ["exercise"]}),
            ],
            r"exercise odd of 02-two is no Python \(invalid syntax.*; mend it",
        ),
    ],
)
def test_an_exercise_whose_solution_would_stay_is_refused(lesson, tmp_path, cells, message):
    with pytest.raises(ValueError, match=message):
        handed_out(cells, lesson, tmp_path / "class")
    assert not (tmp_path / "class").exists()


def test_an_empty_notebook_and_a_text_with_the_tag_are_handed_out_as_they_are(lesson, tmp_path):
    book = new_notebook(cells=[new_markdown_cell("One.", metadata={"tags": ["exercise"]})])
    for name, content in {"02-two": new_notebook(), "03-three": book}.items():
        nbformat.write(content, lesson / "notebooks" / f"{name}.ipynb")
    given = student(sorted((lesson / "notebooks").glob("0[23]*.ipynb")), tmp_path / "class")
    assert [handout.exercises for handout in given] == [0, 0]
    assert sources(tmp_path / "class", "02-two") == [] and sources(tmp_path / "class", "03-three") == ["One."]


def test_pictures_are_found_however_they_are_linked_to(lesson, tmp_path):
    shown = "![](../figures/a%20b.png) ![](<../figures/c.png>) <img src='../figures/more.png'> [](far.md)"
    write(lesson / "figures" / "a b.png")
    (lesson / "notebooks" / "far.md").write_bytes(b"\xff [](../figures/a-b.png)")
    nbformat.write(new_notebook(cells=[new_markdown_cell(shown)]), lesson / "notebooks" / "02-two.ipynb")
    student([lesson / "notebooks" / "02-two.ipynb"], tmp_path / "class")
    pictures = {f"figures/{name}.png" for name in ("a b", "c", "more", "a-b")}
    assert pictures == {name for name in files(tmp_path / "class") if name.endswith(".png")}


def test_a_folder_inside_of_the_package_does_not_hold_itself(lesson):
    for _ in range(2):
        student([lesson / "notebooks" / "01-one.ipynb"], lesson / "clkit" / "class")
    assert not (lesson / "clkit" / "class" / "clkit" / "class").exists()


@pytest.mark.parametrize("record", ["{}", "[]", '{"solutions": false, "notebooks": {"x": 1}, "files": {}}'])
def test_a_damaged_record_is_named(lesson, tmp_path, record):
    write(tmp_path / "class" / teaching.RECORD, record)
    with pytest.raises(ValueError, match=f"out: .*{teaching.RECORD} is damaged .*; give a new folder"):
        student([lesson / "notebooks" / "01-one.ipynb"], tmp_path / "class")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["0", "--out", "../figures"],
            "out: ../figures holds files that clkit student did not write; give a new folder",
        ),
        (["0", "--out", "more.md"], "out: more.md is a file; give a folder"),
        (["0"], "--out"),
        (["7", "--out", "../new"], "names: '7' is unknown"),
        (["{elsewhere}", "--out", "../new"], "put it there, or leave it out"),
        (["02", "--out", "../new"], "exercise bad of 02-two has not one statement marked; mark one with '# your turn'"),
        (["03", "--solutions", "--out", "../new"], "exercise bad of 03-three has no solution below; mark one"),
    ],
)
def test_errors_name_argument_value_and_remedy_and_nothing_is_written(lesson, tmp_path, capsys, names, message):
    for name, source in {"02-two": "a = 1", "03-three": "a = 1  # your turn"}.items():
        cell = new_code_cell(source, id="bad", metadata={"tags": ["exercise"]})
        nbformat.write(new_notebook(cells=[cell]), lesson / "notebooks" / f"{name}.ipynb")
    nbformat.write(new_notebook(), tmp_path / "elsewhere.ipynb")
    before = files(tmp_path)
    status = cli.main(["student", *(name.format(elsewhere=tmp_path / "elsewhere.ipynb") for name in names)])
    assert status == 2 and message in capsys.readouterr().err and files(tmp_path) == before


def test_a_notebook_runs_whole_from_inside_either_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    [first] = [path for path in NOTEBOOKS if path.stem == "10-ledger"]  # the quickest, which reads most
    halves = {half: tmp_path / half for half in ("class", "teacher")}
    for half, folder in halves.items():
        student([first], folder, solutions=half == "teacher")
    stored = {name: (halves["class"] / name).read_bytes() for name in files(halves["class"]) if "-runs" in name}
    monkeypatch.chdir(halves["class"])
    outcomes = execute([folder / "notebooks" / first.name for folder in halves.values()], progress=False)
    for outcome, folder in zip(outcomes, halves.values(), strict=True):
        assert outcome.error == "" and outcome.figures == 1
        assert stored == {name: (folder / name).read_bytes() for name in stored}  # nothing was computed again


def test_the_map_tells_the_minutes_that_the_notebooks_tell():
    page = (ROOT / "notebooks" / "README.md").read_text()
    told = dict(re.findall(r"^\| \[(\d\d-[\w-]+)\].*\| (\d+) \|$", page, re.M))
    for path in NOTEBOOKS:
        goals = [text(cell) for cell in cells(path, "markdown") if cell["id"] == "goals"]
        assert teaching.TIME.findall(goals[0])[0][0] == told[path.stem], path.stem


def test_the_plans_name_sections_that_the_notebooks_have():
    plans = (ROOT / "notebooks" / "README.md").read_text().split("## To teach")[1]
    for name, sections in re.findall(r"\| (\d\d), (.+) \|$", plans, re.M):
        [path] = [path for path in NOTEBOOKS if path.stem.startswith(name)]
        heads = re.findall(r"^##+ (.+)$", "\n".join(text(cell) for cell in cells(path, "markdown")), re.M)
        assert set(sections.split("; ")) <= set(heads), sections
