"""One contract for all rows of MERGES, then what is particular to some."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit import weights as W
from clkit.merging import MERGES, average, merge, slerp, task_arithmetic

SHAPES = {"conv.weight": (4, 3, 3, 3), "norm.running_var": (4,), "linear.weight": (2, 4), "scalar": ()}
ROWS = sorted(MERGES)

rows = pytest.mark.parametrize("name", ROWS)
seeds = st.integers(0, 2**20)


def weights(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for k, shape in SHAPES.items()}


def several(row, seed, dtype=torch.float64):
    return [weights(seed + i, dtype) for i in range(row.arity or 3)], weights(seed + 99, dtype)


def options(name):
    return MERGES[name].function.__kwdefaults__ or {}


def close(a, b, tolerance=1e-9):
    W.check_same(a, b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)


@rows
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_copies_merge_to_the_copy(name, seed):
    (w, *others), base = several(MERGES[name], seed)
    close(MERGES[name]([w] * (1 + len(others)), base=base), w)


@rows
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_order_matters_only_where_it_is_said_to(name, seed):
    ws, base = several(MERGES[name], seed)
    merged, turned = MERGES[name](ws, base=base), MERGES[name](ws[1:] + ws[:1], base=base)
    if MERGES[name].symmetric:
        close(merged, turned)
    elif "t" in options(name):
        close(MERGES[name](ws, t=0.3), MERGES[name](ws[::-1], t=0.7))


@rows
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_a_shift_of_everything_shifts_the_result(name, seed):
    ws, base = several(MERGES[name], seed)
    shift = weights(seed + 7)
    moved = MERGES[name]([W.add(w, shift) for w in ws], base=W.add(base, shift))
    merged = W.add(MERGES[name](ws, base=base), shift)
    if MERGES[name].shifts:
        close(moved, merged)
    else:
        assert W.norm(W.sub(moved, merged)) > 1e-6


@rows
def test_inputs_stay_and_the_result_is_new(name):
    ws, base = several(MERGES[name], 1)
    before = [{k: v.clone() for k, v in w.items()} for w in [*ws, base]]
    merged = MERGES[name](ws, base=base)
    for w, old in zip([*ws, base], before, strict=True):
        assert all(torch.equal(w[k], old[k]) for k in w)
        assert not {t.data_ptr() for t in merged.values()} & {t.data_ptr() for t in w.values()}


@rows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(name, dtype):
    ws, base = several(MERGES[name], 1, dtype)
    merged = MERGES[name](ws, base=base)
    assert {t.dtype for t in merged.values()} == {dtype}
    W.check_finite(merged)


@rows
@pytest.mark.gpu
def test_device_is_kept(name):
    ws, base = several(MERGES[name], 1)
    there = MERGES[name]([{k: v.cuda() for k, v in w.items()} for w in ws], base={k: v.cuda() for k, v in base.items()})
    assert all(t.is_cuda for t in there.values())
    close({k: v.cpu() for k, v in there.items()}, MERGES[name](ws, base=base))


@rows
def test_other_names_and_shapes_are_rejected(name):
    ws, base = several(MERGES[name], 1)
    with pytest.raises(ValueError, match="different names"):
        MERGES[name]([*ws[:-1], {k: v for k, v in ws[-1].items() if k != "scalar"}], base=base)
    with pytest.raises(ValueError, match=r"shape of 'linear\.weight'"):
        MERGES[name]([*ws[:-1], {**ws[-1], "linear.weight": torch.zeros(3, 4)}], base=base)
    with pytest.raises(ValueError, match=r"ws|coefficients"):
        MERGES[name]([], base=base)


@rows
def test_ends_are_reached_bitwise(name):
    if "t" not in options(name):
        pytest.skip("not a path")
    (a, b), _ = several(MERGES[name], 3)
    for t, end in ((0, a), (1, b), (0.0, a), (1.0, b)):
        merged = MERGES[name]([a, b], t=t)
        assert all(torch.equal(merged[k], end[k]) for k in end)
    with pytest.raises(ValueError, match=r"t: 1\.1"):
        MERGES[name]([a, b], t=1.1)


@rows
def test_arity_and_base_are_as_the_row_says(name):
    row, (ws, base) = MERGES[name], several(MERGES[name], 1)
    if row.arity:
        with pytest.raises(ValueError, match=f"ws: {row.arity + 1}"):
            row([*ws, ws[0]], base=base)
    if row.base:
        with pytest.raises(ValueError, match="base"):
            row(ws)
    else:
        close(row(ws), row(ws, base=base))


def test_average_weights_by_coefficients():
    ws = [weights(i) for i in range(3)]
    close(average(ws), W.combine(ws, [1 / 3] * 3))
    close(average(ws, coefficients=[2, 0, 6]), W.lerp(ws[0], ws[2], 0.75))
    for bad in ([1, 2], [0, 0, 0], [1, -1, 1], [1, math.nan, 1], [1, math.inf, 1]):
        with pytest.raises(ValueError, match="coefficients"):
            average(ws, coefficients=bad)


def test_slerp_turns_evenly_and_keeps_length():
    a, b = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    for t in (0.0, 0.25, 0.5, 1.0):
        angle = t * math.pi / 2
        expected = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle)])
        torch.testing.assert_close(slerp([a, b], t=t)["w"], expected)


def test_slerp_by_tensor_or_whole():
    a, b = {"x": torch.tensor([1.0, 0.0]), "y": torch.ones(2)}, {"x": torch.tensor([0.0, 1.0]), "y": torch.ones(2)}
    assert torch.equal(slerp([a, b])["y"], torch.ones(2))
    whole = slerp([a, b], whole=True)
    angle = math.acos(2 / 3)
    torch.testing.assert_close(whole["y"], torch.ones(2) * 2 * math.sin(angle / 2) / math.sin(angle))


def test_slerp_of_opposite_zero_and_parallel_tensors_is_linear():
    a = {"opposite": torch.ones(3), "zero": torch.zeros(2), "parallel": torch.ones(2), "empty": torch.zeros(0)}
    b = {"opposite": -torch.ones(3), "zero": torch.ones(2), "parallel": 3 * torch.ones(2), "empty": torch.zeros(0)}
    merged, linear = slerp([a, b], t=0.25), W.lerp(a, b, 0.25)
    close({k: v.double() for k, v in merged.items()}, {k: v.double() for k, v in linear.items()}, 1e-6)
    assert slerp([{}, {}], whole=True) == {}


def test_task_arithmetic_adds_scaled_task_vectors():
    base, ws = weights(0), [weights(1), weights(2)]
    vector = W.add(W.sub(ws[0], base), W.sub(ws[1], base))
    close(task_arithmetic(ws, base=base, scale=0.3), W.add(base, vector, 0.3))
    close(task_arithmetic(ws, base=base, scale=0), base)
    close(task_arithmetic(ws, base=base), average(ws))
    close(task_arithmetic(ws[:1], base=base), ws[0])
    with pytest.raises(ValueError, match="scale: nan"):
        task_arithmetic(ws, base=base, scale=math.nan)


def test_merge_goes_by_name_and_suggests():
    ws = [weights(1), weights(2)]
    close(merge("slerp", ws, t=0.3), slerp(ws, t=0.3))
    with pytest.raises(ValueError, match="'average'"):
        merge("averge", ws)
    with pytest.raises(TypeError, match="scal"):
        merge("task_arithmetic", ws, base=ws[0], scal=1)
