"""The permutation symmetry of small transformers: all of it is found, and CLeWI's matching undoes a permutation."""

import pytest
import torch

from clkit import alignment, data, models
from clkit.weights import get_weights
from test_alignment_zoo import randomise


def reader():
    stream = data.domains({"math": data.texts("math", context=20, limit=60, test_limit=10)})
    return models.gpt(stream, width=24, depth=2, heads=4), stream[0].train.x


def viewer():
    stream = data.split(data.digits())
    return models.vit(stream, patch=2, dim=24, depth=2, heads=4), stream[0].prepare(stream[0].train.x[:60])


@pytest.fixture(scope="module", params=[reader, viewer], ids=["gpt", "vit"])
def case(request):
    model, x = request.param()
    randomise(model)
    return model, x, alignment.symmetry(model, x[:2])


def test_every_parameter_moves_and_the_function_stays(case):
    model, x, symmetry = case
    assert symmetry.share == 1
    for example in (x[:2], x[:7]):
        assert symmetry.verify(model, example).change < 1e-5
    assert symmetry.verify(model, x[:5], dtype=torch.float64).change < 1e-12


def test_heads_move_as_blocks_and_the_residual_stream_as_one(case):
    symmetry = case[2]
    sizes = sorted((group.size, group.blocks) for group in symmetry.groups.values())
    # the stream; in each of two blocks 4 heads, 6 channels in each for queries with keys and for values, a perceptron
    assert sizes == sorted([(24, 1), *[(4, 1), (6, 4), (6, 4), (96, 1)] * 2])


def test_shorter_sequences_keep_their_function_too():
    model, x = reader()
    randomise(model)
    assert alignment.symmetry(model, x[:2]).verify(model, x[:4, :9]).change < 1e-5


@pytest.mark.parametrize("by", ["activations", "weights"])
def test_matching_undoes_a_random_permutation(case, by):
    model, x, symmetry = case
    weights = get_weights(model)
    moved = alignment.permute(
        symmetry, alignment.random_permutations(symmetry, torch.Generator().manual_seed(1)), weights
    )
    inputs = x if by == "activations" else None
    match = alignment.align(symmetry, model, weights, moved, inputs, by=by)
    back = alignment.permute(symmetry, match.permutations, moved)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
