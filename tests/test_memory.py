from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit import memory as memory_module
from clkit.memory import AHEAD, Memory, Policy, herding, reservoir_slots

POLICIES = get_args(Policy)
laws = settings(max_examples=30, deadline=None)
chunks = st.lists(st.integers(0, 12), min_size=1, max_size=8)


def fill(memory: Memory, sizes: list[int], seed: int = 0, classes: int = 3) -> int:
    """Offers rows x = 0, 1, 2, ... with class x % classes, in batches of the given sizes."""
    g, n = torch.Generator().manual_seed(seed), 0
    for size in sizes:
        x = torch.arange(n, n + size)
        memory.offer(g, x=x, y=x % classes)
        n += size
    return n


def one_by_one(capacity: int, sizes: list[int], seed: int) -> list[int]:
    """Algorithm R as the textbook has it, with the same numbers, of which the memory draws many ahead."""
    draws = torch.rand(AHEAD, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    slots: list[int] = []
    for n in range(sum(sizes)):
        j = int(draws[n] * (n + 1))
        if n < capacity:
            slots.append(n)
        elif j < capacity:
            slots[j] = n
    return slots


@laws
@given(st.integers(1, 10), chunks, st.integers(0, 999))
def test_vectorised_writes_equal_the_one_by_one_reference(capacity, sizes, seed):
    memory = Memory(capacity)
    fill(memory, sizes, seed)
    assert memory.all().get("x", torch.empty(0)).tolist() == one_by_one(capacity, sizes, seed)


def test_a_reservoir_is_a_uniform_sample_of_what_was_offered():
    counts, trials = torch.zeros(20), 4000
    for seed in range(trials):
        memory = Memory(5)
        fill(memory, [7, 13], seed)
        counts[memory.all()["x"]] += 1
    spread = (0.25 * 0.75 * trials) ** 0.5
    assert (counts - 0.25 * trials).abs().max() < 4 * spread


@laws
@given(st.sampled_from(POLICIES), st.integers(1, 10), chunks, st.integers(0, 99))
def test_rows_stay_whole_distinct_and_within_bounds(policy, capacity, sizes, seed):
    memory = Memory(capacity, policy)
    offered = fill(memory, sizes, seed)
    rows = memory.all()
    x = rows.get("x", torch.empty(0))
    assert len(x) == len(memory) == min(capacity, offered)
    assert len(x.unique()) == len(x) and (x < offered).all()
    assert not rows or torch.equal(rows["y"], rows["x"] % 3)


BY_CLASS = [policy for policy in POLICIES if policy != "reservoir"]


def by_class_one_by_one(policy: str, capacity: int, sizes: list[int]) -> set[int]:
    """Whole classes in the order of preference, cut to equal parts; the rest goes to the classes that came first."""
    n = sum(sizes)
    classes = [[x for x in range(n) if x % 3 == c] for c in range(3)]
    ranked = [own[::-1] if policy == "ring" else own for own in classes]
    kept: set[int] = set()
    for turn in range(n):
        for own in ranked:
            if turn < len(own) and len(kept) < capacity:
                kept.add(own[turn])
    return kept


@laws
@given(st.sampled_from(["ring", "herding"]), st.integers(1, 12), chunks)
def test_ring_keeps_the_newest_and_herding_the_first_of_each_class(policy, capacity, sizes):
    memory = Memory(capacity, policy)
    fill(memory, sizes)
    expected = by_class_one_by_one(policy, capacity, sizes)
    kept = memory.all().get("x", torch.empty(0)).tolist()
    share = capacity // 3
    assert len(kept) == len(expected)
    for c in range(3):  # which class has one more is the tie's affair; the others must agree row for row
        mine, theirs = ({x for x in rows if x % 3 == c} for rows in (kept, expected))
        assert mine <= theirs or theirs <= mine
        assert abs(len(mine) - len(theirs)) <= 1 and min(len(mine), share) == min(len(theirs), share)


def test_herding_orders_by_the_fit_of_the_running_mean():
    """Algorithm 4 of iCaRL, as written."""
    g = torch.Generator().manual_seed(0)
    features, y = torch.randn(12, 3, generator=g, dtype=torch.float64), torch.arange(12) % 2
    order = herding(features, y)
    assert sorted(order.tolist()) == list(range(12))
    for label in (0, 1):
        own = [int(i) for i in order if y[i] == label]
        mean = features[y == label].mean(0)
        for turn in range(len(own)):
            left = [i for i in range(12) if y[i] == label and i not in own[:turn]]
            fits = {i: (mean - features[[*own[:turn], i]].mean(0)).norm().item() for i in left}
            assert fits[own[turn]] <= min(fits.values()) + 1e-12


def test_the_best_of_each_class_are_the_first_that_herding_takes():
    g = torch.Generator().manual_seed(0)
    features, y = torch.randn(13, 3, generator=g), torch.arange(13) % 2
    order = herding(features, y)
    for most in (1, 3, 20):
        assert torch.equal(herding(features, y, most), order[: 2 * most])


def test_herding_takes_turns_over_the_classes():
    order = herding(torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.arange(9) // 3)
    assert [sorted((order[i : i + 3] // 3).tolist()) for i in (0, 3, 6)] == [[0, 1, 2]] * 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (8,), (1, 4, 4)])
def test_rows_of_any_kind_come_back_as_they_were(dtype, shape):
    rows = torch.randint(0, 2, (30, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    memory = Memory(40)
    for part in (rows[:7], rows[7:8], rows[8:]):
        memory.offer(torch.Generator(), x=part)
    assert torch.equal(memory.all()["x"], rows)


@laws
@given(st.sampled_from(BY_CLASS), st.integers(1, 12), chunks, st.integers(0, 99))
def test_a_balanced_memory_is_as_balanced_as_what_was_offered_allows(policy, capacity, sizes, seed):
    memory = Memory(capacity, policy)
    n = fill(memory, sizes, seed, classes=3)
    if not n:
        return
    offered = torch.bincount(torch.arange(n) % 3, minlength=3)
    kept = torch.bincount(memory.all()["y"], minlength=3)
    fullest = kept.max()
    assert ((kept >= fullest - 1) | (kept == offered)).all()


def test_a_balanced_memory_gives_a_late_class_its_share():
    memory, g = Memory(10, "balanced"), torch.Generator().manual_seed(0)
    memory.offer(g, y=torch.zeros(100, dtype=torch.int64))
    memory.offer(g, y=torch.ones(5, dtype=torch.int64))
    assert torch.bincount(memory.all()["y"]).tolist() == [5, 5]


@laws
@given(st.sampled_from(POLICIES), chunks, st.integers(1, 20))
def test_a_sample_draws_no_slot_twice(policy, sizes, count):
    memory = Memory(8, policy)
    fill(memory, sizes)
    drawn = memory.sample(count, torch.Generator().manual_seed(1)).get("x", torch.empty(0)).tolist()
    rows = set(memory.all().get("x", torch.empty(0)).tolist())
    assert len(drawn) == len(set(drawn)) == min(count, len(rows))
    assert set(drawn) <= rows


def test_what_a_memory_gave_is_not_changed_by_later_offers():
    memory, g = Memory(3), torch.Generator().manual_seed(0)
    memory.offer(g, x=torch.zeros(3))
    rows = memory.all()["x"]
    memory.offer(g, x=torch.ones(100))
    assert (rows == 0).all() and (memory.all()["x"] == 1).any()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_restored_memory_goes_on_bit_for_bit(policy):
    memory, twin = Memory(6, policy), Memory(6, policy)
    fill(memory, [5, 5, 5], 0)
    twin.load_state_dict(memory.state_dict())
    for m in (memory, twin):
        g = torch.Generator().manual_seed(7)
        m.offer(g, x=torch.arange(100, 120), y=torch.arange(20) % 3)
    assert all(torch.equal(a, b) for a, b in zip(memory.all().values(), twin.all().values(), strict=True))
    assert memory.state_dict().keys() == twin.state_dict().keys()


@pytest.mark.parametrize("policy", BY_CLASS)
def test_a_finer_grouping_goes_before_the_classes(policy):
    memory, x = Memory(8, policy), torch.arange(40)
    memory.offer(torch.Generator().manual_seed(0), x=x, y=x % 2, group=x // 10)
    assert torch.bincount(memory.all()["group"]).tolist() == [2] * 4


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_with_many_labels_have_no_class_to_go_by(policy):
    memory, rows = Memory(3, policy), {"x": torch.zeros(5, 7), "y": torch.zeros(5, 7, dtype=torch.int64)}
    if policy == "reservoir":
        memory.offer(torch.Generator(), **rows)
        assert memory.all()["y"].shape == (3, 7)
    else:
        with pytest.raises(ValueError, match=rf"policy: '{policy}' .* shape \(5, 7\).*use policy=\"reservoir\""):
            memory.offer(torch.Generator(), **rows)


def test_an_empty_memory_saves_loads_and_samples():
    memory = Memory(3)
    memory.load_state_dict(Memory(3).state_dict())
    assert len(memory) == 0 and memory.sample(2, torch.Generator()) == {}


def test_decisions_ahead_run_out_and_are_made_anew(monkeypatch):
    monkeypatch.setattr(memory_module, "AHEAD", 7)
    counts, trials = torch.zeros(30), 2000
    for seed in range(trials):
        memory = Memory(5)
        fill(memory, [4, 9, 2, 6, 9], seed)
        counts[memory.all()["x"]] += 1
    assert (counts - trials / 6).abs().max() < 4.5 * (trials * 5 / 36) ** 0.5


def test_a_slot_is_taken_until_a_later_row_takes_it():
    slots, until = (t.tolist() for t in reservoir_slots(3, 5, 1000, torch.Generator().manual_seed(0)))
    for i in range(1000):
        later = [3 + j + 1 for j in range(i + 1, 1000) if slots[j] == slots[i]]
        assert until[i] == (later[0] if later else torch.iinfo(torch.int64).max)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Memory(0), "capacity: 0; give a whole number, at least 1"),
        (lambda: Memory(3, "herd"), "'herd' is unknown"),
        (lambda: Memory(3).offer(torch.Generator()), "none were given"),
        (lambda: Memory(3).offer(torch.Generator(), x=torch.zeros(2), y=torch.zeros(3)), "lengths differ"),
        (lambda: Memory(3, "balanced").offer(torch.Generator(), x=torch.zeros(2)), "tensor named y"),
    ],
)
def test_bad_settings_and_rows_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_must_stay_of_one_kind():
    memory, g = Memory(3), torch.Generator()
    memory.offer(g, x=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"'x' is torch.float32 of shape \(5,\)"):
        memory.offer(g, x=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="use the same names"):
        memory.offer(g, z=torch.zeros(2, 4))
