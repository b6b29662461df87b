"""A slider that shows one picture for each of its values.

A cell that shows it has two outputs: the knob, a widget, and the picture, an output like that of any figure, which is
exchanged when the knob moves. So the picture has its own size, and it is what is saved: read without a kernel, the
last one shown stands still. Nothing is captured or printed, so notebooks that hold a slider can be executed and
compared by machine.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

from clkit import checks


@checks.arguments
def slider(
    draw: Callable[[Any], Any],
    values: Sequence[Any],
    label: str = "α",
    *,
    start: checks.Index = 0,
    dpi: checks.Count | Literal["figure"] = "figure",
) -> "Slider":
    """A slider over `values` with the figure that `draw(value)` makes of each.

    Each picture is drawn once, when its value is first reached, and kept. `draw` is quickest if it moves the artists
    of one figure and returns that figure; whatever it computes should be looked up in a grid computed before. `start`
    is the position of the first value shown; `dpi` is by default that of the figure. Raises ValueError for no values,
    and for a start that is no position among them.
    """
    if not len(values):
        raise ValueError("values: there are none; give the positions that the slider can take")
    if start >= len(values):
        raise ValueError(f"start: {start} is no position among {len(values)} values; give 0 to {len(values) - 1}")
    return Slider(draw, values, label, start, dpi)


class Slider:
    """What `slider` returns; the last expression of a cell shows it. `index` is the position among `values`.

    `widget` is the box with the knob and the value beside it; `png` the picture, as bytes.
    """

    def __init__(self, draw: Callable[[Any], Any], values: Sequence[Any], label: str, start: int, dpi: Any) -> None:
        import ipywidgets

        self.values, self.label, self.dpi = list(values), label, dpi
        self._draw, self._pictures, self._shown = draw, {}, []
        wide = {"layout": {"width": f"{40 + len(label)}ch"}, "style": {"description_width": "initial"}}
        options = [(_text(value), index) for index, value in enumerate(self.values)]
        knob = ipywidgets.SelectionSlider(options=options, value=start, description=label, readout=False, **wide)
        knob.observe(lambda change: self.move(change["new"]), names="value")
        value = ipywidgets.Label(layout={"width": "max-content"})  # a read-out would be cut
        self.widget: Any = ipywidgets.HBox([knob, value])
        self.move(start)

    def picture(self, index: int) -> bytes:
        """The picture for `values[index]`, drawn when it is first asked for."""
        import matplotlib.pyplot as plt

        if index not in self._pictures:
            figure, buffer = self._draw(self.values[index]), io.BytesIO()
            plt.close(figure)  # or the notebook shows it a second time
            figure.savefig(buffer, format="png", dpi=self.dpi, metadata={"Software": None})
            self._pictures[index] = buffer.getvalue()
        return self._pictures[index]

    def move(self, index: int) -> None:
        """Shows the picture for `values[index]`."""
        self.index, self.png = index, self.picture(index)
        self.widget.children[1].value = _text(self.values[index])
        for place in self._shown:
            place.update(self._bundle(), raw=True)

    def __repr__(self) -> str:
        first, last = _text(self.values[0]), _text(self.values[-1])
        return f"Slider({self.label}: {len(self.values)} values from {first} to {last})"

    def _ipython_display_(self) -> None:
        from IPython.core.display_functions import display

        display(self.widget._repr_mimebundle_() | {"text/plain": repr(self)}, raw=True)
        self._shown.append(display(self._bundle(), raw=True, display_id=True))

    def _bundle(self) -> dict[str, Any]:
        return {"image/png": self.png, "text/plain": f"{self.label} = {_text(self.values[self.index])}"}


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
