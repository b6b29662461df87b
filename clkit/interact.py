"""A slider that shows one picture for each of its values.

It is an Image widget whose bytes are exchanged when the slider moves: nothing is captured or printed, so notebooks
that hold one can be executed and compared by machine. Without ipywidgets, and where stored output is read without a
kernel, the picture for the start value stands still.
"""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100


class Slider:
    """What `slider` returns; the last expression of a cell shows it. `index` is the position among `values`.

    `widget` is the box with the slider and the image, None without ipywidgets; `png` the picture shown, as bytes.
    """

    def __init__(self, draw: "Callable[[Any], Figure]", values: Sequence[Any], label: str, start: int, dpi: int):
        self.values, self.label, self.index, self.dpi = list(values), label, start, dpi
        self._draw = draw
        self._pictures: dict[int, bytes] = {}
        self.png = self.picture(start)
        self.widget = self._widget()

    def picture(self, index: int) -> bytes:
        """The picture for `values[index]`, drawn when it is first asked for."""
        if index not in self._pictures:
            self._pictures[index] = _png(self._draw(self.values[index]), self.dpi)
        return self._pictures[index]

    def move(self, index: int) -> None:
        """Shows the picture for `values[index]`."""
        self.index, self.png = index, self.picture(index)
        if self.widget is not None:
            _, image = self.widget.children
            image.value = self.png

    def _widget(self) -> Any:
        try:
            import ipywidgets
        except ImportError:
            return None
        options = [(_text(value), index) for index, value in enumerate(self.values)]
        knob = ipywidgets.SelectionSlider(options=options, value=self.index, description=self.label)
        knob.observe(lambda change: self.move(change["new"]), names="value")
        return ipywidgets.VBox([knob, ipywidgets.Image(value=self.png, format="png")])

    def __repr__(self) -> str:
        return (
            f"Slider({self.label}: {len(self.values)} values from {_text(self.values[0])} to {_text(self.values[-1])})"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        live = self.widget._repr_mimebundle_() if self.widget is not None else {}
        return {**live, "image/png": self.png, "text/plain": repr(self)}


def slider(
    draw: "Callable[[Any], Figure]", values: Sequence[Any], label: str = "α", *, start: int = 0, dpi: int = DPI
) -> Slider:
    """A slider over `values` with the figure that `draw(value)` makes of each.

    Each picture is drawn once, when its value is first reached, and kept. `draw` is quickest if it moves the artists
    of one figure and returns that figure; whatever it computes should be looked up in a grid computed before. `start`
    is the position of the first value shown.
    """
    if not len(values):
        raise ValueError("values: there are none; give the positions that the slider can take")
    if not 0 <= start < len(values):
        raise ValueError(f"start: {start} is no position among {len(values)} values; give 0 to {len(values) - 1}")
    return Slider(draw, values, label, start, dpi)


def _png(figure: "Figure", dpi: int) -> bytes:
    import matplotlib.pyplot as plt

    plt.close(figure)  # or the notebook shows it a second time
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
