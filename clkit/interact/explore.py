"""The explorer: a run chosen by hand, trained while the page stays alive, looked into and compared with others.

Training goes on in a thread of its own, which only sends messages. All that one sees is changed by the thread of the
page: as soon as that is idle, or while it waits for the run to end.
"""

import asyncio
import copy
import html
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from clkit import alignment, checks, data, landscape, plotting, training
from clkit.experiments import parts
from clkit.interact.knobs import Handles, handles, message, picture

COLUMNS = {"data": ("stream", "split"), "model": ("model", "rule"), "learner": ("learner",)}
COLUMNS |= {"consolidation": ("consolidation",), "training": ("training",)}
OPEN = 4  # settings of a choice that stand open, the others are folded
DPI = 80
LABELS = {"description_width": "84px"}
WIDE = {"width": "auto", "min_width": "0"}
ALPHAS = [round(0.05 * i, 2) for i in range(21)]
MEASURES = ("acc", "forgetting", "last")


class Run(NamedTuple):
    """A run that was made: what it was made of, its stream, and what it gave."""

    recipe: parts.Recipe
    stream: data.Stream
    result: training.Result


class _Stopped(Exception):
    """What ends a run that is not wanted any more."""


def explorer(
    *,
    data: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
    learners: Mapping[str, Any] | None = None,
    consolidations: Mapping[str, Any] | None = None,
) -> "Explorer":
    """A page of controls to choose a run by, to start and to stop it, to look into it and to compare it with others.

    Choices and settings are all that the library has. One's own stand beside them by name: a class or a function, whose
    parameters become settings (`learners={"mine": Mine}`), or a thing as it is (`data={"mine": dataset}`), whose name
    code has for it, too, or ValueError is raised. The last expression of a cell shows it; from code it does the same:

    ```python
    page = interact.explorer()
    page.choose("learner", "ER", memory=50)
    page.run()
    page.wait()
    page.table()
    ```
    """
    given = {"stream": data, "model": models, "learner": learners, "consolidation": consolidations}
    for label, own in zip(("data", "models", "learners", "consolidations"), given.values(), strict=True):
        for name, thing in (own or {}).items():
            if not parts.named(thing) and not str(name).isidentifier():
                raise ValueError(
                    f"{label}: {name!r} is no name that code has for it; give one without blanks and signs"
                )
    return Explorer({part: dict(own or {}) for part, own in given.items()})


class Explorer:
    """What `explorer` returns. `runs` are those that were made, `rows` the accuracies of the one that goes on.

    `widget` is the box of controls.
    """

    def __init__(self, own: Mapping[str, Mapping[str, Any]]) -> None:
        import ipywidgets as w

        self.runs, self.rows = list[Run](), list[np.ndarray]()
        self._events, self._stop = queue.SimpleQueue[tuple[str, Any]](), threading.Event()
        self._thread, self._loop, self._failed = None, None, None
        self._places: dict[str, list[Any]] = {"picture": [], "table": []}
        self._bundles: dict[str, dict[str, Any]] = {
            "picture": {"text/plain": "no run yet"},
            "table": {"text/plain": ""},
        }
        self._choices = {
            part: _Choice(part, parts.makers(part) | own.get(part, {}))
            for column in COLUMNS.values()
            for part in column
        }
        boxes = [
            w.VBox([w.HTML(f"<b>{title}</b>"), *(self._choices[part].box for part in column)], layout={"flex": "1 1 0"})
            for title, column in COLUMNS.items()
        ]
        self.seed = w.Text("0", description="seed", style=LABELS, layout=WIDE)
        boxes[-1].children += (self.seed,)
        self._run = w.Button(description="Run", icon="play", button_style="primary", layout={"width": "90px"})
        self._halt = w.Button(description="Stop", icon="stop", disabled=True, layout={"width": "90px"})
        self._bar = w.FloatProgress(max=1.0, layout={"width": "260px"})
        self._status = w.HTML()
        self._shown = w.Dropdown(options=[("none yet", None)], description="look at", layout={"width": "420px"})
        self._against = w.Dropdown(options=[("none", None)], description="minus", layout={"width": "420px"})
        self._code = w.HTML(layout={"display": "none"})
        toggle = _toggle("Show the code", self._code, {"width": "150px"})
        self.line, self._line = None, w.VBox()
        self._run.on_click(lambda _: self._pressed())
        self._halt.on_click(lambda _: self.stop())
        self._menus = {self._shown: lambda _: self._look(), self._against: lambda _: self._tabulate()}
        for menu, see in self._menus.items():
            menu.observe(see, "value")
        row = w.HBox([self._run, self._halt, self._bar, self._status], layout={"margin": "6px 0"})
        found = w.HBox([self._shown, self._against, toggle])
        self.widget: Any = w.VBox([w.HBox(boxes, layout={"width": "100%"}), row, found, self._code, self._line])

    def choose(self, part: str, name: str | None = None, **settings: Any) -> None:
        """Chooses for a part by name, and sets settings of the choice.

        Parts are "stream" (the dataset), "split" (into tasks), "model", "rule", "learner", "consolidation" and
        "training". Raises ValueError for a name that there is none of, and for what a menu or a box cannot take.
        """
        self._choices[checks.choice("part", part, self._choices)].choose(name, settings)

    def recipe(self) -> parts.Recipe:
        """What the controls say. Raises ValueError for a text that a setting cannot take."""
        names: dict[str, str] = {part: str(choice.menu.value) for part, choice in self._choices.items()}
        settings = {part: choice.settings() for part, choice in self._choices.items()}
        makers = {part: choice.makers[names[part]] for part, choice in self._choices.items()}
        return parts.Recipe(makers, names, settings, _read("seed", self.seed.value, checks.Index))

    def run(self) -> None:
        """Starts the run that the controls say, in the background, and returns at once.

        Raises ValueError, before any work, for settings that do not go, and while another run goes on.
        """
        if self.running:
            raise ValueError("run: another one goes on; stop it, or wait for it")
        recipe = self.recipe()
        made = [recipe.made(part) for part in ("learner", "consolidation", "training")]
        self._loop = None
        with suppress(RuntimeError):  # a script has no loop: `wait` takes the messages
            self._loop = asyncio.get_running_loop()
        self._stop.clear()
        self.rows, self._failed = [], None
        self._run.disabled, self._halt.disabled, self._bar.value = True, False, 0.0
        self._status.value = "reading data"
        self._thread = threading.Thread(target=self._work, args=(recipe, *made), daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether a run goes on, or has ended and not been shown yet."""
        return self._run.disabled

    def stop(self) -> None:
        """Ends the run that goes on after its next step; nothing is kept of it."""
        self._stop.set()

    def wait(self) -> None:
        """Returns when no run goes on any more; raises what ended one but for `stop`."""
        while self.running:
            self._take(*self._events.get())
        if self._failed is not None:
            raise self._failed

    def table(self, against: int | None = None) -> pd.DataFrame:
        """The runs made so far, numbered from 1: what each was, how well it does, and its difference to one of them."""
        rows = []
        for run in self.runs:
            learner, rule, recipe = map(run.recipe.code, ("learner", "consolidation", "training"))
            method = learner if run.recipe.names["consolidation"] == "none" else f"{learner} + {rule}"
            facts = {"data": f"{run.stream.name}, {run.stream.scenario}", "model": run.recipe.code("model")}
            summary = run.result.summary()
            facts |= {"method": method, "training": recipe, "seed": run.recipe.seed}
            rows.append(facts | {name: summary[name] for name in MEASURES} | {"seconds": run.result.seconds})
        table = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="run"))
        if against is not None:
            checks.choice("against", against, table.index)
            for name in MEASURES:
                table[f"{name} − {against}"] = table[name] - table.loc[against, name]
        return table

    def script(self, number: int | None = None) -> str:
        """The lines that make a run again in a script, by its number (default: the last one, or what is chosen now)."""
        if number is None and not self.runs:
            return self.recipe().script()
        known = dict(enumerate(self.runs, 1))
        return known[checks.choice("number", len(known) if number is None else number, known)].recipe.script()

    def _pressed(self) -> None:
        try:
            self.run()
        except Exception as error:
            self._status.value = message(error)

    def _work(self, recipe: parts.Recipe, learner: Any, rule: Any, settings: training.Training) -> None:
        """What the thread does."""
        try:
            stream = recipe.stream()
            if self._stop.is_set():
                raise _Stopped
            told = _Told(rule, self._progress(len(stream)))
            rows = _with_rows(learner, stream, lambda row: self._send("row", row))
            result = training.run(stream, recipe.model(), rows, told, settings, seed=recipe.seed, progress=False)
            vars(result.learner).pop("calibrate", None)
            self._send("made", Run(recipe, stream, result))
        except _Stopped:
            self._send("ended", None)
        except BaseException as error:  # what ends a thread silently would be waited for without end
            self._send("ended", error)

    def _progress(self, tasks: int) -> Callable[[Any], None]:
        sent = [0.0]

        def tell(progress: Any) -> None:
            if self._stop.is_set():
                raise _Stopped
            if time.monotonic() - sent[0] > 0.1:
                sent[0] = time.monotonic()
                self._send("far", (progress.task, (progress.task + progress.step / progress.steps) / tasks, tasks))

        return tell

    def _send(self, kind: str, value: Any) -> None:
        self._events.put((kind, value))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._taken)

    def _taken(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._take(*self._events.get_nowait())

    def _take(self, kind: str, value: Any) -> None:
        """Shows what the thread has sent."""
        if kind == "far":
            task, self._bar.value, tasks = value
            self._status.value = f"task {task + 1} of {tasks}"
        elif kind == "row":
            self.rows.append(value)
            matrix = np.full((len(value), len(value)), np.nan)
            matrix[: len(self.rows)] = self.rows
            self._show_matrix(matrix, f"{len(self.rows)} of {len(value)} tasks")
        else:
            self._run.disabled, self._halt.disabled = False, True
            if kind == "made":
                self._made(value)
            else:
                self._failed = value
                self._bar.value = 0.0
                self._status.value = "stopped" if value is None else message(value)

    def _made(self, run: Run) -> None:
        self.runs.append(run)
        self._bar.value = 1.0
        self._status.value = f"{run.result.summary()['acc']:.1%} on average, in {run.result.seconds:.1f} s"
        labels = [f"{number}: {row.method}, seed {row.seed}" for number, row in self.table().iterrows()]
        numbered = [(label, number) for number, label in enumerate(labels, 1)]
        offered = {self._against: [("none", None), *numbered], self._shown: numbered}
        chosen = {self._against: self._against.value, self._shown: len(numbered)}
        for menu, see in self._menus.items():
            menu.unobserve(see, "value")  # or it acts on the first option, too
            menu.options = offered[menu]
            menu.value = chosen[menu]
            menu.observe(see, "value")
        self._look()
        self._tabulate()

    def _look(self) -> None:
        """Shows the run that is chosen: its matrix, the way from its new weights to its old ones, its code."""
        if (number := self._shown.value) is None or number > len(self.runs):
            return
        run = self.runs[number - 1]
        self._code.value = f"<pre>{html.escape(self.script(number))}</pre>"
        tasks = range(2, len(run.stream) + 1)
        if not tasks:
            return self._show_matrix(run.result.accuracy, "1 task")
        knobs = {"α": ALPHAS, "after task": tasks, "line": landscape.VARIANTS}
        try:
            way = _Way(run)
            line = handles(way.draw, knobs, start={"after task": len(run.stream), "line": way.variant}, dpi=DPI)
        except Exception as error:  # a network of one's own may have no line; the run counts all the same
            self._status.value = message(error)
            return self._show_matrix(run.result.accuracy, f"{len(run.stream)} tasks")
        line.shown = self._places["picture"]  # the list itself: where the page is shown later, it moves, too
        self._lay(line)
        self._show("picture", line.bundle())

    def _show_matrix(self, accuracy: np.ndarray, text: str) -> None:
        """Shows a matrix alone, without a line."""
        self._lay(None)
        self._show("picture", {"image/png": picture(_matrix(accuracy)[0], DPI), "text/plain": text})

    def _lay(self, line: Handles | None) -> None:
        """Puts a line in the place of the one before, whose knobs may still be on their way and change nothing now."""
        if self.line is not None:
            self.line.shown = []
        self.line, self._line.children = line, (line.widget,) if line else ()

    def _tabulate(self) -> None:
        table = self.table(self._against.value).round(3)
        self._show("table", {"text/html": table.to_html(), "text/plain": table.to_string()})

    def _show(self, what: str, bundle: dict[str, Any]) -> None:
        self._bundles[what] = bundle
        for place in self._places[what]:
            place.update(bundle, raw=True)

    def __repr__(self) -> str:
        return f"Explorer({len(self.runs)} runs)"

    def _ipython_display_(self) -> None:
        from IPython.core.display_functions import display

        display(self.widget._repr_mimebundle_() | {"text/plain": repr(self)}, raw=True)
        for what, places in self._places.items():
            places.append(display(self._bundles[what], raw=True, display_id=True))


class _Choice:
    """The menu of a part and the fields of what is chosen in it; `makers` by name."""

    def __init__(self, part: str, makers: dict[str, Any]) -> None:
        import ipywidgets as w

        self.part, self.makers = part, makers
        self.menu = w.Dropdown(options=[*makers], value=parts.DEFAULTS.get(part, part), layout=WIDE)
        if part == "rule":  # the second menu of its column
            self.menu.description, self.menu.style = part, LABELS
        self.fields: dict[str, tuple[parts.Option, Any]] = {}
        self._settings = w.VBox()
        self.box = w.VBox([self.menu, self._settings] if len(makers) > 1 else [self._settings])
        self.menu.observe(lambda _: self._fill(), "value")
        self._fill()

    def _fill(self) -> None:
        import ipywidgets as w

        maker = self.makers[str(self.menu.value)]
        self.menu.tooltip = parts.about(maker)
        self.fields = {option.name: (option, _field(option)) for option in parts.options(maker)}
        fields = [field for _, field in self.fields.values()]
        rest = w.VBox(fields[OPEN:], layout={"display": "none"})
        folded = (_toggle("more", rest, WIDE), rest) if len(fields) > OPEN else ()
        self._settings.children = (*fields[:OPEN], *folded)

    def choose(self, name: str | None, settings: Mapping[str, Any]) -> None:
        if name is not None:
            self.menu.value = checks.choice(self.part, name, self.makers)
        for key, value in settings.items():
            option, field = self.fields[checks.choice("settings", key, self.fields)]
            as_text = field.has_trait("placeholder")
            field.value = option._replace(default=value).shown if as_text else checks.value(key, value, option.hint)

    def settings(self) -> dict[str, Any]:
        """What is not at its default."""
        found = {}
        for name, (option, field) in self.fields.items():
            value = field.value
            if field.has_trait("placeholder"):
                if value.strip() == ("" if option.required else option.shown):
                    continue
                value = _read(name, value, option.hint)
            if value != option.default:
                found[name] = value
        return found


def _field(option: parts.Option) -> Any:
    """A box to tick, a menu or a line of text, as the values of a setting are."""
    import ipywidgets as w

    shape: dict[str, Any] = {"description": option.name, "style": LABELS, "layout": WIDE}
    shape["tooltip"] = f"{option.name}: {checks.expects(option.hint)}"
    if option.hint is bool:
        return w.Checkbox(option.default is True, indent=False, **shape)
    if words := checks.words(option.hint):
        return w.Dropdown(options=[(str(word).lower() if word is None else word, word) for word in words],
                          value=words[0] if option.required else option.default, **shape)  # fmt: skip
    return w.Text("" if option.required else option.shown, continuous_update=False, **shape)


def _toggle(label: str, box: Any, layout: Any) -> Any:
    """A button that shows a box, and hides it again."""
    import ipywidgets as w

    button = w.ToggleButton(description=label, layout=layout)
    button.observe(lambda change: setattr(box.layout, "display", "" if change["new"] else "none"), "value")
    return button


def _read(name: str, text: str, hint: Any) -> Any:
    """What a text stands for, within the range that the annotation allows; else ValueError."""
    return checks.value(name, checks.parse(name, text.strip(), hint), hint)


class _Told:
    """A consolidation as it is, but that it tells how far the run is whenever it is asked whether it is due."""

    def __init__(self, rule: Any, tell: Callable[[Any], None]) -> None:
        self._rule, self._tell = rule, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_rule"], name)

    def __repr__(self) -> str:
        return repr(self._rule)

    def due(self, progress: Any) -> bool:
        self._tell(progress)
        return self._rule.due(progress)

    def __call__(self, context: Any) -> Any:
        return self._rule(context)


def _with_rows(learner: Any, stream: data.Stream, tell: Callable[[np.ndarray], None]) -> Any:
    """A copy of a learner that tells the accuracies on all tasks as soon as the weights after a task are deployed."""
    kept: dict[int, dict[str, Any]] = {}

    def calibrate(self: Any, model: Any, task: Any) -> None:
        type(self).calibrate(self, model, task)
        tell(training.evaluate(model, stream, predict=self.predict, kept=kept).accuracy)

    learner = copy.copy(learner)
    learner.calibrate = MethodType(calibrate, learner)
    return learner


class _Way:
    """The way from a run's weights as trained on a task to those deployed before it, measured where one looks."""

    def __init__(self, run: Run) -> None:
        self.run, self.variant, self._old, self._symmetry = run, landscape.VARIANTS[0], dict[Any, Any](), None
        self._found: dict[tuple[int, str], dict[float, np.ndarray]] = {}
        self._figure, middle, right = _matrix(run.result.accuracy)
        tasks = range(1, len(run.stream) + 1)
        with plotting.style():
            middle.axis("on")
            self._bars = middle.bar(tasks, [0] * len(tasks), color=plotting.BLUE)
            middle.set(xlabel="task", ylabel="accuracy (%)", ylim=(0, 100), xticks=tasks, title=" ")
            right.axis("on")
            (self._means,) = right.plot([], "o-", color=plotting.BLUE)
            (self._point,) = right.plot([], "o", color=plotting.ORANGE, markersize=9)
            right.set(xlim=(-0.03, 1.03), ylim=(0, 100), xticks=[0, 0.5, 1], ylabel="mean accuracy (%)")
            right.set(xticklabels=["0 (new)", "0.5", "1 (old)"], xlabel="α")
            self._figure.draw_without_rendering()
        self._figure.set_layout_engine("none")  # what is laid out once is drawn twice as fast

    def measure(self, alpha: float, task: int, variant: str) -> np.ndarray:
        """The accuracies on the tasks until `task`, counted from 1, at alpha: 0 is new, 1 is old."""
        found = self._found.setdefault((task, variant), {})
        if alpha not in found:
            result, aligned = self.run.result, variant.startswith("aligned")
            refresh = result.inputs[task - 1] if variant.endswith("re-estimated") else None
            path = result.trained[task - 1], self._end(task, aligned)
            predict = {"predict": result.learner.predict, "seen": task, "refresh": refresh}
            found[alpha] = landscape.curve(result.model, path, self.run.stream, [alpha], **predict).accuracy[0]
        return found[alpha]

    def _end(self, task: int, aligned: bool) -> Any:
        result = self.run.result
        old, new, inputs = result.weights[task - 2], result.trained[task - 1], result.inputs[task - 1]
        if aligned and task not in self._old:
            place = next(result.model.parameters()).device
            old, new = ({name: t.to(place) for name, t in ws.items()} for ws in (old, new))
            inputs = inputs.to(place)
            self._symmetry = self._symmetry or alignment.symmetry(result.model, inputs[:2])
            match = alignment.align(self._symmetry, result.model, new, old, inputs, by="activations")
            self._old[task] = alignment.permute(self._symmetry, match.permutations, old)
        return self._old[task] if aligned else old

    def draw(self, alpha: float, task: int, variant: str) -> Any:
        """The matrix, beside it the accuracies at alpha, and the means wherever one has looked."""
        here, found = self.measure(alpha, task, variant), self._found[task, variant]
        for bar, height in zip(self._bars, [*here, *[0.0] * len(self._bars)], strict=False):
            bar.set_height(100 * height)
        self._bars[0].axes.set_title(f"at α = {alpha:g}: {here.mean():.1%} on average")
        ts = sorted(found)
        self._means.set_data(ts, [100 * found[t].mean() for t in ts])
        self._point.set_data([alpha], [100 * here.mean()])
        return self._figure


def _matrix(accuracy: np.ndarray) -> tuple[Any, Any, Any]:
    """A figure with the accuracies on the left, and the axes of two more panels, which are empty."""
    from matplotlib.figure import Figure

    with plotting.style():
        fig = Figure(figsize=(11.6, 3.2), layout="constrained")
        left, *others = fig.subplots(1, 3)
        plotting.accuracy_matrix(left, accuracy)
        for ax in others:
            ax.axis("off")
    return fig, *others
