"""A slider that shows one picture for each of its values.

It is an Image widget whose bytes are exchanged when the slider moves: nothing is captured or printed, so notebooks
that hold one can be executed and compared by machine. Without ipywidgets, and where stored output is read without a
kernel, the picture for the start value stands still.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, Literal

from clkit import checks
from clkit.checks import Count, Index


@checks.arguments
def slider(
    draw: Callable[[Any], Any],
    values: Sequence[Any],
    label: str = "α",
    *,
    start: Index = 0,
    dpi: Count | Literal["figure"] = "figure",
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

    `widget` is the box with the slider and the image, None without ipywidgets; `png` the picture shown, as bytes.
    """

    def __init__(self, draw: Callable[[Any], Any], values: Sequence[Any], label: str, start: int, dpi: Any) -> None:
        self.values, self.label, self.dpi = list(values), label, dpi
        self._draw, self._pictures = draw, {}
        self.widget: Any = None
        self.move(start)
        try:
            import ipywidgets
        except ImportError:
            return
        options = [(_text(value), index) for index, value in enumerate(self.values)]
        knob = ipywidgets.SelectionSlider(options=options, value=start, description=label)
        knob.observe(lambda change: self.move(change["new"]), names="value")
        self.widget = ipywidgets.VBox([knob, ipywidgets.Image(value=self.png, format="png")])

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
        if self.widget is not None:
            self.widget.children[1].value = self.png

    def __repr__(self) -> str:
        first, last = _text(self.values[0]), _text(self.values[-1])
        return f"Slider({self.label}: {len(self.values)} values from {first} to {last})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        live = self.widget._repr_mimebundle_() if self.widget is not None else {}
        return {**live, "image/png": self.png, "text/plain": repr(self)}


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
