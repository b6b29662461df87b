"""One run by names and text options: what a shell can choose from, derived from the library itself.

The options of a learner, a consolidation or a training are the fields of its dataclass; those of a stream or a model
are the parameters of the function that makes it. Nothing here names a method.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from clkit import data, models
from clkit.consolidation import CONSOLIDATIONS
from clkit.data.core import unknown
from clkit.experiments.plan import device_kind
from clkit.learners import LEARNERS
from clkit.modulation import RULES, modulated
from clkit.training import Result, Training, run

PARTS = ("stream", "model", "rule", "learner", "consolidation", "training")


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting of a part: its name, its default and the kinds of value it takes, in the order in which to try them."""

    name: str
    default: Any
    kinds: tuple[Any, ...]

    def parse(self, text: str) -> Any:
        """The value that a text stands for; tuples are written with commas. Raises ValueError if it stands for none."""
        for kind in sorted(self.kinds, key=lambda kind: isinstance(kind, tuple) and "," not in text):
            try:
                return _parse(text, kind)
            except ValueError:
                continue
        raise ValueError(f"{self.name}: {text!r} is not {self.expects}")

    @property
    def shown(self) -> str:
        """The default, as one would write it."""
        if isinstance(self.default, tuple | list):
            return ",".join(map(str, self.default))
        return str(self.default).lower() if self.default in (None, True, False) else str(self.default)

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty

    @property
    def expects(self) -> str:
        """What the option takes, in words."""
        return " or ".join(dict.fromkeys(_words(kind) for kind in self.kinds))


def choices(part: str) -> list[str]:
    """The names to choose from for a part: stream, model, rule, learner, consolidation or training."""
    return list(_makers(part))


def about(part: str, name: str) -> str:
    """The first sentence of a choice's documentation."""
    maker = _maker(part, name)
    text = inspect.getdoc(maker.func if isinstance(maker, partial) else maker) or ""
    return " ".join(text.partition("\n\n")[0].split())


def options(part: str, name: str) -> list[Option]:
    """The options of a part's choice, in order; those that no text can express are left out."""
    maker = _maker(part, name)
    function = maker.func if isinstance(maker, partial) else maker
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function)
    found = []
    for parameter in inspect.signature(maker).parameters.values():
        kinds = tuple(_kinds(hints.get(parameter.name, str)))
        if parameter.name not in ("stream", "seed", "progress") and kinds and parameter.kind != parameter.VAR_KEYWORD:
            found.append(Option(parameter.name, parameter.default, kinds))
    return found


def run_single(
    chosen: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    tasks: int = 5,
    scenario: data.Scenario = "class",
    order: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    checkpoint: Path | None = None,
) -> Result:
    """Runs one configuration: `chosen` names each part, `settings` has the options of each that are not the default.

    With a rule (modulation, a mask, ...) the model is a frozen network whose weights it makes, as `PerTask` needs it.
    A stream's dataset is split into `tasks`; its classes come in their own order, or in one shuffled by `order`.
    """
    made = {part: _maker(part, chosen[part]) for part in PARTS if part != "training"}
    device_kind(device)
    training = Training(**settings.get("training", {}))
    learner = made["learner"](**settings.get("learner", {}))
    consolidation = made["consolidation"](**settings.get("consolidation", {}))
    dataset = made["stream"](**settings.get("stream", {}))
    stream = data.split(dataset, tasks, order=order, scenario=scenario)
    model = partial(made["model"], **settings.get("model", {}))
    if chosen["rule"] != "none":
        model = partial(modulated, model=model, rule=made["rule"](**settings.get("rule", {})))
    options: dict[str, Any] = {"seed": seed, "device": device, "progress": progress, "checkpoint": checkpoint}
    return run(stream, model, learner, consolidation, training, keep=False, **options)


def _makers(part: str) -> dict[str, Callable[..., Any]]:
    if part == "learner":
        return dict(LEARNERS)
    if part == "consolidation":
        return dict(CONSOLIDATIONS)
    if part == "rule":
        return {"none": _no_rule, **RULES}
    if part == "training":
        return {"training": Training}
    if part == "model":
        return {name: f for name, f in _functions(models).items() if next(iter(_parameters(f)), "") == "stream"}
    made = {name: f for name, f in _functions(data).items() if get_type_hints(f).get("return") is data.Dataset}
    loader = made.pop("load")
    return {**made, **{name: partial(loader, name) for name in data.TORCHVISION}}


def _no_rule() -> None:
    """The model computes with its own weights."""


def _maker(part: str, name: str) -> Callable[..., Any]:
    makers = _makers(part)
    if name not in makers:
        raise unknown(part, name, makers)
    return makers[name]


def _functions(module: types.ModuleType) -> dict[str, Callable[..., Any]]:
    public = {name: thing for name, thing in vars(module).items() if callable(thing) and not name.startswith("_")}
    return {name: thing for name, thing in public.items() if inspect.isfunction(inspect.unwrap(thing))}


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _kinds(hint: Any) -> list[Any]:
    """What a type hint allows of None, bool, int, float, tuples, literals and text, most special first."""
    if get_origin(hint) in (Union, types.UnionType):
        return sorted((kind for part in get_args(hint) for kind in _kinds(part)), key=_rank)
    if get_origin(hint) in (tuple, list, Sequence):
        inner = [kind for part in get_args(hint) if part is not ... for kind in _kinds(part)]
        return [(tuple, tuple(dict.fromkeys(inner)))] if inner else []
    if get_origin(hint) is Literal:
        return [hint]
    return [hint] if hint in (type(None), bool, int, float, str, Path) else []


def _rank(kind: Any) -> int:
    order = [type(None), bool, int, float]
    return order.index(kind) if kind in order else 6 if kind in (str, Path) else 4 + (get_origin(kind) is Literal)


def _parse(text: str, kind: Any) -> Any:
    if kind is type(None):
        if text.lower() == "none":
            return None
        raise ValueError
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError
    if isinstance(kind, tuple):
        inner = Option("", None, kind[1])
        return tuple(inner.parse(part.strip()) for part in text.split(",") if part.strip())
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        raise ValueError
    return kind(text)


def _words(kind: Any) -> str:
    if isinstance(kind, tuple):
        return "a list with commas"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    words = {type(None): "none", bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    return words.get(kind, "a word")
