import numpy as np
import pytest
import torch

import toys
from clkit import ER, CLeWI, alignment, landscape, models, normalization
from clkit import weights as W
from clkit.data import Examples, Stream, Task
from clkit.evaluation import evaluate


@pytest.fixture(scope="module")
def stream():
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for i in range(3):
        x = torch.randint(0, 256, (30, 1, 8, 8), generator=generator, dtype=torch.uint8)
        part = Examples(x, torch.arange(30) % 2 + 2 * i)
        tasks.append(Task(i, f"task {i}", (2 * i, 2 * i + 1), part, part))
    return Stream("noise", tuple(tasks), tuple("abcdef"))


@pytest.fixture(scope="module")
def net(stream):
    return models.convnet(stream, widths=(4, 6))


@pytest.fixture(scope="module")
def ends(stream):
    return tuple(W.get_weights(models.convnet(stream, widths=(4, 6), seed=seed)) for seed in (1, 2))


@pytest.fixture(scope="module")
def inputs(stream):
    return torch.cat([task.prepare(task.train.x[:10]) for task in stream])


def test_a_segment_ends_at_its_ends(ends):
    path = landscape.segment(*ends)
    for t, end in enumerate(ends):
        assert all(torch.equal(v, end[k]) for k, v in path(t).items())
    with pytest.raises(ValueError, match="different names"):
        landscape.segment(ends[0], {})


@pytest.mark.parametrize("refreshed", [False, True])
def test_a_curve_is_what_one_finds_position_by_position(stream, net, ends, inputs, refreshed):
    before = W.get_weights(net)
    found = landscape.curve(net, ends, stream, [0, 0.3, 1], refresh=inputs if refreshed else None, batch=7)
    assert all(torch.equal(v, before[k]) for k, v in W.get_weights(net).items()) and net.training
    assert found.loss.shape == found.accuracy.shape == (3, 3)
    for i, t in enumerate(found.ts):
        w = W.lerp(*ends, float(t))
        other = models.convnet(stream, widths=(4, 6))
        W.set_weights(other, normalization.refresh(other, w, inputs) if refreshed else w)
        expected = evaluate(other, stream)
        np.testing.assert_allclose(found.loss[i], expected.loss, rtol=1e-5)
        np.testing.assert_array_equal(found.accuracy[i], expected.accuracy)


def test_curves_take_any_path_and_a_learners_prediction(stream, net, ends):
    straight = landscape.curve(net, ends, stream, 3)
    same = landscape.curve(net, landscape.segment(*ends), stream, 3)
    np.testing.assert_array_equal(straight.loss, same.loss)
    still = landscape.curve(net, lambda t: ends[0], stream, 3, predict=lambda model, x, task: 0 * model(x))
    np.testing.assert_allclose(still.loss, np.log(6))


def test_seen_keeps_the_first_tasks(stream, net, ends):
    every, two = (landscape.curve(net, ends, stream, 2, seen=seen) for seen in (None, 2))
    np.testing.assert_array_equal(two.loss, every.loss[:, :2])


def test_the_barrier_of_a_way_back_to_the_start_is_its_peak(stream, net, ends):
    path = landscape.segment(*ends)
    curve = landscape.curve(net, lambda t: path(1 - abs(2 * t - 1)), stream, 5)
    loss = curve.loss.mean(1)
    assert curve.barrier == pytest.approx(loss.max() - loss[0])
    assert landscape.curve(net, (ends[0], ends[0]), stream, 5).barrier == pytest.approx(0, abs=1e-6)


def test_frames_are_tidy(stream, net, ends):
    curve = landscape.curve(net, ends, stream, 4)
    frame = curve.to_frame()
    assert list(frame.columns) == ["t", "task", "loss", "accuracy"] and len(frame) == 12
    row = frame[(frame.t == curve.ts[2]) & (frame.task == 1)]
    assert row.loss.item() == curve.loss[2, 1] and row.accuracy.item() == curve.accuracy[2, 1]
    named = landscape.to_frame({"one": curve, "two": curve})
    assert list(named.columns) == ["variant", "t", "task", "loss", "accuracy"]
    assert list(named.variant) == ["one"] * 12 + ["two"] * 12


def test_a_permuted_copy_is_found_again_and_the_way_to_it_is_flat(stream, net, ends, inputs):
    symmetry = alignment.symmetry(net, inputs[:2])
    new = normalization.refresh(net, ends[0], inputs)
    old = alignment.permute(symmetry, alignment.random_permutations(symmetry, torch.Generator().manual_seed(1)), new)
    curves = landscape.interpolation(net, old, new, stream, inputs, ts=3, symmetry=symmetry)
    start = curves["plain"].loss[0]
    for name in ("aligned", "aligned, re-estimated"):
        np.testing.assert_allclose(curves[name].loss, np.tile(start, (3, 1)), rtol=1e-3)
    assert not np.allclose(curves["plain"].loss[1], start, rtol=1e-3)


def test_alignment_and_re_estimation_keep_the_ends(stream, net, ends, inputs):
    new, old = ends
    curves = landscape.interpolation(net, old, new, stream, inputs, ts=3)
    assert list(curves) == ["plain", "plain, re-estimated", "aligned", "aligned, re-estimated"]
    for suffix in ("", ", re-estimated"):
        plain, aligned = curves[f"plain{suffix}"], curves[f"aligned{suffix}"]
        np.testing.assert_allclose(plain.loss[[0, -1]], aligned.loss[[0, -1]], rtol=1e-4)
        assert not np.allclose(plain.loss[1], aligned.loss[1], rtol=1e-4)
    np.testing.assert_allclose(curves["plain"].loss[0], landscape.curve(net, (new, old), stream, 2).loss[0])


def test_variants_picks_curves_and_leaves_the_others_out(stream, net, ends, inputs):
    every = landscape.interpolation(net, *ends, stream, inputs, ts=3)
    for name in landscape.VARIANTS:
        (found,) = landscape.interpolation(net, *ends, stream, inputs, ts=3, variants=[name]).items()
        assert found[0] == name
        np.testing.assert_array_equal(found[1].loss, every[name].loss)
    assert landscape.interpolation(net, *ends, stream, inputs, variants=[]) == {}


def test_plain_variants_need_no_symmetry(stream, net, ends, inputs, monkeypatch):
    monkeypatch.setattr(alignment, "symmetry", None)
    landscape.interpolation(net, *ends, stream, inputs, ts=2, variants=["plain", "plain, re-estimated"])


@pytest.mark.parametrize("variants", [landscape.VARIANTS, ("aligned", "plain, re-estimated")])
def test_merges_are_interpolations_by_hand(stream, net, ends, inputs, variants):
    before = W.get_weights(net)
    trained = [*ends, before]
    deployed = [W.get_weights(models.convnet(stream, widths=(4, 6), seed=seed)) for seed in (3, 4, 5)]
    seen = [inputs[:8], inputs[8:18], inputs[18:]]
    found = landscape.merges(net, trained, deployed, seen, stream, ts=[0, 0.5, 1], variants=variants)
    assert len(found) == 2 and W.equal(W.get_weights(net), before)
    for t, curves in enumerate(found, 1):
        expected = landscape.interpolation(
            net, deployed[t - 1], trained[t], stream, seen[t], ts=[0, 0.5, 1], seen=t + 1, variants=variants
        )
        assert tuple(curves) == tuple(expected) == tuple(variants)
        for name, curve in curves.items():
            assert curve.loss.shape == (3, t + 1)
            np.testing.assert_array_equal(curve.loss, expected[name].loss)
            np.testing.assert_array_equal(curve.accuracy, expected[name].accuracy)


def test_one_task_has_no_merge(stream, net, ends, inputs):
    assert landscape.merges(net, ends[:1], ends[1:], [inputs], stream) == []


def test_merges_of_a_run_start_where_it_trained_and_end_where_it_deployed():
    images = toys.images()
    result = toys.quick(images, ER(8), CLeWI(0.3, points=0), model=toys.small_convnet)
    found = landscape.merges(
        result.model, result.trained, result.weights, result.inputs, images, ts=[0, 0.3, 1], variants=landscape.VARIANTS
    )
    for t, curves in enumerate(found, 1):
        merged = curves["aligned, re-estimated"].accuracy[1]
        np.testing.assert_array_equal(merged, result.accuracy[t, : t + 1])
        np.testing.assert_array_equal(curves["plain"].accuracy[2], result.accuracy[t - 1, : t + 1])


def test_a_plane_goes_through_its_corners(stream, net, ends):
    corners = (*ends, W.get_weights(net))
    plane = landscape.plane(net, corners, stream, 3, margin=0)
    sides = [W.norm(W.sub(corners[i], corners[j])) for i, j in ((0, 1), (0, 2), (1, 2))]
    flat = [np.linalg.norm(plane.corners[i] - plane.corners[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(flat, sides, rtol=1e-5)
    start = landscape.curve(net, ends, stream, [0])
    assert plane.xs[0] == pytest.approx(0) and plane.ys[0] == 0
    assert plane.loss[0, 0] == pytest.approx(start.loss.mean(), rel=1e-5)
    assert plane.loss.shape == plane.accuracy.shape == (3, 3)


def test_statistics_are_averaged_on_paths_and_planes_and_go_no_further_than_their_ends(stream, net, ends):
    """Variances so far apart that a straight line beyond an end leads below zero, where logits are NaN."""
    a, b, c = ({**w, **{k: t * f for k, t in W.statistics(w).items() if k.endswith("var")}} for w, f in
               zip((*ends, W.get_weights(net)), (1.0, 50.0, 1e-3), strict=True))  # fmt: skip
    path = landscape.segment(a, b)
    for t, end in ((-0.5, a), (3.0, b)):
        assert W.equal(W.statistics(path(t)), W.statistics(end))
        assert torch.equal(path(t)["linear.weight"], W.lerp(a, b, t)["linear.weight"])
    assert np.isfinite(landscape.curve(net, (a, b), stream, [-1, 0, 1, 2]).loss).all()
    plane = landscape.plane(net, (a, b, c), stream, 5, margin=1)
    assert np.isfinite(plane.loss).all()
    origin, to_b, to_c = (plane.corners[i] - plane.corners[0] for i in range(3))
    middle = landscape.plane(net, (a, b, c), stream, 2, margin=0)  # its corners are those of the box
    assert (origin == 0).all() and middle.loss[0, 0] == pytest.approx(
        landscape.curve(net, (a, b), stream, [0]).loss.mean()
    )
    assert middle.loss[0, 1] == pytest.approx(landscape.curve(net, (a, b), stream, [1]).loss.mean(), rel=1e-3)
    assert to_b[1] == 0 and to_c[1] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, e, s: landscape.curve(n, e, s, 1), "ts: 1"),
        (lambda n, e, s: landscape.curve(n, e, s, []), "ts"),
        (lambda n, e, s: landscape.curve(n, e, s, seen=4), "seen: 4 of 3"),
        (lambda n, e, s: landscape.curve(n, (e[0], {}), s), "different names"),
        (
            lambda n, e, s: landscape.interpolation(n, *e, s, torch.zeros(2, 1, 8, 8), variants=["plain", "alinged"]),
            "variants: .*'alinged'.*; give",
        ),
        (
            lambda n, e, s: landscape.merges(n, e, e, [torch.zeros(2, 1, 8, 8)] * 2, s, variants=["all"]),
            "variants: .*'all'.*; give several, each 'plain' or",
        ),
        (lambda n, e, s: landscape.plane(n, e, s), "corners: 2"),
        (lambda n, e, s: landscape.plane(n, (*e, W.lerp(*e, 0.5)), s), "one line"),
    ],
)
def test_bad_input_names_itself(stream, net, ends, call, message):
    with pytest.raises(ValueError, match=message):
        call(net, ends, stream)


def test_disentanglement_is_how_often_another_tasks_vector_changes_an_answer(stream, net, ends):
    """By hand for one pair, nothing for a vector of zero, and alpha scales both vectors."""
    base, (a, b) = W.get_weights(net), ends
    found = landscape.disentanglement(net, base, [a, base, b], stream, alpha=0.5)
    assert np.isnan(np.diag(found)).all() and found[0, 1] == found[2, 1] == 0
    x, own = stream[0].prepare(stream[0].test.x), list(stream[0].classes)
    points = (W.lerp(base, a, 0.5), W.combine([a, b], [0.5, 0.5]))
    one, both = (W.set_weights(net, w) or net.eval()(x)[:, own].argmax(1) for w in points)
    W.set_weights(net, base)
    assert found[0, 2] == pytest.approx(float((one != both).double().mean())) and found[0, 2] > 0
    with pytest.raises(ValueError, match="trained: 2 weights for 3 tasks"):
        landscape.disentanglement(net, base, [a, b], stream)
