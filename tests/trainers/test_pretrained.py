"""Starting a run from trained weights."""

import pytest
import torch

from nnssl.trainers.pretrained import load_pretrained


@pytest.mark.parametrize("rates", [(0.0, 0.2), (0.2, 0.0)], ids=["into", "out of"])
def test_weights_pass_between_networks_with_and_without_dropout(build, tmp_path, rates):
    """Dropout renumbers the norms of nnU-Net's blocks, and each norm has a second name that stays."""
    source, target = (build("SupervisedTrainer", settings={"dropout": rate}) for rate in rates)
    with torch.no_grad():
        for parameter in source.network.parameters():
            parameter.uniform_()
    torch.save({"network_weights": source.network.state_dict()}, tmp_path / "source.pth")
    load_pretrained(target, tmp_path / "source.pth")
    pairs = zip(source.network.named_parameters(), target.network.parameters(), strict=True)
    assert {name for (name, a), b in pairs if not torch.equal(a, b)} == {
        name for name, _ in source.network.named_parameters() if ".seg_layers." in name
    }
