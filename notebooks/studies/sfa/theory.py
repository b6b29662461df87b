"""What SFA is in closed form: L2 with a merge after every step, and on a quadratic whatever lies between two merges.

On a quadratic loss with curvature h along a direction, training settles at theta = c + s (theta_o - c), where c is the
optimum and theta_o the anchor: s is the share of the way back to the anchor that is kept. Kleiman et al. 2025
(arXiv 2501.05559) compare SFA with L2; the maps and fixed points here are our own derivation.
"""

import copy
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clkit import checks
from clkit.checks import Count, Positive, Share
from clkit.consolidation import merge_steps
from clkit.curvature import trainable
from clkit.data import Examples
from clkit.data.core import IGNORED
from clkit.evaluation import EVALUATION_BATCH
from clkit.weights import Weights, set_weights

if TYPE_CHECKING:
    import pandas as pd

Undone = Annotated[float, checks.Range(0, 1, "high", "since 1 undoes every step, which no L2 does")]


@checks.arguments
def matched_l2(lr: Positive, beta: Undone) -> tuple[float, float]:
    """From SFA with a merge after every step to the L2 that it is: (learning rate, strength) for SFA's (lr, beta).

    A step and a merge are (1 - beta) (theta - lr u) + beta theta_o = theta - eta u - eta strength (theta - theta_o),
    with eta = (1 - beta) lr and strength = beta / eta. Exact for plain gradient descent; with momentum or Adam for the
    decoupled L2, because a step u is linear in the rate. `matched_sfa` goes back.
    """
    return (1 - beta) * lr, beta / ((1 - beta) * lr)


def matched_sfa(lr: float, strength: float) -> tuple[float, float]:
    """From L2 to the SFA with a merge after every step that it is: (learning rate, beta) for L2's (lr, strength).

    The inverse of `matched_l2`: beta = lr strength, and a rate of lr / (1 - beta), which is above L2's own.
    """
    if not (lr > 0 and strength >= 0 and lr * strength < 1):
        raise ValueError(f"lr={lr!r}, strength={strength!r}: give lr above 0, strength from 0 on, lr strength below 1")
    return lr / (1 - lr * strength), lr * strength


@checks.arguments
def effective_strength(beta: Undone, lr: Positive, k: Count) -> float:
    """The strength of the L2 that SFA with a merge after every `k` steps approaches: beta / ((1 - beta) lr k).

    Where k steps take theta but a little way, a merge balances k gradients: g(theta) + strength (theta - theta_o) = 0.
    At k = 1 it is that of `matched_l2`, and exact.
    """
    return beta / ((1 - beta) * lr * k)


def kept_l2(h: ArrayLike, strength: float) -> np.ndarray:
    """The share s that L2 keeps of the anchor along directions of curvature `h`: strength / (strength + h).

    From 1 in flat directions to 0 in sharp ones, elementwise.
    """
    return strength / (strength + np.asarray(h, dtype=np.float64))


def kept_sfa(h: ArrayLike, beta: float, lr: float, k: int) -> np.ndarray:
    """The share s that SFA keeps of the anchor, just after a merge, along directions of curvature `h`, elementwise.

    s = beta / (1 - (1 - beta) (1 - lr h)^k), the fixed point of k steps of gradient descent at rate `lr` and a merge
    with weight `beta` of the old. Where steps do not overshoot (0 <= lr h <= 1), s falls from 1 to beta and not below,
    unlike L2's: sharp directions are interpolated. `kept_l2` at `effective_strength` is its limit for small lr h k.

    Raises ValueError where a merge does not undo how far the steps diverge, (1 - beta) |1 - lr h|^k >= 1.
    """
    return beta / (1 - _left(h, beta, lr, k))


def measured_sfa(h: ArrayLike, beta: float, lr: float, k: int) -> np.ndarray:
    """The share s of `kept_sfa`, measured: gradient descent on h theta^2 / 2 with merges, until they change nothing.

    Starts at the anchor, 1, whose optimum is 0; in float64, `k` steps and a merge at a time. Arguments and errors are
    those of `kept_sfa`.
    """
    _left(h, beta, lr, k)
    h = np.asarray(h, dtype=np.float64)
    old, theta = np.full_like(h, np.inf), np.ones_like(h)
    while np.abs(theta - old).max(initial=0) > 1e-15:
        old, theta = theta, theta.copy()
        for _ in range(k):
            theta -= lr * h * theta
        theta = (1 - beta) * theta + beta
    return theta


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


@checks.arguments
def top_curvature(
    model: nn.Module, weights: Weights, examples: Examples, *, iterations: Count = 100, tolerance: Positive = 1e-4,
    seed: int = 0
) -> float:  # fmt: skip
    """The largest eigenvalue of the Hessian of a model's mean cross entropy at `weights`, by power iteration.

    SFA leaves L2 where lr h k comes near 1, h the curvature: the largest says where that begins. `examples` are
    prepared; the model runs in evaluation mode, on their device, over all classes. Each of at most `iterations` costs
    two backward passes; it ends once the estimate changes by less than the share `tolerance`. Power iteration finds
    the eigenvalue of the largest size; if that is negative, a second one on the Hessian shifted by it finds the largest
    of all. The model itself is left alone.
    """
    if not len(examples):
        raise ValueError("examples: there are none; pass at least one")
    net = copy.deepcopy(model).to(examples.x.device).eval()
    set_weights(net, weights)
    parameters = list(trainable(net).values())
    if not parameters:
        raise ValueError("model: it has no parameter that requires a gradient; there is no curvature to measure")

    def product(v: list[Tensor]) -> list[Tensor]:
        """The Hessian of the summed loss times a vector."""
        total = [torch.zeros_like(p) for p in parameters]
        for x, y in zip(examples.x.split(EVALUATION_BATCH), examples.y.split(EVALUATION_BATCH), strict=True):
            loss = nn.functional.cross_entropy(net(x).flatten(0, -2), y.flatten(), reduction="sum")
            slopes = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            along = torch.stack([(g * t).sum() for g, t in zip(slopes, v, strict=True)]).sum()
            for part, t in zip(total, torch.autograd.grad(along, parameters, materialize_grads=True), strict=True):
                part += t
        return total

    def largest(shift: float) -> float:
        """The eigenvalue of the largest size of the mean loss's Hessian minus `shift`."""
        generator = torch.Generator(examples.x.device).manual_seed(seed)
        v = [torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device) for p in parameters]
        value = 0.0
        for _ in range(iterations):
            length = _dot(v, v) ** 0.5
            v = [t / length for t in v]
            w = [t / targets - shift * u for t, u in zip(product(v), v, strict=True)]
            before, value = value, _dot(v, w)
            if not _dot(w, w) or abs(value - before) <= tolerance * abs(value):
                break
            v = w
        return value

    targets = int((examples.y != IGNORED).sum())
    with sdpa_kernel(SDPBackend.MATH):  # the attention that can be differentiated twice
        value = largest(0.0)
        return value if value >= 0 else value + largest(value)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(torch.stack([(s.double() * t.double()).sum() for s, t in zip(a, b, strict=True)]).sum())


@checks.arguments
def _left(h: ArrayLike, beta: Share, lr: Positive, k: Count) -> np.ndarray:
    """How much of the distance to the fixed point is left after k steps and a merge: (1 - beta) (1 - lr h)^k."""
    left = (1 - beta) * (1 - lr * np.asarray(h, dtype=np.float64)) ** k
    if not (np.abs(left) < 1).all():
        raise ValueError(
            f"h: with lr={lr:g}, k={k}, beta={beta:g} training does not settle at every one of them; "
            "give beta above 0 and h in [0, 2 / lr]"
        )
    return left
