"""The third stream: cases with masks of unknown quality, drawn beside labeled and unlabeled ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnssl_test_tools import equal, take
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl.data.loader import PseudoLoader
from nnssl.data.seeding import Stream
from nnssl.data.views import labeled_transforms

UNSURE = 2


@pytest.fixture(scope="module")
def masks(toy, tmp_path_factory):
    """Three cases with a bright organ and an unsure slab."""
    folder = tmp_path_factory.mktemp("pseudo")
    for number in range(3):
        data, seg = toy.random_case(20 + number)
        seg[:, 8:12, 8:12, 8:12], seg[:, :, :6, 6:] = 1, UNSURE
        locations = {1: np.argwhere(seg == 1), (-1, 0, 1): np.argwhere(seg < UNSURE)[::7]}
        toy.write_case(folder, f"ps_{number}", data, seg, {"class_locations": locations})
    return folder


@pytest.fixture
def with_pseudo(make_loader, masks, toy):
    """Return a function that adds the third stream to a paired loader."""

    def make(dim=2, probabilities=None, **options):
        loader = make_loader(dim, **options)
        manager = LabelManager({"background": 0, "organ": 1, "ignore": UNSURE}, None)
        loader.pseudo = PseudoLoader(
            nnUNetDatasetBlosc2(str(masks)),
            3,
            toy.initial[dim],
            toy.patch[dim],
            manager,
            0.33,
            probabilities,
            transforms=labeled_transforms(toy.stock_transforms(dim)),
        )
        return loader

    return make


@pytest.mark.parametrize("dim", [2, 3])
def test_a_batch_holds_crops_targets_and_weights_of_the_third_stream(with_pseudo, toy, dim):
    batches = [batch["pseudo"] for batch in take(with_pseudo(dim), 4)]
    for batch in batches:
        assert batch.keys() == {"data", "target", "weight", "keys"}
        assert batch["data"].shape == (3, 2, *toy.patch[dim])
        assert batch["target"].shape == (3, 1, *toy.patch[dim])
        assert torch.equal(batch["weight"], torch.ones(3))
        assert all(type(key) is str and key.startswith("ps_") for key in batch["keys"])
    values = {int(v) for batch in batches for v in batch["target"].unique()}
    assert values == {0, 1, UNSURE}


def test_the_third_stream_does_not_depend_on_the_number_of_workers_and_starts_anywhere(with_pseudo):
    reference = take(with_pseudo(), 5)
    assert not torch.equal(reference[0]["pseudo"]["data"], reference[1]["pseudo"]["data"])
    for workers in (1, 2):
        assert all(map(equal, reference, take(with_pseudo(), 5, workers)))
    assert all(map(equal, reference[3:], take(with_pseudo(start_index=3), 2)))


def test_the_other_batches_do_not_move_when_the_third_stream_is_drawn(with_pseudo, make_loader):
    plain, batches = take(make_loader(2), 5), take(with_pseudo(), 5)
    assert all(equal(a, {k: b[k] for k in a}) for a, b in zip(plain, batches, strict=True))
    assert "pseudo" not in plain[0]


def test_the_third_stream_has_randomness_of_its_own(with_pseudo, masks):
    """Let two streams draw from the same cases with the same loader: equal seeds would give equal batches."""
    loader = with_pseudo()
    loader.labeled = loader.pseudo
    batch = take(loader, 1)[0]
    assert not torch.equal(batch["data"], batch["pseudo"]["data"])
    assert len(set(Stream)) == len(Stream.__members__)


def test_cases_are_drawn_in_proportion_to_their_weight(with_pseudo):
    batches = take(with_pseudo(probabilities=[0.0, 0.2, 0.8]), 60)
    keys = [key for batch in batches for key in batch["pseudo"]["keys"]]
    share = {key: keys.count(key) / len(keys) for key in set(keys)}
    assert set(share) == {"ps_1", "ps_2"}
    assert share["ps_2"] == pytest.approx(0.8, abs=0.1)  # 180 draws: a standard deviation is 0.03
