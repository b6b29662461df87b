"""The correction of a merged network's features: one weight matrix moves, so that they come closer to the parents'."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

from clkit import curvature, tangent
from clkit.weights import Weights, evaluation_mode, set_weights

BATCH = 256
ROWS = 8192  # of features that a correction looks at, evenly spaced among all

Targets = Sequence[tuple[float, Tensor]]
Layer = nn.Linear | nn.Conv2d


def mismatch(features: Tensor, targets: Targets, loss: str) -> Tensor:
    """How far features (N, F) are from each of the targets, times the target's share, added up: a scalar.

    "squared" is the mean squared difference, "cosine" the mean over rows of 1 - the cosine, which is half the squared
    distance at unit length.
    """

    def apart(target: Tensor) -> Tensor:
        if loss == "squared":
            return (features - target).square().mean()
        return (F.normalize(features, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean() / 2

    return torch.stack([part * apart(target) for part, target in targets]).sum()


def descend(design: Tensor, features: Tensor, targets: Targets, loss: str, *, lr: float, steps: int) -> Tensor:
    """The M (in, out) that full-batch steps of Adam reach from 0, minimising `mismatch` of features + design M."""
    move = design.new_zeros(design.shape[1], features.shape[1]).requires_grad_()
    optimizer = torch.optim.Adam([move], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        mismatch(features + design @ move, targets, loss).backward()
        optimizer.step()
    return move.detach()


def projections(model: nn.Module, x: Tensor) -> tuple[dict[str, Layer], str | None]:
    """The layers whose weight matrix can be corrected, by the name of the weight, and the last one before the head.

    Those are the trainable linear layers and ungrouped convolutions that run once when the model is called with the
    prepared inputs `x`, in this order; the head is the last linear layer that runs, else the last convolution. For a
    linearised model the layers are its network's.
    """
    names: dict[int, str] = {}
    ran: list[str] = []
    layers: dict[str, Layer] = {}
    hooks = []
    for prefix, layer in tangent.layers(model).items():
        if isinstance(layer, Layer):
            name = names.setdefault(id(layer.weight), f"{prefix}.weight".strip("."))
            layers[name] = layer
            hooks.append(layer.register_forward_hook(lambda *_, name=name: ran.append(name)))
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    linear = [name for name in ran if isinstance(layers[name], nn.Linear)]
    head = ran.index((linear or ran)[-1]) if ran else 0
    wanted = curvature.trainable(model)
    fit = {
        name: layers[name]
        for name in ran
        if name in wanted and ran.count(name) == 1 and getattr(layers[name], "groups", 1) == 1
    }
    return fit, next((name for name in reversed(ran[:head]) if name in fit), None)


def correct(
    model: nn.Module,
    merged: Weights,
    parents: Sequence[tuple[float, Weights]],
    inputs: Tensor,
    *,
    by: str = "steps",
    loss: str = "squared",
    strength: float = 100.0,
    steps: int = 10,
    lr: float = 1e-4,
    name: str | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Moves one weight matrix of merged weights so that its layer's outputs come closer to the parents' on `inputs`.

    The last stage of holistic merging (arXiv 2509.23592) by itself; `consolidation.HCMM` has what each setting does.
    `model` is a scratch copy, which is overwritten; `parents` are shares and weights; `by` is "steps" of Adam at `lr`
    on the `loss`, or "ridge" regression of a `strength`; `name` is the weight's, a pattern, or None for the last one
    before the head. Gives the corrected weights, and the mismatch before and after.
    """
    full, layer = projection(model, inputs, name)
    targets = [(part, read(model, parent, inputs, layer)[1]) for part, parent in parents]
    design, features = read(model, merged, inputs, layer)
    if by == "ridge":
        wanted = torch.stack([part * target for part, target in targets]).sum(0)
        move = curvature.ridge(design, wanted - features, strength)
    else:
        move = descend(design, features, targets, loss, lr=lr, steps=steps)
    both = [mismatch(f, targets, loss) for f in (features, features + design @ move)]
    weight = merged[full]
    moved = weight.double() + move.T.view_as(weight)
    return {**merged, full: moved.to(weight.dtype)}, torch.stack(both).tolist()


def projection(model: nn.Module, inputs: Tensor, wanted: str | None) -> tuple[str, Layer]:
    """The name of the weight that `wanted`, a name or pattern, fits, or of the last before the head, and its layer.

    Raises ValueError where that is not one weight, and for no inputs.
    """
    if not len(inputs):
        raise ValueError("inputs: the memory is empty where features are needed; offer it examples first")
    found, last = projections(model, inputs[:1])
    if wanted is None:
        if last is None:
            raise ValueError(
                "projection: no linear layer or convolution that is trained and runs once comes before the head; "
                f'name one of {list(found)}, or use correction="none"'
            )
        return last, found[last]
    fits = [name for name in found if fnmatchcase(name, wanted)]
    if len(fits) != 1:
        raise ValueError(f"projection: {wanted!r} fits {fits or 'no weight'}; give the name of one of {list(found)}")
    return fits[0], found[fits[0]]


@torch.no_grad()
def read(model: nn.Module, weights: Weights, inputs: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """What a layer's weight matrix multiplies (N, in), and the layer's outputs (N, out), in double precision.

    A linearised model's outputs are affine in the weight with the inputs at its point of expansion as the design. Of
    more than `ROWS` rows (places of a convolution, tokens) evenly spaced ones are taken, the same for any weights.
    """
    set_weights(model, weights)
    pairs: list[tuple[Tensor, Tensor]] = []
    room = ROWS

    def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        value = tangent.value(out)
        value = value.movedim(1, -1) if isinstance(layer, nn.Conv2d) else value
        both = curvature.input_rows(layer, unpack_dual(args[0])[0]), value.flatten(0, -2)
        rows = torch.linspace(0, len(both[0]) - 1, min(len(both[0]), room), device=out.device).long()
        pairs.append((both[0][rows].double(), both[1][rows].double()))

    hook = layer.register_forward_hook(keep)
    try:
        with evaluation_mode(model):
            for part in inputs.split(BATCH):
                room = max(1, ROWS * len(part) // len(inputs))
                model(part)
    finally:
        hook.remove()
    design, outputs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return design, outputs
