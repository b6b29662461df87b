"""What makes two computations the same: a description of all that bears on the result, to be hashed or compared.

Values are described by their content, and code counts as much as settings do. What an installed package defines goes by
its name. What a notebook, a script or a folder beside it defines goes by what it does: bytecode, what is captured,
the globals that are used, the source of the file and of the local files that it imports, and so on.
clkit's own code enters through `source_digest`.
"""

import ast
import copyreg
import dis
import functools
import sys
import threading
import types
from collections.abc import Iterable, Mapping
from importlib.machinery import PathFinder
from importlib.util import resolve_name
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clkit.store.files import canonical, digest, hash_bytes, hash_tensor, unusual_stride

ABOVE_RUNS = {"__init__", "experiments", "plotting", "interact", "benchmarks", "cli"}
WORDS = Path | torch.device | torch.dtype | torch.layout | torch.memory_format | complex | range | slice | type(...)
VOLATILE = ("_keys_to_ignore_on_load", "_original_object_hash")  # transformers': other in every process, and no matter
GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_LOADED: dict[str, tuple[Any, str]] = {}  # by a module's name: its spec, which a reload replaces, and its source's hash


def describe(value: Any, name: str = "value", known: Iterable[Any] = ()) -> Any:
    """A JSON value that is equal for equal values and differs where a result might: in every process, of every copy.

    A module counts with its parameters, buffers, flags, hooks and other attributes. An object counts with all that is
    in it, a function with all that it uses. A thing with a `fingerprint`, a text, describes itself by that. Raises
    TypeError, naming the place in `name`, on what cannot be told apart reliably. What is in `known` goes by its place
    there.
    """
    return _Walk({id(part): (place, part) for place, part in enumerate(known)}).of(value, name)


def differences(there: Any, here: Any, place: str = "") -> list[str]:
    """Where two JSON values differ, in words: "learner memory: 9 there, 8 here"."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(name, there.get(name), here.get(name)) for name in {**there, **here}]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(there, here, strict=True))]
    else:
        return [] if canonical(there) == canonical(here) else [f"{place}: {there!s:.200} there, {here!s:.200} here"]
    return [text for name, a, b in pairs for text in differences(a, b, f"{place} {name}".strip())]


@functools.cache
def source_digest() -> str:
    """The hash of clkit's code up to the training loop, but its comments and docstrings: other code, other runs."""
    root = Path(__file__).parents[1]
    places = [path.relative_to(root) for path in root.rglob("*.py")]
    below = [place for place in places if place.parts[0].removesuffix(".py") not in ABOVE_RUNS]
    return digest({place.as_posix(): _source(root / place)[0] for place in below})


PARSING = threading.Lock()  # two threads that parse at once raise SystemError in Python 3.11


def local_modules() -> dict[str, str]:
    """The hash of the file of every imported module of one's own, neither installed nor of clkit, by name."""
    files = {name: Path(file) for name in list(sys.modules) if (file := _local_file(name))}
    return {name: hash_bytes(file.read_bytes()) for name, file in files.items() if file.is_file()}


class _Walk:
    """One walk over a value; what is met a second time goes by its number: circles end, and sharing counts."""

    def __init__(self, seen: Mapping[int, tuple[int, Any]] | None = None) -> None:
        self.seen = dict(seen or {})

    def of(self, value: Any, place: str) -> Any:
        """The description of what is at `place`."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, WORDS):
            return {type(value).__name__: str(value)}
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}[{_sources([value.__name__])}]"
        if type(value) is tuple:
            return [self.of(item, f"{place}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, types.MethodType):
            return {"method": self.of(value.__func__, place), "of": self.of(value.__self__, place)}
        if _known(value):
            return _name(value)
        if id(value) in self.seen and not issubclass(type(value), bytes):  # of short ones Python keeps one
            return {"again": self.seen[id(value)][0]}
        self.seen[id(value)] = len(self.seen), value  # kept alive, lest another get its id
        if isinstance(value, types.FunctionType):
            return f"{_name(value)}[{digest(self.function(value, place))}]"
        if isinstance(value, type):
            return f"{_name(value)}[{digest(self.kind(value, place))}]"
        if isinstance(value, nn.Module):
            inner = getattr(value, "_orig_mod", value)
            return f"{'compiled ' * (inner is not value)}{type(inner).__name__}[{digest(self.object(inner, place))}]"
        if isinstance(getattr(value, "fingerprint", None), str):
            return {"class": self.of(type(value), place), "fingerprint": value.fingerprint}
        if type(value) is list:
            return [self.of(item, f"{place}[{i}]") for i, item in enumerate(value)]
        if type(value) in (dict, types.MappingProxyType):
            return self.mapping(value, place)
        if isinstance(value, set | frozenset):
            return {type(value).__name__: sorted((_Walk(self.seen).of(item, place) for item in value), key=canonical)}
        if isinstance(value, Tensor):
            return self.tensor(value, place)
        if isinstance(value, np.ndarray | np.generic | bytes):
            rows = np.asarray(value)
            content = self.of(rows.tolist(), place) if rows.dtype.hasobject else hash_bytes(rows.tobytes())
            return {"array": [str(rows.dtype), list(rows.shape), content]}
        if isinstance(value, RemovableHandle):
            return "a hook's handle"  # its number counts the hooks of the process; the hook is in its module
        return self.object(value, place)

    def mapping(self, value: Mapping, place: str) -> dict[str, Any]:
        """A dict, in any order."""
        if all(isinstance(key, str) for key in value):
            return {key: self.of(value[key], f"{place}.{key}") for key in sorted(value)}
        keys = sorted(((_Walk(self.seen).of(key, place), key) for key in value), key=lambda pair: canonical(pair[0]))
        return {"dict": [[text, self.of(value[key], f"{place}[{key!r}]")] for text, key in keys]}

    def tensor(self, value: Tensor, place: str) -> dict[str, Any]:
        """Entries of any shape, their layout, whether they are trained, and attributes that someone added."""
        try:
            facts: dict[str, Any] = {type(value).__name__: hash_tensor(value), "stride": unusual_stride(value)}
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise _refused(value, place) from error
        facts |= {"requires_grad": value.requires_grad or None, "attributes": self.of(vars(value), place) or None}
        return {name: fact for name, fact in facts.items() if fact is not None}

    def object(self, value: Any, place: str) -> dict[str, Any]:
        """The class, and what a copy would be made of."""
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            parts = reduce(value) if reduce else value.__reduce_ex__(4)
            if isinstance(parts, str):  # a thing with a name, a cached function for example
                parts = getattr, (value.__module__, parts), getattr(value, "__wrapped__", None)
        except Exception as error:
            if not isinstance(value, nn.Module):
                raise _refused(value, place) from error
            parts = None, (), vars(value)  # a parametrised module, which deepcopy alone can copy
        make, args, state, items, entries = cast(Any, (*parts, None, None, None)[:5])
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, args = None, args[1:]
        facts = {"class": type(value), "made by": make, "made of": args, "and items": [*(items or ())]}
        facts |= {"and entries": [*(entries or ())], "and": None if isinstance(state, dict) else state}
        nothing = (types.NoneType, tuple, list)
        found = {n: self.of(fact, place) for n, fact in facts.items() if not isinstance(fact, nothing) or fact}
        attributes = {
            name: attribute
            for name, attribute in (state.items() if isinstance(state, dict) else ())
            if not isinstance(getattr(type(value), str(name), None), functools.cached_property)
            and not str(name).startswith(VOLATILE)
        }
        return found | self.mapping(_in_order(attributes) if isinstance(value, nn.Module) else attributes, place)

    def kind(self, value: type, place: str) -> dict[str, Any]:
        """All that a class and its own bases define."""
        own = [base for base in value.__mro__ if not _known(base)]
        members = [
            {name: found for name, thing in sorted(vars(base).items()) if (found := self.member(thing, name, place))}
            for base in own
        ]
        sources = _sources(base.__module__ for base in own)
        return {"bases": [*map(_name, value.__mro__)], "members": members, "sources": sources}

    def member(self, value: Any, name: str, place: str) -> list[Any]:
        """What a class has under a name; nothing of what Python or a decorator made there."""
        if isinstance(value, classmethod | staticmethod | property | functools.cached_property):
            parts = [getattr(value, part, None) for part in ("__func__", "fget", "fset", "fdel", "func")]
        elif isinstance(value, types.FunctionType):
            parts = [value] if value.__code__.co_filename != "<string>" else []
        else:
            slot = isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType)
            parts = [] if slot or name.startswith(("__", "_abc_", "_value2member_map_")) else [value]
        return [self.of(part, f"{place}.{name}") for part in parts]

    def function(self, value: types.FunctionType, place: str) -> dict[str, Any]:
        """What a function does, what it captured and, if it is not installed, all that it uses."""
        codes = [value.__code__]
        for code in codes:  # and what is defined within
            codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        facts: dict[str, Any] = {
            "code": [(code.co_code, code.co_exceptiontable, code.co_names, code.co_varnames) for code in codes],
            "constants": [tuple(c for c in code.co_consts if not isinstance(c, types.CodeType)) for code in codes],
            "defaults": (value.__defaults__, value.__kwdefaults__),
            "captured": {name: cell.cell_contents for name, cell in cells if cell != types.CellType()},
            "attributes": {name: item for name, item in vars(value).items() if name != "__wrapped__"},
        }
        if _installed(value):
            return {name: self.of(part, f"{place} {name}") for name, part in facts.items()}
        steps = [step for code in codes for step in _steps(code)]
        used = {name: value.__globals__[name] for kind, name in steps if kind in GLOBALS and name in value.__globals__}
        facts["used"] = _reached(used, {name for code in codes for name in code.co_names})
        imported = [name for kind, name in steps if kind == "IMPORT_NAME"]
        parts = ["", *(f".{name}" for kind, name in steps if kind == "IMPORT_FROM")]
        facts["sources"] = _sources([value.__module__, *(name + part for name in imported for part in parts)])
        return {name: self.of(part, f"{place} {name}") for name, part in facts.items()}


@functools.cache
def _steps(code: types.CodeType) -> list[tuple[str, Any]]:
    return [(step.opname, step.argval) for step in dis.get_instructions(code)]


def _refused(value: Any, place: str) -> TypeError:
    return TypeError(
        f"{place}: {type(value).__name__} {value!r:.60} has no stable description, so that nothing that depends on it "
        "could be found again; keep plain values, tensors or objects of them there, or give its class a `fingerprint`, "
        "a text"
    )


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{value.__qualname__}"


def _known(value: Any) -> bool:
    """Whether a function or class is told by its name: it is installed, and no other has that name."""
    name, owner = getattr(value, "__qualname__", "<"), getattr(value, "__self__", None)
    named = callable(value) and isinstance(name, str) and "<" not in name
    return named and isinstance(owner, types.NoneType | types.ModuleType | type) and _installed(value)


def _installed(thing: Any) -> bool:
    """Whether code comes from clkit, the standard library or another installed package."""
    module = getattr(thing, "__module__", None)
    return _local_file(module) is None if module else not isinstance(thing, types.FunctionType)


def _in_order(state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's attributes: its parts in their order, hooks by their rank, since their ids count all of a process."""
    hooks = {name: held for name, held in state.items() if "_hooks" in name and isinstance(held, dict)}
    rank = {key: i for i, key in enumerate(sorted({key for held in hooks.values() for key in held}))}
    listed = {name: [(rank[key], hook) for key, hook in held.items()] for name, held in hooks.items() if held}
    parts = {name: list(state[name].items()) for name in ("_parameters", "_buffers", "_modules") if name in state}
    return {name: held for name, held in state.items() if name not in hooks} | parts | listed


def _reached(used: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Things by name and, where a thing is a local module, what code with these names in it reaches through it."""
    found, entered = dict(used), set()
    waiting = list(used.items())
    while waiting:
        name, thing = waiting.pop()
        if isinstance(thing, types.ModuleType) and thing.__name__ not in entered and _local_file(thing.__name__):
            entered.add(thing.__name__)
            inner = {f"{name}.{n}": vars(thing)[n] for n in sorted(names & vars(thing).keys())}
            waiting += inner.items()
            found |= inner
    return found


def _sources(names: Iterable[str]) -> str:
    """The hash of the sources of local modules, by name, and of all local modules that they import.

    Raises TypeError on a module whose file has changed since it was first met: what runs is not what the file says.
    """
    found: dict[str, str] = {}
    waiting = [name for name in names if name]
    while waiting:
        name = waiting.pop()
        file = None if name in found else _local_file(name)
        if not file:
            continue
        state = Path(file).stat()
        found[name], imports = _source(Path(file), state.st_mtime_ns, state.st_size)
        package = name if file.endswith("__init__.py") else name.rpartition(".")[0]
        waiting += [resolve_name(other, package) for other in imports if package or not other.startswith(".")]
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if _LOADED.get(name, (None,))[0] is not spec:
            _LOADED[name] = spec, found[name]
        elif spec is not None and _LOADED[name][1] != found[name]:
            remedy = "restart, importlib.reload the module, or have it done by %autoreload 2 --full"
            raise TypeError(f"{name}: {file} was edited after it was imported; {remedy}")
    return digest(found) if found else ""


def _local_file(name: str) -> str | None:
    """The source of a module of one's own, imported or not; empty if it has none; None if the module is installed."""
    root = name.partition(".")[0]
    if root in {"__main__", "__mp_main__"}:  # its other name, by which children of a process import it
        return ""
    installed = any(part in _file(owner) for owner in (root, name) for part in ("site-packages", "dist-packages"))
    if root == "clkit" or root in sys.stdlib_module_names or installed:
        return None
    return _file(name) if _file(name).endswith(".py") else ""


def _file(name: str) -> str:
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) or ""
    parent, folders = name.rpartition(".")[0], None
    if parent in sys.modules:
        folders = getattr(sys.modules[parent], "__path__", [])
    elif parent:
        folders = [str(Path(_file(parent)).parent)] if _file(parent).endswith("__init__.py") else []
    spec = PathFinder.find_spec(name, folders)
    return (spec.origin if spec else None) or ""


@functools.cache
def _source(path: Path, *version: int) -> tuple[str, list[str]]:
    """The hash of a file's code without comments and docstrings, and what may be modules among its imports."""
    with PARSING:
        tree = ast.parse(path.read_bytes())
    imports = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [part for alias in node.names for part in accumulate(alias.name.split("."), "{}.{}".format)]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            imports += [module, *(f"{module}{'' if module.endswith('.') else '.'}{a.name}" for a in node.names)]
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return digest(ast.dump(tree)), imports


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
