"""Settings are checked from their annotations."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clkit import checks
from clkit.checks import Count, Range, Share


@dataclass(frozen=True)
class Blend:
    alpha: Share | tuple[Share, ...] | Literal["search"] = 0.3
    align: Literal["activations", "weights"] | None = "activations"
    rounds: Count = 10
    lr: Annotated[float, Range(0, open="low", means="the rate of a step")] = 0.1
    quiet: bool = False
    __post_init__ = checks.fields


@given(
    st.floats() | st.integers() | st.booleans() | st.none() | st.text(max_size=9) | st.lists(st.floats(), max_size=2)
)
def test_what_is_accepted_is_in_the_range_and_what_is_refused_is_not(alpha):
    def share(x):
        return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1

    fits = share(alpha) or (isinstance(alpha, list) and all(map(share, alpha))) or alpha == "search"
    try:
        made = Blend(alpha=alpha)
    except ValueError as error:
        assert not fits and "alpha" in str(error) and repr(alpha) in str(error)
    else:
        assert fits and made.alpha == (tuple(alpha) if isinstance(alpha, list) else alpha)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(1), np.float16(1)])
def test_numbers_of_numpy_are_numbers(number):
    made = Blend(alpha=number)
    assert type(made.alpha) in (int, float) and made.alpha == float(number)
    assert repr(made) == repr(Blend(alpha=made.alpha))


def test_an_array_is_a_tuple_of_numbers():
    assert Blend(alpha=np.array([0.25, 0.5])).alpha == (0.25, 0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 1.5}, ["alpha", "1.5", "[0, 1]", "'search'"]),
        ({"alpha": "serch"}, ["alpha", "'serch'", "did you mean 'search'"]),
        ({"align": "weight"}, ["align", "did you mean 'weights'", "None"]),
        ({"rounds": 0}, ["rounds", "0", "a whole number, at least 1"]),
        ({"rounds": 2.0}, ["rounds", "2.0", "a whole number"]),
        ({"rounds": True}, ["rounds", "True"]),
        ({"lr": 0}, ["lr", "above 0", "the rate of a step"]),
        ({"lr": float("inf")}, ["lr", "inf"]),
        ({"quiet": 1}, ["quiet", "True or False"]),
    ],
)
def test_an_error_names_the_setting_the_value_and_the_remedy(settings, words):
    with pytest.raises(ValueError) as error:
        Blend(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_values_that_fit_stay_the_same_objects():
    alphas = (0.1, 0.2)
    assert Blend(alpha=alphas).alpha is alphas


def test_arguments_of_a_function_are_checked():
    @checks.arguments
    def stretch(x: list, by: Literal["left", "right"] = "left", *, times: Count = 1) -> tuple:
        return x, by, times

    assert stretch([1], times=np.int64(3)) == ([1], "left", 3)
    with pytest.raises(ValueError, match=r"by: 'lft' is unknown.*did you mean 'left'"):
        stretch([1], "lft")
    with pytest.raises(ValueError, match="times: 0"):
        stretch([1], times=0)
    with pytest.raises(TypeError):
        stretch()


def test_a_choice_known_when_the_program_runs():
    assert checks.choice("name", "a", {"a": 1}) == "a"
    with pytest.raises(ValueError, match="name: 'z' is unknown; choose one of a, b"):
        checks.choice("name", "z", ["a", "b"])


def test_a_text_stands_for_the_most_special_value_that_fits():
    hint = bool | int | float | tuple[int | float, ...] | Literal["search"] | None
    texts = {"none": None, "TRUE": True, "3": 3, "0.5": 0.5, "1e-3": 1e-3, "1,0.5": (1, 0.5), "search": "search"}
    found = {text: checks.parse("x", text, hint) for text in texts}
    assert found == texts and [type(found[text]) for text in ("TRUE", "3")] == [bool, int]
    assert checks.parse("x", "4", tuple[int, ...]) == (4,) and checks.parse("x", "any", str | None) == "any"
    for text, words in (("y", "x: 'y' is unknown; choose one of search"), ("1,a", "x: '1,a' is unknown")):
        with pytest.raises(ValueError, match=words):
            checks.parse("x", text, hint)
    with pytest.raises(ValueError, match="x: 'y'; give a whole number, at least 1 or None"):
        checks.parse("x", "y", Count | None)


def test_what_no_text_can_stand_for_is_left_out():
    assert checks.readable(int | np.ndarray) is int and checks.readable(np.ndarray | None) is None


def test_ranges_beside_a_union_are_of_its_numbers_and_starred_arguments_pass():
    hint = Annotated[int | None, Range(1)]
    assert checks.value("x", None, hint) is None and checks.value("x", 2, hint) == 2
    with pytest.raises(ValueError, match=r"x: 0; give a whole number, at least 1 or None"):
        checks.value("x", 0, hint)

    @checks.arguments
    def scale(by: Share, *rest: int, **more: float) -> tuple:
        return by, rest, more

    assert scale(0.5, 1, 2, c=1.0) == (0.5, (1, 2), {"c": 1.0})
