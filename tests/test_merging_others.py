"""The same merges by other libraries, where they are installed and their definitions agree."""

import pytest
import torch

from clkit import merging as M
from merging_toys import weights

TASKS = [weights(i, torch.float32) for i in range(3)]
BASE = weights(99, torch.float32)
MATRIX = "linear.weight"


def near(merged, other, name):
    torch.testing.assert_close(merged[name], other.view_as(merged[name]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_mergekit_trims_tensor_by_tensor(density):
    """Its number kept, int(density n), is ours where density n is whole."""
    sparsify = pytest.importorskip("mergekit.sparsify")
    for name in ("conv.weight", MATRIX):
        for w in TASKS:
            tau = w[name] - BASE[name]
            trimmed = sparsify.magnitude(tau.clone(), density)
            merged = M.ties([{name: w[name]}], base={name: BASE[name]}, density=density, whole=False)
            near(merged, BASE[name] + trimmed, name)


def test_mergekit_elects_the_same_signs():
    """It elects a plus where the sum is exactly zero, which random numbers are not."""
    module = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    for name in BASE:
        taus = torch.stack([w[name] - BASE[name] for w in TASKS])
        mask = module.get_mask(taus, method="sum", mask_dtype=taus.dtype)
        mean = (taus * mask).sum(0) / mask.sum(0).clamp(min=1)
        near(M.ties(TASKS, base=BASE, density=1), BASE[name] + mean, name)


def test_mergekit_takes_the_same_arcs():
    slerp = pytest.importorskip("mergekit.merge_methods.slerp").slerp
    for name in ("conv.weight", MATRIX):
        other = slerp(0.3, TASKS[0][name].flatten(), TASKS[1][name].flatten())
        near(M.slerp(TASKS[:2], t=0.3), torch.as_tensor(other), name)


def test_fusion_bench_adds_the_same_task_vectors():
    arithmetic = pytest.importorskip("fusion_bench.utils.state_dict_arithmetic")
    total = arithmetic.state_dict_sub(TASKS[0], BASE)
    for w in TASKS[1:]:
        total = arithmetic.state_dict_add(total, arithmetic.state_dict_sub(w, BASE))
    merged = M.task_arithmetic(TASKS, base=BASE, scale=0.3)
    for name in BASE:
        near(merged, BASE[name] + 0.3 * total[name], name)
