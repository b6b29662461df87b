"""Handles: knobs with the picture that belongs to their position.

A cell that shows them has two outputs: the knobs, a widget, and the picture, an output like that of any figure, which
is exchanged when a knob moves. So the picture has its own size, live and stored, and it is what is saved: read without
a kernel, the last one shown stands still. Nothing is captured or printed, so notebooks that hold handles can be
executed and compared by machine.
"""

import html
import io
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from clkit import checks

FRAME = 1 / 15
"""The seconds that a drawing may take for a knob to be followed while it is dragged."""


@checks.arguments
def handles(
    draw: Callable[..., Any],
    values: Mapping[str, Any],
    *,
    start: Mapping[str, Any] | None = None,
    dpi: checks.Count | Literal["figure"] = "figure",
) -> "Handles":
    """A knob for each label of `values`, and the figure that `draw` makes of their values, in this order.

    ```python
    interact.handles(draw, {"α": (0.0, 0.5, 1.0), "task": (1, 2, 3)}, start={"α": 0.5})   # draw(alpha, task)
    ```

    Each picture is drawn once, when its position is first reached, and kept. So `draw` may look a value up or compute
    it on the spot. Where the last drawing took longer than a fifteenth of a second, knobs act when they are let go;
    else, and when every picture is kept, pictures follow them. `start` has the first value of a knob, by default the
    first of its own; `dpi` is by default that of the figure. What the first drawing raises stops the cell. What a later
    one raises is shown under the knobs, and the picture before it stays.

    Raises ValueError for no knob, a knob without values, and a start that is none of them, TypeError for a drawing that
    is no figure.
    """
    offered = {
        label: list(own) if np.iterable(own) and not isinstance(own, str) else [] for label, own in values.items()
    }
    if not offered or not all(isinstance(label, str) and own for label, own in offered.items()):
        told = f"values: {dict(values)!r:.200}"
        raise ValueError(f"{told}; give at least one label, a text, each with a list of values that its knob can take")
    for label in start or {}:
        checks.choice("start", label, offered)
    return Handles(draw, offered, [_position(label, own, start or {}) for label, own in offered.items()], dpi)


class Handles:
    """What `handles` returns; the last expression of a cell shows it. `at` has the knobs' values, by label.

    `knobs` are the sliders by label and `widget` the box that holds them; `png` is the picture, as bytes, and `shown`
    the outputs that it is shown in; `error` is what the last drawing raised, or None.
    """

    def __init__(self, draw: Callable[..., Any], values: dict[str, list[Any]], start: list[int], dpi: Any) -> None:
        import ipywidgets

        self.values, self.dpi, self.png, self.error = values, dpi, b"", None
        self._draw, self._pictures, self.shown = draw, {}, []
        self._position = dict(zip(values, start, strict=True))
        self.knobs: dict[str, Any] = {}
        self._texts: dict[str, Any] = {}
        wide = max(map(len, values))
        for label, own in values.items():
            knob = self.knobs[label] = ipywidgets.SelectionSlider(
                options=[(_text(value), index) for index, value in enumerate(own)],
                value=self._position[label],
                description=label,
                readout=False,  # it would be cut
                layout={"width": f"{40 + wide}ch"},
                style={"description_width": f"{wide}ch" if len(values) > 1 else "initial"},
            )
            knob.observe(lambda change, label=label: self._moved(label, change["new"]), names="value")
            self._texts[label] = ipywidgets.Label(layout={"width": "max-content"})
        rows = [ipywidgets.HBox([knob, self._texts[label]]) for label, knob in self.knobs.items()]
        self._message = ipywidgets.HTML()
        self.widget: Any = ipywidgets.VBox([*rows, self._message])
        self._show()
        if self.error is not None:
            raise self.error

    @property
    def at(self) -> dict[str, Any]:
        """The value of each knob, by label."""
        return {label: own[self._position[label]] for label, own in self.values.items()}

    def move(self, to: Mapping[str, Any]) -> None:
        """Moves knobs to values, by label. Raises ValueError for a label or a value that there is none of."""
        for label in to:
            checks.choice("to", label, self.values)
        for label, index in {label: _position(label, self.values[label], to) for label in to}.items():
            self.knobs[label].value = index

    def _moved(self, label: str, index: int) -> None:
        self._position[label] = index
        self._show()

    def _show(self) -> None:
        """Shows the picture for where the knobs are, or what drawing it raised."""
        where, follows = tuple(self._position.values()), next(iter(self.knobs.values())).continuous_update
        waits = "" if follows or where in self._pictures else " ..."
        for label, value in self.at.items():
            self._texts[label].value = _text(value) + waits
        try:
            self.png, self.error = self._picture(where), None
        except Exception as error:
            self.error = error
        finally:
            for label, value in self.at.items() if waits else ():
                self._texts[label].value = _text(value)
        self._message.value = "" if self.error is None else message(self.error)
        for place in self.shown if self.error is None else ():
            place.update(self.bundle(), raw=True)

    def _picture(self, where: tuple[int, ...]) -> bytes:
        """The picture for a position, drawn when it is first asked for."""
        if where not in self._pictures:
            begun = time.perf_counter()
            self._pictures[where] = _drawn(self._draw, [*self.at.values()], self.dpi)
            follows = time.perf_counter() - begun <= FRAME
            follows |= len(self._pictures) == math.prod(map(len, self.values.values()))
            for knob in self.knobs.values():
                knob.continuous_update = follows
        return self._pictures[where]

    def __repr__(self) -> str:
        knobs = (f"{k}: {len(v)} values from {_text(v[0])} to {_text(v[-1])}" for k, v in self.values.items())
        return f"Handles({'; '.join(knobs)})"

    def _ipython_display_(self) -> None:
        from IPython.core.display_functions import display

        display(self.widget._repr_mimebundle_() | {"text/plain": repr(self)}, raw=True)
        self.shown.append(display(self.bundle(), raw=True, display_id=True))

    def bundle(self) -> dict[str, Any]:
        """The picture with what it stands for in words, as an output has them."""
        at = ", ".join(f"{label} = {_text(value)}" for label, value in self.at.items())
        return {"image/png": self.png, "text/plain": at}


def _drawn(draw: Callable[..., Any], values: list[Any], dpi: Any) -> bytes:
    """The picture that is drawn of values; whatever comes of it, no figure stays open that it began."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    before = plt.get_fignums()
    try:
        figure = draw(*values)
        if not isinstance(figure, Figure):
            raise TypeError(f"draw: it gave {figure!r:.60}, which is no figure; return the figure")
        return picture(figure, dpi)
    finally:
        for number in set(plt.get_fignums()).difference(before):
            plt.close(number)


def picture(figure: Any, dpi: Any = "figure") -> bytes:
    """A figure as PNG; it is closed, or the notebook would show it a second time."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    plt.close(figure)
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _position(label: str, own: list[Any], wanted: Mapping[str, Any]) -> int:
    """Where the value that is wanted of a knob stands among its own; the first place if none is."""
    if label not in wanted:
        return 0
    value = wanted[label]
    for index, known in enumerate(own):
        if known is value or _same(_plain(known), _plain(value)):
            return index
    raise checks.unknown(label, _text(value), map(_text, own))


def _same(known: Any, value: Any) -> bool:
    if isinstance(known, float) and isinstance(value, float):
        return math.isclose(known, value, abs_tol=1e-12) or (math.isnan(known) and math.isnan(value))
    arrays = hasattr(known, "ndim") or hasattr(value, "ndim")
    return np.array_equal(known, value) if arrays else bool(known == value)


def _plain(value: Any) -> Any:
    """A number of an array or a tensor as Python has it, with no more digits than it had there."""
    if getattr(value, "ndim", None) != 0:
        return value
    return float(f"{value.item():.6g}") if str(value.dtype).endswith("float32") else value.item()


def _text(value: Any) -> str:
    value = _plain(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def message(error: BaseException) -> str:
    """An error as it is shown on a page: in HTML."""
    return f"<span style='color: var(--jp-error-color1, #b00)'>{html.escape(f'{type(error).__name__}: {error}')}</span>"
