import sys

import matplotlib as mpl
import pytest

mpl.use("agg")
import matplotlib.pyplot as plt

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


def test_moving_the_slider_changes_the_picture(drawing):
    draw, called = drawing
    shown = slider(draw, VALUES, "α")
    knob, image = shown.widget.children
    seen = [bytes(image.value)]
    for index in (1, 2, 0):
        knob.value = index
        seen.append(bytes(image.value))
        assert image.value == shown.png and shown.index == index
    assert seen[0].startswith(b"\x89PNG") and len(set(seen)) == 3 and seen[0] == seen[3]
    assert called == VALUES
    assert not plt.get_fignums()


def test_pictures_are_drawn_when_they_are_needed(drawing):
    draw, called = drawing
    slider(draw, range(50), start=7)
    assert called == [7]


def test_stored_output_holds_the_picture_beside_the_widget(drawing):
    shown = slider(drawing[0], VALUES, "α", start=1)
    bundle = shown._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["image/png"] == shown.png
    assert bundle["text/plain"] == repr(shown) == "Slider(α: 3 values from 0 to 1)"


def test_without_ipywidgets_the_picture_stands_still(drawing, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    shown = slider(drawing[0], VALUES)
    assert shown.widget is None and set(shown._repr_mimebundle_()) == {"image/png", "text/plain"}
    first = shown.png
    shown.move(2)
    assert shown.png != first


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
