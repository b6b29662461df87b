"""Merges of task matrices by their singular vectors: isotropic (Iso-C), decorrelated (TSV), orthogonal in turn (OPCM).

A tensor of two and more axes is the matrix (first axis, the rest); others are averaged as the methods say. Released
code takes tensors of two axes alone for matrices, so that it averages kernels of convolutions. A matrix is decomposed
through the Gram matrix of its shorter side, in double precision: for (64, 4608) an eigenproblem of 64 by 64 in the
place of a singular value decomposition. Squaring loses directions below 1e-8 of the largest; those of float32 weights
are rounding below 1e-5 or so. Weights in float64 are decomposed directly. Of one tensor at a time, the task matrices
of all networks are held twice.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from clkit import checks
from clkit.merging.pieces import Density, Scale, TaskVectors, on_parameters
from clkit.weights import Weights

SQUARED = 1e-8  # of the largest singular value: what is smaller is lost in a square
SHARED = 16  # singular vectors of the same direction differ by so many times the precision of the weights, or less


def decompose(matrix: Tensor, eps: float | None = None, most: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition U (m, r), s (r,), V (n, r), largest first, without what rounding has left.

    Directions whose singular value is below eps sqrt(max(m, n)) of the largest are cut off: r is the numerical rank, or
    `most`. `eps` None is the matrix's own precision. The factors are in float64.
    """
    double, limit, squared = _limit(matrix, eps)
    if not matrix.numel():
        return double.new_zeros(len(matrix), 0), double.new_zeros(0), double.new_zeros(matrix.shape[1], 0)
    if not squared:
        u, s, vt = torch.linalg.svd(double, full_matrices=False)
        rank = int((s > limit * s[0]).sum())
        return u[:, :rank][:, :most], s[:rank][:most], vt[:rank][:most].T
    s, short = (part[..., :most] for part in _of_gram(double, limit))
    if len(double) <= double.shape[1]:
        return short, s, double.T @ short / s
    return double @ short / s, s, short


def polar(matrix: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """The nearest matrix with orthonormal directions, same shape, and the singular values of the given one.

    It is U V^T without the directions that `decompose` cuts off, in float64.
    """
    double, limit, squared = _limit(matrix, eps)
    if not squared or not matrix.numel():
        u, s, v = decompose(matrix, eps)
        return u @ v.T, s
    s, short = _of_gram(double, limit)
    root = short / s @ short.T  # one product of the matrix's size, where U V^T takes two
    return root @ double if len(double) <= double.shape[1] else double @ root, s


def _limit(matrix: Tensor, eps: float | None) -> tuple[Tensor, float, bool]:
    """A matrix in float64, the share of the largest singular value that counts at least, and if squares keep it."""
    eps = torch.finfo(matrix.dtype).eps if eps is None else eps
    return matrix.double(), eps * max(*matrix.shape, 1) ** 0.5, eps > SQUARED


def _of_gram(double: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The singular values (r,), largest first, and the singular vectors of the shorter side (min(m, n), r)."""
    wide = double if len(double) <= double.shape[1] else double.T
    if double.device.type == "cpu":  # numpy sees a square, and makes half of it
        values, short = torch.linalg.eigh(torch.from_numpy(wide.numpy() @ wide.numpy().T))
    else:
        values, short = torch.linalg.eigh(wide @ wide.T)
    s = values.clamp(min=0).sqrt().flip(0)
    rank = int((s > limit * s[0]).sum())
    return s[:rank], short.flip(1)[:, :rank]


@on_parameters()
def iso_c(ws: Sequence[Weights], *, base: Weights, scale: Scale = 1.0) -> dict[str, Tensor]:
    """`base` plus `scale` times the sum of the task matrices with all singular values made equal, to their mean.

    U V^T mean(s), where U diag(s) V^T is the sum of a layer's task matrices; the mean is over min(m, n) values, zeros
    too, and directions that the sum lacks stay out, where a decomposition would pick arbitrary ones. Other tensors take
    `scale` times the mean of their task vectors, as in the released code. The paper tunes the scale.

    Ref: Marczak et al., No task left behind: isotropic model merging, arXiv 2502.04959, algorithm 1.
    """

    def matrix(parts: Tensor) -> Tensor:
        directions, s = polar(parts.sum(0))
        return directions * (s.sum() / min(directions.shape))

    return _by_matrix(ws, base, matrix, scale)


@on_parameters()
def tsv(
    ws: Sequence[Weights], *, base: Weights, density: Density | None = None, scale: Scale = 1.0
) -> dict[str, Tensor]:
    """`base` plus `scale` times the sum of low-rank task matrices whose singular vectors are made orthogonal.

    Of each task matrix the leading `density` of its min(m, n) singular directions are kept (None: 1 / n tasks, as in
    the paper, so that all fit side by side; at least one). The left vectors of all tasks, side by side, are replaced by
    the nearest orthonormal ones. So are the right ones, and the result is U diag(s) V^T. Directions that several
    tasks share are no basis: they go to the tasks in equal parts, where a decomposition would pick arbitrary ones.
    Other tensors take `scale` times the mean of their task vectors. The paper finds scale = 1 good without tuning.

    Ref: Gargiulo et al., Task singular vectors, arXiv 2412.00081, algorithm 1 (TSV-Merge).
    """
    share = 1 / max(len(ws), 1) if density is None else density

    def matrix(parts: Tensor) -> Tensor:
        found = [decompose(part, most=max(1, int(share * min(part.shape)))) for part in parts]
        eps = SHARED * torch.finfo(parts.dtype).eps
        u, v = (polar(torch.cat([f[side] for f in found], 1), eps)[0] for side in (0, 2))
        return (u * torch.cat([f[1] for f in found])) @ v.T

    return _by_matrix(ws, base, matrix, scale)


@on_parameters()
def opcm(
    ws: Sequence[Weights],
    *,
    base: Weights,
    alpha: checks.Share = 0.5,
    projection: Literal["paper", "released"] = "paper",
) -> dict[str, Tensor]:
    """Takes the weights in one after another, each time only what is orthogonal to what is merged already.

    T is the task's matrix (out, in), M the one merged so far, with singular vectors u_i, v_i. The leading directions
    are those that hold the share `alpha` of the sum of singular values. From T is removed all that begins or ends in
    them, and its component on every other u_i v_i^T. Then M + T is divided by one number for all weights: the length of
    the merged task vector is the mean length of those so far. Other tensors add up without a projection. Order matters.
    Memory is constant: only the merged weights and two numbers have to be kept.

    alpha = 0.5 is the paper's. It decomposes into full bases, whose part beyond the rank of M is arbitrary; here that
    part has no diagonal to take out. The published numbers come from the `projection` "released", that of the code: of
    tensors of two axes it takes out only what both begins and ends in leading directions. Its line for the other u_i
    v_i^T empties a copy of the diagonal, so these stay.

    Ref: Tang et al., Merging models on the fly without retraining (OPCM), arXiv 2501.09522, eq. 5 to 8.
    """
    vectors = TaskVectors(ws, base)
    dtype, merged = vectors.dtype, {name: torch.zeros_like(t, dtype=vectors.dtype) for name, t in base.items()}
    factor = mean = 0.0
    for t, w in enumerate(ws):
        squares, own = [], []
        for name, total in merged.items():
            vector = w[name].to(dtype) - base[name].to(dtype)
            own.append(vector.double().square().sum().cpu())
            if t and (vector.ndim == 2 or (vector.ndim > 2 and projection == "paper")):
                vector = _orthogonal(vector.flatten(1), total.flatten(1), alpha, projection).view_as(vector)
            total.mul_(factor).add_(vector)
            squares.append(total.double().square().sum().cpu())
        mean += (float(torch.stack(own).sum()) ** 0.5 - mean) / (t + 1) if own else 0.0
        length = float(torch.stack(squares).sum()) ** 0.5 if squares else 0.0
        factor = length / mean if mean else 1.0
        for total in merged.values():
            total.div_(factor or 1.0)
    return {name: (base[name].to(dtype) + merged[name]).to(base[name].dtype) for name in vectors.names}


def _orthogonal(matrix: Tensor, merged: Tensor, alpha: float, projection: str) -> Tensor:
    """What is left of a task matrix beside the merged one: the projection of `opcm`."""
    u, s, v = decompose(merged)
    leading = int((s.cumsum(0) <= alpha * s.sum()).sum())
    own = matrix.double()
    first, last = u[:, :leading], v[:, :leading]
    if projection == "released":
        return (own - first @ (first.T @ own @ last) @ last.T).to(matrix.dtype)
    own = own - first @ (first.T @ own)
    own = own - (own @ last) @ last.T
    u, v = u[:, leading:], v[:, leading:]
    diagonal = ((u.T @ own) * v.T).sum(1)
    return (own - (u * diagonal) @ v.T).to(matrix.dtype)


def _by_matrix(
    ws: Sequence[Weights], base: Weights, rule: Callable[[Tensor], Tensor], scale: float
) -> dict[str, Tensor]:
    """base + scale rule(task matrices (n, out, in)) for matrices, base + scale mean(task vectors) for other tensors."""
    vectors = TaskVectors(ws, base)
    merged = vectors.merge(lambda piece, part: part.mean(0), scale)
    for name, tensor in merged.items():
        if tensor.ndim > 1 and tensor.numel():
            origin = base[name].flatten(1).to(vectors.dtype)
            parts = torch.stack([w[name].flatten(1).to(vectors.dtype) - origin for w in ws])
            tensor.copy_(origin.double().add(rule(parts), alpha=scale).view_as(tensor))
    return merged
