"""Handles: their knobs, their picture, and what a saved notebook holds of both."""

import base64
import io
import math
from types import SimpleNamespace

import matplotlib as mpl
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

mpl.use("agg")
import matplotlib.pyplot as plt

from clkit.experiments import execute
from clkit.experiments.notebooks import WIDGET
from clkit.interact import handles, knobs

VALUES = (0.0, 0.5, 1.0)


@pytest.fixture(autouse=True)
def no_figure_before():
    """Other tests of the process may have left some open."""
    plt.close("all")


@pytest.fixture
def drawing():
    """A function that moves one artist of one figure, and the values it was called with."""
    figure, ax = plt.subplots(figsize=(2, 1))
    (line,) = ax.plot([0, 1], [0, 1])
    called = []

    def draw(*values):
        called.append(values if len(values) > 1 else values[0])
        line.set_ydata([sum(values), 1 - values[0]])
        return figure

    return draw, called


def text(shown, label):
    """What stands beside a knob."""
    return shown.widget.children[list(shown.knobs).index(label)].children[1].value


def test_moving_a_knob_changes_the_picture_and_the_value_beside_it(drawing):
    draw, called = drawing
    shown = handles(draw, {"α": VALUES})
    seen = [shown.png]
    for index, value in ((1, "0.5"), (2, "1"), (0, "0")):
        shown.knobs["α"].value = index
        seen.append(shown.png)
        assert shown.at == {"α": VALUES[index]} and text(shown, "α") == value
    assert seen[0].startswith(b"\x89PNG") and len(set(seen)) == 3 and seen[0] == seen[3]
    assert called == [*VALUES]
    assert not plt.get_fignums()


def test_each_knob_keeps_the_others_where_they_are(drawing):
    draw, called = drawing
    shown = handles(draw, {"p": VALUES, "β": (0.1, 0.2)}, start={"β": 0.2})
    shown.knobs["p"].value = 2
    shown.move({"β": 0.1})
    shown.move({"p": 0.0, "β": 0.2})
    assert called == [(0.0, 0.2), (1.0, 0.2), (1.0, 0.1), (0.0, 0.1)]
    assert shown.at == {"p": 0.0, "β": 0.2} and text(shown, "β") == "0.2"


def test_pictures_are_drawn_when_they_are_needed(drawing):
    draw, called = drawing
    handles(draw, {"x": range(50), "y": range(50)}, start={"x": 7})
    assert called == [(7, 0)]


def test_a_start_is_found_among_sums_of_decimals_and_words(drawing):
    shown = handles(lambda *_: drawing[0](0), {"α": [0.1 * i for i in range(11)], "merge": ["ties", "dare"]},
                    start={"α": 0.3, "merge": "dare"})  # fmt: skip
    assert text(shown, "α") == "0.3" and shown.at["merge"] == "dare"


@pytest.mark.parametrize(
    ("values", "start", "shown"),
    [
        (np.linspace(0, 1, 11, dtype=np.float32), 0.3, "0.3"),
        (torch.linspace(0, 1, 11), 0.3, "0.3"),
        (torch.arange(4), 2, "2"),
        ((0.1, math.nan), np.float64("nan"), "nan"),
        ((np.zeros(2), np.ones(2)), np.ones(2), "[1. 1.]"),
        ((np.zeros(2), np.ones(3)), np.ones(3), "[1. 1. 1.]"),
        ((None, ("a", np.float64(1))), ("a", 1.0), "('a', np.float64(1.0))"),
    ],
)
def test_values_of_arrays_and_tensors_are_told_and_found_as_numbers(drawing, values, start, shown):
    knob = handles(lambda _: drawing[0](0), {"α": values}, start={"α": start})
    assert text(knob, "α") == shown and knob.bundle()["text/plain"] == f"α = {shown}"


def test_no_figure_stays_open_whatever_comes_of_a_drawing():
    mine = plt.figure()
    ends: list = [ValueError("no"), None, plt.gca(), KeyboardInterrupt()]

    def draw(value):
        plt.figure()
        plt.subplots()
        if isinstance(value, BaseException):
            raise value
        return value

    for end, error in zip(ends, (ValueError, TypeError, TypeError, KeyboardInterrupt), strict=True):
        with pytest.raises(error, match="no figure; return the figure" if error is TypeError else None):
            handles(draw, {"of": [end]})
        assert plt.get_fignums() == [mine.number]
    shown = handles(draw, {"of": [mine, *ends]})
    assert shown.error is None and not plt.get_fignums()
    shown.move({"of": None})
    assert isinstance(shown.error, TypeError) and not plt.get_fignums()


def test_a_drawing_that_is_interrupted_does_not_wait_for_ever(drawing):
    def draw(value):
        if value == 1.0:
            raise KeyboardInterrupt
        return drawing[0](value)

    shown = handles(draw, {"α": VALUES})
    shown.knobs["α"].continuous_update = False
    with pytest.raises(KeyboardInterrupt):
        shown.move({"α": 1.0})
    assert text(shown, "α") == "1"
    shown.move({"α": 0.5})
    assert shown.error is None and text(shown, "α") == "0.5"


def test_neither_label_nor_value_is_cut(drawing):
    names = ["x", "the plain average of a sequence of networks"]
    label = "a label that is longer than most"
    shown = handles(lambda name: drawing[0](0), {label: names}, start={label: names[1]})
    knob, value = shown.widget.children[0].children
    assert knob.style.description_width == "initial" and not knob.readout
    assert int(knob.layout.width.removesuffix("ch")) > len(knob.description) + 20
    assert value.layout.width == "max-content" and value.value == names[1]


def test_a_knob_waits_to_be_let_go_while_drawing_is_slow(drawing, monkeypatch):
    now, takes = [0.0], [0.01]
    monkeypatch.setattr(knobs, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def draw(*values):
        now[0] += takes[0]
        return drawing[0](*values)

    shown = handles(draw, {"α": VALUES, "β": (0.0, 1.0)})
    pair = shown.knobs.values()
    assert all(knob.continuous_update for knob in pair)
    takes[0] = 0.5
    shown.move({"α": 0.5})
    assert not any(knob.continuous_update for knob in pair)
    shown.move({"α": 0.0})  # a kept picture tells nothing
    assert not any(knob.continuous_update for knob in pair)
    takes[0] = 0.01
    shown.move({"α": 1.0})
    assert all(knob.continuous_update for knob in pair)
    takes[0] = 0.5
    for beta in (1.0, 0.0):
        for alpha in VALUES:
            shown.move({"α": alpha, "β": beta})
    assert all(knob.continuous_update for knob in pair)  # every picture is kept


def test_what_a_later_drawing_raises_is_shown_and_the_page_goes_on(drawing):
    def draw(value):
        if value == 0.5:
            raise ValueError("no <b> picture for 0.5")
        return drawing[0](value)

    shown = handles(draw, {"α": VALUES})
    before, message = shown.png, shown.widget.children[-1]
    assert message.value == "" and shown.error is None
    shown.knobs["α"].value = 1
    assert "ValueError: no &lt;b&gt; picture for 0.5" in message.value
    assert shown.png == before and isinstance(shown.error, ValueError)
    shown.knobs["α"].value = 2
    assert message.value == "" and shown.png != before and shown.error is None
    with pytest.raises(ValueError, match="no <b> picture"):
        handles(draw, {"α": VALUES}, start={"α": 0.5})


PREPARE = """
import matplotlib.pyplot as plt
from clkit.interact import handles

figure = plt.figure(figsize=(3, 2), dpi=40)
line = figure.subplots().plot([0, 1], [0, 1])[0]
plt.close(figure)

def draw(value):
    line.set_ydata([value, 1 - value])
    return figure

shown = handles(draw, {"α": [0.0, 0.5, 1.0]}, start={"α": 0.5})
"""
CELLS = [PREPARE, "shown", 'shown.move({"α": 1.0})']


def test_what_is_saved_is_the_picture_last_shown_in_its_own_size(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    path = tmp_path / "x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in CELLS]), path)
    (outcome,) = execute([path], progress=False, write=True)
    assert outcome.error == ""
    _, shown, moved = nbformat.read(path, as_version=4).cells
    knob, picture = shown.outputs
    assert knob.data == {"text/plain": "Handles(α: 3 values from 0 to 1)"}  # the view was taken out
    assert picture.data["text/plain"] == "α = 1" and picture.output_type == "display_data"
    png = base64.b64decode(picture.data["image/png"])
    assert Image.open(io.BytesIO(png)).size == (120, 80)
    assert not moved.outputs


def test_the_knobs_and_the_picture_are_outputs_of_their_own(drawing, displayed):
    shown = handles(drawing[0], {"α": VALUES, "β": (1, 2)}, start={"α": 0.5})
    shown._ipython_display_()
    box, picture = displayed
    assert WIDGET in box and "image/png" not in box
    assert WIDGET not in picture and picture["image/png"] == shown.png
    shown._ipython_display_()  # in another cell: both follow the knob
    shown.knobs["α"].value = 0
    assert [bundle["text/plain"] for bundle in displayed[4:]] == ["α = 0, β = 1"] * 2


def test_bad_input_names_itself(drawing):
    with pytest.raises(ValueError, match=r"values: \{\}; give at least one label"):
        handles(drawing[0], {})
    with pytest.raises(ValueError, match=r"values.*'α': \[\]"):
        handles(drawing[0], {"α": []})
    odds: list = [{"α": 0.5}, {"α": "text"}, {1: VALUES}]
    for odd in odds:
        with pytest.raises(
            ValueError, match=r"values: .*; give at least one label, a text, each with a list of values"
        ):
            handles(drawing[0], odd)
    with pytest.raises(ValueError, match=r"start: 'a' is unknown; choose one of α"):
        handles(drawing[0], {"α": VALUES}, start={"a": 0.5})
    with pytest.raises(ValueError, match=r"α: '0.3' is unknown; choose one of 0, 0.5, 1"):
        handles(drawing[0], {"α": VALUES}, start={"α": 0.3})
    with pytest.raises(ValueError, match=r"dpi: 0; give a whole number, at least 1 or 'figure'"):
        handles(drawing[0], {"α": VALUES}, dpi=0)
    shown = handles(drawing[0], {"α": VALUES})
    with pytest.raises(ValueError, match="α: '2' is unknown"):
        shown.move({"α": 2})
    with pytest.raises(ValueError, match="to: 'β' is unknown"):
        shown.move({"β": 0})


def test_a_picture_is_as_fine_as_its_figure_unless_asked_otherwise():
    figure = plt.figure(figsize=(2, 1), dpi=50)
    made = [handles(lambda _: figure, {"α": VALUES}, **dpi) for dpi in ({}, {"dpi": 100})]
    assert [int.from_bytes(shown.png[16:20], "big") for shown in made] == [100, 200]
