"""Monte Carlo dropout."""

import pytest
import torch
from torch import nn

from nnssl.errors import UserError
from nnssl.training.mc_dropout import dropout_active, mean_prediction, noisy


def test_only_dropout_wakes_and_all_goes_back():
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Dropout(0.0)).eval()
    with dropout_active(network):
        assert [m.training for m in network] == [False, True, False, False]
    assert not any(m.training for m in network)
    with pytest.raises(RuntimeError, match="inside"), dropout_active(network):
        raise RuntimeError("inside")
    assert not network[1].training


@pytest.mark.parametrize("layers", [[nn.Identity()], [nn.Dropout(0.0)]])
def test_a_network_without_dropout_is_refused(layers):
    with pytest.raises(UserError, match="needs a network with dropout"), dropout_active(nn.Sequential(*layers)):
        pass


def test_the_mean_of_many_passes_is_the_expectation():
    torch.manual_seed(0)
    network, x = nn.Dropout(0.25), torch.ones(4, 2, 8, 8)
    mean = mean_prediction(network, network, x, 2000)
    assert torch.allclose(mean, x, atol=0.06)  # inverted dropout keeps the expectation
    one = mean_prediction(network, network, x, 1)
    assert torch.allclose(one.unique(), torch.tensor([0.0, 4 / 3]))


def test_every_pass_draws_its_own_noise():
    network, x, seen = nn.Dropout(0.5), torch.zeros(1, 1, 8, 8), []
    mean_prediction(lambda images: seen.append(images) or network(images), network, x, 3, 0.1)
    assert len(seen) == 3
    assert all(0 < images.abs().max() <= 0.2 + 1e-6 for images in seen)
    assert not torch.equal(seen[0], seen[1])


def test_noise_is_cut_off():
    torch.manual_seed(0)
    x = torch.zeros(100_000)
    drawn = noisy(x, 0.1)
    assert drawn.abs().max() == pytest.approx(0.2)
    assert drawn.std().item() == pytest.approx(0.1 * 0.9594, rel=0.02)  # sd of a normal clamped at 2 sigma
    assert noisy(x, 0) is x
