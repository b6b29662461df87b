"""Every solution of the notebooks is right, and every exercise can tell it from none.

What runs are the notebooks that `clkit student` writes: without solutions, where an exercise runs and says "not yet",
with a hint, and with them, where all its checks say "right". Of a notebook only those statements run that an exercise
depends on, with the first of several seeds and, where the answers are the same, in fewer epochs. So nbval skips those
that no later cell needs.
"""

import ast
import contextlib
import functools
import io
import math
import re
import symtable
from itertools import pairwise

import matplotlib.pyplot as plt
import pytest

from clkit import Training, experiments
from clkit.experiments import teaching
from clkit.experiments.notebooks import opened
from clkit.experiments.teaching import MARK, marked, statements
from test_repository import NOTEBOOKS, cells, text

EPOCHS = {"00-start-here": 1}  # at most; elsewhere as many as the notebook has


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    """The folders that a class and its teacher get, made once."""
    folders = {solutions: tmp_path_factory.mktemp("solved" if solutions else "class") for solutions in (False, True)}
    for solutions, folder in folders.items():
        experiments.student(NOTEBOOKS, folder, solutions=solutions)
    return folders


def exercises(path):
    """The exercises of a committed notebook: the cell's text, the statement marked in it, and the solutions below."""
    book = opened(path).cells
    pairs = [pair for pair in pairwise(book) if teaching.is_exercise(pair[0])]
    return [(cell.source, marked(cell.source), teaching.solved(below)) for cell, below in pairs]


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
    """What the checks of a cell print, a line a check.

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
    return [line for line in out.getvalue().splitlines() if re.match("(right|not yet): ", line)]


def test_what_no_answer_changes_runs_once():
    cell = "a = 1  # your turn\nb = [ran.append(0)]\nc, d = [ran.append(a)], []\ne = []\ne.append(a)"
    cell += "\nprint('right: a' if a > 4 and e == [a] else 'not yet: a')"
    ran, fixed, shared = [], set(statements(cell)[1:]), {}
    assert checked(cell, {"ran": ran}, fixed, shared) == ["not yet: a"] and ran == [0, 1]
    solved = cell.replace(marked(cell), "a = 5")
    assert checked(solved, {"ran": ran}, fixed, shared) == ["right: a"] and ran == [0, 1, 5]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_ask_for_something_written(path):
    found = exercises(path)
    assert len(found) >= 3
    for source, statement, solutions in found:
        assert statement and solutions and re.search(r"page\.(check|predict)\(", source), source
        assert not re.search(rf"{MARK}.*[(=]", source), "what may be written stands in the solution, which a test runs"
    for cell in cells(path):
        tags = cell["metadata"].get("tags", [])
        assert "nbval-skip" not in tags or "exercise" in tags
    for cell in cells(path, "markdown"):
        for hidden in re.findall(r"<details>.*?</details>", text(cell), re.S):
            assert not re.search(r"<code>[^<]*[(=]", hidden), hidden


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_to_predict_to_build_and_to_break(path):
    found = exercises(path)
    predicted = [statement for source, statement, _ in found if "page.predict(" in source]
    assert predicted and all(statement.startswith(f"guess = None  {MARK}") for statement in predicted)
    built = [solutions[0] for *_, solutions in found if "def " in solutions[0]]
    assert any(len([line for line in solution.splitlines() if line.strip()]) >= 5 for solution in built)
    broken = [source for source, statement, _ in found if re.search(r"\bwhy\b.*=", statement)]
    assert any("len(why.split()) > 7" in source for source in broken)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")
def test_what_a_class_gets_is_not_yet_and_its_solutions_are_right(path, handed_out, monkeypatch, tmp_path):
    given, solved = (folder / "notebooks" / path.name for folder in handed_out.values())
    monkeypatch.chdir(given.parent)
    monkeypatch.setenv("CLKIT_FIGURES", str(tmp_path))
    book, ran, most = opened(given).cells, set(), EPOCHS.get(path.stem, math.inf)
    written = {cell.id: cell.source for cell in opened(solved).cells}
    others = {source: solutions[1:] for source, _, solutions in exercises(path)}

    def shorter(epochs, *args, **options):
        return Training(min(epochs, most), *args, **options)

    space = {"display": lambda *_: None, "__name__": "__main__"}
    for place, cell in enumerate(book):
        if not teaching.is_exercise(cell):
            continue
        source = cell.source
        solutions = [written[cell.id], *(source.replace(str(marked(source)), other) for other in others[source])]
        before = [s for cell in book[:place] if cell.cell_type == "code" for s in statements(cell.source)]
        for i in sorted(set().union(*(needed(before, cell) for cell in [source, *solutions])) - ran):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(before[i], path.stem, "exec"), space)
            space |= {"SEEDS": space["SEEDS"][:1]} if "SEEDS" in space else {}
            space |= {"Training": shorter} if "Training" in space else {}
            ran.add(i)
        fixed, shared = {s for s in statements(source) if MARK not in s}, {}
        unsolved = [line for line in checked(source, space, fixed, shared) if line.startswith("not yet: ")]
        assert unsolved, f"right as it stands: {source}"
        assert not [line for line in unsolved if line.rstrip().endswith(";")], "a check without a hint"
        if ends := re.search(r"a number between (\d+) and (\d+)", str(marked(source))):
            guesses = (source.replace("guess = None", f"guess = {end}.0") for end in ends.groups())
            said = [line for guess in guesses for line in checked(guess, space, fixed, shared)]
            assert any(line.startswith("not yet: ") for line in said), "every guess is right"
        for solution in solutions:
            assert all(line.startswith("right: ") for line in checked(solution, space, fixed, shared)), solution
