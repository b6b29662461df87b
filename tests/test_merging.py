"""One contract for all rows of MERGES; what is particular to some is in the files beside."""

import math
import weakref
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toys
from clkit import merging, models
from clkit import weights as W
from clkit.consolidation import Merging
from clkit.merging import MERGES, Merge, merge
from merging_toys import (
    MINE,
    PARAMETERS,
    SHAPES,
    STATISTICS,
    apart,
    close,
    needed,
    options,
    permuted,
    run,
    several,
    weights,
)

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
@law
@given(seed=seeds, s=st.floats(0, 1), scale=st.floats(0.1, 3))
def test_statistics_are_averaged_and_parameters_do_not_hear_of_them(name, seed, s, scale):
    """By the weights that a merge has for networks, else by equal ones. They are so long that they would decide all."""
    ws, base = several(MERGES[name], seed)
    for i, w in enumerate([base, *ws]):
        w |= {k: w[k].exp() * 1000.0**i for k in STATISTICS}
    line = {"interpolate": {"t": s}, "slerp": {"t": s, "whole": True}, "wise_ft": {"alpha": s}}
    given = {"average": {"coefficients": [s, 1, 2]}, **line}.get(
        name, {"scale": scale} if "scale" in options(name) else {}
    )
    merged, sources = run(name, ws, base, seed, **given), [base, *ws] if name == "wise_ft" else ws
    for k in STATISTICS:
        low, high = (getattr(torch.stack([w[k] for w in sources]), end)(0).values for end in ("min", "max"))
        assert (merged[k] >= low * (1 - 1e-12)).all() and (merged[k] <= high * (1 + 1e-12)).all()
    if name != "greedy_soup":  # it weighs those alike that it takes, and its score hears of all
        shares = [1 - s, s] if name in line else [c / (3 + s) for c in given.get("coefficients", [1 + s / 3] * len(ws))]
        wanted = W.combine(sources, shares if name in line or name == "average" else [1 / len(ws)] * len(ws))
        close({k: merged[k] for k in STATISTICS}, {k: wanted[k] for k in STATISTICS})
        *alone, start = ({k: w[k] for k in PARAMETERS} for w in [*ws, base])
        close({k: merged[k] for k in PARAMETERS}, run(name, alone, start, seed, **given))


WIDE, NARROW = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)


@rows
@law
@given(seed=seeds, dtypes=st.lists(st.sampled_from(WIDE + NARROW), min_size=4, max_size=4))
@example(seed=0, dtypes=[torch.float32, torch.float32, torch.float16, torch.float32])
def test_dtypes_may_differ_and_the_result_has_the_first(name, seed, dtypes):
    """That of the base, else of the first weights; the arithmetic is that of inputs made wide, rounded once."""
    row, (ws, base) = MERGES[name], several(MERGES[name], seed)
    low, start = [{k: t.to(d) for k, t in w.items()} for w, d in zip(ws, dtypes, strict=False)], dtypes[-1]
    base = {k: t.to(start) for k, t in base.items()}
    dtype = start if row.base else dtypes[0]
    merged = run(name, low, base, seed)
    assert {t.dtype for t in merged.values()} == {dtype}
    kind = torch.float64 if torch.float64 in [t.dtype for w in [base, *low] for t in w.values()] else torch.float32
    exact = run(
        name, [{k: t.to(kind) for k, t in w.items()} for w in low], {k: t.to(kind) for k, t in base.items()}, seed
    )
    close(merged, {k: t.to(dtype) for k, t in exact.items()}, 1e-5 if dtype in WIDE else torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", [n for n, row in (MERGES | MINE).items() if row.base and row.homogeneous])
def test_numbers_too_large_for_the_dtype_are_named(name):
    """Vectors of two that point the same way, whose merge at the scale 4 is beyond float16, but not at 0.5."""
    tau = {k: t.half() for k, t in weights(1, shapes=PARAMETERS).items()}
    tau = W.scale(tau, 30000 / max(float(t.abs().max()) for t in tau.values()))
    ws, start = [tau] * (MERGES[name].arity or 2), W.scale(tau, 0)
    exact = MERGES[name].exact or {}
    if "scale" in options(name):
        merged = run(name, ws, start, **exact, scale=0.5)
        assert all(t.isfinite().all() for t in merged.values())
        with pytest.raises(
            ValueError, match=r"^(conv|norm|linear)\.weight: too large for float16; give weights of a wider"
        ):
            run(name, ws, start, **exact, scale=5.0)


@rows
def test_counters_masks_and_gradients_are_no_matter(name):
    """Of what is no parameter counters are dropped, whoever has them; what is not finite and equal is taken over."""
    ws, base = several(MERGES[name], 1)
    plain = run(name, ws, base)
    mask = {"attention.mask": torch.full((3, 3), -math.inf).triu(1), "unset": torch.tensor(math.inf)}
    counter = {"norm.num_batches_tracked": torch.tensor(7), "seen": torch.tensor(True)}
    with_all = [{k: t.clone().requires_grad_() for k, t in w.items()} | mask for w in [*ws, base]]
    with_all[0] |= counter
    *given, start = with_all
    merged = run(name, given, start)
    assert merged.keys() == plain.keys() | mask.keys() and not any(t.requires_grad for t in merged.values())
    assert all(torch.equal(merged[k], t) and merged[k].data_ptr() != t.data_ptr() for k, t in mask.items())
    close({k: merged[k] for k in plain}, plain)
    given[-1] |= {"attention.mask": mask["attention.mask"] * 2 + 1}
    if len(given) > 1 or MERGES[name].base:
        with pytest.raises(ValueError, match=r"'attention\.mask' holds a NaN or an infinity"):
            run(name, given, start)


@rows
def test_weights_that_are_all_statistics_or_share_tensors_are_no_trouble(name):
    row = MERGES[name]
    few = [{k: w[k].exp() for k in STATISTICS} for w in several(row, 1)[0]]
    need = {"score": lambda w: 0.0} if row.needs == "score" else {row.needs: [{}] * len(few)} if row.needs else {}
    merged = row(few, base=few[0], **need)
    close(merged, W.combine(few, [1 / len(few)] * len(few)) if row.arity != 1 else few[0])
    ws, base = several(row, 1)
    tied = [w | {"scalar": w["linear.weight"][0, 0]} for w in [*ws, base]]
    separate = [{k: t.clone() for k, t in w.items()} for w in tied]
    close(run(name, tied[:-1], tied[-1]), run(name, separate[:-1], separate[-1]))


def gave(result):
    return lambda ws, *, base: result(ws)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (gave(lambda ws: None), "it gave None; a merge gives a mapping of names to floating tensors"),
        (gave(lambda ws: [ws[0]]), "a merge gives a mapping"),
        (gave(lambda ws: {k: 1.0 for k in ws[0]}), "a merge gives a mapping of names to floating tensors"),
        (gave(lambda ws: {k: t.to(torch.complex64) for k, t in ws[0].items()}), "of names to floating tensors"),
        (gave(lambda ws: {k: t.long() for k, t in ws[0].items()}), "of names to floating tensors"),
        (
            gave(lambda ws: {"w": ws[0]["scalar"]}),
            "gave and ws\\[0\\] have different names: missing .* unexpected \\['w'\\]",
        ),
        (gave(lambda ws: {k: t.flatten() for k, t in ws[0].items()}), "differ in the shape of"),
        (gave(lambda ws: [t.zero_() for t in ws[0].values()] and ws[0]), "it changed its inputs"),
        (gave(lambda ws: W.scale(ws[0], math.nan)), "'conv.weight' of what it gave is not a number"),
    ],
)
def test_a_merge_of_a_users_own_that_gives_something_else_is_told_so(function, message, monkeypatch):
    (ws, base), row = several(MERGES["ties"], 1), Merge(function)
    with pytest.raises(ValueError, match=message):
        row(ws, base=base)
    monkeypatch.setitem(MERGES, "wrong", row)
    with pytest.raises(ValueError, match=message):
        merge("wrong", ws, base=base)


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


@pytest.mark.parametrize("merge_", ["ties", "average", partial(merging.ties, density=0.5)])
@pytest.mark.parametrize("name", ["ws", "base"])
def test_what_a_merge_is_given_anyway_is_no_option(merge_, name):
    with pytest.raises(ValueError, match=f"options: '{name}' is (given by whoever calls|unknown)"):
        Merging(merge_, {name: {}})


def test_a_partial_merge_is_checked_as_the_whole_and_keeps_its_weights():
    for bad in (
        lambda: Merging(partial(merging.ties), {"density": 2}),
        lambda: Merging(partial(merging.ties, density=2)),
    ):
        with pytest.raises(ValueError, match="density: 2; give a number in"):
            bad()
    w, v = weights(1), weights(2)
    held = Merge(partial(merging.average, coefficients=(3, 1)))
    close(held([w, v]), W.lerp(w, v, 0.25))
    with pytest.raises(ValueError, match=r"(?s)ws: .*; give several, each an instance of Mapping"):
        merge("average", w)


def test_a_row_reads_the_functions_signature():
    def mine(ws, factor, *, base=None, seed=0, **rest):
        return W.scale(ws[0], factor)

    row = Merge(mine)
    assert (row.base, row.random, row.needs) == (True, True, "factor")
    row.check({"anything": 1})
    assert row([{"w": torch.ones(2)}], base={"w": torch.zeros(2)}, factor=2)["w"].tolist() == [2, 2]
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
