"""Merges that know something of the data: Fisher information entry by entry, Gram matrices layer by layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clkit.merging.pieces import Piece, TaskVectors
from clkit.merging.vectors import share
from clkit.weights import Weights, check_finite


def fisher(
    ws: Sequence[Weights], *, importances: Sequence[Weights], coefficients: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The mean of weights, at every entry weighted by the importances there: sum_i F_i w_i / sum_i F_i.

    `importances`: for each of the weights a mapping of names to non-negative tensors of their shapes, as
    `curvature.fisher` gives them, in any common unit; names without one (BatchNorm statistics) are averaged, and so are
    entries where no network has any importance. `coefficients` multiply the importances of each. The paper takes the
    diagonal Fisher information and tunes the coefficients; its code divides them by the length of each network's
    importances and puts 1e-6 in the place of smaller ones, by default in the first network alone.

    With the previous and the current weights this is CoFiMA (Marouf et al., arXiv 2312.08977), a step of a sequence.

    Ref: Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832.
    """
    vectors = TaskVectors(ws, ws[0] if ws else {})
    given = [1.0] * len(ws) if coefficients is None else [float(c) for c in coefficients]
    if len(given) != len(ws) or not all(0 < c < torch.inf for c in given):
        raise ValueError(f"coefficients: {given} for {len(ws)} weights; give one above 0 for each")
    _check_knowledge("importances", importances, vectors)
    for i, known in enumerate(importances):
        check_finite(known, f"importances[{i}]")
        for name, tensor in known.items():
            if name not in ws[0] or tensor.shape != ws[0][name].shape:
                raise ValueError(
                    f"importances[{i}]: {name!r} of shape {tuple(tensor.shape)} is no tensor of the weights; "
                    "measure them with curvature.fisher on the same architecture"
                )
            if (tensor < 0).any():
                raise ValueError(f"importances[{i}]: {name!r} has negative entries; give squares or magnitudes")
    flat = [{name: tensor.reshape(-1) for name, tensor in known.items()} for known in importances]
    factors = torch.tensor(given, dtype=vectors.dtype)[:, None]

    def rule(piece: Piece, part: Tensor) -> Tensor:
        if not any(piece.name in known for known in flat):
            return part.mean(0)
        f = torch.zeros_like(part)
        for row, known in zip(f, flat, strict=True):
            if piece.name in known:
                row.copy_(piece.of(known))
        f.mul_(factors.to(f.device))
        largest = f.amax(0)
        f.div_(torch.where(largest > 0, largest, 1)).masked_fill_(largest == 0, 1)
        return part.mul_(f).sum(0).div_(f.sum(0))

    return vectors.merge(rule)


def regmean(ws: Sequence[Weights], *, grams: Sequence[Weights], shrink: float = 0.9) -> dict[str, Tensor]:
    """Linear layers whose outputs come closest, in least squares, to each network's own on its own inputs.

    W = (sum_i G_i)^-1 sum_i G_i W_i for W (in, out), with the Gram matrices G_i = X_i^T X_i of the layers' inputs,
    their off-diagonal entries multiplied by `shrink` (the paper's 0.9, or 0.1 on some language models; 1 is the exact
    least squares). `grams`: for each network a mapping of a parameter's name, as in "linear.weight", to a matrix
    (in, in), as `curvature.grams` gives it; a kernel of a convolution counts as (out, in x height x width). Networks
    count by their number of rows. Parameters without a Gram matrix in every network are averaged, and so are inputs
    that were always zero: where the solution is not unique, it is the one nearest to the mean.

    Ref: Jin et al., Dataless knowledge fusion by merging weights, arXiv 2212.09849.
    """
    shrink = share("shrink", shrink, open_low=False)
    vectors = TaskVectors(ws, ws[0] if ws else {})
    _check_knowledge("grams", grams, vectors)
    for i, known in enumerate(grams):
        check_finite(known, f"grams[{i}]")
        for name, gram in known.items():
            width = ws[0][name].flatten(1).shape[1] if name in ws[0] and ws[0][name].ndim > 1 else None
            if tuple(gram.shape) != (width, width):
                raise ValueError(
                    f"grams[{i}]: {name!r} of shape {tuple(gram.shape)} does not fit the weights; give (in, in) for "
                    "a weight (out, in), measured with curvature.grams"
                )
    merged = vectors.merge(lambda piece, part: part.mean(0))
    for name, mean in merged.items():
        if all(name in known for known in grams):
            matrix = torch.stack([w[name].flatten(1).double() for w in ws])
            moved = _regression([known[name].to(matrix) for known in grams], matrix - matrix.mean(0), shrink)
            mean.copy_((matrix.mean(0) + moved).view_as(mean))
    return merged


def _regression(grams: Sequence[Tensor], matrices: Tensor, shrink: float) -> Tensor:
    """The smallest D (out, in) with D sum_i G_i = sum_i W_i G_i, for G shrunk; in double precision."""
    total, wanted = torch.zeros_like(grams[0]), torch.zeros_like(matrices[0])
    for gram, matrix in zip(grams, matrices, strict=True):
        shrunk = gram * shrink + torch.diag(gram.diagonal()) * (1 - shrink)
        total, wanted = total + shrunk, wanted + matrix @ shrunk
    size = total.diagonal().clamp(min=0).sqrt()
    unit = torch.where(size > 0, 1 / size, 0)
    solved = torch.linalg.pinv(unit[:, None] * total * unit, hermitian=True, rtol=len(total) * 1e-12)
    return (wanted * unit) @ solved * unit


def _check_knowledge(name: str, given: Sequence[Weights], vectors: TaskVectors) -> None:
    if len(given) != len(vectors):
        raise ValueError(f"{name}: {len(given)} for {len(vectors)} weights; give one mapping for each")
