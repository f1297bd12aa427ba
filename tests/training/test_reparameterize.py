"""RS: published votes, a Gaussian against SciPy, and sampling from probabilities."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from nnssl.training.reparameterize import gaussian_smooth, log_probabilities, reparameterize_and_smooth


def certain(classes: int, side: int = 24) -> torch.Tensor:
    """Return a flat region in which class 0 is certain: x0 of +1 for it and -1 for the others."""
    x0 = torch.full((1, classes, side, side, side), -1.0)
    x0[:, 0] = 1
    return x0


@pytest.mark.parametrize(("classes", "vote"), [(2, 0.80), (4, 0.57), (5, 0.51), (14, 0.25)])
def test_published_votes_of_a_certain_branch(classes, vote):
    torch.manual_seed(0)
    q = reparameterize_and_smooth(certain(classes))[..., 1:-1, 1:-1, 1:-1]
    assert q[:, 0].mean().item() == pytest.approx(vote, abs=0.01)
    assert q[:, 1:].mean().item() == pytest.approx((1 - vote) / (classes - 1), abs=0.01)


def test_a_vote_of_log_probabilities_does_not_fade_with_the_number_of_classes():
    torch.manual_seed(0)
    for classes in (2, 14):
        q = reparameterize_and_smooth(log_probabilities(certain(classes, 12)))[..., 1:-1, 1:-1, 1:-1]
        assert q[:, 0].mean().item() > 0.99


def test_the_largest_vote_before_smoothing_is_drawn_from_the_probabilities():
    p = torch.tensor([0.6, 0.3, 0.1]).view(1, 3, 1, 1).expand(1, 3, 200, 200)
    torch.manual_seed(0)
    drawn = reparameterize_and_smooth(log_probabilities(2 * p - 1), sigma=0).argmax(1)
    assert [(drawn == k).float().mean().item() for k in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.01)


@pytest.mark.parametrize("space", [(7, 6), (5, 6, 7), (1, 4)])
@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_the_gaussian_is_scipys_with_three_taps_and_zeros_outside(space, sigma):
    x = torch.randn(2, 3, *space, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = (0, 0, *[1] * len(space))
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, *[sigma] * len(space)), mode="constant", radius=radius)
    before = x.clone()
    np.testing.assert_allclose(gaussian_smooth(x, sigma), expected, atol=1e-12)
    assert torch.equal(x, before)


def test_published_taps():
    line = torch.zeros(1, 1, 5)
    line[..., 2] = 1
    assert gaussian_smooth(line).flatten().tolist() == pytest.approx([0, 0.2741, 0.4519, 0.2741, 0], abs=1e-4)
    assert torch.equal(gaussian_smooth(line, 0), line)


def test_votes_of_a_voxel_are_probabilities_up_to_the_zeros_outside():
    torch.manual_seed(0)
    x0 = torch.randn(2, 4, 9, 8).clamp(-1, 1)
    q = reparameterize_and_smooth(x0, tau=0.5)
    assert torch.allclose(q[..., 1:-1, 1:-1].sum(1), torch.ones(2, 7, 6))
    assert (q.sum(1)[:, 0, 0] < 0.6).all()  # a corner sees outside
    assert q.min() >= 0
    assert not q.requires_grad


def test_a_higher_temperature_softens_the_vote():
    spread = []
    for tau in (0.2, 1.0, 5.0):
        torch.manual_seed(0)
        spread.append(reparameterize_and_smooth(torch.zeros(1, 3, 30, 30), tau, sigma=0).std().item())
    assert spread[0] > spread[1] > spread[2]


def test_noise_is_fresh_and_follows_the_seed():
    x0 = torch.zeros(1, 2, 6, 6)
    torch.manual_seed(1)
    first, second = reparameterize_and_smooth(x0), reparameterize_and_smooth(x0)
    torch.manual_seed(1)
    assert torch.equal(first, reparameterize_and_smooth(x0))
    assert not torch.equal(first, second)


def test_half_precision_votes_in_single():
    with torch.autocast("cpu", torch.bfloat16):
        assert reparameterize_and_smooth(torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32
