"""Settings are checked from their annotations."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import toys
from clkit import alignment, checks, curvature, representation
from clkit.checks import Count, Range, Share
from clkit.weights import get_weights


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


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_what_is_free_is_asked_of_the_system_and_of_the_gpu(monkeypatch):
    monkeypatch.setattr(checks.Path, "read_text", lambda self: "MemTotal: 9 kB\nMemAvailable:    3 kB\nMemFree: 1 kB\n")
    checks.room("three", 3 * 1024, CPU, "give less")
    with pytest.raises(ValueError, match=r"^four take 3.07e-06 GB, and cpu has 3.07e-06 GB free; give less$"):
        checks.room("four", 3 * 1024 + 1, CPU, "give less")
    free = {"memory_reserved": 7, "memory_allocated": 5, "mem_get_info": (2 * 10**9, 10**11)}
    for name, value in free.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    checks.room("much", 2 * 10**9 + 2, GPU, "give less")
    with pytest.raises(ValueError, match=r"^more take 20 GB, and cuda:0 has 2 GB free; give less$"):
        checks.room("more", 2e10, GPU, "give less")


def test_nothing_is_said_where_what_is_free_is_not_known(monkeypatch):
    checks.room("all", 1e30, torch.device("mps"), "give less")
    monkeypatch.setattr(checks.Path, "read_text", lambda self: "MemFree: 1 kB\n")
    checks.room("all", 1e30, CPU, "give less")

    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(checks.Path, "read_text", missing)
    checks.room("all", 1e30, CPU, "give less")


def test_what_may_surprise_says_its_memory_before_any_work(monkeypatch):
    """Each is refused one byte short of what it says, with no tensor of the kind made, and done otherwise."""
    stream = toys.images(2)
    net, x = toys.small_convnet(stream), torch.randn(16, 1, 6, 6)
    nets = [get_weights(toys.small_convnet(stream, seed=seed)) for seed in range(3)]
    groups = alignment.symmetry(net, x[:2])
    shown = [tap.slots[group].shape for tap in groups.taps for group in tap.slots]
    a = torch.randn(300, 2)
    pairs = 8 * 3 * sum(lanes * units**2 for lanes, units in shown)
    for size, largest, use, words in (
        (40 * 300**2, 600, lambda: representation.cka(a, a, kernel="rbf"), "of 300 examples .*cka_in_batches"),
        (pairs, 3456, lambda: alignment.align_many(groups, net, nets, x), "networks: their correlations .*by weights"),
        (4 * (9**2 + 36**2 + 54**2 + 5**2), 324, lambda: curvature.grams(net, nets[0], x), "Gram matrices"),
    ):
        monkeypatch.setattr(checks, "_free", lambda device, size=size: size - 1)
        with toys.Sizes() as sizes, pytest.raises(ValueError, match=words):
            use()
        assert sizes.largest <= largest
        monkeypatch.setattr(checks, "_free", lambda device, size=size: size)
        use()
