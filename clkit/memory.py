"""A bounded store of examples: rows of named tensors, filled by reservoir, balanced, ring or herding selection.

Writes are vectorised: one decision and one scatter for a whole batch, with no host synchronisation on the
reservoir's path. The memory does not know why something is stored.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

AHEAD = 4096  # rows that a reservoir decides on at once
POLICIES = ("reservoir", "balanced", "ring", "herding")


def reservoir_slots(seen: int, capacity: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws the slots that the `count` rows after the first `seen` take in a reservoir (Vitter 1985, algorithm R).

    Gives (slots, until), both (count,) int64: a row that is not kept has slot `capacity`, and `until` is how many rows
    have been seen when a later row of these takes the slot again. Each row costs one draw.
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

    `policy` says which rows stay when more were offered: "reservoir" keeps a uniform sample of everything offered; the
    others keep as equal a number of each class (the tensor named "y", or if there is one "group", of finer classes) as
    what was offered allows: "balanced" a uniform sample of the class, "ring" its newest rows (GEM), "herding" those
    offered first, so that rows offered in the order of `herding` leave the best and lose the last (iCaRL); where a
    class comes in several tasks, these two keep the newest and the first task's rows of it. `holdout` is the share of
    the slots that `sample` never draws from: rows to choose settings by, spread evenly over the slots.
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
        self.decided = 0  # the rows seen before the first that `slots` and `until` are about
        self.slots = self.until = torch.zeros(0, dtype=torch.int64)

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
            self._by_class(generator, rows, count)
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
        counts = {"seen": torch.tensor(self.seen), "decided": torch.tensor(self.decided)}
        return state | counts | {"keys": self.keys[: len(self)].clone(), "slots": self.slots, "until": self.until}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` of a memory of the same settings gave."""
        rows = {name.removeprefix("rows."): tensor for name, tensor in state.items() if name.startswith("rows.")}
        self.seen, self.decided = int(state["seen"]), int(state["decided"])
        self.slots, self.until = state["slots"], state["until"]
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
        self.open, self.held = self.open.to(device), self.held.to(device)

    def _reservoir(self, generator: torch.Generator, rows: Mapping[str, Tensor], count: int) -> None:
        """Decides on many rows ahead, so that a batch's share is a look at the decisions for it."""
        if not self.rows:
            self._allocate(rows)
        end = self.seen + count
        if end > self.decided + len(self.slots):
            self.decided = self.seen
            self.slots, self.until = reservoir_slots(self.seen, self.capacity, max(count, AHEAD), generator)
        mine = slice(self.seen - self.decided, end - self.decided)
        slots = self.slots[mine].masked_fill(self.until[mine] <= end, self.capacity)
        for name, tensor in rows.items():
            _write(self.rows[name], slots, tensor)

    def _by_class(self, generator: torch.Generator, rows: Mapping[str, Tensor], count: int) -> None:
        """Every row has a key; a class keeps its rows of smallest keys, classes in equal parts.

        Keys are random, or the row's number in the order of offers, or that backwards. What cannot be shared equally
        goes to the smallest of the random keys, and else to the classes that came first.
        """
        have = len(self)
        if not self.rows:
            self._allocate(rows)
        if self.policy == "balanced":
            keys = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        else:
            keys = torch.arange(self.seen, self.seen + count, dtype=torch.float64, device=self.keys.device)
            keys = -keys if self.policy == "ring" else keys
        pool = {name: torch.cat([self.rows[name][:have], tensor]) for name, tensor in rows.items()}
        keys = torch.cat([self.keys[:have], keys.to(self.keys.device)])
        by_key = keys.argsort()
        rank = torch.empty_like(by_key)
        rank[by_key] = _rank_within(pool.get("group", pool["y"])[by_key])
        order = rank + keys if self.policy == "balanced" else rank.double()
        keep = torch.argsort(order, stable=True)[: self.capacity]
        free = (keep >= have).nonzero().squeeze(1)
        stays = torch.zeros(have, dtype=torch.bool, device=keep.device)
        stays[keep[keep < have]] = True
        slots = torch.cat([(~stays).nonzero().squeeze(1), torch.arange(have, len(keep), device=keep.device)])
        for name, tensor in pool.items():
            _write(self.rows[name], slots, tensor[keep[free]])
        self.keys[slots] = keys[keep[free]]

    def _slots(self, *, held: bool) -> Tensor:
        count = int(len(self) * self.holdout)
        return self.held[:count] if held else self.open[: len(self) - count]

    def _take(self, slots: Tensor) -> dict[str, Tensor]:
        return {name: tensor[slots] for name, tensor in self.rows.items()}


def check_policy(policy: str, y: Tensor) -> None:
    """Raises ValueError if a policy that goes by class is to go by labels of which a row has many."""
    if policy != "reservoir" and y.ndim > 1:
        raise ValueError(
            f"policy: {policy!r} keeps rows by their class and the labels have shape {tuple(y.shape)}, many a row "
            '(tokens); use policy="reservoir", or a rule that has it'
        )


def herding(features: Tensor, y: Tensor, most: int | None = None) -> Tensor:
    """Orders rows by how well the mean of those before them and themselves fits the mean of their class: (n,) int64.

    Rebuffi et al. 2017 (arXiv 1611.07725), algorithm 4: greedily, for `features` (n, F) of labels `y` (n,). All first
    choices of the classes come first, then all second ones, and so on, up to the `most` best of each class (None: all).
    """
    features, order = features.double(), torch.empty(0, dtype=torch.int64, device=y.device)
    turns = torch.empty(0, dtype=torch.int64, device=y.device)
    for label in y.unique():
        rows = (y == label).nonzero().squeeze(1)
        own = features[rows]
        goal, total = own.mean(0), torch.zeros_like(own[0])
        left = torch.zeros(len(rows), dtype=torch.float64, device=y.device)
        picks = []
        for turn in range(1, min(len(rows), most or len(rows)) + 1):
            pick = ((goal - (total + own) / turn).square().sum(1) + left).argmin()
            left[pick] = float("inf")
            total = total + own[pick]
            picks.append(pick)
        order = torch.cat([order, rows[torch.stack(picks)]])
        turns = torch.cat([turns, torch.arange(len(picks), device=y.device)])
    return order[turns.argsort(stable=True)]


def _write(store: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Copies rows into slots; bytes as words of eight where they fit, since the copy goes element by element."""
    if rows.element_size() < 8 and rows.numel() and rows[0].nbytes % 8 == 0:
        rows = rows.contiguous()
        rows = rows if rows.data_ptr() % 8 == 0 else rows.clone()
        store, rows = (t.flatten(1).view(torch.int64) for t in (store, rows))
    store.index_copy_(0, slots, rows)


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
