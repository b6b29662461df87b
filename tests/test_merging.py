"""One contract for all rows of MERGES; what is particular to some is in the files beside."""

import math
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toys
from clkit import merging, models
from clkit import weights as W
from clkit.consolidation import Merging
from clkit.merging import MERGES, Merge, merge
from merging_toys import MINE, SHAPES, apart, close, needed, options, permuted, run, several, weights

rows = pytest.mark.parametrize("name", sorted(MERGES | MINE))
seeds = st.integers(0, 2**20)
law = settings(max_examples=8, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def _a_row_of_a_users_own():
    MERGES.update(MINE)
    yield
    for name in MINE:
        del MERGES[name]


@rows
@law
@given(seed=seeds)
def test_copies_merge_to_the_copy_where_nothing_is_left_out(name, seed):
    row, ((w, *others), base) = MERGES[name], several(MERGES[name], seed)
    copies = [w] * (1 + len(others))
    merged = run(name, copies, base, seed, **(row.exact or {}))
    if row.exact is None:
        assert apart(merged, w)
    else:
        close(merged, w)
    if row.exact:
        assert apart(run(name, copies, base, seed), w)


@rows
@law
@given(seed=seeds)
def test_order_matters_only_where_it_is_said_to(name, seed):
    row, (ws, base) = MERGES[name], several(MERGES[name], seed)
    need = needed(row, seed, len(ws))
    turned = {k: v[1:] + v[:1] if isinstance(v, list) else v for k, v in need.items()}
    merged, other = row(ws, base=base, **need), row(ws[1:] + ws[:1], base=base, **turned)
    if row.symmetric:
        close(merged, other)
    elif "t" in options(name):
        close(row(ws, t=0.3), row(ws[::-1], t=0.7))
    else:
        assert apart(merged, other)


@rows
@law
@given(seed=seeds)
def test_a_shift_of_everything_shifts_the_result(name, seed):
    row, (ws, base) = MERGES[name], several(MERGES[name], seed)
    shift = weights(seed + 7)

    def move(w):
        return W.add(w, shift)

    moved = row(list(map(move, ws)), base=move(base), **needed(row, seed, len(ws), move))
    merged = move(run(name, ws, base, seed))
    if row.shifts:
        close(moved, merged)
    else:
        assert apart(moved, merged)


@rows
@law
@given(seed=seeds, scale=st.sampled_from([0.25, 3.0, -2.0]))
def test_task_vectors_as_many_times_as_long_lead_as_many_times_as_far(name, seed, scale):
    row, (ws, base) = MERGES[name], several(MERGES[name], seed)

    def move(w):
        return W.lerp(base, w, scale)

    stretched = row(list(map(move, ws)), base=base, **needed(row, seed, len(ws), move))
    merged = move(run(name, ws, base, seed))
    if row.homogeneous:
        close(stretched, merged, 1e-8)
    else:
        assert apart(stretched, merged)


@rows
@law
@given(seed=seeds)
def test_permuted_channels_come_out_permuted(name, seed):
    row, (ws, base) = MERGES[name], several(MERGES[name], seed)
    need = needed(row, seed, len(ws), permuted, channels=True)
    moved, merged = row(list(map(permuted, ws)), base=permuted(base), **need), permuted(run(name, ws, base, seed))
    if row.permutes:
        close(moved, merged)
    else:
        assert apart(moved, merged)


@rows
def test_lots_depend_on_the_seed_alone(name):
    row, (ws, base) = MERGES[name], several(MERGES[name], 1)
    assert row.random == ("seed" in options(name)) == (name in ("dare", "dare_ties", "della"))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first, again = run(name, ws, base), run(name, ws, base)
    assert W.equal(first, again) and torch.equal(state, torch.random.get_rng_state())
    if row.random:
        assert W.equal(run(name, ws, base, seed=0, **{}), first)
        assert apart(row(ws, base=base, seed=1), first)
        with pytest.raises(ValueError, match="seed: -1"):
            row(ws, base=base, seed=-1)


@rows
def test_inputs_stay_and_the_result_is_new(name):
    ws, base = several(MERGES[name], 1)
    before = [{k: v.clone() for k, v in w.items()} for w in [*ws, base]]
    for given_options in ({}, MERGES[name].exact or {}):
        merged = run(name, ws, base, **given_options)
        for w, old in zip([*ws, base], before, strict=True):
            assert W.equal(w, old)
            assert not {t.data_ptr() for t in merged.values()} & {t.data_ptr() for t in w.values()}


@rows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_halves_are_added_up_in_single_precision(name, dtype):
    ws, base = several(MERGES[name], 1, dtype)
    merged = run(name, ws, base)
    assert {t.dtype for t in merged.values()} == {dtype}
    assert {k: t.shape for k, t in merged.items()} == {k: torch.Size(s) for k, s in SHAPES.items()}
    exact, origin = ([{k: v.double() for k, v in w.items()} for w in part] for part in (ws, [base]))
    close({k: v.double() for k, v in merged.items()}, run(name, exact, origin[0]), 32 * torch.finfo(dtype).eps)


@rows
@pytest.mark.gpu
def test_device_is_kept(name):
    ws, base = several(MERGES[name], 1)

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.cuda()
        if isinstance(value, dict):
            return {k: move(v) for k, v in value.items()}
        return [move(v) for v in value] if isinstance(value, list) else value

    need = needed(MERGES[name], 1, len(ws))
    moved = need if "score" in need else move(need)
    if "score" in need:
        moved = {"score": lambda w: need["score"]({k: v.cpu() for k, v in w.items()})}
    there = MERGES[name](move(ws), base=move(base), **moved)
    assert all(t.is_cuda for t in there.values())
    close({k: v.cpu() for k, v in there.items()}, run(name, ws, base))


@rows
def test_memory_layout_and_the_order_of_names_do_not_matter(name):
    ws, base = several(MERGES[name], 1)

    def strange(w):
        turned = dict(reversed(w.items()))
        return turned | {"conv.weight": w["conv.weight"].to(memory_format=torch.channels_last)}

    usual = [{k: v.clone() for k, v in w.items()} for w in [*ws, base]]
    merged = run(name, [ws[0], *map(strange, ws[1:])], strange(base))
    close(merged, run(name, usual[:-1], usual[-1]))


@rows
def test_other_names_and_shapes_are_rejected(name):
    ws, base = several(MERGES[name], 1)
    with pytest.raises(ValueError, match="different names"):
        run(name, [*ws[:-1], {k: v for k, v in ws[-1].items() if k != "scalar"}], base)
    with pytest.raises(ValueError, match=r"shape of 'linear\.weight'"):
        run(name, [*ws[:-1], {**ws[-1], "linear.weight": torch.zeros(3, 4)}], base)
    with pytest.raises(ValueError, match=r"ws|coefficients"):
        run(name, [], base)


@rows
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(name, bad):
    ws, base = several(MERGES[name], 1)
    broken = {**ws[-1], "linear.weight": ws[-1]["linear.weight"].clone().fill_(bad)}
    with pytest.raises(ValueError, match=rf"ws\[{len(ws) - 1}\]: 'linear\.weight' holds a NaN"):
        run(name, [*ws[:-1], broken], base)
    if MERGES[name].base:
        with pytest.raises(ValueError, match=r"base: 'linear\.weight' holds a NaN"):
            run(name, ws, broken)


@rows
@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("density", [0, -0.1, 1.5, math.nan]),
        ("outliers", [-0.1, 1.5, 0.9]),
        ("epsilon", [-0.1, 1.1, math.nan]),
        ("alpha", [-0.1, 1.1, math.nan]),
        ("t", [-0.1, 1.1, math.nan]),
        ("scale", [math.nan, math.inf]),
        ("shrink", [-0.1, 1.1]),
        ("task", [-1, 3]),
    ],
)
def test_an_option_out_of_range_is_named_with_its_value(name, option, values):
    ws, base = several(MERGES[name], 1)
    for value in values if option in options(name) else []:
        with pytest.raises(ValueError, match=f"{option}: {value}"):
            run(name, ws, base, **{option: value})


@pytest.mark.parametrize(("name", "position"), [("interpolate", "t"), ("slerp", "t"), ("wise_ft", "alpha")])
def test_ends_are_reached_bitwise(name, position):
    (first, *others), base = several(MERGES[name], 3)
    a, b = (first, others[0]) if others else (base, first)
    for t, end in ((0, a), (1, b), (0.0, a), (1.0, b)):
        assert W.equal(run(name, [first, *others], base, **{position: t}), end)


@rows
def test_arity_base_and_needs_are_as_the_row_says(name):
    row, (ws, base) = MERGES[name], several(MERGES[name], 1)
    need = needed(row, 1, len(ws))
    if row.arity:
        with pytest.raises(ValueError, match=f"ws: {row.arity + 1}"):
            row([*ws, ws[0]], base=base)
    if row.base:
        with pytest.raises(ValueError, match="base"):
            row(ws)
    else:
        close(row(ws, **need), row(ws, base=base, **need))
    if row.needs:
        with pytest.raises(ValueError, match=row.needs):
            row(ws, base=base)
    with pytest.raises(TypeError, match="unheard"):
        row(ws, base=base, **need, unheard=1)


@rows
def test_one_network_and_no_tensors_are_no_trouble(name):
    row = MERGES[name]
    count = row.arity or 3
    need = {"score": lambda w: 0.0} if row.needs == "score" else {row.needs: [{}] * count} if row.needs else {}
    assert row([{}] * count, base={}, **need) == {}
    empty = {"none": torch.zeros(0, 3), "zero": torch.zeros(2, 2)}
    close(row([empty] * count, base=empty, **need), empty)
    if not row.arity and row.exact is not None:
        w, base = weights(1), weights(2)
        close(run(name, [w], base, **row.exact), w)


class Live(TorchDispatchMode):
    """The most bytes of new storages alive at once."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self.known:
                    self.live += storage.nbytes()
                    self.most = max(self.most, self.live)
                    self.known[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata)
        return result

    def forget(self, key):
        self.live -= self.known.pop(key)


ENTRYWISE = ["average", "task_arithmetic", "model_stock", "ties", "breadcrumbs", "dare", "dare_ties", "magmax", "emr"]


@pytest.mark.parametrize("name", ENTRYWISE)
def test_less_than_two_networks_are_allocated(name):
    shapes = {str(i): (256, 192, 3, 3) for i in range(6)} | {f"{i} bias": (64,) for i in range(6)}
    ws, base = [weights(i, torch.float32, shapes) for i in range(4)], weights(9, torch.float32, shapes)
    network = sum(t.nbytes for t in base.values())
    with Live() as live:
        merged = MERGES[name](ws, base=base)
    assert network <= live.most < 2 * network
    del merged


def test_a_row_added_to_the_table_goes_by_name_in_a_run():
    """Three tasks, of which the median is neither the mean nor one of the networks."""
    stream = toys.stream()
    model = models.mlp(stream, hidden=(4,))
    base = W.get_weights(model)
    result = toys.quick(stream, None, Merging("median", {"scale": 0.5}), model=model)
    expected = merge("median", result.trained[:3], base=base, scale=0.5)
    close(result.weights[2], expected, 1e-6)
    assert apart(result.weights[2], merge("average", result.trained[:3]))


def test_options_are_checked_before_any_work():
    row = MERGES["ties"]
    row.check({"density": 0.5, "whole": False, "scale": 2})
    for bad, message in (
        ({"density": 2}, "density: 2; give a number in \\(0, 1\\], the share of entries that are kept"),
        ({"whole": "yes"}, "whole: 'yes'; give True or False"),
        ({"densty": 0.5}, "options: 'densty' is unknown; .* did you mean 'density'"),
    ):
        with pytest.raises(ValueError, match=message):
            row.check(bad)
    with pytest.raises(ValueError, match="scale: -1; give a number, above 0"):
        MERGES["median"].check({"scale": -1})


def test_a_row_reads_the_functions_signature():
    def mine(ws, factor, *, base=None, seed=0, **rest):
        return ws

    row = Merge(mine, defaults={"factor": 2})
    assert (row.base, row.random, row.needs) == (True, True, "factor")
    row.check({"anything": 1})
    assert row([1], base={}) == [1]
    half = Merge(partial(merging.task_arithmetic, scale=0.5))
    ws, base = [weights(1), weights(2)], weights(3)
    assert half.base and half.needs is None
    close(half(ws, base=base), merging.task_arithmetic(ws, base=base, scale=0.5))
    half.check({"scale": 1.0})


def test_merge_goes_by_name_and_suggests():
    ws = [weights(1), weights(2)]
    close(merge("slerp", ws, t=0.3), MERGES["slerp"](ws, t=0.3))
    with pytest.raises(ValueError, match="'average'"):
        merge("averge", ws)
    with pytest.raises(TypeError, match="scal"):
        merge("task_arithmetic", ws, base=ws[0], scal=1)
