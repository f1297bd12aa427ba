"""SVDA: which operations, how often, in which ranges, and that views and labels share their geometry."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from nnssl.data.loader import IndexedLoader, LabeledLoader, PairedLoader, UnlabeledLoader, wrap_loader
from nnssl.data.seeding import derive_seed, seed_cpu
from nnssl.data.svda import Svda, spatial, svda_unlabeled, svda_views
from nnssl.data.unlabeled import UnlabeledDataset
from nnssl.data.views import labeled_transforms

ROTATION, SCALING, BLUR, BRIGHTNESS, CONTRAST, GAMMA = range(6)


def run(pipeline, index, **data):
    seed_cpu(derive_seed(0, 0, 0, index))
    return pipeline(**data)


def crop(toy, dim, flat=False, seed=0):
    space = [n if flat and i == 0 else 2 * n for i, n in enumerate(toy.patch[dim])]
    image = torch.randn(2, *space, generator=torch.Generator().manual_seed(seed)) + 3
    return {"image": image, "segmentation": torch.zeros(1, *space, dtype=torch.int16)}


KINDS = [(2, False), (3, False), (3, True)]


def pipeline_of(toy, dim, flat=False, use_mask=False, **settings):
    return svda_views(toy.stock_transforms(dim, use_mask, do_dummy_2d_data_aug=flat), **settings)


# ------------------------------------------------------------------------------------------------- the draw


def test_three_of_six_are_drawn_and_seven_tenths_of_them_applied():
    torch.manual_seed(0)
    draws = [Svda().get_parameters()["chosen"] for _ in range(3000)]
    assert all(len(set(chosen)) == len(chosen) <= 3 for chosen in draws)
    assert np.mean([len(chosen) for chosen in draws]) == pytest.approx(2.1, abs=0.05)
    how_often = Counter(i for chosen in draws for i in chosen)
    assert [how_often[i] / 3000 for i in range(6)] == pytest.approx([0.35] * 6, abs=0.03)
    before = [chosen.index(BLUR) < chosen.index(ROTATION) for chosen in draws if {BLUR, ROTATION} <= set(chosen)]
    assert np.mean(before) == pytest.approx(0.5, abs=0.1)  # any order: spatial ones may follow intensity ones


def test_counts_and_probabilities_are_settings():
    torch.manual_seed(0)
    assert all(len(Svda(5, 1.0).get_parameters()["chosen"]) == 5 for _ in range(10))
    assert not Svda(6, 0.0).get_parameters()["chosen"]
    with pytest.raises(ValueError, match=r"0\.\.6"):
        Svda(7)


# ------------------------------------------------------------------------------------------------- the operations


def apply(chosen: list[int], image: torch.Tensor, index: int = 0) -> torch.Tensor:
    seed_cpu(derive_seed(0, 0, 0, index))
    return Svda().apply({"image": image.clone()}, chosen)["image"]


def test_brightness_multiplies_by_seven_to_thirteen_tenths():
    image = torch.rand(1, 6, 7) + 1
    factors = [(apply([BRIGHTNESS], image, i) / image).flatten() for i in range(200)]
    assert all(f.std() < 1e-5 for f in factors)
    assert 0.7 <= min(f[0] for f in factors) < 0.75
    assert 1.25 < max(f[0] for f in factors) <= 1.3


def test_contrast_keeps_mean_and_range():
    image = torch.randn(1, 20, 20)
    for index in range(50):
        changed = apply([CONTRAST], image, index)
        assert image.min() <= changed.min()
        assert changed.max() <= image.max()
        inside = (changed > image.min()) & (changed < image.max())
        factor = ((changed - image.mean())[inside] / (image - image.mean())[inside]).median()
        assert 0.7 - 1e-3 <= factor <= 1.3 + 1e-3


def test_gamma_keeps_mean_and_spread_and_never_inverts():
    image = torch.rand(1, 30, 30) ** 2
    moved = 0
    for index in range(30):
        changed = apply([GAMMA], image, index)
        assert changed.mean().item() == pytest.approx(image.mean().item(), abs=1e-4)
        assert changed.std().item() == pytest.approx(image.std().item(), rel=1e-3)
        assert torch.equal(changed.flatten().argsort(), image.flatten().argsort())
        moved += not torch.allclose(changed, image, atol=1e-3)
    assert moved > 20


def test_the_blur_is_about_a_voxel_wide():
    point = torch.zeros(1, 31, 31)
    point[0, 15, 15] = 1
    axis = torch.arange(31.0) - 15
    widths = [(apply([BLUR], point, i)[0].sum(0) * axis**2).sum().sqrt().item() for i in range(100)]
    assert 0.65 < min(widths) < 0.8
    assert 1.2 < max(widths) < 1.35


def coordinates(*space: int) -> torch.Tensor:
    axes = torch.meshgrid(*[torch.arange(float(n)) - (n - 1) / 2 for n in space], indexing="ij")
    return torch.stack(axes)


@pytest.mark.parametrize("space", [(21, 21), (7, 21, 21)])
def test_rotations_turn_the_plane_by_up_to_fifteen_degrees(space):
    angles = []
    for index in range(100):
        seed_cpu(derive_seed(0, 0, 0, index))
        moved = spatial("rotation", space)(image=coordinates(*space))["image"]
        center = tuple(n // 2 for n in space[:-2])
        y, x = moved[-2][center][8:13, 8:13], moved[-1][center][8:13, 8:13]
        angles.append(np.degrees(np.arctan2(y.diff(dim=1).mean().item(), x.diff(dim=1).mean().item())))
        if len(space) == 3:  # about the first axis: slices stay slices
            inside = moved[0][:, 8:13, 8:13]
            assert torch.allclose(inside, coordinates(*space)[0][:, 8:13, 8:13], atol=1e-4)
    assert -15.01 <= min(angles) < -13
    assert 13 < max(angles) <= 15.01


@pytest.mark.parametrize("space", [(21, 21), (9, 21, 21)])
def test_scaling_enlarges_half_of_the_crops(space):
    factors = []
    for index in range(300):
        seed_cpu(derive_seed(0, 0, 0, index))
        moved = spatial("scaling", space)(image=coordinates(*space))["image"]
        steps = [moved[a].diff(dim=a).mean().item() for a in range(len(space))]
        assert steps == pytest.approx([steps[0]] * len(space), abs=1e-3)  # all axes alike
        factors.append(steps[0])
    assert min(factors) == pytest.approx(0.7, abs=0.02)
    assert max(factors) == pytest.approx(1, abs=1e-4)
    assert np.mean(np.isclose(factors, 1)) == pytest.approx(0.5, abs=0.1)


# ------------------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize(("dim", "flat"), KINDS)
def test_without_operations_a_view_is_the_crops_center(toy, dim, flat):
    data = crop(toy, dim, flat)
    starts = [(n - p) // 2 for n, p in zip(data["image"].shape[1:], toy.patch[dim], strict=True)]
    center = data["image"][(slice(None), *(slice(s, s + p) for s, p in zip(starts, toy.patch[dim], strict=True)))]
    for index in range(5):
        views = run(svda_unlabeled(pipeline_of(toy, dim, flat, count=0)), index, **crop(toy, dim, flat))
        assert torch.equal(views["image"], center)
        assert torch.equal(views["weak"], center)


@pytest.mark.parametrize(("dim", "flat"), KINDS)
def test_views_and_labels_share_their_geometry(toy, dim, flat):
    labeled, unlabeled = (
        labeled_transforms(pipeline_of(toy, dim, flat, count=6, probability=1.0)),
        svda_unlabeled(pipeline_of(toy, dim, flat, count=6, probability=1.0)),
    )
    for index in range(15):
        data = crop(toy, dim, flat)
        data["image"].zero_()
        data["image"][..., data["image"].shape[-2] // 2 :, : data["image"].shape[-1] // 2] = 4
        data["segmentation"] = (data["image"][:1] > 0).short()
        views = run(labeled, index, **{k: v.clone() for k, v in data.items()})
        label = views["segmentation"] == 1
        assert 0 < label.float().mean() < 1
        middle = (views["image"][0].min() + views["image"][0].max()) / 2
        assert ((views["image"][:1] > middle) != label).float().mean() < 0.1
        views = run(unlabeled, index, **{k: v.clone() for k, v in data.items()})
        assert ((views["weak"][:1] > 2) != label).float().mean() < 0.08
        assert not torch.equal(views["weak"], views["image"])
        assert views["weak"].max() <= 4 + 1e-4  # no intensity operation


@pytest.mark.parametrize("dim", [2, 3])
def test_what_a_rotation_brings_in_from_outside_is_background_and_counts_nowhere(toy, dim):
    outside = 0
    for index in range(20):
        pipeline = pipeline_of(toy, dim, count=6, probability=1.0)
        image, label = torch.full((1, *toy.patch[dim]), 5.0), torch.ones(1, *toy.patch[dim], dtype=torch.int16)
        views = run(labeled_transforms(pipeline), index, image=image.clone(), segmentation=label)
        assert set(views["segmentation"].unique().tolist()) <= {0, 1}
        views = run(svda_unlabeled(pipeline), index, image=image, segmentation=torch.zeros_like(label))
        beyond = views["weak"] == 0
        assert views["segmentation"][beyond].eq(-1).all()
        outside += beyond.sum()
    assert outside > 20


def test_masks_and_label_transforms_stay(toy):
    stock = toy.stock_transforms(3, True, deep_supervision_scales=[[1.0] * 3, [0.5] * 3])
    data = crop(toy, 3)
    data["segmentation"][..., : data["segmentation"].shape[-1] // 2] = -1
    labeled = run(labeled_transforms(svda_views(stock)), 0, **{k: v.clone() for k, v in data.items()})
    assert [tuple(s.shape[1:]) for s in labeled["segmentation"]] == [toy.patch[3], tuple(n // 2 for n in toy.patch[3])]
    views = svda_unlabeled(svda_views(stock))
    assert views.masks_image
    got = run(views, 0, **data)
    hidden = (got["segmentation"] < 0).expand_as(got["weak"])
    assert hidden.any()
    assert got["weak"][hidden].eq(0).all()
    assert got["image"][hidden].eq(0).all()


def test_nnunets_pipeline_is_left_alone(toy):
    stock = toy.stock_transforms(3)
    before = [repr(step) for step in stock.transforms]
    run(svda_unlabeled(svda_views(stock)), 0, **crop(toy, 3))
    assert [repr(step) for step in stock.transforms] == before


def test_batches_are_the_same_for_any_number_of_workers_and_transforms_pickle(toy, folders):
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    pipeline = pickle.loads(pickle.dumps(pipeline_of(toy, 3)))
    sizes = (toy.initial[3], toy.patch[3], LabelManager({"background": 0, "organ": 1}, None))

    def loader() -> IndexedLoader:
        cases = nnUNetDatasetBlosc2(str(folders.labeled))
        labeled = LabeledLoader(cases, 2, *sizes, 0.33, transforms=labeled_transforms(pipeline))
        pool = UnlabeledDataset(folders.unlabeled, use_mask=False)
        views = pickle.loads(pickle.dumps(svda_unlabeled(pipeline)))
        return PairedLoader(labeled, UnlabeledLoader(pool, 3, *sizes, transforms=views), seed=7, rank=0, start_index=0)

    drawn = []
    for workers in (0, 2):
        batches = wrap_loader(loader(), workers, pin_memory=False)
        drawn.append([next(batches) for _ in range(4)])
        batches.close()
    for a, b in zip(*drawn, strict=True):
        assert torch.equal(a["data"], b["data"])
        assert torch.equal(a["target"], b["target"])
        assert all(torch.equal(a["unlabeled"][k], b["unlabeled"][k]) for k in ("weak", "strong", "valid"))
