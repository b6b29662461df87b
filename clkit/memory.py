"""A bounded store of examples: rows of named tensors, filled by reservoir, balanced, ring or herding selection.

Writes are vectorised: one decision and one scatter for a whole batch, with no host synchronisation on the
reservoir's path. The memory does not know why something is stored.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from clkit import checks

StepPolicy = Literal["reservoir", "balanced", "ring"]  # those that can be filled as training goes
Policy = Literal[StepPolicy, "herding"]
AHEAD = 4096  # rows that a reservoir decides on at once


def reservoir_slots(seen: int, capacity: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws the slots that the `count` rows after the first `seen` take in a reservoir (Vitter 1985, algorithm R).

    Returns (slots, until), both (count,) int64. A row that is not kept has slot `capacity`. `until` is the number of
    rows seen when a later row of these takes the slot again. Each row costs one draw.
    """
    device = generator.device
    number = torch.arange(seen, seen + count, device=device)
    draw = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    slots = torch.where(number < capacity, number, (draw * (number + 1)).long().clamp_(max=capacity))
    by_slot = slots.argsort(stable=True)
    until = torch.full_like(slots, torch.iinfo(torch.int64).max)
    again = slots[by_slot[1:]] == slots[by_slot[:-1]]
    until[by_slot[:-1]] = torch.where(again, number[by_slot[1:]] + 1, until[0])
    return slots, until


class Memory:
    """At most `capacity` rows of named tensors, e.g. {"x": images, "y": labels}.

    `policy` says which rows stay when more were offered:

    - "reservoir": a uniform sample of everything offered
    - "balanced": as equal a number of each class as was offered, a uniform sample of each
    - "ring": as equal a number of each class, its newest rows (GEM)
    - "herding": as equal a number of each class, the rows offered first: offered in the order of `herding`, the best
      stay and the last are lost (iCaRL)

    The class is the tensor named "y", or one named "group", of finer classes, where it is given. Where a class comes in
    several tasks, "ring" keeps the newest task's rows of it and "herding" the first's. Every offer counts: a row that
    is offered again, in another epoch, is one more row, and may be held twice.
    """

    @checks.arguments
    def __init__(self, capacity: checks.Count, policy: Policy = "reservoir") -> None:
        self.capacity = capacity
        self.policy: Policy = policy
        self.rows: dict[str, Tensor] = {}
        self.keys = torch.zeros(0, dtype=torch.float64)
        self.seen = 0
        self.decided = 0  # the rows seen before the first that `slots` and `until` are about
        self.slots = self.until = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def offer(self, generator: torch.Generator, **rows: Tensor) -> None:
        """Offers a batch of rows, tensors of equal length by name; which of them stay is drawn from `generator`.

        Raises ValueError on rows whose lengths, names, shapes or dtypes differ from each other's or the memory's.
        """
        count = self._check(rows)
        if count == 0:
            return
        if not self.rows:
            self._allocate(rows)
        if self.policy == "reservoir":
            slots = self._reservoir(generator, count)
        else:
            slots, taken = self._by_class(generator, rows, count)
            rows = {name: tensor[taken] for name, tensor in rows.items()}
        for name, tensor in rows.items():
            _write(self.rows[name], slots, tensor)
        self.seen += count

    def sample(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws `count` rows without replacement, or all there are if fewer."""
        order = torch.rand(len(self), generator=generator, device=generator.device).topk(min(count, len(self)))
        return {name: tensor.index_select(0, order.indices) for name, tensor in self.rows.items()}

    def all(self) -> dict[str, Tensor]:
        """Every row, in slot order."""
        return {name: tensor[: len(self)].clone() for name, tensor in self.rows.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that the memory holds: tensors, numbers and a dict of tensors, enough to go on bit for bit."""
        count = len(self)
        return {
            "rows": {name: tensor[:count].clone() for name, tensor in self.rows.items()},
            "keys": self.keys[:count].clone(),
            **{name: getattr(self, name) for name in ("seen", "decided", "slots", "until")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` of a memory of the same settings gave."""
        for name in ("seen", "decided", "slots", "until"):
            setattr(self, name, state[name])
        if state["rows"]:
            self._allocate(state["rows"])
            for name, tensor in state["rows"].items():
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
        for name, stored in self.rows.items():
            tensor = rows[name]
            if (stored.shape[1:], stored.dtype) != (tensor.shape[1:], tensor.dtype):
                raise ValueError(
                    f"rows: {name!r} is {tensor.dtype} of shape {tuple(tensor.shape[1:])} a row, the memory holds "
                    f"{stored.dtype} of {tuple(stored.shape[1:])}; all tasks of a stream must agree"
                )
        if self.policy != "reservoir" and "y" not in rows:
            raise ValueError(f"policy: {self.policy!r} needs the classes; offer a tensor named y")
        if "y" in rows:
            check_policy(self.policy, rows["y"])
        return next(iter(counts.values()))

    def _allocate(self, rows: Mapping[str, Tensor]) -> None:
        """Makes room for `capacity` rows and, behind them, one that takes the rows that are not kept."""
        device = next(iter(rows.values())).device
        self.rows = {n: t.new_zeros((self.capacity + 1, *t.shape[1:])) for n, t in rows.items()}
        self.keys = torch.zeros(self.capacity, dtype=torch.float64, device=device)

    def _reservoir(self, generator: torch.Generator, count: int) -> Tensor:
        """The slots (count,) of the rows offered: many are decided on ahead, so that a batch looks its own up."""
        end = self.seen + count
        if end > self.decided + len(self.slots):
            self.decided = self.seen
            self.slots, self.until = reservoir_slots(self.seen, self.capacity, max(count, AHEAD), generator)
        mine = slice(self.seen - self.decided, end - self.decided)
        return self.slots[mine].masked_fill(self.until[mine] <= end, self.capacity)

    def _by_class(self, generator: torch.Generator, rows: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """The slots of the rows that are taken, and which of the `count` offered ones these are: both (taken,).

        Every row has a key. A class keeps its rows of smallest keys, and classes have equal parts. Keys are random, or
        the row's number in the order of offers, or that backwards. What cannot be shared equally goes to the smallest
        of the random keys, else to the classes that came first.
        """
        have, device = len(self), self.keys.device
        name = "group" if "group" in rows else "y"
        if self.policy == "balanced":
            keys = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        else:
            keys = torch.arange(self.seen, self.seen + count, dtype=torch.float64, device=device)
            keys = -keys if self.policy == "ring" else keys
        keys = torch.cat([self.keys[:have], keys.to(device)])
        rank = _rank(torch.cat([self.rows[name][:have], rows[name]]), keys)
        order = rank + keys if self.policy == "balanced" else rank.double()
        keep = torch.argsort(order, stable=True)[: self.capacity]
        fresh = keep[keep >= have]
        free = torch.ones(len(keep), dtype=torch.bool, device=device)
        free[keep[keep < have]] = False
        slots = free.nonzero().squeeze(1)
        self.keys[slots] = keys[fresh]
        return slots, fresh - have


def check_policy(policy: Policy, y: Tensor) -> None:
    """Raises ValueError if a policy that goes by class is to go by labels (N, L), of which a row has many."""
    if policy != "reservoir" and y.ndim > 1:
        raise ValueError(
            f"policy: {policy!r} keeps rows by class and labels of shape {tuple(y.shape)} are many a row (tokens); "
            'use policy="reservoir", or a rule with it'
        )


def herding(features: Tensor, y: Tensor, most: int | None = None) -> Tensor:
    """Orders rows by how well the mean of those before them and themselves fits the mean of their class: (n,) int64.

    Rebuffi et al. 2017 (arXiv 1611.07725), algorithm 4: greedily, for `features` (n, F) of labels `y` (n,). All first
    choices of the classes come first, then all second ones, and so on, up to the `most` best of each class (None: all).
    """
    features, turns = features.double(), [[] for _ in range(min(len(y), most or len(y)))]
    for label in y.unique():
        rows = (y == label).nonzero().squeeze(1)
        own = features[rows]
        goal, total = own.mean(0), torch.zeros_like(own[0])
        left = torch.zeros(len(rows), dtype=torch.float64, device=y.device)
        for turn, picks in enumerate(turns[: len(rows)], 1):
            pick = ((goal - (total + own) / turn).square().sum(1) + left).argmin()
            left[pick] = float("inf")
            total = total + own[pick]
            picks.append(rows[pick][None])
    return torch.cat([y[:0], *(pick for picks in turns for pick in picks)])


def _write(store: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Copies rows into slots; bytes as words of eight where they fit, since the copy goes element by element."""
    if rows.element_size() < 8 and rows.numel() and rows[0].nbytes % 8 == 0:
        rows = rows.contiguous()
        rows = rows if rows.data_ptr() % 8 == 0 else rows.clone()
        store, rows = (t.flatten(1).view(torch.int64) for t in (store, rows))
    store.index_copy_(0, slots, rows)


def _rank(labels: Tensor, keys: Tensor) -> Tensor:
    """How many entries of the same label have a smaller key than each, for labels (n,) and keys (n,): (n,) int64."""
    by_key = keys.argsort()
    order = by_key[labels[by_key].argsort(stable=True)]
    counts = labels.unique(return_counts=True)[1]
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first
    return rank
