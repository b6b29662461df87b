"""What makes two runs the same: a description of everything that bears on the result, to be hashed.

Code counts as much as settings do. Functions and classes of installed packages are described by name; those of a
notebook or script by their bytecode, what they capture and the globals they use, so that an edited factory or measure
is another one. clkit's own code enters through `source_digest`.
"""

import ast
import dataclasses
import dis
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clkit.data import Stream
from clkit.experiments.store import canonical

UPPER = {"__init__", "experiments", "plotting", "interact", "benchmarks", "cli"}


@functools.cache
def source_digest() -> str:
    """The hash of clkit's code of floors 0 to 3, without comments and docstrings: changed code makes other runs."""
    root = Path(__file__).parents[1]
    out = sha256()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if place.parts[0].removesuffix(".py") not in UPPER:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list):
                    node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
            out.update(f"{place.as_posix()}\n{ast.dump(tree)}\n".encode())
    return out.hexdigest()[:16]


def describe(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """A JSON value that is equal for equal values and differs where a result might; the same in every process.

    Raises TypeError on values that cannot be told apart reliably.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in seen:
        return "recursive"
    inner = (*seen, id(value))
    if isinstance(value, Mapping):
        return {"dict": sorted(([describe(k, inner), describe(v, inner)] for k, v in value.items()), key=canonical)}
    if isinstance(value, set | frozenset):
        return {"set": sorted((describe(item, inner) for item in value), key=canonical)}
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return [describe(item, inner) for item in value]
    if isinstance(value, Stream):
        return {"stream": value.fingerprint}
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return {"tensor": [str(value.dtype), list(value.shape), sha256(raw.tobytes()).hexdigest()[:16]]}
    if isinstance(value, np.generic | np.ndarray):
        raw = np.ascontiguousarray(value)
        return {"array": [str(raw.dtype), list(raw.shape), sha256(raw.tobytes()).hexdigest()[:16]]}
    if isinstance(value, functools.partial):
        options = {name: describe(item, inner) for name, item in sorted(value.keywords.items())}
        return {"call": describe(value.func, inner), "args": describe(list(value.args), inner), "options": options}
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, Path | torch.device | torch.dtype | bytes | complex | range | slice) or value is ...:
        return {type(value).__name__: str(value)}
    if isinstance(value, type | FunctionType | MethodType) or (callable(value) and hasattr(value, "__qualname__")):
        return _code(value, inner)
    if isinstance(value, nn.Module):
        kinds = sorted({canonical(_code(type(module), inner)).decode() for module in value.modules()})
        return {"module": repr(value), "code": kinds, "state": describe(value.state_dict(), inner)}
    if dataclasses.is_dataclass(value):
        fields = {f.name: describe(getattr(value, f.name), inner) for f in dataclasses.fields(value) if f.init}
        return {"class": _code(type(value), inner), "fields": fields}
    return {"class": _code(type(value), inner), "hash": _pickled(value)}


def _pickled(value: Any) -> str:
    import pickle

    import joblib

    try:
        return str(joblib.hash(value))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise TypeError(
            f"{type(value).__name__} {value!r:.60} has no stable description, so a run that uses it could not be found "
            "again; make it a dataclass of plain values"
        ) from error


def _code(thing: Any, seen: tuple[int, ...]) -> Any:
    """A function or class: its name if its package is installed, else what it does as well."""
    name = f"{thing.__module__}.{thing.__qualname__}"
    if isinstance(thing, MethodType):
        return {"method": _code(thing.__func__, seen), "of": describe(thing.__self__, seen)}
    if isinstance(thing, type):
        own = [base for base in thing.__mro__ if not _installed(base)]
        return {"class": name, "own": [_members(base, seen) for base in own]} if own else name
    if _installed(thing) or not isinstance(thing, FunctionType):
        return name
    codes = list(_nested(thing.__code__))
    captured = {
        name: describe(cell.cell_contents, seen)
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
    }
    names = {i.argval for code in codes for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    used = {name: describe(thing.__globals__[name], seen) for name in sorted(names & thing.__globals__.keys())}
    return {
        "function": name,
        "code": sha256(canonical([_bytecode(code, seen) for code in codes])).hexdigest()[:16],
        "defaults": [describe(thing.__defaults__, seen), describe(thing.__kwdefaults__, seen)],
        "captured": captured,
        "globals": used,
    }


def _members(kind: type, seen: tuple[int, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, member in vars(kind).items():
        parts: list[Callable[..., Any] | None] = [getattr(member, "__func__", member)]
        if isinstance(member, property):
            parts = [member.fget, member.fset]
        functions = [p for p in parts if isinstance(p, FunctionType) and p.__code__.co_filename != "<string>"]
        if functions:
            found[name] = [describe(function, seen) for function in functions]
        elif not name.startswith("__") and isinstance(member, bool | int | float | str | tuple | None):
            found[name] = describe(member, seen)
    return found


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _nested(const)


def _bytecode(code: CodeType, seen: tuple[int, ...]) -> list[Any]:
    consts = [describe(const, seen) for const in code.co_consts if not isinstance(const, CodeType)]
    return [code.co_code.hex(), consts, list(code.co_names), list(code.co_varnames)]


def _installed(thing: Any) -> bool:
    """Whether code comes from clkit, the standard library or another installed package."""
    module = getattr(thing, "__module__", None) or "builtins"
    root = module.partition(".")[0]
    if root == "clkit" or (root in sys.stdlib_module_names and root != "__main__"):
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return bool({"site-packages", "dist-packages"} & set(Path(file).parts))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
