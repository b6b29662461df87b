"""Methods by name, made in grids of settings; and what every method of a table is set to, as columns of it."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from clkit.consolidation import CONSOLIDATIONS, Consolidation
from clkit.data import Dataset, Stream
from clkit.learners import LEARNERS, Learner, Sum
from clkit.training import ModelFactory, Training

Model = nn.Module | ModelFactory
Named = Mapping[str, Any]
SWEPT = (Mapping, list, tuple, range, np.ndarray)
_PARTS = ("consolidation", "learner", "training", "model", "stream", "labels")
"""What a run consists of, in the order in which their settings get the plain names of columns."""


@dataclass(frozen=True)
class Method:
    """One row of a comparison: a learner, a consolidation, and a training or model of its own where it needs one.

    `labels` are columns of its rows beside its settings, and no part of what is computed.
    """

    learner: Learner
    consolidation: Consolidation | None = None
    training: Training | None = None
    model: Model | None = None
    labels: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def grid(
    kind: Callable[..., Any],
    name: str | None = None,
    *,
    learner: Learner | None = None,
    consolidation: Consolidation | None = None,
    training: Training | None = None,
    model: Model | None = None,
    **settings: Any,
) -> dict[str, Method]:
    """Makes a method of every combination of settings: `kind(**settings)`, by name.

    ```python
    methods = grid(SFA, "SFA p={p:g} β={beta:g}", p=(0.1, 0.25, 1.0), beta=(0.2, 0.5)) | grid(Joint)
    methods |= grid(EWC, "EWC λ={strength:g}", strength=(1.0, 10.0))
    methods |= grid(ER, "ER {memory} + CLeWI", memory=(50, 100), consolidation=CLeWI(alpha=0.3))
    methods |= grid(CLeWI, "CLeWI α={alpha:g}, {align}", alpha=(0.1, 0.3), learner=ER(memory=50),
                    align={"matched": "activations", "not matched": None})
    ```

    - `kind`: a class of learners or consolidations, or any function that gives one, or gives a whole `Method`
    - `name`: a format of the settings; by default the kind's own name with what is swept. Of a mapping the keys are
      put in, of other settings the values.
    - `settings`: lists, tuples, ranges, arrays and mappings (of names to values) are swept, the last one fastest; other
      values are fixed. A value that is a tuple itself stands in a list: `own=[("linear.",)]`.
    - `learner` (default: fine-tuning) goes with consolidations, `consolidation` (default: none) with learners;
      `training` and `model` are the method's own. A setting that has one of these names goes into the kind:
      `grid(partial(Merging, training="independent"), "{merge}", merge=("ties", "dare"))`.

    Raises ValueError for a name that is given twice, TypeError for settings that the kind does not have.
    """
    if not isinstance(training, Training | None):
        raise TypeError(f"training: {training!r}; give a Training, or partial({word(kind)}, training=...) as the kind")
    parts = {"learner": learner, "consolidation": consolidation, "training": training, "model": model}
    given: dict[str, Any] = {part: value for part, value in parts.items() if value is not None}
    made: dict[str, Method] = {}
    for labels, values in combinations(settings):
        thing = kind(**values)
        own = "learner" if isinstance(thing, Learner) else "consolidation"
        if own in given and not isinstance(thing, Method):
            raise TypeError(f"{own}: {word(kind)} is the {own} itself; leave {given[own]!r} out")
        swept = [f"{axis}={label}" for axis, label in labels.items() if isinstance(settings[axis], SWEPT)]
        title = name.format(**labels) if name else " ".join([word(kind), *swept])
        if title in made:
            raise ValueError(f"name: {name!r} gives {title!r} twice; put every setting that is swept into it")
        whole = thing if isinstance(thing, Method) else replace(Method(Learner()), **{own: thing})
        made[title] = replace(whole, **given, labels={**labels, **whole.labels})
    return made


def combinations(settings: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The labels and the values of every combination of settings, by name, the last one fastest.

    What is swept, a `SWEPT`, gives its items, labelled by a mapping's keys or else by themselves; other values are
    their own label. ValueError for what is empty.
    """
    pairs = []
    for axis, value in settings.items():
        items = value.tolist() if isinstance(value, np.ndarray) else value if isinstance(value, SWEPT) else [value]
        pairs.append(list(items.items()) if isinstance(items, Mapping) else [(item, item) for item in items])
        if not pairs[-1]:
            raise ValueError(f"{axis}: {value!r} is empty; give at least one value")
    for chosen in itertools.product(*pairs):
        labels, values = ([pair[k] for pair in chosen] for k in (0, 1))
        yield dict(zip(settings, labels, strict=True)), dict(zip(settings, values, strict=True))


def with_settings(
    table: pd.DataFrame, streams: Named, models: Named, trainings: Named, methods: Mapping[str, Method]
) -> pd.DataFrame:
    """A table of runs with columns for what they were set to, before its hash; `attrs["settings"]` names them.

    - `consolidation` and `learner`: of which kind they are, in words ("none" for no consolidation)
    - their settings: the first of each kind, and every other of which some method has not the default
    - settings of the training, the model and the stream, if rows differ in them; of functions these are the keywords of
      a `partial`
    - labels of the methods, those that `grid` gave among them, where no setting has that name

    These are numbers, words and truth values alone. Nested parts are named by their kind, and their settings count:
    of `SFA(p=Drift(times=40))` p, "Drift", and times, of `Sum(ER(50), EWC(10.0))` memory and strength. Rows without a
    setting have NaN or None there.

    A name that is a column already is put after its part's: where `alpha` is a consolidation's, a learner's is
    `learner_alpha`. The order is results, consolidation, learner, training, model, stream.
    """
    rows = []
    for stream, model, training, method in zip(*(table[a] for a in ("stream", "model", "training", "method"))):  # noqa: B905
        own = methods[method]
        parts = own.consolidation, own.learner, own.training or trainings[training], own.model or models[model]
        rows.append([_plain(part) for part in (*parts, streams[stream], tuple(own.labels.items()))])
        for k, part in enumerate(parts[:2]):
            kinds = [word(type(each)) for each in (part.parts if isinstance(part, Sum) else [part])]
            rows[-1][k] = {_PARTS[k]: ("none" if part is None else " + ".join(kinds), True)} | rows[-1][k]
    table, added = table.copy(), []
    place = len(table.columns) - ("hash" in table)
    for k, part in enumerate(_PARTS):
        told = dict.fromkeys(name for row in rows for name, (_, tells) in row[k].items() if tells)
        for name in told:
            column = [row[k].get(name, (None,))[0] for row in rows]
            if part == "labels" and name in added:
                continue
            if part == "labels" or len(set(column)) > 1 or (k < 2 and column[0] is not None):
                while name in table:
                    name = f"{part}_{name}"
                table.insert(place + len(added), name, column)
                added.append(name)
    table.attrs["settings"] = added
    return table


def word(kind: Any) -> str:
    """What a class or function is called: a built-in rule by its name in words."""
    known: dict[Any, str] = {rule: name for name, rule in (LEARNERS | CONSOLIDATIONS).items()}
    inner = kind.func if isinstance(kind, functools.partial) else kind
    return known.get(inner) or getattr(inner, "__name__", type(inner).__name__)


def _plain(part: Any) -> dict[str, tuple[Any, bool]]:
    """The settings of a part by name, each with whether it tells something; a second one of a name is `name_2`."""
    found: dict[str, tuple[Any, bool]] = {}
    for name, value, tells in _walk(part):
        title, number = name, 1
        while title in found:
            title, number = f"{name}_{number + 1}", number + 1
        found[title] = value, tells
    return found


def _walk(part: Any) -> Iterator[tuple[str, Any, bool]]:
    if isinstance(part, Stream | Dataset | type):
        return
    items: list[tuple[str, Any, Any]] = []
    if isinstance(part, functools.partial):
        items = [(name, value, None) for name, value in part.keywords.items()]
    elif isinstance(part, tuple):  # of parts, or of options by name, as Merging has them
        pairs = [each if isinstance(each, tuple) and len(each) == 2 else ("", each) for each in part]
        items = [(name if isinstance(name, str) else "", value, None) for name, value in pairs]
    elif is_dataclass(part):
        own = [field for field in fields(part) if field.init]
        items = [(f.name, getattr(part, f.name), f.default if f is not own[0] else None) for f in own]
    for name, value, default in items:
        plain = isinstance(value, bool | int | float | str | None)
        if name and plain:
            yield name, value, value != default
        elif name and is_dataclass(value) and not isinstance(value, Learner | Stream | Dataset | type):
            yield name, word(type(value)), True
        if not plain:
            yield from _walk(value)
