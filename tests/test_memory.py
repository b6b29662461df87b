import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit.memory import POLICIES, Memory, reservoir_slots

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
    """Algorithm R as the textbook has it, drawing the same numbers."""
    g, slots, n = torch.Generator().manual_seed(seed), [], 0
    for size in sizes:
        draws = torch.rand(size, generator=g, dtype=torch.float64) if size else []
        for draw in draws:
            if n < capacity:
                slots.append(n)
            else:
                j = int(draw * (n + 1))
                if j < capacity:
                    slots[j] = n
            n += 1
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
@given(st.sampled_from(POLICIES), st.integers(1, 10), chunks, st.integers(0, 99), st.floats(0, 0.9))
def test_rows_stay_whole_distinct_and_within_bounds(policy, capacity, sizes, seed, holdout):
    holdout = holdout if int(capacity * holdout) else 0.0
    memory = Memory(capacity, policy, holdout=holdout)
    offered = fill(memory, sizes, seed)
    rows, held = memory.all(), memory.held_out()
    x = torch.cat([rows.get("x", torch.empty(0)), held.get("x", torch.empty(0))])
    assert len(x) == len(memory) == min(capacity, offered)
    assert len(x.unique()) == len(x) and (x < offered).all()
    for part in (rows, held):
        assert not part or torch.equal(part["y"], part["x"] % 3)
    assert len(held.get("x", [])) == int(len(memory) * holdout)


@laws
@given(st.integers(1, 12), chunks, st.integers(0, 99))
def test_a_balanced_memory_is_as_balanced_as_what_was_offered_allows(capacity, sizes, seed):
    memory = Memory(capacity, "balanced")
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
@given(st.sampled_from(POLICIES), chunks, st.integers(1, 20), st.floats(0, 0.9))
def test_a_sample_has_no_row_twice_and_none_held_out(policy, sizes, count, holdout):
    memory = Memory(8, policy, holdout=holdout if holdout >= 0.125 else 0.0)
    fill(memory, sizes)
    drawn = memory.sample(count, torch.Generator().manual_seed(1)).get("x", torch.empty(0)).tolist()
    open_rows = set(memory.all().get("x", torch.empty(0)).tolist())
    assert len(drawn) == len(set(drawn)) == min(count, len(open_rows))
    assert set(drawn) <= open_rows


@pytest.mark.parametrize("policy", POLICIES)
def test_a_restored_memory_goes_on_bit_for_bit(policy):
    memory, twin = Memory(6, policy, holdout=0.3), Memory(6, policy, holdout=0.3)
    fill(memory, [5, 5, 5], 0)
    twin.load_state_dict(memory.state_dict())
    for m in (memory, twin):
        g = torch.Generator().manual_seed(7)
        m.offer(g, x=torch.arange(100, 120), y=torch.arange(20) % 3)
    assert all(torch.equal(a, b) for a, b in zip(memory.all().values(), twin.all().values(), strict=True))
    assert memory.state_dict().keys() == twin.state_dict().keys()


def test_an_empty_memory_saves_loads_and_samples():
    memory = Memory(3)
    memory.load_state_dict(Memory(3).state_dict())
    assert len(memory) == 0 and memory.sample(2, torch.Generator()) == {}


def test_slots_never_repeat_within_a_batch():
    slots = reservoir_slots(3, 5, 1000, torch.Generator().manual_seed(0))
    kept = slots[slots < 5]
    assert len(kept.unique()) == len(kept) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Memory(0), "capacity is 0"),
        (lambda: Memory(3, "herd"), "'herd' is unknown"),
        (lambda: Memory(3, holdout=1.0), "holdout: 1.0"),
        (lambda: Memory(3, holdout=0.2), "less than one example"),
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
