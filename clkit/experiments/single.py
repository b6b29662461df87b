"""One run by names and text options: what a shell can choose from, derived from the library itself.

The options of a learner, a consolidation or a training are the fields of its dataclass; those of a stream or a model
are the parameters of the function that makes it. Nothing here names a method.
"""

import inspect
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from clkit import checks, data, models
from clkit.consolidation import CONSOLIDATIONS
from clkit.data.streams import Disjoint
from clkit.learners import LEARNERS
from clkit.modulation import RULES, modulated
from clkit.training import Result, Training, find_device, run

PARTS = ("stream", "model", "rule", "learner", "consolidation", "training")


class Option(NamedTuple):
    """A setting of a part: its name, its default and the annotation that says which values it takes."""

    name: str
    default: Any
    hint: Any

    @property
    def shown(self) -> str:
        """The default, as one would write it in a shell."""
        if isinstance(self.default, tuple | list):
            return ",".join(map(str, self.default))
        return str(self.default).lower() if self.default in (None, True, False) else str(self.default)

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty


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
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function, include_extras=True)
    found = []
    for parameter in inspect.signature(maker).parameters.values():
        hint = checks.readable(hints.get(parameter.name, str))
        if parameter.name not in ("stream", "seed", "progress") and hint and parameter.kind != parameter.VAR_KEYWORD:
            found.append(Option(parameter.name, parameter.default, hint))
    return found


def run_single(
    chosen: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    tasks: int = 5,
    scenario: Disjoint = "class",
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
    find_device(device)
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
    return makers[checks.choice(part, name, makers)]


def _functions(module: types.ModuleType) -> dict[str, Callable[..., Any]]:
    public = {name: thing for name, thing in vars(module).items() if callable(thing) and not name.startswith("_")}
    return {name: thing for name, thing in public.items() if inspect.isfunction(inspect.unwrap(thing))}


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters
