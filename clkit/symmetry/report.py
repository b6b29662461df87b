"""A symmetry in words: a table of what each axis of the weights follows, and a summary."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from clkit.symmetry.elements import Axis, Group


class Row(NamedTuple):
    """What one axis of one weight follows, in words."""

    parameter: str
    axis: int
    size: int
    follows: str


class Table(list[Row]):
    """Rows that print as a table."""

    def __str__(self) -> str:
        cells = [Row._fields, *self]
        widths = [max(len(str(c[k])) for c in cells) for k in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in cells)


def follows(axis: Axis, groups: Sequence[str], reasons: tuple[str, ...]) -> str:
    """Names the groups that an axis follows, and why the rest stands still."""
    group, words = axis.group.ravel(), []
    for g in dict.fromkeys(group.tolist()):
        here = group == g
        if g < 0:
            why = dict.fromkeys(reasons[r] for r in axis.reason.ravel()[here])
            words.append(f"fixed ({', '.join(list(why)[:2])})")
            continue
        times = np.unique(axis.index.ravel()[here], return_counts=True)[1]
        words.append(groups[g] + (f" x {times[0]}" if times[0] > 1 else ""))
    return " | ".join(words[:6]) + (f" | ... {len(words) - 6} more" if len(words) > 6 else "")


def summary(groups: Mapping[str, Group], share: float, frozen: Mapping[str, int]) -> str:
    """Lists the groups with their sizes and blocks, the share that moves, and the reasons of what does not."""
    lines = [f"Symmetry: {len(groups)} groups move {share:.1%} of the parameters"]
    for group in list(groups.values())[:40]:
        inside = f" in each of {group.blocks} {group.within}" if group.within else ""
        lines.append(f"  {group.name}: {group.size}{inside}")
    if len(groups) > 40:
        lines.append(f"  ... {len(groups) - 40} more")
    why = ", ".join(f"{reason} ({n})" for reason, n in list(frozen.items())[:8])
    return "\n".join([*lines, f"fixed positions: {why or 'none'}"])
