"""Settings checked from their annotations, in one place; and what to say of a name that is not known.

A dataclass of settings says what each field may be, and asks for the check once:

```python
@dataclass(frozen=True)
class Blend:
    alpha: Share = 0.3                        # a number in [0, 1]
    align: Literal["activations", "weights"] | None = "activations"
    rounds: Annotated[int, Range(1)] = 10     # a whole number, at least 1
    __post_init__ = checks.fields
```

`arguments` does the same for the parameters of a function. What is annotated with a class, a tensor, a module or a
mapping for example, must be of that class; what is annotated otherwise passes unchecked. Numbers of numpy become
Python's, and lists become tuples where a tuple is asked for.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both among them unless `open` names "low", "high" or "both".

    `means` says what a number stands for, where the name of the setting does not: it ends the error.
    """

    low: float = -math.inf
    high: float = math.inf
    open: Literal["", "low", "high", "both"] = ""
    means: str = ""

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open in ("low", "both") else self.low <= value
        below = value < self.high if self.open in ("high", "both") else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        text = f", {self.means}" if self.means else ""
        if self.high == math.inf:
            least = f", {'above' if self.open in ('low', 'both') else 'at least'} {self.low:g}"
            return ("" if self.low == -math.inf else least) + text
        ends = "(" if self.open in ("low", "both") else "[", ")" if self.open in ("high", "both") else "]"
        return f" in {ends[0]}{self.low:g}, {self.high:g}{ends[1]}{text}"


Share = Annotated[float, Range(0, 1)]
Part = Annotated[float, Range(0, 1, "high")]
Positive = Annotated[float, Range(0, open="low")]
NotNegative = Annotated[float, Range(0)]
Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]

_NO = object()  # what does not fit
_MANY = (tuple, list, Sequence)
_PLAIN = (bool, int, float, str, Path, NoneType, None)
_STAR, _STARS = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def fields(settings: Any) -> None:
    """Checks every field of a dataclass against its annotation: made to be its `__post_init__`.

    Raises ValueError that names the field, its value and what to give instead.
    """
    for name, hint in _hints(type(settings)).items():
        old = getattr(settings, name, _NO)
        if old is not _NO and (new := value(name, old, hint)) is not old:
            object.__setattr__(settings, name, new)


def arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function check its arguments against their annotations before it begins; ValueError as in `fields`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound, hints = signature.bind(*args, **kwargs), _hints(innermost(function))
        for name, old in bound.arguments.items():
            if name in hints and signature.parameters[name].kind not in (_STAR, _STARS):
                bound.arguments[name] = value(name, old, hints[name])
        return function(*bound.args, **bound.kwargs)

    return checked


def options(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks options, by name, that a function will be called with, and gives them in Python's own types.

    Raises ValueError for a name that the function does not take, and as in `fields` for a value.
    """
    known, hints = inspect.signature(function).parameters, _hints(innermost(function))
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        for name in given:
            choice("options", name, known)
    return {name: value(name, old, hints[name]) if name in hints else old for name, old in given.items()}


def innermost(function: Any) -> Any:
    """The function that a partial one, or an object with a `__call__` of its own, calls in the end."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__code__") or isinstance(function, type) else type(function).__call__


def value(name: str, given: Any, hint: Any) -> Any:
    """The value of a setting, in Python's own types, or a ValueError that says what the annotation `hint` allows."""
    found = _fit(given, hint)
    if found is not _NO:
        return found
    words = [word for part, _ in _parts(hint) if get_origin(part) is Literal for word in get_args(part)]
    if words and isinstance(given, str):
        others = [_words(*part) for part in _parts(hint) if get_origin(part[0]) is not Literal]
        raise unknown(name, given, words, others=others)
    raise ValueError(f"{name}: {given!r:.200}; give {expects(hint)}")


def choice(name: str, given: Any, known: Iterable[Any]) -> Any:
    """The value, if it is one of those known when the program runs (a table's keys, say); else a ValueError."""
    options = list(known)
    if given not in options:
        raise unknown(name, given, options)
    return given


def unknown(
    name: str, given: object, known: Iterable[Any], *, others: Sequence[str] = (), cutoff: float = 0.5
) -> ValueError:
    """Builds the error for a name that is not known: the close matches, and the first twenty that are known."""
    options = list(dict.fromkeys(map(str, known)))
    lower = {option.lower(): option for option in options}
    close = [lower[match] for match in get_close_matches(str(given).lower(), lower, cutoff=cutoff)]
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    shown = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return ValueError(f"{name}: {given!r} is unknown; choose one of {' or '.join([shown, *others])}{hint}")


def package(name: str, extra: str, setting: str) -> Any:
    """Imports a package that one of clkit's extras installs; raises ImportError that names it where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{setting} needs {name}, which is not installed: pip install 'clkit[{extra}]'") from error


def room(what: str, size: float, device: Any, remedy: str) -> None:
    """Raises ValueError if something will take more bytes than are free on a torch device, before it is made.

    Nothing is raised where what is free is not known.
    """
    if (free := _free(device)) is not None and size > free:
        raise ValueError(f"{what} take {size / 1e9:.3g} GB, and {device} has {free / 1e9:.3g} GB free; {remedy}")


def _free(device: Any) -> int | None:
    """The bytes that a GPU has free, or Linux on the CPU; None elsewhere."""
    if device.type == "cuda":
        import torch

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for its next tensor
        return torch.cuda.mem_get_info(device)[0] + held
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines() if device.type == "cpu" else []
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None


@contextmanager
def explained(
    what: str, remedy: str, *, of: type[Exception] | tuple[type[Exception], ...] = Exception, kind: Any = ValueError
) -> Iterator[None]:
    """Says what errors `of` some kind mean where they come from within: raises "what (the error); remedy" instead."""
    try:
        yield
    except of as error:
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise kind(f"{what} ({first}); {remedy}") from error


def parse(name: str, text: str, hint: Any) -> Any:
    """The value that a text stands for under an annotation, in a shell for example; several are written with commas.

    Raises ValueError, as `value` does, where it stands for none.
    """
    found = _read(text, hint)
    return value(name, text, hint) if found is _NO else found


def readable(hint: Any) -> Any:
    """The parts of an annotation whose values a text can stand for; None if there is none."""
    parts = tuple(Annotated[(part, *ranges)] if ranges else part for part, ranges in _parts(hint) if _legible(part))
    return Union[parts] if any(part is not NoneType for part in parts) else None  # noqa: UP007


def words(hint: Any) -> tuple[Any, ...]:
    """The words that an annotation chooses from, None among them if it may be; () where it takes anything else."""
    kinds = [kind for kind, _ in _parts(hint)]
    if not all(get_origin(kind) is Literal or kind is NoneType for kind in kinds):
        return ()
    return tuple(word for kind in kinds for word in (get_args(kind) or (None,)))


def expects(hint: Any) -> str:
    """What an annotation allows, in words: "a whole number, at least 1, or none"."""
    return " or ".join(dict.fromkeys(_words(*part) for part in _parts(hint)))


@functools.cache
def _hints(thing: Any) -> dict[str, Any]:
    """The annotations that can be checked, by name."""
    source = thing
    if not isinstance(thing, type):  # what a function gives may be named for type checking only
        annotations = getattr(thing, "__annotations__", {})
        source = SimpleNamespace(__annotations__={k: v for k, v in annotations.items() if k != "return"})
    hints = get_type_hints(source, getattr(thing, "__globals__", None), include_extras=True)
    wanted = {name: hint for name, hint in hints.items() if _checkable(hint)}
    if isinstance(thing, type):
        own = {name for name, field in getattr(thing, "__dataclass_fields__", {}).items() if field.init}
        return {name: hint for name, hint in wanted.items() if name in own}
    return wanted


def _parts(hint: Any, ranges: tuple[Range, ...] = ()) -> list[tuple[Any, tuple[Range, ...]]]:
    """The alternatives of an annotation with their ranges; those beside a union hold for each of its numbers."""
    if get_origin(hint) is Annotated:
        inner, *more = get_args(hint)
        return _parts(inner, (*ranges, *(r for r in more if isinstance(r, Range))))
    if get_origin(hint) in (Union, UnionType):
        return [part for inner in get_args(hint) for part in _parts(inner, ranges)]
    return [(hint, () if hint is NoneType else ranges)]


def _leaves(hint: Any) -> Iterator[Any]:
    """What the parts of an annotation are made of, in the end."""
    for base, _ in _parts(hint):
        if get_origin(base) in _MANY:
            yield from (leaf for inner in get_args(base) if inner is not ... for leaf in _leaves(inner))
        else:
            yield base


def _legible(hint: Any) -> bool:
    """Whether every part of an annotation is a number, a word, a path, None, or a tuple of such."""
    return all(get_origin(leaf) is Literal or leaf in _PLAIN for leaf in _leaves(hint))


def _checkable(hint: Any) -> bool:
    """Whether every part of an annotation is a word or a class, or a tuple of such."""
    return all(get_origin(leaf) is Literal or leaf in _PLAIN or _class(leaf) is not Any for leaf in _leaves(hint))


def _class(hint: Any) -> Any:
    """The class of an annotation: Mapping of Mapping[str, Tensor]; Any where an object cannot be asked for it."""
    found = get_origin(hint) or hint
    return found if isinstance(found, type) and not getattr(found, "_is_protocol", False) else Any


def _fit(given: Any, hint: Any) -> Any:
    """The value in Python's own types if it fits the annotation, else `_NO`."""
    for part, ranges in _parts(hint):
        found = _plain(given, part)
        if found is not _NO and all(found in r for r in ranges):
            return found
    return _NO


def _plain(given: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        given = str(given) if isinstance(given, str) else given  # of numpy, or a member of a StrEnum
        return next((word for word in get_args(kind) if type(word) is type(given) and word == given), _NO)
    if get_origin(kind) in _MANY:
        return _tuple(given, get_args(kind) + (...,) * (get_origin(kind) is not tuple))
    if kind in (NoneType, None):
        return None if given is None else _NO
    if kind is bool:
        return bool(given) if isinstance(given, bool) or str(getattr(given, "dtype", "")) == "bool" else _NO
    if kind in (int, float):
        if isinstance(given, bool) or not isinstance(given, Integral if kind is int else Real):
            return _NO
        number: Any = given
        if kind is int and not -(2**63) <= number < 2**64:  # no generator and no tensor takes it
            return _NO
        return given if type(given) in (int, float) else kind(number)
    if isinstance(given, Mapping) and get_args(kind):
        held = get_args(kind)[-1]
        return given if all(_fit(item, held) is not _NO for item in given.values()) else _NO
    return given if _class(kind) is Any or isinstance(given, _class(kind)) else _NO


def _read(text: str, hint: Any) -> Any:
    """What a text stands for, `_NO` if nothing: None before numbers, numbers before words, a list if it has commas."""
    order = [NoneType, bool, int, float, Literal, str, Path, tuple]
    found: list[tuple[int, Any]] = []
    for kind, _ in _parts(hint):
        if get_origin(kind) in _MANY:
            items = [_read(item.strip(), get_args(kind)[0]) for item in text.split(",") if item.strip()]
            if _NO not in items:
                found.append((0 if "," in text else order.index(tuple), tuple(items)))
        elif get_origin(kind) is Literal:
            found += [(order.index(Literal), word) for word in get_args(kind) if str(word) == text]
        elif kind in (NoneType, bool):
            words = {"none": None} if kind is NoneType else {"true": True, "false": False}
            found += [(order.index(kind), words[text.lower()])] if text.lower() in words else []
        elif kind in order:
            with suppress(ValueError):
                found.append((order.index(kind), kind(text)))
    return min(found, key=lambda pair: pair[0])[1] if found else _NO


def _tuple(given: Any, kinds: tuple[Any, ...]) -> Any:
    if hasattr(given, "tolist") and getattr(given, "ndim", 0) == 1:
        given = given.tolist()
    if not isinstance(given, tuple | list | range):
        return _NO
    inner = [kinds[0]] * len(given) if kinds[-1:] == (...,) else list(kinds)
    if len(inner) != len(given):
        return _NO
    found = tuple(_fit(item, kind) for item, kind in zip(given, inner, strict=True))
    same = isinstance(given, tuple) and all(a is b for a, b in zip(found, given, strict=True))
    return _NO if any(item is _NO for item in found) else given if same else found


def _words(hint: Any, ranges: tuple[Range, ...]) -> str:
    """What one part of an annotation allows."""
    if get_origin(hint) is Literal:
        return " or ".join(repr(word) for word in get_args(hint))
    if get_origin(hint) in _MANY:
        inner = dict.fromkeys(expects(kind) for kind in get_args(hint) if kind is not ...)
        return f"several, each {' or '.join(inner)}"
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    words |= dict.fromkeys((NoneType, None), "None")
    return words.get(hint, f"an instance of {_class(hint).__name__}") + "".join(map(str, ranges))
