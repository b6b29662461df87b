"""The slider: its knob, its picture, and what a saved notebook holds of both."""

import base64
import io
from types import SimpleNamespace

import matplotlib as mpl
import nbformat
import pytest
from PIL import Image

mpl.use("agg")
import matplotlib.pyplot as plt

from clkit.experiments import execute
from clkit.experiments.notebooks import WIDGET
from clkit.interact import slider

VALUES = [0.0, 0.5, 1.0]


@pytest.fixture
def drawing():
    """A function that moves one artist of one figure, and the values it was called with."""
    figure, ax = plt.subplots(figsize=(2, 1))
    (line,) = ax.plot([0, 1], [0, 1])
    called = []

    def draw(value):
        called.append(value)
        line.set_ydata([value, 1 - value])
        return figure

    return draw, called


def test_moving_the_knob_changes_the_picture_and_the_value_beside_it(drawing):
    draw, called = drawing
    shown = slider(draw, VALUES, "α")
    knob, value = shown.widget.children
    seen = [shown.png]
    for index, text in ((1, "0.5"), (2, "1"), (0, "0")):
        knob.value = index
        seen.append(shown.png)
        assert shown.index == index and value.value == text
    assert seen[0].startswith(b"\x89PNG") and len(set(seen)) == 3 and seen[0] == seen[3]
    assert called == VALUES
    assert not plt.get_fignums()


def test_pictures_are_drawn_when_they_are_needed(drawing):
    draw, called = drawing
    slider(draw, range(50), start=7)
    assert called == [7]


def test_neither_label_nor_value_is_cut(drawing):
    names = ["x", "the plain average of a sequence of networks"]
    knob, value = slider(drawing[0], [0, 1], "a label that is longer than most").widget.children
    assert knob.style.description_width == "initial" and not knob.readout
    assert int(knob.layout.width.removesuffix("ch")) > len(knob.description) + 20
    knob, value = slider(lambda name: drawing[0](0), names, "merge", start=1).widget.children
    assert value.layout.width == "max-content" and value.value == names[1]
    knob.value = 0
    assert value.value == "x"


PREPARE = """
import matplotlib.pyplot as plt
from clkit.interact import slider

figure = plt.figure(figsize=(3, 2), dpi=40)
line = figure.subplots().plot([0, 1], [0, 1])[0]
plt.close(figure)

def draw(value):
    line.set_ydata([value, 1 - value])
    return figure

shown = slider(draw, [0.0, 0.5, 1.0], "α", start=1)
"""
CELLS = [PREPARE, "shown", "shown.widget.children[0].value = 2"]


def test_what_is_saved_is_the_picture_last_shown_in_its_own_size(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    path = tmp_path / "x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in CELLS]), path)
    (outcome,) = execute([path], progress=False, write=True)
    assert outcome.error == ""
    _, shown, moved = nbformat.read(path, as_version=4).cells
    knob, picture = shown.outputs
    assert knob.data == {"text/plain": "Slider(α: 3 values from 0 to 1)"}  # the view was taken out
    assert picture.data["text/plain"] == "α = 1" and picture.output_type == "display_data"
    png = base64.b64decode(picture.data["image/png"])
    assert Image.open(io.BytesIO(png)).size == (120, 80)
    assert not moved.outputs


@pytest.fixture
def displayed(monkeypatch):
    """The bundles that are displayed, those exchanged later behind them."""
    bundles = []

    def display(bundle, *, raw, display_id=False):
        bundles.append(bundle)
        return SimpleNamespace(update=display) if display_id else None

    monkeypatch.setattr("IPython.core.display_functions.display", display)
    return bundles


def test_the_knob_and_the_picture_are_outputs_of_their_own(drawing, displayed):
    shown = slider(drawing[0], VALUES, "α", start=1)
    shown._ipython_display_()
    knob, picture = displayed
    assert WIDGET in knob and "image/png" not in knob
    assert WIDGET not in picture and picture["image/png"] == shown.png
    shown._ipython_display_()  # in another cell: both follow the knob
    shown.widget.children[0].value = 0
    assert [bundle["text/plain"] for bundle in displayed[4:]] == ["α = 0", "α = 0"]


def test_bad_input_names_itself(drawing):
    with pytest.raises(ValueError, match="values"):
        slider(drawing[0], [])
    with pytest.raises(ValueError, match="start: 3"):
        slider(drawing[0], VALUES, start=3)
    with pytest.raises(ValueError, match=r"start: -1; give a whole number, at least 0"):
        slider(drawing[0], VALUES, start=-1)
    with pytest.raises(ValueError, match=r"dpi: 0; give a whole number, at least 1 or 'figure'"):
        slider(drawing[0], VALUES, dpi=0)


def test_a_picture_is_as_fine_as_its_figure_unless_asked_otherwise():
    figure = plt.figure(figsize=(2, 1), dpi=50)
    width = [int.from_bytes(slider(lambda _: figure, VALUES, **dpi).png[16:20], "big") for dpi in ({}, {"dpi": 100})]
    assert width == [100, 200]
