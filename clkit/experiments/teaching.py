"""A class's folder: notebooks with the solutions of their exercises taken out, or pasted in, and all that they read.

An exercise is a code cell with the tag `exercise`. One statement of it is marked `# your turn`: that is what a student
writes anew. The text cell below has the solution, a block of python code in `<details>`.
"""

import ast
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from clkit import store
from clkit.checks import explained
from clkit.experiments.notebooks import normalise, opened
from clkit.experiments.pages import repository

MARK = "# your turn"
RECORD = "made-by-clkit-student.json"
KEPT = ("tags", "jupyter", "slideshow")  # what a cell's metadata may tell a class
FOLD, CODE = re.compile(r"<(/?)details\b[^>]*>", re.I), re.compile(r"```python\n(.*?)```", re.S)
SUMMARY = re.compile(r"<summary>(.*?)</summary>", re.S | re.I)
EMPTY = re.compile(r"<details><summary>.*?</summary>\s*</details>", re.S)
LINK = re.compile(r"(?:\]\(<?|\bsrc=[\"'])(?!\w+:)([^)#\s\"'>]+)")
READ = re.compile(r"\bpage\.root((?: / \"[^\"]+\")+)")
TIME = re.compile(r"\*\*Time:\*\* about (.+?) minutes for you, (.+?) for the machine")

README = """# Notebooks for a class

Made by `clkit student`. With Python 3.11 or newer, once, in this folder:

```bash
python3 -m venv .venv
.venv/bin/pip install .
```

On Windows write `py` for `python3`, and `.venv\\Scripts\\` for `.venv/bin/`, here and below. This fetches PyTorch, so
do it at home. On Linux without a GPU much less is fetched if this goes between the two lines:
`.venv/bin/pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu`. Then, each time:

```bash
.venv/bin/jupyter lab notebooks
```

| notebook | exercises | minutes for you | for the machine |
|---|---|---|---|
{rows}

Run the cells of a notebook in order. {told}

Leave `figures` and `notebooks/studies` where they are: stored results lie there, which take hours to compute.
A link to a notebook that is not in the table above leads nowhere.
"""
STUDENT = f"""An exercise is a cell with `{MARK}` in it. As it stands it runs, and says "not yet" and
what to try next. Write the marked statement anew and run the cell again, until all its checks say "right"."""
TEACHER = """Exercises have their solutions, so that all their checks say "right"; explanations are folded below."""


class Handout(NamedTuple):
    """A notebook handed out: how many exercises it has, and how long it takes a person, in minutes, and the machine.

    Times are what its goals tell, "-" where they tell nothing.
    """

    notebook: str
    exercises: int
    minutes: str
    machine: str


def student(notebooks: Sequence[Path], out: Path | str, *, solutions: bool = False) -> list[Handout]:
    """Writes notebooks into a folder for a class, without outputs, and returns what was handed out.

    Without `solutions` these are taken out, with all else that is folded between an exercise and the next cell of code,
    and the answers to the questions of "## Recall"; checks stay. With them they are pasted in place of the marked
    statements, and explanations stay. The folder stands alone: it has the packages and stored results that notebooks
    read, the pictures and pages that they link to, and the package to install. Notebooks that were handed out to it
    before stay.

    Raises ValueError before anything is written: for notebooks that are not those of one repository, for an exercise
    without its mark or its solution, and for an `out` that was not made by this function or is the other half, or in
    which a file was changed since.
    """
    paths, place = [path.resolve() for path in notebooks], store.expand(out)
    root = repository(next(iter(paths), Path()).parent)
    if apart := [path for path in paths if path.parent != root / "notebooks"]:
        raise ValueError(f"names: {apart[0]} is not in {root / 'notebooks'}; put it there, or leave it out")
    record = _record(place, solutions)
    books = {path.stem: opened(path) for path in paths}
    handouts = {name: _handout(name, book) for name, book in books.items()}
    told = record["notebooks"] | {name: handout[1:] for name, handout in handouts.items()}
    rows = "\n".join(f"| {' | '.join([name, *map(str, told[name])])} |" for name in sorted(told))
    files = {"pyproject.toml": b""}  # by which notebooks find the folder's root
    files |= {name: file.read_bytes() for name, file in _beside(root, books.values(), place.resolve()).items()}
    files |= {f"notebooks/{name}.ipynb": version(book, name, solutions=solutions) for name, book in books.items()}
    files["README.md"] = README.format(rows=rows, told=TEACHER if solutions else STUDENT).encode()
    digests = {name: sha256(content).hexdigest() for name, content in files.items()}
    for name in files:
        _check_unchanged(place / name, record["files"].get(name), digests[name])
    store.writable(place / RECORD)
    for name, content in files.items():
        store.write_atomically(place / name, lambda file, content=content: file.write_bytes(content))
    store.write_json(place / RECORD, record | {"notebooks": told, "files": record["files"] | digests})
    return list(handouts.values())


def version(book: Any, name: str, *, solutions: bool) -> bytes:
    """The file of a notebook without outputs, and without solutions or with them pasted in.

    Of several solutions the first is pasted in, and the others stay below. Raises ValueError for an exercise that is no
    Python, with other than one marked statement, or without a solution, which may stand where it would not be found.
    """
    import nbformat

    book, below, asked = deepcopy(book), False, False
    for place, cell in enumerate(book.cells):
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in KEPT}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            below = is_exercise(cell)
        if is_exercise(cell):
            with explained(f"notebooks: exercise {cell.get('id')} of {name} is no Python", "mend it", of=SyntaxError):
                statement, found = marked(cell.source), solved(*book.cells[place + 1 : place + 2])
            if statement is None or not found:
                want = "no solution below" if statement else "not one statement marked"
                remedy = f"mark one with {MARK!r}, and give a block of python code in <details> in the next cell"
                raise ValueError(f"notebooks: exercise {cell.get('id')} of {name} has {want}; {remedy}")
            cell.source = cell.source.replace(statement, found[0]) if solutions else cell.source
        if cell.cell_type != "markdown":
            continue
        if heads := re.findall(r"^#+ +(.*)", cell.source, re.M):
            asked = "Recall" in map(str.strip, heads)
        if solutions and place and is_exercise(book.cells[place - 1]):
            text = EMPTY.sub("", cell.source.replace(f"```python\n{next(iter(solved(cell)), '')}\n```", ""))
        else:
            text = cell.source if solutions or not (below or asked) else _unfolded(cell.source, questions=asked)
        if text != cell.source:
            cell.source = re.sub(r"\n{3,}", "\n\n", text).strip()
            shown = {name: file for name, file in cell.get("attachments", {}).items() if f"attachment:{name}" in text}
            cell.update({"attachments": shown} if "attachments" in cell else {})
    book.cells = [cell for cell in book.cells if cell.source.strip()]
    return (nbformat.writes(normalise(book)) + "\n").encode()


def is_exercise(cell: Any) -> bool:
    """Whether a cell of a notebook is an exercise."""
    return cell.cell_type == "code" and "exercise" in cell.metadata.get("tags", [])


def marked(source: str) -> str | None:
    """The statement of a cell's code that a student writes anew, as text; None where not exactly one is marked."""
    found = [statement for statement in statements(source) if MARK in statement]
    return found[0] if len(found) == source.count(MARK) == 1 else None


def statements(source: str) -> list[str]:
    """The statements of a cell's code, as text."""
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body:
        first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
        found.append("\n".join(lines[first - 1 : node.end_lineno]))
    return found


def solved(below: Any = None) -> list[str]:
    """The solutions in the text cell below an exercise, as code."""
    text = below.source if below is not None and below.cell_type == "markdown" else ""
    return [code.rstrip("\n") for start, stop in folded(text) for code in CODE.findall(text[start:stop])]


def folded(text: str) -> list[tuple[int, int]]:
    """Where a text is folded, as a browser has it: each outermost `<details>`, to the end where it stays open."""
    spans, depth, begun = [], 0, 0
    for tag in FOLD.finditer(text):
        begun = begun if depth else tag.start()
        depth = max(0, depth - 1) if tag[1] else depth + 1
        if depth == 0:
            spans.append((begun, tag.end()))
    return [*spans, (begun, len(text))] if depth else spans


def _unfolded(text: str, *, questions: bool) -> str:
    """A text without what is folded in it; in its place the `questions`, numbered, as they are asked."""
    for start, stop in reversed(folded(text)):
        asked = SUMMARY.search(text, start, stop) if questions else None
        text = text[:start] + (f"1. {asked[1].strip()}" if asked else "") + text[stop:]
    return text


def _handout(name: str, book: Any) -> Handout:
    told = TIME.search("\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown"))
    return Handout(name, sum(map(is_exercise, book.cells)), *(told.groups() if told else "--"))


def _beside(root: Path, books: Iterable[Any], out: Path) -> dict[str, Path]:
    """What notebooks of a repository read and link to, but for what lies in `out`: paths in it and their files."""
    folders = [root / "clkit", *(path.parent for path in (root / "notebooks").glob("*/__init__.py"))]
    found = [file for folder in folders for file in folder.rglob("*") if "__pycache__" not in file.parts]
    for file in (root / "figures").glob("*.json"):
        content = store.read_json(file)
        found += [file] if isinstance(content, dict) and content.keys() & {"results", "claims"} else []
    books = list(books)
    named = READ.findall("\n".join(cell.source for book in books for cell in book.cells if cell.cell_type == "code"))
    found += [root.joinpath(*re.findall(r'"([^"]+)"', parts)) for parts in named]
    texts = [(root / "notebooks", cell.source) for book in books for cell in book.cells if cell.cell_type == "markdown"]
    for folder, text in texts:
        linked = {(folder / unquote(link)).resolve() for link in LINK.findall(text)}
        linked = {file for file in linked.difference(found) if file.is_file() and file.is_relative_to(root)}
        new = [file for file in linked if file.suffix != ".ipynb"]
        texts += [
            (file.parent, file.read_text(encoding="utf-8", errors="replace")) for file in new if file.suffix == ".md"
        ]
        found += new
    found = [file for file in [*found, root / "pyproject.toml"] if file.is_file() and not file.is_relative_to(out)]
    return {file.relative_to(root).as_posix(): file for file in found}


def _record(place: Path, solutions: bool) -> dict[str, Any]:
    """What was handed out to a folder before: of a new or an empty one, nothing."""
    if place.exists() and not place.is_dir():
        raise ValueError(f"out: {place} is a file; give a folder")
    if not place.exists() or not any(place.iterdir()):
        return {"solutions": solutions, "notebooks": {}, "files": {}}
    if not (place / RECORD).is_file():
        raise ValueError(f"out: {place} holds files that clkit student did not write; give a new folder")
    record = store.read_json(place / RECORD)
    with explained(f"out: {place / RECORD} is damaged", "give a new folder", of=(KeyError, TypeError, AttributeError)):
        record = {"solutions": bool(record["solutions"]), "files": dict(record["files"]),
                  "notebooks": {name: list(told) for name, told in record["notebooks"].items()}}  # fmt: skip
    if record["solutions"] != solutions:
        raise ValueError(f"out: {place} is {'without' if solutions else 'with'} solutions; give another folder")
    return record


def _check_unchanged(file: Path, before: str | None, now: str) -> None:
    if file.exists():
        there = sha256(store.content(file, "out", "give a new folder")).hexdigest()
        if there not in (before, now):
            raise ValueError(f"out: {file} was changed since it was written; give a new folder, or take it away")
