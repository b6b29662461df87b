"""Facts of the CLeWI paper and its released runs that any faithful implementation shows, on scikit-learn's digits."""

from functools import partial

import numpy as np
import pytest

from clkit import alignment, data, landscape, models
from clkit.consolidation import CLeWI
from clkit.learners import ER
from clkit.training import Result, Training, run

SEEDS = (0, 1)
ALPHAS = (0.0, 0.2, 0.4, 0.5)
NET = partial(models.convnet, widths=(16, 32, 32))


def train(stream: data.Stream, consolidation: CLeWI | None, seed: int) -> Result:
    options = {"training": Training(epochs=5, batch=32, lr=0.1), "device": "cpu", "progress": False}
    return run(stream, NET, ER(memory=50), consolidation, seed=seed, **options)


@pytest.fixture(scope="module")
def stream(digits) -> data.Stream:
    return data.split(digits, tasks=5)


@pytest.fixture(scope="module")
def er(stream) -> list[Result]:
    return [train(stream, None, seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def swept(stream) -> dict[float, list[Result]]:
    return {alpha: [train(stream, CLeWI(alpha=alpha, points=0), seed) for seed in SEEDS] for alpha in ALPHAS}


def mean(results: list[Result], value: str) -> float:
    return float(np.mean([result.summary()[value] for result in results]))


def test_forgetting_and_the_last_task_fall_as_alpha_rises(swept):
    forgetting = [mean(swept[alpha], "forgetting") for alpha in ALPHAS]
    last = [mean(swept[alpha], "last") for alpha in ALPHAS]
    assert (np.diff(forgetting) < 0).all()
    assert (np.diff(last) <= 0.01).all() and last[-1] < last[0] - 0.1


def test_average_accuracy_peaks_inside_the_range_of_alpha(swept):
    assert max(ALPHAS, key=lambda alpha: mean(swept[alpha], "acc")) in ALPHAS[1:-1]


def test_merging_beats_replay_alone_and_forgets_at_most_half(er, swept):
    assert mean(swept[0.4], "acc") > mean(er, "acc") + 0.08
    assert mean(swept[0.4], "forgetting") < mean(er, "forgetting") / 2


def test_re_estimating_alone_gains_nothing(er, swept):
    assert mean(swept[0.0], "acc") < mean(er, "acc") + 0.02


def test_the_newest_task_is_lost_at_the_old_end_and_the_best_point_lies_inside(swept, stream):
    result = swept[0.2][0]
    kinds = ["aligned, re-estimated"]
    found = landscape.merges(result.model, result.trained, result.weights, result.inputs, stream, ts=11, variants=kinds)
    for curve in (merge[kinds[0]] for merge in found):
        assert curve.accuracy[-1, -1] == 0
        assert 0 < curve.accuracy.mean(1).argmax() < 10


def test_networks_trained_one_from_the_other_keep_their_channels(swept):
    for result in swept[0.2]:
        assert all(report["identity"] > 0.9 for report in result.reports[1:])


def test_independent_networks_need_permutation_and_re_estimation(digits):
    whole = data.split(digits, tasks=1)
    a, b = (train(whole, None, seed) for seed in (0, 1))
    inputs = whole[0].prepare(whole[0].train.x[:300])
    curves = landscape.interpolation(a.model, b.weights[0], a.weights[0], whole, inputs, ts=[0, 0.5, 1])
    middle = {name: curve.accuracy[1, 0] for name, curve in curves.items()}
    assert middle["aligned, re-estimated"] > middle["plain"] + 0.3
    assert middle["aligned, re-estimated"] > middle["plain, re-estimated"] + 0.05
    assert middle["aligned, re-estimated"] > curves["plain"].accuracy[[0, 2], 0].min() - 0.1
    net = a.model
    match = alignment.align(alignment.symmetry(net, inputs[:2]), net, a.weights[0], b.weights[0], inputs)
    assert max(match.unmoved.values()) < 0.3
