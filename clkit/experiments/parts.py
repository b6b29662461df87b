"""What a run is made of, by name: the choices for each part, the settings that each takes, and the code that it is.

Nothing here names a method. The settings of a learner, a consolidation or a training are the fields of its dataclass;
those of a dataset, a division into tasks or a model are the parameters of the function that makes it.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, get_type_hints

from clkit import checks, data, models, training
from clkit.consolidation import CONSOLIDATIONS
from clkit.learners import LEARNERS
from clkit.modulation import RULES, modulated

DEFAULTS = {"stream": "digits", "model": "convnet", "rule": "none", "learner": "fine-tuning", "consolidation": "none"}
"""The parts that there is a choice for, and what is chosen by default; "training" and "split" are the others."""
ELSEWHERE = ("stream", "dataset", "datasets", "seed", "progress")  # what a maker takes that is no setting of it


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


def makers(part: str) -> dict[str, Any]:
    """What makes each choice of a part, by name: all that the library has.

    Parts are "stream" (the dataset), "split", "model", "rule", "learner", "consolidation" and "training".
    """
    known: dict[str, Mapping[str, Any]] = {
        "learner": LEARNERS,
        "consolidation": CONSOLIDATIONS,
        "rule": {"none": no_rule, **RULES},
        "training": {"training": training.Training},
        "split": {"split": split},
    }
    if part in known:
        return {**known[part]}
    public = vars(models if part == "model" else data).items()
    functions = {n: f for n, f in public if n[0] != "_" and inspect.isfunction(inspect.unwrap(f) if callable(f) else f)}
    if part == "model":
        return {n: f for n, f in functions.items() if next(iter(inspect.signature(f).parameters), "") == "stream"}
    made = {name: f for name, f in functions.items() if get_type_hints(f).get("return") is data.Dataset}
    loader = made.pop("load")
    return {**made, "folders": data.folders, **{name: partial(loader, name) for name in data.TORCHVISION}}


def maker(part: str, name: str) -> Any:
    """What makes one choice of a part; ValueError for a name that is not known."""
    known = makers(part)
    return known[checks.choice(part, name, known)]


def makes(thing: Any) -> bool:
    """Whether a choice is a class or a function that makes a part, and not the part itself."""
    return isinstance(thing, type | partial) or inspect.isroutine(thing)


def named(thing: Any) -> bool:
    """Whether a choice is a class or a function that has a name of its own, as a lambda has not."""
    return makes(thing) and "<lambda>" not in getattr(checks.innermost(thing), "__qualname__", "<lambda>")


def about(maker: Any) -> str:
    """The first sentence of a choice's documentation."""
    text = inspect.getdoc(checks.innermost(maker) if makes(maker) else maker) or ""
    return " ".join(text.partition("\n\n")[0].split())


def options(maker: Any, elsewhere: Sequence[str] = ELSEWHERE) -> list[Option]:
    """The settings of a choice, in order; those `elsewhere` and those that no text can express are left out."""
    if not makes(maker):
        return []
    function = checks.innermost(maker)
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function, include_extras=True)
    found = []
    for p in inspect.signature(maker).parameters.values():
        plain = type(p.default) if isinstance(p.default, bool | int | float) else str
        hint = checks.readable(hints.get(p.name, plain))
        if p.name not in elsewhere and hint and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            found.append(Option(p.name, p.default, hint))
    return found


def no_rule() -> None:
    """The model computes with its own weights."""


@checks.arguments
def split(
    dataset: Any,
    tasks: int | Sequence[int] = 5,
    *,
    order: int | Sequence[int | str] | None = None,
    scenario: data.Scenario = "class",
) -> data.Stream:
    """A stream of a dataset: its classes parted into tasks, with labels of their own or ("domain") the same in each.

    Of several datasets, by name, each is a task with the same classes. Raises ValueError as `data.split` does, and for
    these with another scenario than "domain".
    """
    for function, options in _steps(isinstance(dataset, Mapping), tasks, order, scenario):
        dataset = function(dataset, **options)
    return dataset


@dataclass(frozen=True)
class Recipe:
    """One run: what makes each of its parts, and their settings but those at their defaults.

    `makers` are classes, functions or things as they are, by part; `names` what these are called; `seed` is the run's.
    """

    makers: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0

    def made(self, part: str) -> Any:
        """A part. Raises ValueError for settings that it does not take, or takes only with others."""
        thing, settings = self.makers[part], self.settings.get(part, {})
        for option in options(thing):
            if option.required and option.name not in settings:
                raise ValueError(f"{self.names.get(part, part)} needs {option.name}, {checks.expects(option.hint)}")
        return thing(**settings) if makes(thing) else thing

    def stream(self) -> data.Stream:
        """The data in tasks, as "stream" and "split" say."""
        return split(self.made("stream"), **self.settings.get("split", {}))

    def model(self) -> Any:
        """The network or its factory; with a rule (modulation, a mask, ...) one frozen, whose weights that makes."""
        thing, rule, settings = self.makers["model"], self.makers.get("rule", no_rule), self.settings.get("model", {})
        thing = partial(thing, **settings) if settings else thing
        return thing if rule is no_rule else partial(modulated, model=thing, rule=self.made("rule"))

    def run(self, **options: Any) -> training.Result:
        """The run; options are those of `training.run`, which has the errors."""
        learner, rule, recipe = map(self.made, ("learner", "consolidation", "training"))
        return training.run(self.stream(), self.model(), learner, rule, recipe, seed=self.seed, **options)

    def code(self, part: str) -> str:
        """A part as Python code, without the imports: `ER(memory=50)`."""
        script = _Script(self)
        return script.model() if part == "model" else script.part(part)

    def script(self) -> str:
        """The lines that make the same run: imports, the stream, the run. A thing as it is goes by its name."""
        script = _Script(self)
        parts = [script.model(), *map(script.part, ("learner", "consolidation", "training"))]
        lines = f"stream = {script.stream()}\nresult = {script.name(training.run)}(stream, {', '.join(parts)}"
        imports = [f"from {m} import {', '.join(sorted(names))}" for m, names in sorted(script.imports.items())]
        return "\n".join(imports) + f"\n\n{lines}, seed={self.seed})"


class _Script:
    """Parts of a recipe as code, and the names that it imports, by module."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.imports = recipe, dict[str, set[str]]()

    def name(self, thing: Any) -> str:
        """What a class or function is called once it is imported, from the shortest module that hands it on.

        What was made within a function goes by its own name, and one without a name by that of the choice.
        """
        module, within, name = thing.__module__, *thing.__qualname__.rpartition("<locals>.")[::2]
        if name == "<lambda>":
            choices = ((self.recipe.names[part], maker) for part, maker in self.recipe.makers.items())
            return next((choice for choice, maker in choices if checks.innermost(maker) is thing), name)
        if within:
            return name
        first = name.partition(".")[0]
        ends = [i for i, letter in enumerate(module) if letter == "."]
        places = [module[:end] for end in ends] + [module]
        outer = getattr(sys.modules.get(module), first, thing)
        place = next((p for p in places if getattr(sys.modules.get(p), first, None) is outer), module)
        if place != "__main__":
            self.imports.setdefault(place, set()).add(first)
        return name

    def call(self, function: Any, *first: str, **settings: Any) -> str:
        """A call with arguments that are code already, and settings."""
        while isinstance(function, partial):
            first, settings = (*first, *map(repr, function.args)), function.keywords | settings
            function = function.func
        return f"{self.name(function)}({', '.join([*first, *(f'{k}={v!r}' for k, v in settings.items())])})"

    def part(self, part: str) -> str:
        thing = self.recipe.makers[part]
        return self.call(thing, **self.recipe.settings.get(part, {})) if makes(thing) else self.recipe.names[part]

    def model(self) -> str:
        thing, settings = self.recipe.makers["model"], self.recipe.settings.get("model", {})
        code = self.name(thing) if makes(thing) else self.recipe.names["model"]
        code = self.call(partial, code, **settings) if settings else code
        if self.recipe.makers.get("rule", no_rule) is no_rule:
            return code
        return self.call(partial, self.name(modulated), f"model={code}", f"rule={self.part('rule')}")

    def stream(self) -> str:
        settings = {"tasks": 5, "order": None, "scenario": "class"} | dict(self.recipe.settings.get("split", {}))
        code = self.part("stream")
        source = self.recipe.makers["stream"]
        for function, options in _steps(source is data.folders or isinstance(source, Mapping), **settings):
            code = self.call(function, code, **options)
        return code


def _steps(several: bool, tasks: Any, order: Any, scenario: str) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """The functions that make a stream of a dataset, or of several, one after another, with their options."""
    if several:
        if scenario != "domain":
            raise ValueError(f'scenario: {scenario!r}; several datasets with the same classes are "domain"')
        return [(data.domains, {})]
    options: dict[str, Any] = {"tasks": tasks} | ({} if order is None else {"order": order})
    if scenario == "domain":
        return [(data.split, options), (data.shared_head, {})]
    return [(data.split, options | ({} if scenario == "class" else {"scenario": scenario}))]
