"""HCMM: after a task, merge by what Adam's second moments say of each weight, then correct the features.

The correction moves one weight matrix, so that the features of the merged network come closer to its parents'.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

from clkit import checks, curvature, normalization, tangent
from clkit.consolidation.base import Alpha, Context, Merged, Progress
from clkit.merging import check_importances
from clkit.modules import evaluation_mode, hooked
from clkit.weights import Weights, check_same, set_weights

Loss = Literal["squared", "absolute", "cosine"]
By = Literal["steps", "pass", "ridge"]
Layer = nn.Linear | nn.Conv2d
Targets = Sequence[tuple[float, Tensor]]
READ_BATCH = 256
PASS_BATCH = 128
ROWS = 8192  # of features that a correction looks at, evenly spaced among all


@dataclass(frozen=True)
class HCMM:
    """Merges the previous and the current weights by importance after every task, then corrects the features.

    Holistic continual model merging (arXiv 2509.23592), its two stages after training; the one before, fine-tuning in
    the tangent space, is a `run` on a `tangent.Linearized` model. Training goes on from what is deployed. Kept between
    two tasks are the weights and one importance for each trained number: the same bytes after every task, and no data.

    Merging is `importance_merge`, number by number, where alpha weights the NEW weights: 0 keeps the old ones, 1 the
    new ones.

    - `importance`, F. Adam's second moments at the task's last step, which need `Training(optimizer="adamw")`: "raw"
      (the released code), "corrected" for Adam's bias to zero, or "normalised" to a mean of 1 over all numbers. Raw
      moments grow with a task's steps, as 1 - 0.999^n. "fisher": the exact diagonal Fisher information of the new
      network, all classes competing, for logits (N, C); a mean over what the learner lets a consolidation see. "none":
      theta <- (1 - alpha) theta_old + alpha theta (what the released code does in the domain-incremental setting)
    - `accumulate`: F_old of the next task. "ema" (released) is (1 - alpha) F_old + alpha F: the first task's share
      fades as (1 - alpha)^(T-1). "sum" is F_old + F, the precisions of a Laplace approximation: alpha = 0.5 then gives
      the importance-weighted mean of all that the tasks were trained to

    Every trained parameter is merged by its importance, the head, if it is trained, too: its rows for classes that a
    loss leaves out have second moments of 0 and stay with the tasks that trained them. What has no importance in either
    network, BatchNorm's statistics and frozen tensors, goes by alpha; frozen tensors keep their bits (the paper's head
    is frozen, its network without BatchNorm). `refresh` re-estimates BatchNorm's statistics on what the learner lets a
    consolidation see.

    Correction: one weight matrix moves so that its layer's outputs on those inputs, the features, come closer to the
    parents'. It changes nothing else, the layer's bias and the importances among them.

    - `correction`: "steps", `correction_steps` of Adam at a constant `correction_lr`, each of which sees all inputs;
      "pass" (released), one pass of AdamW at that rate in random batches of 128 rows, with a weight decay of 0.01 and
      the gradient clipped to norm 1; "ridge", least squares in closed form, with `ridge` times the mean eigenvalue of
      the layer's Gram matrix as the penalty on the change; or "none"
    - `target`: the features of the "previous" network, as released, which takes back a part of the new task; or of
      "both" parents, the current one's weighing alpha
    - `loss`: the "squared" or the "absolute" difference (both released), or the "cosine" for a head that normalises;
      the last two have no "ridge"
    - `projection`: the weight's name, or a pattern (`*.proj.weight`) that fits one linear layer or convolution; None is
      the last one before the head. For a linearised model the features are linearised, and affine in the weight.

    The released rate is 1e-7, which moves weights of 1e-2 by about 1e-6, and its pass is over the whole task. Here it
    is over what the learner shows; of more than 8,192 rows of features as many evenly spaced ones count. The released
    whole is `HCMM(importance="raw", correction="pass", correction_lr=1e-7)` after `Training(optimizer="adamw", lr=1e-5,
    weight_decay=0.1, batch=128, schedule="cosine", warmup=500, clip=1.0)`. Most of its tasks have fewer than 500 steps,
    and end in the warm-up.

    The report has the mean `share` of the new weights over the numbers with an importance, and the `mismatch` before
    and after the correction.

    Raises ValueError before training for a network without such a projection. At the end of a task it raises ValueError
    where there is nothing to work on: no second moments, no inputs.
    """

    alpha: Alpha = 0.4
    importance: Literal["corrected", "raw", "normalised", "fisher", "none"] = "corrected"
    accumulate: Literal["ema", "sum"] = "ema"
    correction: Literal[By, "none"] = "steps"
    target: Literal["previous", "both"] = "previous"
    loss: Loss = "squared"
    ridge: checks.Positive = 100.0
    correction_steps: checks.Count = 10
    correction_lr: checks.Positive = 1e-4
    projection: str | None = None
    refresh: bool = False

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.loss != "squared" and self.correction == "ridge":
            raise ValueError(f'loss: "{self.loss}" has no closed form; use correction="steps", or loss="squared"')

    @property
    def uses_moments(self) -> bool:
        """Whether it reads Adam's second moments."""
        return self.importance not in ("fisher", "none")

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Raises ValueError unless the network has the projection, and the Fisher information, that are wanted."""
        if self.correction != "none":
            projection(model, x[:1], self.projection)
        if self.importance == "fisher":
            curvature.fisher(model, x, labels="exact")

    def due(self, progress: Progress) -> bool:
        """At the end of every task; of the first only to keep its importance."""
        return progress.end and (progress.task > 0 or self.importance != "none")

    def __call__(self, context: Context) -> Merged:
        """Merges, corrects, and takes the importance along."""
        new, old = self._measured(context), context.memo or {}
        if not context.progress.task:
            return Merged(context.current, context.current, memo=new)
        w = shares(old, new, self.alpha)
        count = sum(part.numel() for part in w.values())
        report: dict[str, Any] = {"share": float(sum(part.sum() for part in w.values())) / count if w else self.alpha}
        merged = self._settled(context, _step(context.previous, context.current, w, self.alpha))
        if self.correction != "none":
            both = [(1 - self.alpha, context.previous), (self.alpha, context.current)]
            parents = both if self.target == "both" else [(1.0, context.previous)]
            corrected, report["mismatch"] = correct(
                context.model,
                merged,
                parents,
                context.inputs,
                by=self.correction,
                loss=self.loss,
                strength=self.ridge,
                steps=self.correction_steps,
                lr=self.correction_lr,
                name=self.projection,
            )
            merged = self._settled(context, corrected)
        return Merged(merged, merged, report, carried(old, new, self.alpha, self.accumulate) or None)

    def _measured(self, context: Context) -> dict[str, Tensor]:
        """The importance of every trained number for the task just learned."""
        if self.importance == "none":
            return {}
        if self.importance == "fisher":
            set_weights(context.model, context.current)
            return curvature.fisher(context.model, context.inputs, labels="exact")
        if context.second_moment is None:
            remedy = 'use Training(optimizer="adamw") for at least one step, or use importance="fisher" or "none"'
            raise ValueError(f"importance: {self.importance!r} needs Adam's second moments, there are none; {remedy}")
        scales = context.moment_scale if self.importance == "corrected" else {}
        moments = {name: v / scales.get(name, 1.0) for name, v in context.second_moment.items()}
        if self.importance == "normalised":
            mean = curvature.diagonal_trace(moments) / sum(v.numel() for v in moments.values())
            moments = {name: v / mean if mean else v for name, v in moments.items()}
        return moments

    def _settled(self, context: Context, merged: Weights) -> Weights:
        return normalization.refresh(context.model, merged, context.inputs) if self.refresh else merged


def importance_merge(
    previous: Weights, current: Weights, old: Weights, new: Weights, alpha: float
) -> dict[str, Tensor]:
    """Goes from the previous weights to the current ones, in every number as far as its importance says.

    ((1 - alpha) F_old theta_old + alpha F theta) / ((1 - alpha) F_old + alpha F). It is computed as theta_old + w
    (theta - theta_old), with w of `shares`. w is alpha where both importances are 0, and for names that have none:
    nothing is divided by zero, alpha = 0 gives the previous weights and alpha = 1 the current ones, bitwise. alpha
    weights the NEW weights. `old` and `new` hold importances, at least 0, of tensors of the weights, in a common unit
    and in the shapes of the weights. Raises ValueError for others, for an alpha outside [0, 1] and for weights that do
    not match.
    """
    checks.value("alpha", alpha, Alpha)
    check_same(previous, current, names=("previous", "current"))
    for label, known in (("old", old), ("new", new)):
        check_importances(label, known, previous)
    return _step(previous, current, shares(old, new, alpha), alpha)


def shares(old: Weights, new: Weights, alpha: float) -> dict[str, Tensor]:
    """How far every number goes from its previous value (0) to its current one (1): w = alpha F / F_total.

    F_total = (1 - alpha) F_old + alpha F, with the importances `old` and `new` by name, each in its tensor's shape; one
    without a name is 0 throughout, and where F_total is 0 w is alpha. In double precision, so that no importance is too
    small.
    """
    found = {}
    for name, before, after in _pairs(old, new):
        part = alpha * after.double()
        total = (1 - alpha) * before.double() + part
        found[name] = torch.where(total > 0, part / total.where(total > 0, 1), alpha)
    return found


def carried(old: Weights, new: Weights, alpha: float, accumulate: str) -> dict[str, Tensor]:
    """The importance that is kept: (1 - alpha) F_old + alpha F for "ema", F_old + F for "sum", in the same shapes."""
    a, b = (1 - alpha, alpha) if accumulate == "ema" else (1.0, 1.0)
    return {name: a * before + b * after for name, before, after in _pairs(old, new)}


def _pairs(old: Weights, new: Weights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The importances of two networks by name, zeros where one has none."""
    for name, like in {**old, **new}.items():
        yield name, old.get(name, torch.zeros_like(like)), new.get(name, torch.zeros_like(like))


def _step(previous: Weights, current: Weights, w: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """From the previous weights to the current ones by w, and by alpha where a name has none."""
    return {
        name: torch.lerp(tensor, current[name], w[name].to(tensor.dtype) if name in w else alpha)
        for name, tensor in previous.items()
    }


@checks.arguments
def correct(
    model: nn.Module,
    merged: Weights,
    parents: Sequence[tuple[float, Weights]],
    inputs: Tensor,
    *,
    by: By = "steps",
    loss: Loss = "squared",
    strength: checks.Positive = 100.0,
    steps: checks.Count = 10,
    lr: checks.Positive = 1e-4,
    name: str | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Moves one weight matrix of merged weights so that its layer's outputs come closer to the parents' on `inputs`.

    The last stage of holistic merging (arXiv 2509.23592) by itself; `consolidation.HCMM` has what each setting does.
    `model` is a scratch copy, which is overwritten; `parents` are shares and weights; `inputs` (N, ...) are prepared.
    `by` is "steps" of Adam at `lr` on the `loss`, a "pass" of AdamW, or "ridge" regression of a `strength`; `name` is
    the weight's, a pattern, or None for the last one before the head. Gives the corrected weights, and the mismatch
    before and after. Raises ValueError for no inputs, and where `name` is not one weight.
    """
    full, layer = projection(model, inputs, name)
    targets = [(part, _read(model, parent, inputs, layer)[1]) for part, parent in parents]
    design, features = _read(model, merged, inputs, layer)
    weight = merged[full]
    if by == "pass":
        move = one_pass(design, features, targets, loss, weight.double().flatten(1).T, lr=lr)
    elif by == "ridge":
        wanted = torch.stack([part * target for part, target in targets]).sum(0)
        move = curvature.ridge(design, wanted - features, strength)
    else:
        move = descend(design, features, targets, loss, lr=lr, steps=steps)
    both = [feature_loss(f, targets, loss) for f in (features, features + design @ move)]
    moved = weight.double() + move.T.view_as(weight)
    return {**merged, full: moved.to(weight.dtype)}, torch.stack(both).tolist()


def feature_loss(features: Tensor, targets: Targets, loss: Loss) -> Tensor:
    """How far features (N, F) are from each of the targets (N, F), times the target's share, added up: a scalar.

    "squared" is the mean squared difference, "absolute" that of absolute ones, "cosine" the mean over rows of 1 - the
    cosine, which is half the squared distance at unit length.
    """

    def apart(target: Tensor) -> Tensor:
        if loss == "squared":
            return (features - target).square().mean()
        if loss == "absolute":
            return (features - target).abs().mean()
        return (F.normalize(features, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean() / 2

    return torch.stack([part * apart(target) for part, target in targets]).sum()


def descend(design: Tensor, features: Tensor, targets: Targets, loss: Loss, *, lr: float, steps: int) -> Tensor:
    """The M (in, out) that full-batch steps of Adam reach from 0, minimising `feature_loss` of features + design M.

    For a design (N, in), features (N, out) and targets (N, out).
    """
    move = design.new_zeros(design.shape[1], features.shape[1]).requires_grad_()
    optimizer = torch.optim.Adam([move], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        feature_loss(features + design @ move, targets, loss).backward()
        optimizer.step()
    return move.detach()


def one_pass(design: Tensor, features: Tensor, targets: Targets, loss: Loss, weight: Tensor, *, lr: float) -> Tensor:
    """The change (in, out) of a weight (in, out) that one pass of AdamW over the rows comes to, in random batches.

    The rest is as in `descend`. The order is drawn from torch's global generator.
    """
    live = weight.clone().requires_grad_()
    optimizer = torch.optim.AdamW([live], lr=lr)
    for rows in torch.randperm(len(design)).to(design.device).split(PASS_BATCH):
        optimizer.zero_grad()
        moved = features[rows] + design[rows] @ (live - weight)
        feature_loss(moved, [(part, target[rows]) for part, target in targets], loss).backward()
        nn.utils.clip_grad_norm_([live], 1.0)
        optimizer.step()
    return live.detach() - weight


def projection(model: nn.Module, inputs: Tensor, wanted: str | None) -> tuple[str, Layer]:
    """The name of the weight that `wanted`, a name or pattern, fits, or of the last before the head, and its layer.

    `inputs` (N, ...) are prepared. Raises ValueError where that is not one weight, and for no inputs.
    """
    if not len(inputs):
        raise ValueError("inputs: the memory is empty where features are needed; offer it examples first")
    found, last = projections(model, inputs[:1])
    fits = [name for name in found if (name == last if wanted is None else fnmatchcase(name, wanted))]
    if len(fits) != 1:
        none = "no linear layer or convolution that is trained and runs once comes before the head"
        what = none if wanted is None else f"{wanted!r} fits {fits or 'no weight'}"
        raise ValueError(f'projection: {what}; name one of {list(found)}, or use correction="none"')
    return fits[0], found[fits[0]]


def projections(model: nn.Module, x: Tensor) -> tuple[dict[str, Layer], str | None]:
    """The layers whose weight matrix can be corrected, by the name of the weight, and the last one before the head.

    Those are the trainable linear layers and ungrouped convolutions that run once, in this order. The model is called
    with the prepared inputs `x` (N, ...). The head is the last linear layer that runs, else the last convolution.
    For a linearised model the layers are its network's.
    """
    names: dict[int, str] = {}
    ran: list[str] = []
    layers: dict[str, Layer] = {}
    hooks = []
    for prefix, layer in tangent.layers(model).items():
        if isinstance(layer, Layer):
            name = names.setdefault(id(layer.weight), f"{prefix}.weight".strip("."))
            layers[name] = layer
            hooks.append((layer, lambda *_, name=name: ran.append(name)))
    with hooked(hooks), torch.no_grad(), evaluation_mode(model):
        model(x)
    linear = [name for name in ran if isinstance(layers[name], nn.Linear)]
    head = ran.index((linear or ran)[-1]) if ran else 0
    wanted = curvature.trainable(model)
    fit = {
        name: layers[name]
        for name in ran
        if name in wanted and ran.count(name) == 1 and getattr(layers[name], "groups", 1) == 1
    }
    return fit, next((name for name in reversed(ran[:head]) if name in fit), None)


@torch.no_grad()
def _read(model: nn.Module, weights: Weights, inputs: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """What a layer's weight matrix multiplies (N, in), and the layer's outputs (N, out), in double precision.

    A linearised model's outputs are affine in the weight with the inputs at its point of expansion as the design. Of
    more than `ROWS` rows (places of a convolution, tokens) evenly spaced ones are taken, the same for any weights.
    """
    set_weights(model, weights)
    pairs: list[tuple[Tensor, Tensor]] = []
    room = ROWS

    def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        value = tangent.linearised(out)
        value = value.movedim(1, -1) if isinstance(layer, nn.Conv2d) else value
        both = curvature.input_rows(layer, unpack_dual(args[0])[0]), value.flatten(0, -2)
        rows = torch.linspace(0, len(both[0]) - 1, min(len(both[0]), room), device=out.device).long()
        pairs.append((both[0][rows].double(), both[1][rows].double()))

    with hooked([(layer, keep)]), evaluation_mode(model):
        for part in inputs.split(READ_BATCH):
            room = max(1, ROWS * len(part) // len(inputs))
            model(part)
    design, outputs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return design, outputs
