"""SFA's studies that are no grids: the sawtooth, the geometry of each merge, the match with L2, and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from clkit import landscape, weights
from clkit.consolidation import SFA, Context, Merged, merge_steps
from clkit.data import Stream
from clkit.experiments import Comparison, Method
from clkit.learners import L2, Learner
from clkit.training import Training, run
from studies.sfa.grids import conflict, even_odd, frontier, small_mlp
from studies.sfa.theory import effective_strength

if TYPE_CHECKING:
    import pandas as pd


def sawtooth(
    stream: Stream, rules: dict[str, SFA | None], training: Training, *, every: int = 8, seed: int = 0
) -> "pd.DataFrame":
    """Accuracy on every task all along a stream, on both sides of every merge.

    `rules` are consolidations by name. Columns: method, learning, step, when ("step", "before" or "after" a merge),
    task, accuracy, as `Result.trajectory` has them.
    """
    import pandas as pd

    tables = []
    for name, rule in rules.items():
        result = run(stream, small_mlp, None, rule, training, seed=seed, watch=every, progress=False)
        tables.append(result.trajectory().assign(method=name))
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class _Kept(SFA):
    """SFA that keeps the weights before and after every merge, for `merges`."""

    def __call__(self, context: Context) -> Merged:
        merged = super().__call__(context)
        pair = (context.progress.step, context.previous, context.current, merged.train)
        self.seen.append(pair)  # type: ignore[attr-defined]
        return merged


def merges(head: str = "masked", p: float = 0.25, beta: float = 0.5, seeds: Sequence[int] = range(5)) -> "pd.DataFrame":
    """Every merge of even then odd digits: both tasks before and after, and the barrier between anchor and network.

    Columns: seed, number (of the merge, from 1), old_before, old_after, new_before, new_after (test accuracies), and
    barrier: how far the mean test loss over both tasks rises, along the line from the anchor to the trained weights,
    above its chord.
    """
    import pandas as pd

    grid, rows = frontier("digits", head), []
    stream = even_odd("digits", head)
    for seed in seeds:
        rule = _Kept(p, beta)
        object.__setattr__(rule, "seen", [])
        result = run(stream, small_mlp, None, rule, grid.training, seed=seed, progress=False)
        for number, (_, anchor, trained, merged) in enumerate(rule.seen, 1):  # type: ignore[attr-defined]
            line = landscape.curve(result.model, (anchor, trained), stream, 11)
            after = landscape.curve(result.model, (merged, merged), stream, [0.0]).accuracy[0]
            before = line.accuracy[-1]
            row = {"old_before": before[0], "old_after": after[0], "new_before": before[1], "new_after": after[1]}
            rows.append({"seed": seed, "number": number} | row | {"barrier": line.barrier})
    return pd.DataFrame(rows)


def against_l2(head: str = "shared", beta: float = 0.5) -> Comparison:
    """SFA at every p and L2 at the strength that the theory gives for it, on even then odd digits: a grid."""
    grid = frontier("digits", head)
    stream, training = even_odd("digits", head), grid.training
    steps = training.epochs * (len(stream[1].train) // training.batch + 1)
    methods = {}
    for p in (1 / steps, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0):
        k = max(1, round(p * steps))
        strength = effective_strength(beta, training.lr, k)
        methods[f"SFA K={k}"] = Method(Learner(), SFA(p, beta))
        if strength * training.lr < 1:
            methods[f"L2 matched to K={k}"] = Method(L2(strength))
    return replace(grid, methods=methods)


def contradiction(
    conflicts: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), seeds: Sequence[int] = range(5)
) -> "pd.DataFrame":
    """The cosine between the gradients of the two tasks of `conflict`, over all their data; -1 is exact contradiction.

    Columns: conflict, seed, start (before any training), learned (where the first task has ended).
    """
    import pandas as pd

    grid, rows = conflict(), []
    for c in conflicts:
        for seed in seeds:
            stream = grid.streams[f"c={c:g}"](seed)
            first = replace(stream, tasks=stream.tasks[:1])
            nets = {"start": small_mlp(stream, seed=seed)}
            nets["learned"] = run(first, small_mlp, None, None, grid.training, seed=seed, progress=False).model.eval()
            row = {"conflict": c, "seed": seed}
            for place, net in nets.items():
                a, b = (_gradient(net, task) for task in stream)
                row[place] = weights.dot(a, b) / weights.norm(a) / weights.norm(b)
            rows.append(row)
    return pd.DataFrame(rows)


def _gradient(net: torch.nn.Module, task: Any) -> weights.Weights:
    loss = torch.nn.functional.cross_entropy(net(task.prepare(task.train.x)), task.train.y)
    names = [name for name, _ in net.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(net.parameters())), strict=True))


def costs(
    parameters: int, example: int, rows: int, tasks: int, steps: int, batch: int, *, p: float = 0.25
) -> "pd.DataFrame":
    """What each method keeps and does beyond plain fine-tuning, over a stream.

    `parameters` of the network in float32, an `example` in bytes with its label, `rows` a task has, optimizer `steps` a
    task with `batch` rows. Columns: kept, bytes held beside the network while the last task is learned; flops,
    floating-point operations added in all (a training row costs 6 a parameter); moved, bytes read and written in all
    beyond those of fine-tuning's own steps; flops_share, of fine-tuning's operations.

    A merge reads two networks and writes one. L2 reads the anchor at every step, EWC the importance, too, whose
    computation costs a training row for every one of the task's. A buffer's rows take the place of the task's own in a
    batch, so that they add no operations; they are read when drawn and written when kept.
    """
    import pandas as pd

    size, later = 4 * parameters, tasks - 1
    own = tasks * steps * batch * 6 * parameters
    merged = len(merge_steps(steps, p)) * later
    table: dict[str, tuple[float, float, float]] = {
        "fine-tuning": (0, 0, 0),
        f"SFA p={p:g}": (size, 3 * parameters * merged, 3 * size * merged),
        "WiSE-FT": (size, 3 * parameters * later, 3 * size * later),
        "L2": (size, 3 * parameters * steps * later, size * steps * later),
        "EWC": (
            2 * size,
            4 * parameters * steps * later + tasks * rows * 6 * parameters,
            2 * size * steps * later + 3 * size * tasks,
        ),
        "task arithmetic": ((tasks + 1) * size, 2 * parameters * tasks, (tasks + 2) * size),
    }
    for share in (0.01, 0.05, 0.1):
        kept = round(share * rows) * example * later
        drawn = sum(t * share / (1 + t * share) for t in range(1, tasks)) * steps * batch * example
        table[f"buffer {share:.0%}"] = (kept, 0, kept + drawn)
    frame = pd.DataFrame.from_dict(table, orient="index", columns=["kept", "flops", "moved"])
    return frame.assign(flops_share=frame.flops / own).astype(float)
