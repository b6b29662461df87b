"""Every hint and solution of the notebooks runs, and every exercise can tell a right answer from none.

An exercise is a cell with the tag `exercise`. One statement of it is marked `# your turn`: that is what the reader
writes anew. As committed the cell runs and a `page.check` of it prints "not yet". The text cell below holds answers:
each block of python code there takes the marked statement's place, and then all checks print "right". Of the notebook
only those statements run that an exercise depends on, with the first of several seeds and, where the answers are the
same, in fewer epochs.
"""

import ast
import contextlib
import functools
import io
import math
import re
import symtable

import matplotlib.pyplot as plt
import pytest

from clkit import Training
from test_repository import NOTEBOOKS, cells, text

MARK = "# your turn"
EPOCHS = {"00-start-here": 1}  # at most; elsewhere as many as the notebook has


def all_cells(path):
    return cells(path, "code", "markdown")


def is_exercise(cell):
    return "exercise" in cell["metadata"].get("tags", [])


def exercises(path):
    """The exercises of a notebook: the cell's position and text, and the answers given below it."""
    found, book = [], all_cells(path)
    for place, cell in enumerate(book):
        if is_exercise(cell):
            below = text(book[place + 1]) if place + 1 < len(book) else ""
            hidden = "".join(re.findall(r"<details>.*?</details>", below, re.S))
            found.append((place, text(cell), re.findall(r"```python\n(.*?)```", hidden, re.S)))
    return found


@functools.cache
def uses(statement):
    """The names that a statement reads, those of them that its functions read later, that it sets anew, and changes."""
    reads, later, tables = set(), set(), [symtable.symtable(statement, "cell", "exec")]
    top, node = tables[0], ast.parse(statement).body[0]
    for table in tables:
        tables += table.get_children()
        reads |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (table is top or s.is_global())}
        later |= {s.get_name() for s in table.get_symbols() if table is not top and s.is_global()}
    sets = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    if isinstance(node, ast.For):
        reads -= {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
    changes = set()
    for part in ast.walk(node):
        places = [*getattr(part, "targets", []), getattr(part, "target", None)]
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
            places.append(part.value.func)
        for place in places:
            while isinstance(place, ast.Subscript | ast.Attribute):
                place = place.value
                changes |= {place.id} if isinstance(place, ast.Name) else set()
    whole = isinstance(node, ast.Assign | ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
    return reads, later, sets if whole else set(), sets | changes


def statements(source):
    """The statements of a cell, as text."""
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found.append("\n".join(lines[first - 1 : node.end_lineno]))
    return found


def needed(before, source, later=frozenset()):
    """The positions of those of the statements `before` a cell that it depends on; a page does not change."""
    fixed = {"page"}.union(*(uses(s)[2] for s in before if re.match(r"(import|from)\s", s)))
    own, wanted, kept, called = statements(source), set(later), set(), set(later)
    local = set().union(*(uses(s)[3] for s in own))
    for place, statement in reversed(list(enumerate([*before, *own]))):
        reads, inner, sets, changes = uses(statement)
        if place >= len(before):
            loop = changes if re.match(r"(for|with)\s", statement) else set()
            wanted, called = wanted - sets | reads - loop, called | inner - local
        elif wanted & (changes - fixed) or wanted & sets & fixed:
            kept.add(place)
            wanted, called = wanted - sets | reads, called | inner
    return kept if called == later else needed(before, source, called)


def test_a_cell_needs_what_it_depends_on_and_no_more():
    before = ["import numpy as np", "a, b = 1, [2]", "c = a + 1", "b.append(a)", "np.seterr()"]
    before += ["for a in b:\n    d = a", "def f(x):\n    return x + c", "c = 5", "print(a)", "x = [a for a in b]"]
    before += ["c += 1", "b[0] = d"]
    assert needed(before, "f(2)") >= {6, 7, 10} and 11 not in needed(before, "f(2)")
    assert needed(before, "np.sum(d)") == {0, 1, 3, 5}  # the loop sets a anew, but for an empty b
    assert needed(before, "e = a\nfor c in e:\n    print(c)") == {1, 3, 5}
    assert needed(before, "for i in ():\n    d = i\n    print(d, [c for c in (i, d)])") == set()
    assert needed(before, "c = 1\nx = c") == set()
    assert needed(before, "len(b)") == {1, 3, 5, 11}


def answered(source, answer):
    """A cell with its marked statement replaced."""
    marked = [statement for statement in statements(source) if MARK in statement]
    lines = [line for line in source.splitlines() if MARK in line]
    (statement,) = marked or [s for s in statements(source) if s in lines[0]]
    assert len(lines) == 1
    return source.replace(statement, answer.rstrip("\n"))


def repeated(source, fixed):
    """The statements of a cell but the `fixed` ones, those that read what they change, and those that make it."""
    again = set()
    while True:
        changed, written, found = set().union(*(uses(s)[3] for s in again)), {"page"}, set()
        for statement in statements(source):
            reads, _, _, changes = uses(statement)
            if statement not in fixed or reads & written or changes & changed:
                found.add(statement)
                written |= changes
        if found == again:
            return again
        again = found


def checked(source, space, fixed, shared):
    """What the checks of a cell print: whether each answer is right.

    What the `fixed` statements set that depend on no other one is the same in every cell of an exercise: they run once
    and leave it in `shared`.
    """
    out, space, again = io.StringIO(), dict(space), repeated(source, fixed)
    with contextlib.redirect_stdout(out):
        for statement in statements(source):
            if statement in again:
                exec(compile(statement, "exercise", "exec"), space)
                continue
            if statement not in shared:
                before = dict(space)
                exec(compile(statement, "exercise", "exec"), space)
                shared[statement] = {name: space[name] for name in space if space[name] is not before.get(name, out)}
            space |= shared[statement]
    plt.close("all")
    return [line.startswith("right: ") for line in out.getvalue().splitlines() if re.match("(right|not yet): ", line)]


def test_what_no_answer_changes_runs_once():
    cell = "a = 1  # your turn\nb = [ran.append(0)]\nc, d = [ran.append(a)], []\ne = []\ne.append(a)"
    cell += "\nprint('right: a' if a > 4 and e == [a] else 'not yet: a')"
    ran, fixed, shared = [], set(statements(cell)[1:]), {}
    assert checked(cell, {"ran": ran}, fixed, shared) == [False] and ran == [0, 1]
    assert checked(answered(cell, "a = 5"), {"ran": ran}, fixed, shared) == [True] and ran == [0, 1, 5]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_ask_for_something_written(path):
    found = exercises(path)
    assert len(found) >= 3
    for _, source, answers in found:
        assert len(re.findall(MARK, source)) == 1 and re.search(r"page\.(check|predict)\(", source) and answers, source
        assert not re.search(rf"{MARK}.*[(=]", source), "what may be written stands in the answers, which a test runs"
    for cell in cells(path, "markdown"):
        for hidden in re.findall(r"<details>.*?</details>", text(cell), re.S):
            assert not re.search(r"<code>[^<]*[(=]", hidden), hidden


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")
def test_answers_are_right_and_committed_cells_are_not_yet(path, monkeypatch, tmp_path):
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("CLKIT_FIGURES", str(tmp_path))
    book, found, ran, most = all_cells(path), exercises(path), set(), EPOCHS.get(path.stem, math.inf)

    def shorter(epochs, *args, **options):
        return Training(min(epochs, most), *args, **options)

    space = {"display": lambda *_: None, "__name__": "__main__"}
    for place, source, answers in found:
        before = [s for cell in book[:place] if cell["cell_type"] == "code" for s in statements(text(cell))]
        cells_to_run = [source, *(answered(source, answer) for answer in answers)]
        for i in sorted(set().union(*(needed(before, cell) for cell in cells_to_run)) - ran):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(before[i], path.stem, "exec"), space)
            space |= {"SEEDS": space["SEEDS"][:1]} if "SEEDS" in space else {}
            space |= {"Training": shorter} if "Training" in space else {}
            ran.add(i)
        fixed, shared = {s for s in statements(source) if MARK not in s}, {}
        committed = checked(source, space, fixed, shared)
        assert committed and not all(committed), f"right as it stands: {source}"
        for answer, cell in zip(answers, cells_to_run[1:], strict=True):
            assert all(checked(cell, space, fixed, shared)), answer
