"""What a stored result depends on: its code, definition by definition, its data, and the environment it was made in.

A record of this lies with every stored table. `stale` compares the records with what is here now, without executing
anything, and `keep` writes down why a result stays as it is.
"""

import ast
import functools
import hashlib
import inspect
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from clkit import store
from clkit.data import FONTS
from clkit.experiments.methods import SWEPT, combinations
from clkit.experiments.sweep import Comparison, Study
from clkit.store import digest
from clkit.training import find_device

NO_MATTER = ("checks", "store", "experiments", "plotting", "interact", "cli", "benchmarks")  # of clkit, to a number
PACKAGES = ("torch", "numpy", "scikit-learn", "matplotlib")
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
MISSING = "no record of what it depends on"
Place = tuple[str, str]  # a module and a name that it defines

DIGITS, GLYPHS = ("clkit.data.images", "digits"), ("clkit.data.characters", "glyphs")
SHIPPED = {  # what makes data of files of a package
    DIGITS: ("scikit-learn's digits", "sklearn", ["datasets/data/digits.csv.gz"]),
    GLYPHS: ("matplotlib's fonts", "matplotlib", [f"mpl-data/fonts/ttf/{face}.ttf" for face in FONTS.values()]),
    ("clkit.data.text", "_embedded"): ("clkit's texts", "clkit", ["data/texts.jsonl.xz"]),
}
READERS = {("clkit.data.images", "files"), ("clkit.data.text", "_real")}  # of packs


class _Module:
    """A file's top-level definitions by name, where its imported names come from, and its other statements."""

    def __init__(self, file: Path, package: str) -> None:
        self.file, self.loose = file, list[ast.AST]()
        self.defined, self.imported = dict[str, list[ast.AST]](), dict[str, set[str]]()
        text = file.read_text(encoding="utf-8")
        if script := file.suffix == ".ipynb":
            cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
            text = "\n".join(line for cell in cells for line in cell.splitlines() if line[:1] not in ("%", "!"))
        for node in ast.parse(text).body:
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                continue
            for part in ast.walk(node):
                if isinstance(part, ast.ImportFrom | ast.Import):
                    start = "." * getattr(part, "level", 0) + (getattr(part, "module", "") or "")
                    of = [resolve_name(start, package)] if isinstance(part, ast.ImportFrom) else []
                    for a in part.names:
                        name = a.name if a.asname else a.name.partition(".")[0]  # "import a.b" is of a
                        self.imported.setdefault(a.asname or name, set()).add(".".join([*of, name]))
            named = isinstance(node, DEFINITIONS | ast.Assign | ast.AnnAssign | ast.AugAssign)
            for name in _changed(node, script) if named or not script else ():
                self.defined.setdefault(name, []).append(node)
            if not (named or script or isinstance(node, ast.Import | ast.ImportFrom) or _is_text(node)):
                self.loose.append(node)

    def origins(self, name: str) -> list[str]:
        """Where an imported name may come from, in dots."""
        return [*self.imported.get(name, [star[:-1] + name for star in self.imported.get("*", ())])]


class Code:
    """The code of clkit and of a repository, as definitions that use each other; none of it is run.

    A notebook is a module under its own name.
    """

    def __init__(self, root: Path) -> None:
        self.folders = root / "notebooks", root, Path(__file__).parents[2]
        self.module = functools.cache(self._module)
        self.read = functools.cache(self._read)

    def _module(self, name: str) -> _Module | None:
        """A local module, None if it is none or does not matter to any number."""
        if not any(f"{name}.".startswith(f"clkit.{part}.") for part in NO_MATTER):
            for folder in self.folders:
                for end in (".py", "/__init__.py", ".ipynb"):
                    if (file := folder / f"{name.replace('.', '/')}{end}").is_file():
                        return _Module(file, name if "_" in end else name.rpartition(".")[0])
        return None

    def places(self, dotted: str) -> list[Place]:
        """Where a name is defined, followed through the packages that hand it on; of a module all that it defines."""
        parts = dotted.split(".")
        for cut in range(len(parts), 0, -1):
            name, rest = ".".join(parts[:cut]), parts[cut:]
            if module := self.module(name):
                found = [(name, each) for each in rest[:1] or module.defined if each in module.defined]
                origins = module.origins(rest[0]) if rest else []
                return found + [place for origin in origins for place in self.places(".".join([origin, *rest[1:]]))]
        return []

    def _read(self, place: Place) -> tuple[list[ast.AST], str, list[Place]]:
        """The statements of a definition, their digest, and what they use."""
        module = self.module(place[0])
        assert module is not None  # or it would be no place
        nodes, used = module.defined[place[1]] + module.loose, []
        for name in {name for node in nodes for name in _uses(node)}:
            first, _, rest = name.partition(".")
            if first in module.defined:
                used.append((place[0], first))
            for origin in module.origins(first):
                used += self.places(f"{origin}.{rest}".rstrip("."))
        return nodes, digest([_spelled(node) for node in nodes]), used

    def reached(self, roots: Iterable[str]) -> set[Place]:
        """All definitions that code with these dotted names uses, and those that these use."""
        waiting, found = [place for root in roots for place in self.places(root)], set[Place]()
        while waiting:
            place = waiting.pop()
            if place not in found:
                found.add(place)
                waiting += self.read(place)[2]
        return found

    def file(self, place: Place) -> str:
        """The path of the file that a definition is in, from the repository's root or clkit's."""
        file = getattr(self.module(place[0]), "file", Path())
        return next(file.relative_to(f).as_posix() for f in self.folders[1:] if file.is_relative_to(f))

    def facts(self, roots: Iterable[str], words: Iterable[str] = ()) -> dict[str, dict[str, str]]:
        """Digests of the code that is used by file, but comments, docstrings and layout, and of data by source.

        Data are what is shipped, and packs and files of settings that words name.
        """
        found, code = self.reached(roots), dict[str, list[Any]]()
        for place in sorted(found):
            code.setdefault(self.file(place), []).append([place[1], self.read(place)[1]])
        shipped = [SHIPPED[place] for place in sorted(found & SHIPPED.keys())]
        data = {name: digest([_hashed(f) for f in _files(package, files)])[:8] for name, package, files in shipped}
        packs = os.environ.get("CLKIT_DATA") if found & READERS else None
        for name in sorted({word.removeprefix("pack ").partition("/")[0].removesuffix(".zip") for word in words}):
            for end in (".zip", "") if packs and re.fullmatch(r"[\w-]{1,99}", name) else ():
                if (path := store.expand(packs or "") / f"{name}{end}").exists():
                    data.setdefault(f"pack {name}", _hashed(path))
        names = {word.rpartition("/")[2] for word in words}
        for path in (path for path in self.folders[0].rglob("*.toml") if path.name in names):
            data[path.relative_to(self.folders[1]).as_posix()] = _hashed(path)
        return {"code": {file: digest(parts)[:8] for file, parts in sorted(code.items())}, "data": data}


def record(values: Iterable[Any], code: Code, notebook: str) -> dict[str, Any]:
    """What a result depends on that is made of `values`, in a repository's code, by the name of its page.

    `roots` are the names in code from which all the rest is found, `code` has digests by file, `data` by source,
    `environment` versions and the kind of device.
    """
    roots, words = _roots(values, notebook)
    ends = (".zip", ".toml") if "clkit.experiments.sweep.Study" in roots else ".zip"  # a comparison tells all settings
    for place in code.reached(roots):
        if not place[0].startswith("clkit."):
            for node in code.read(place)[0]:
                texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                words |= {
                    t for t in texts if isinstance(t, str) and (isinstance(node, DEFINITIONS) or t.endswith(ends))
                }
    return {"roots": sorted(roots), **code.facts(roots, words), "environment": environment()}


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, and the kind of device."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "device": find_device("auto").type}


def changes(known: Mapping[str, Any], code: Code) -> list[str]:
    """What of a record no longer matches, by name, or `MISSING`; a pack that is not at hand counts as it was."""
    if not all(isinstance(known.get(part), kind) for part, kind in {"roots": list, "code": dict, "data": dict}.items()):
        return [MISSING]
    here = code.facts(known["roots"], known["data"])
    pairs = (known["code"], here["code"]), (known["data"], known["data"] | here["data"])
    return [name for there, now in pairs for name in {**there, **now} if there.get(name) != now.get(name)]


def samples(whole: Comparison | Study, changed: Sequence[str], code: Code, notebook: str, number: int) -> list[Any]:
    """Single runs of a comparison, or points of a study, that together use every definition of the files that changed.

    `number` says which seed they have, and which comes first.
    """
    seed, parts = [whole.seeds[number % len(whole.seeds)]], list[Any]()
    study = isinstance(whole, Study)
    axes = whole.axes if study else {name: getattr(whole, name) for name in ("streams", "models", "methods")}
    for label, value in combinations(axes):
        point = {axis: {label[axis]: value[axis]} for axis in axes if isinstance(axes[axis], SWEPT)}
        parts.append(replace(whole, seeds=seed, **({"axes": {**axes, **point}} if study else point)))
    runs, left = [], {place for place in code.reached(_roots([whole], notebook)[0]) if code.file(place) in changed}
    for part in parts[number % len(parts) :] + parts[: number % len(parts)]:
        used = left & code.reached(_roots([part], notebook)[0])
        runs += [part] if used else []
        left -= used
    return runs or parts[:1]


def stale(names: Sequence[str], root: Path, *, environments: bool = False) -> dict[str, list[str]]:
    """What stored results no longer match, by their names: files of code, sources of data, or that no record is there.

    Of results among the figures of a repository that begin with one of `names`, or all. With `environments` also what
    versions and device they were made with, where others are here; that alone makes no result stale.
    """
    code, found, here = Code(root), {}, environment()
    for file, content in _stored(names, root):
        known = content.get("provenance") or {}
        there = known.get("environment", {}).items() if environments else ()
        reasons = changes(known, code) + [f"{n} {v} there, {here.get(n)} here" for n, v in there if here.get(n) != v]
        found |= {file.stem: reasons} if reasons else {}
    return found


def keep(reason: str, names: Sequence[str], root: Path) -> list[str]:
    """Writes down why stale results stay as they are, and what is here now; returns their names.

    Raises ValueError without a reason, without names, and for results without a record, which only their page can make.
    """
    if not reason.strip():
        raise ValueError("keep: say in a sentence why these results stay as they are")
    if not names:
        raise ValueError("names: there are none; name the notebooks or results to keep")
    code, kept = Code(root), {}
    for file, content in _stored(names, root):
        known = content.get("provenance") or {}
        if "roots" not in known:
            raise ValueError(f"names: {file.stem} has {MISSING}; execute its notebook with --write")
        if changes(known, code):
            here = code.facts(known["roots"], known["data"])
            known |= {"code": here["code"], "data": known["data"] | here["data"], "kept": reason}
            kept[file] = content
    for file, content in kept.items():  # all of them or none
        store.write_json(file, content)
    return [file.stem for file in kept]


def _stored(names: Sequence[str], root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of results and what they hold; ValueError where no file is named so."""
    files = sorted((root / "figures").glob("*.json"))
    if lost := [name for name in names if not any(file.name.startswith(name) for file in files)]:
        raise ValueError(f"names: no result begins with {lost[0]!r}; give names as they stand in {root / 'figures'}")
    for file in files:
        if file.name.startswith(tuple(names) or ""):
            content = store.read_json(file)
            if isinstance(content, dict) and "results" in content:
                yield file, content


def _roots(values: Iterable[Any], notebook: str) -> tuple[set[str], set[str]]:
    """The dotted names of the functions and classes in values, however deep, and the words among the values."""
    roots, words, seen, waiting = set[str](), set[str](), dict[int, Any](), list(values)
    while waiting:
        value = waiting.pop()
        module, name = (getattr(value, part, None) for part in ("__module__", "__qualname__"))
        if isinstance(value, str):
            words.add(value)
        elif id(value) in seen:
            continue
        elif isinstance(value, partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            waiting += [value.__func__, value.__self__]
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif isinstance(module, str) and isinstance(name, str):
            roots.add(f"{notebook if module == '__main__' else module}.{name.partition('.')[0]}")
            waiting += _captured(own) if isinstance(own := inspect.unwrap(value), FunctionType) else []
        elif type(value).__module__.partition(".")[0] not in ("builtins", "torch", "numpy"):
            waiting += [type(value), *getattr(value, "__dict__", {}).values()]
        seen[id(value)] = value
    return roots | ({"clkit.training.run"} if "clkit.experiments.sweep.Comparison" in roots else set()), words


def _captured(function: FunctionType) -> list[Any]:
    """What a function has by default and in its cells; one without a name of its own also what it uses."""
    found = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    found += [cell.cell_contents for cell in function.__closure__ or ()]
    codes, spaces = [function.__code__] if "<" in function.__qualname__ else [], [function.__globals__]
    for code in codes:
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    for space in spaces:  # of the file, and of modules that it uses
        used = [space[name] for code in codes for name in code.co_names if name in space]
        spaces += [vars(m) for m in used if isinstance(m, ModuleType) and not any(vars(m) is s for s in spaces)]
        found += used
    return found


def _changed(statement: ast.AST, script: bool) -> Iterator[str]:
    """The names that a statement gives a value; but in notebooks, whose tables grow, also a part of one, by a[0].b."""
    for node in [statement] if isinstance(statement, DEFINITIONS) else ast.walk(statement):
        part: Any = node if isinstance(getattr(node, "ctx", None), ast.Store) else None
        while isinstance(part, ast.Attribute | ast.Subscript) and not script:
            part = part.value
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(node, DEFINITIONS) or (isinstance(node, ast.Lambda) and not script):
            yield getattr(node, "name", "<lambda>")


def _uses(node: ast.AST) -> Iterator[str]:
    """The names that code uses, with the attributes that it takes of them: "models.resnet18"."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts, node = [node.attr, *parts], node.value
    if isinstance(node, ast.Name):
        yield ".".join([node.id, *parts])
    for child in ast.iter_child_nodes(node):
        yield from _uses(child)


def _spelled(node: Any) -> Any:
    """Code as a JSON value that is the same in all versions of Python."""
    if isinstance(node, ast.AST):
        parts = {name: _spelled(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
        return [type(node).__name__, parts]
    if isinstance(node, list):
        return [_spelled(part) for part in node if not _is_text(part)]
    return node if isinstance(node, str) else repr(node)


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _files(package: str, inside: Sequence[str]) -> list[Path]:
    """Files of an installed package, which is not imported."""
    spec = find_spec(package)
    return [Path(spec.origin).parent / name for name in inside] if spec and spec.origin else []


def _hashed(path: Path) -> str:
    """The digest of a file, of a folder that of the names and sizes of what is in it; each is read once."""
    return _digest(path, path.stat().st_mtime_ns)


@functools.cache
def _digest(path: Path, changed: int) -> str:
    if path.is_dir():
        return digest(sorted((p.relative_to(path).as_posix(), p.stat().st_size) for p in path.rglob("*")))[:8]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]
