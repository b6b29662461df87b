"""A bounded store of examples: rows of named tensors, filled by reservoir or class-balanced sampling.

Writes are vectorised: one decision and one scatter for a whole batch, with no host synchronisation on the
reservoir's path. The memory does not know why something is stored.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

POLICIES = ("reservoir", "balanced")


def reservoir_slots(seen: int, capacity: int, count: int, generator: torch.Generator) -> Tensor:
    """Draws the slot that each of `count` new rows takes in a reservoir that has seen `seen` rows: (count,) int64.

    A row that is not kept gets slot `capacity`, and so does a row whose slot a later row of the same batch takes:
    writing the result in any order equals the one-by-one algorithm (Vitter 1985, algorithm R). Each row costs one draw.
    """
    device = generator.device
    draw = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    seen_by = torch.arange(seen + 1, seen + count + 1, device=device)
    slot = (draw * seen_by).long().clamp_(max=capacity)
    free = max(0, min(count, capacity - seen))
    slot[:free] = seen_by[:free] - 1
    newest = torch.zeros(capacity + 1, dtype=torch.int64, device=device)
    newest.scatter_reduce_(0, slot, seen_by, "amax")
    return torch.where(newest[slot] == seen_by, slot, capacity)


class Memory:
    """At most `capacity` rows of named tensors, e.g. {"x": images, "y": labels}.

    `policy` says which rows stay when more were offered: "reservoir" keeps a uniform sample of everything offered;
    "balanced" keeps as equal a number of each class (the tensor named "y") as what was offered allows, a uniform
    sample within a class. `holdout` is the share of the slots that `sample` never draws from: rows to choose
    settings by. Slots are random, so held-out rows are a random part of the memory too.
    """

    def __init__(self, capacity: int, policy: str = "reservoir", *, holdout: float = 0.0) -> None:
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"memory: capacity is {capacity!r}; give the number of examples to keep, at least 1")
        if policy not in POLICIES:
            raise ValueError(f"policy: {policy!r} is unknown; choose one of {', '.join(POLICIES)}")
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout: {holdout!r}; give a share of the memory in [0, 1)")
        if holdout and int(capacity * holdout) == 0:
            raise ValueError(
                f"holdout: {holdout!r} of a memory of {capacity} is less than one example; give more of either"
            )
        self.capacity, self.policy, self.holdout = capacity, policy, holdout
        self.rows: dict[str, Tensor] = {}
        held = [int((slot + 1) * holdout) > int(slot * holdout) for slot in range(capacity)]
        self.open = torch.tensor([slot for slot in range(capacity) if not held[slot]], dtype=torch.int64)
        self.held = torch.tensor([slot for slot in range(capacity) if held[slot]], dtype=torch.int64)
        self.keys = torch.zeros(0, dtype=torch.float64)
        self.seen = 0

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def offer(self, generator: torch.Generator, **rows: Tensor) -> None:
        """Offers a batch of rows, tensors of equal length by name; which of them stay is drawn from `generator`."""
        count = self._check(rows)
        if count == 0:
            return
        if self.policy == "reservoir":
            self._reservoir(generator, rows, count)
        else:
            self._balanced(generator, rows, count)
        self.seen += count

    def sample(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws `count` rows without replacement, or all there are if fewer, leaving out the held-out ones."""
        slots = self._slots(held=False)
        order = torch.rand(len(slots), generator=generator, device=generator.device).topk(min(count, len(slots)))
        return self._take(slots[order.indices])

    def all(self) -> dict[str, Tensor]:
        """Every row that is not held out, in slot order."""
        return self._take(self._slots(held=False))

    def held_out(self) -> dict[str, Tensor]:
        """Every held-out row, in slot order; none if `holdout` is 0."""
        return self._take(self._slots(held=True))

    def state_dict(self) -> dict[str, Tensor]:
        """All that the memory holds, as tensors: what `load_state_dict` needs to go on bit for bit."""
        state = {f"rows.{name}": tensor[: len(self)].clone() for name, tensor in self.rows.items()}
        return state | {"keys": self.keys[: len(self)].clone(), "seen": torch.tensor(self.seen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` of a memory of the same settings gave."""
        rows = {name.removeprefix("rows."): tensor for name, tensor in state.items() if name.startswith("rows.")}
        self.seen = int(state["seen"])
        if rows:
            self._allocate(rows)
            for name, tensor in [*rows.items()]:
                self.rows[name][: len(self)] = tensor
            self.keys[: len(self)] = state["keys"]

    def _check(self, rows: Mapping[str, Tensor]) -> int:
        if not rows:
            raise ValueError("rows: none were given; pass tensors by name, e.g. x=images, y=labels")
        counts = {name: len(tensor) for name, tensor in rows.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"rows: the lengths differ, {counts}; pass one row of each tensor per example")
        if self.rows and self.rows.keys() != rows.keys():
            raise ValueError(f"rows: {sorted(rows)} offered to a memory of {sorted(self.rows)}; use the same names")
        for name, tensor in rows.items():
            stored = self.rows.get(name)
            if stored is not None and (stored.shape[1:], stored.dtype) != (tensor.shape[1:], tensor.dtype):
                raise ValueError(
                    f"rows: {name!r} is {tensor.dtype} of shape {tuple(tensor.shape[1:])} a row, the memory holds "
                    f"{stored.dtype} of {tuple(stored.shape[1:])}; all tasks of a stream must agree"
                )
        if self.policy == "balanced" and "y" not in rows:
            raise ValueError("policy: 'balanced' needs the classes; offer a tensor named y")
        return next(iter(counts.values()))

    def _allocate(self, rows: Mapping[str, Tensor]) -> None:
        """Makes room for `capacity` rows and, behind them, one that takes the rows that are not kept."""
        device = next(iter(rows.values())).device
        self.rows = {n: t.new_zeros((self.capacity + 1, *t.shape[1:])) for n, t in rows.items()}
        self.keys = torch.zeros(self.capacity, dtype=torch.float64, device=device)
        self.open, self.held = self.open.to(device), self.held.to(device)

    def _reservoir(self, generator: torch.Generator, rows: Mapping[str, Tensor], count: int) -> None:
        if not self.rows:
            self._allocate(rows)
        slots = reservoir_slots(self.seen, self.capacity, count, generator)
        for name, tensor in rows.items():
            self.rows[name][slots] = tensor

    def _balanced(self, generator: torch.Generator, rows: Mapping[str, Tensor], count: int) -> None:
        """Every row ever offered has a random key; a class keeps its rows of smallest keys, classes in equal parts."""
        have = len(self)
        if not self.rows:
            self._allocate(rows)
        keys = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        pool = {name: torch.cat([self.rows[name][:have], tensor]) for name, tensor in rows.items()}
        keys = torch.cat([self.keys[:have], keys.to(self.keys.device)])
        by_key = keys.argsort()
        rank = torch.empty_like(by_key)
        rank[by_key] = _rank_within(pool["y"][by_key])
        keep = torch.argsort(rank.double() + keys)[: self.capacity]
        free = (keep >= have).nonzero().squeeze(1)
        stays = torch.zeros(have, dtype=torch.bool, device=keep.device)
        stays[keep[keep < have]] = True
        slots = torch.cat([(~stays).nonzero().squeeze(1), torch.arange(have, len(keep), device=keep.device)])
        for name, tensor in pool.items():
            self.rows[name][slots] = tensor[keep[free]]
        self.keys[slots] = keys[keep[free]]

    def _slots(self, *, held: bool) -> Tensor:
        count = int(len(self) * self.holdout)
        return self.held[:count] if held else self.open[: len(self) - count]

    def _take(self, slots: Tensor) -> dict[str, Tensor]:
        return {name: tensor[slots] for name, tensor in self.rows.items()}


def _rank_within(labels: Tensor) -> Tensor:
    """How many earlier entries of `labels` equal each one: (n,) int64."""
    order = labels.argsort(stable=True)
    ordered = labels[order]
    index = torch.arange(len(labels), device=labels.device)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(first, index, 0).cummax(0).values
    rank = torch.empty_like(index)
    rank[order] = index - start
    return rank
