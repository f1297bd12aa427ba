"""Class queries on the resolutions of a decoder: their grids, and one head in plain loops."""

import pytest
import torch

from nnssl.networks.semantic_attention import ScaleAttention, SemanticAttention, scale_grids


@pytest.mark.parametrize(
    ("patch", "strides", "expected"),
    [
        ((256, 256), [1, 2, 2, 2, 2, 2, 2], {0: (8, 8), 1: (16, 16), 2: (32, 32)}),
        ((256, 256), [1, 2, 2, 2, 2, 2, 2, 2], {1: (8, 8), 2: (16, 16), 3: (32, 32)}),
        ((128, 128, 128), [1, 2, 2, 2, 2, 2], {0: (8, 8, 8), 1: (8, 8, 16), 2: (8, 8, 16)}),
        ((20, 320, 256), [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]], dict.fromkeys(range(3), (10, 10, 8))),
        ((16, 16), [1, 2], {0: (16, 16)}),
    ],
)
def test_grids_are_the_highest_resolutions_of_few_positions_or_halved(patch, strides, expected):
    assert scale_grids(patch, strides, 3, 1024) == expected


def test_one_head_in_loops():
    torch.manual_seed(0)
    layer, n = ScaleAttention(3, (2, 2), 4, 1), 4
    embeddings, features = torch.randn(1, 2, 4), torch.randn(1, 3, 2, 2)
    after, maps = layer(embeddings, features)
    tokens = [features[0, :, i // 2, i % 2] for i in range(n)]
    for c in range(2):
        q = layer.query(embeddings[0, c])
        scores = torch.stack([torch.dot(q, layer.key(token)) / 2 for token in tokens])
        scores = scores + layer.positions(scores)
        expected = scores * layer.mix.weight[0, 0] + layer.mix.bias[0]
        torch.testing.assert_close(maps[0, c].flatten(), expected, rtol=1e-4, atol=1e-6)
        share = scores.exp() / scores.exp().sum()
        read = sum(w * layer.value(token) for w, token in zip(share, tokens, strict=True))
        moved = layer.norms[0](embeddings[0, c] + layer.join(read))
        torch.testing.assert_close(after[0, c], layer.norms[1](moved + layer.perceptron(moved)), rtol=1e-4, atol=1e-6)


def test_larger_features_are_read_as_the_means_of_cells():
    layer = ScaleAttention(3, (2, 3), 8, 2)
    embeddings, cells = torch.randn(2, 2, 8), torch.randn(2, 3, 2, 3)
    large = cells.repeat_interleave(4, 2).repeat_interleave(2, 3)
    large = large + torch.tensor([0.5, -0.5]).repeat(3)  # nothing on the mean of a cell
    for ours, theirs in zip(layer(embeddings, large), layer(embeddings, cells), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 4), (4, 2, 6)])
def test_a_query_goes_from_each_resolution_to_the_next_and_all_parts_learn(shape):
    torch.manual_seed(0)
    grids = {1: tuple(n // 2 for n in shape), 2: shape}
    module = SemanticAttention({0: 2, 1: 3, 2: 5}, grids, 3, 8, 2)
    scales = [
        torch.randn(2, c, *grid, requires_grad=True) for c, grid in ((2, (1,) * len(shape)), (3, grids[1]), (5, shape))
    ]
    (low, high), queries = module(scales)
    assert low.shape == (2, 3, *grids[1])
    assert high.shape == (2, 3, *shape)
    assert [q.shape for q in queries] == [(2, 3, 8)] * 2
    (high.square().sum() + queries[1].square().sum()).backward()
    assert scales[0].grad is None  # not among the grids
    assert scales[1].grad.any()
    assert scales[2].grad.any()
    silent = {name.rsplit(".", 1)[0] for name, p in module.named_parameters() if p.grad is None}
    assert silent == {"layers.0.mix"}  # another output: the first map


def test_a_taught_module_looks_at_each_resolution_with_what_it_is_given():
    grids = {0: (2, 2), 1: (4, 4)}
    module = SemanticAttention({0: 2, 1: 3}, grids, 3, 8, 2, taught=True)
    scales, given = [torch.randn(2, 2, 2, 2), torch.randn(2, 3, 4, 4)], [torch.randn(3, 8) for _ in grids]
    maps, _ = module(scales, given)
    for layer, query, features, logits in zip(module.layers, given, scales, maps, strict=True):
        torch.testing.assert_close(logits, layer(query.expand(2, -1, -1), features)[1])
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in module.parameters())  # nothing that would never learn


def test_maps_are_in_single_precision_under_autocast():
    module = SemanticAttention({0: 2}, {0: (4, 4)}, 3, 8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        (maps,), _ = module([torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)])
    assert maps.dtype == torch.float32
