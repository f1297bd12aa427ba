"""The projection head acts voxel by voxel."""

import torch

from nnssl.networks.projection import ProjectionHead


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


def test_autocast_does_not_reach_the_head():
    torch.manual_seed(0)
    head, voxels = ProjectionHead(8, dim=6), torch.randn(12, 8)
    expected = head(voxels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(voxels), expected)
        assert head(voxels.bfloat16()).dtype == torch.float32
