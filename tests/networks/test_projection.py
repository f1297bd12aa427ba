"""The heads act voxel by voxel."""

import pytest
import torch

from nnssl.networks.projection import ProjectionHead, Selector, SeparationHeads


def test_shape_and_independence_of_voxels():
    torch.manual_seed(0)
    head, voxels = ProjectionHead(16), torch.randn(10, 16)
    out = head(voxels)
    assert out.shape == (10, 64)
    torch.testing.assert_close(head(voxels[[3]]), out[[3]])  # would fail with a norm over the batch
    assert head(voxels[:0]).shape == (0, 64)


def test_gradient_reaches_voxels_and_all_weights():
    torch.manual_seed(0)
    head, voxels = ProjectionHead(8, dim=6), torch.randn(12, 8, requires_grad=True)
    head(voxels).square().sum().backward()
    assert voxels.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


def test_selectors_weigh_single_voxels():
    torch.manual_seed(0)
    heads, voxels = SeparationHeads(8, 6, 2), torch.randn(12, 6)
    assert len(heads.embedding_selectors) == len(heads.prototype_selectors) == 2
    weights = heads.embedding_selectors[0](voxels)
    assert weights.shape == (12,)
    assert 0 < weights.min() < weights.max() < 1
    torch.testing.assert_close(heads.embedding_selectors[0](voxels[[3]]), weights[[3]])


@pytest.mark.parametrize("head", [ProjectionHead(8, dim=6), Selector(8)])
def test_autocast_does_not_reach_the_head(head):
    torch.manual_seed(0)
    voxels = torch.randn(12, 8)
    expected = head(voxels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(voxels), expected)
        assert head(voxels.bfloat16()).dtype == torch.float32
