import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clkit import metrics

matrices = st.integers(1, 6).flatmap(lambda n: arrays(float, (n, n), elements=st.floats(0, 1)))
MATRIX = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 1.0]]


def test_the_definitions_by_hand():
    expected = {
        "acc": (0.5 + 0.7 + 1.0) / 3,
        "forgetting": (0.4 + 0.1) / 2,
        "bwt": (-0.4 - 0.1) / 2,
        "fwt": ((0.1 - 0.05) + (0.2 - 0.1)) / 2,
        "last": 1.0,
        "plasticity": 0.9,
    }
    assert metrics.summary(MATRIX, [0.3, 0.05, 0.1]) == pytest.approx(expected)
    assert metrics.running(MATRIX) == pytest.approx([0.9, 0.7, 2.2 / 3])


def test_forgetting_looks_at_the_best_accuracy_since_the_task_was_learned():
    matrix = [[0.5, 1.0, 0], [0.9, 0.6, 0], [0.4, 0.6, 1]]
    assert metrics.forgetting(matrix) == pytest.approx((0.5 + 0.0) / 2)


@settings(max_examples=50, deadline=None)
@given(matrices)
def test_forgetting_is_never_negative_and_at_least_minus_bwt(matrix):
    assert metrics.forgetting(matrix) >= 0
    assert metrics.forgetting(matrix) >= -metrics.bwt(matrix) - 1e-12


@settings(max_examples=50, deadline=None)
@given(matrices)
def test_a_network_that_never_changes_neither_forgets_nor_transfers(matrix):
    constant = np.tile(matrix[:1], (len(matrix), 1))
    numbers = metrics.summary(constant, constant[0])
    assert numbers["forgetting"] == numbers["bwt"] == numbers["fwt"] == 0


@settings(max_examples=50, deadline=None)
@given(matrices)
def test_the_published_forgetting_is_the_sum_over_all_tasks_divided_by_their_number(matrix):
    size = len(matrix)
    drops = [matrix[k:, k].max() - matrix[-1, k] for k in range(size)]
    assert metrics.forgetting(matrix) * (size - 1) / size == pytest.approx(np.mean(drops))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9).flatmap(lambda n: arrays(float, n, elements=st.floats(0, 5))), st.floats(-3, 3))
def test_a_barrier_is_not_negative_and_blind_to_a_tilt(losses, slope):
    t = np.linspace(0, 1, len(losses))
    assert metrics.barrier(losses, t) >= 0
    assert metrics.barrier(losses + slope * t, t) == pytest.approx(metrics.barrier(losses, t), abs=1e-9)


def test_a_convex_curve_has_no_barrier():
    t = np.linspace(0, 1, 11)
    assert metrics.barrier((t - 0.4) ** 2, t) == pytest.approx(0, abs=1e-12)
    assert metrics.barrier(1 - (t - 0.5) ** 2, t) == pytest.approx(0.25)


@pytest.mark.parametrize("ts", [[0, 0.5], [0, 0.5, 0.9], [0, 0.6, 0.5, 1], [0.0]])
def test_bad_positions_are_refused(ts):
    with pytest.raises(ValueError, match="rising positions from 0 to 1"):
        metrics.barrier(np.zeros(3 if len(ts) == 2 else len(ts)), ts)


def test_bad_matrices_are_refused():
    with pytest.raises(ValueError, match="\\(tasks, tasks\\)"):
        metrics.acc([[1, 0]])
    with pytest.raises(ValueError, match="one accuracy for each of 3"):
        metrics.fwt(MATRIX, [0.1])
