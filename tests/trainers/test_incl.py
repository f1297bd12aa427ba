"""INCL: who learns from what, and maps against labels in closed form."""

import math

import pytest
import torch
from nnssl_test_tools import same, weights
from torch.nn import functional

from nnssl.errors import UserError
from nnssl.losses.consistency import dice_distance
from nnssl.trainers.incl import INCLSettings, to_cells


def start(build, configuration="2d", **settings):
    trainer = build("INCLTrainer", configuration, {"unsupervised_schedule": "constant", **settings})
    batch = next(trainer.dataloader_train)
    batch["unlabeled"]["valid"][..., :6] = False
    return trainer, batch


def enlarged(maps, like):
    """Return probabilities of maps at the voxels of an image, those of the cell that a voxel lies in."""
    return functional.interpolate(maps.softmax(1), like.shape[2:], mode="nearest")


def test_cells_hold_the_shares_of_their_valid_voxels():
    first = torch.tensor([[[[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]]]])
    channels = torch.cat([first, 1 - first], 1)
    valid = torch.tensor([[[[True, True, False, False], [True, False, False, False]]]])
    shares, counted = to_cells(channels, valid, (1, 2))
    assert counted.tolist() == [[[[True, False]]]]
    assert shares[0, :, 0, 0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert shares[0, :, 0, 1].tolist() == [0, 0]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_sspas_loss_is_that_of_its_maps_at_the_voxels(build, configuration):
    """The cross-entropy, written at full resolution; the Dice against the shares of each cell."""
    trainer, batch = start(build, configuration)
    truth = batch["target"][0]
    with torch.no_grad():
        _, scales = trainer.network(batch["data"], scales=True)
        maps, expected = trainer.read(scales), 0.0
        assert len(maps) == 3 or configuration == "3d_fullres"
        for logits in maps:
            probs = enlarged(logits, truth)
            expected -= probs.gather(1, truth.long()).log().mean().item()
            onehot = functional.one_hot(truth[:, 0].long(), 3).movedim(-1, 1).float()
            kernel = [a // b for a, b in zip(truth.shape[2:], logits.shape[2:], strict=True)]
            pooling = functional.avg_pool2d if truth.ndim == 4 else functional.avg_pool3d
            expected += dice_distance(logits.softmax(1), pooling(onehot, kernel)).item()
    assert trainer.train_step(batch)["loss_proxy"] == pytest.approx(expected / len(maps), rel=1e-4)


def test_the_unlabeled_terms_are_the_formula(build):
    trainer, batch = start(build, unsupervised_weight=0.5, consistency_weight=7.0)
    unlabeled = batch["unlabeled"]
    similar = alike = 0.0
    with torch.no_grad():
        output, scales = trainer.network(unlabeled["strong"], scales=True)
        sspa, uscl = trainer.trained_network("sspa"), trainer.trained_network("uscl")
        _, queries = sspa(trainer.network(batch["data"], scales=True)[1])
        found = sspa(scales)[0], uscl(scales, [q.mean(0) for q in queries])[0]
        maps = [[z.softmax(1) for z in each] for each in found]
        for m, n in zip(*maps, strict=True):
            shares, counted = to_cells(output[0].softmax(1), unlabeled["valid"], m.shape[2:])
            similar += dice_distance(n, shares, counted).item() / len(maps[0])
            alike += (n - m).square().movedim(1, -1)[counted[:, 0]].mean().item() / len(maps[0])
    scalars = trainer.train_step(batch)
    assert scalars["loss_learner"] == pytest.approx(0.5 * similar, rel=1e-4)
    assert scalars["loss_semantic"] == pytest.approx(3.5 * alike, rel=1e-4)


def test_every_part_learns_from_its_own_terms(build):
    trainer, batch = start(build)
    parts = {
        "head": trainer.network.decoder.seg_layers[-1],
        "encoder": trainer.network.encoder,
        "sspa": trainer.trained_network("sspa"),
        "uscl": trainer.trained_network("uscl"),
    }
    learners = {
        "loss_supervised": {"head", "encoder"},
        "loss_proxy": {"encoder", "sspa"},
        # the prediction is a constant: its head learns nothing; so are SSPA's maps, it learns by its queries alone
        "loss_learner": {"encoder", "sspa", "uscl"},
        "loss_semantic": {"encoder", "sspa", "uscl"},
    }
    maps_of_sspa = [layer.mix.weight for layer in parts["sspa"].layers]
    seen = set()
    for group in trainer.compute_losses(batch):
        for name, term in list(group.terms.items()):
            for part in parts.values():
                part.zero_grad(set_to_none=True)
            term.backward(retain_graph=True)
            reached = {
                key
                for key, part in parts.items()
                if any(p.grad is not None and p.grad.any() for p in part.parameters())
            }
            assert reached == learners[name], name
            assert any(w.grad is not None and w.grad.any() for w in maps_of_sspa) == (name == "loss_proxy"), name
            seen.add(name)
        group.terms.clear()
    assert seen == set(learners)


def test_weight_zero_lets_the_modules_rest_and_a_warm_up_teaches_sspa(build):
    for settings, rests in (
        ({"unsupervised_weight": 0}, [True, True]),
        ({"unsupervised_schedule": "warmup99"}, [False, True]),
        ({}, [False, False]),
    ):
        trainer, batch = start(build, **settings)
        modules = [trainer.trained_network(name) for name in ("sspa", "uscl")]
        before = [weights(module) for module in modules]
        trainer.train_step(batch)
        assert [same(old, weights(module)) for old, module in zip(before, modules, strict=True)] == rests


def test_without_a_valid_voxel_the_numbers_are_finite(build):
    trainer, batch = start(build)
    batch["unlabeled"]["valid"][:] = False
    scalars = trainer.train_step(batch)
    assert all(math.isfinite(value) for value in scalars.values()), scalars
    assert scalars["loss_semantic"] == 0


def test_a_decoder_of_fewer_resolutions_is_warned_of(build, capsys):
    build("INCLTrainer", settings={"scales": 9})
    assert "the modules read" in capsys.readouterr().out
    build("INCLTrainer", settings={"scales": 9, "unsupervised_weight": 0})
    assert "the modules read" not in capsys.readouterr().out


def test_queries_must_divide_over_the_heads():
    with pytest.raises(UserError, match="divide evenly"):
        INCLSettings.from_mapping({"dim": 10, "heads": 4})
