"""DiffRect's published views: enhancements against Pillow and SciPy, geometry shared by all, the strong view alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from scipy import ndimage

from nnssl.data.photometric import Enhance, brightness, contrast, published_views, sharpness
from nnssl.data.seeding import derive_seed, seed_cpu
from nnssl.data.views import Part, labeled_transforms, part_of, unlabeled_transforms

SPACES = [(9, 7), (5, 6, 7)]


def scan(space, channels=2, seed=0):
    return torch.rand(channels, *space, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(pipeline, index, **data):
    seed_cpu(derive_seed(0, 0, 0, index))
    return pipeline(**data)


# ----------------------------------------------------------------------------------------------- enhancements


@pytest.mark.parametrize("space", SPACES)
def test_enhancements_follow_their_formulas(space):
    x, f = scan(space), 1.07
    kernel = np.ones([3] * len(space))
    kernel[(1,) * len(space)] = 5
    inner = (slice(1, -1),) * len(space)
    for i, channel in enumerate(x.numpy()):
        np.testing.assert_allclose(contrast(x, f)[i], channel.mean() + f * (channel - channel.mean()))
        np.testing.assert_allclose(brightness(x, f)[i], f * channel)
        smooth = channel.copy()
        smooth[inner] = ndimage.convolve(channel, kernel / kernel.sum())[inner]
        np.testing.assert_allclose(sharpness(x, f)[i], smooth + f * (channel - smooth))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(contrast, "Contrast"), (brightness, "Brightness"), (sharpness, "Sharpness")]
)
def test_enhancements_are_pillows_up_to_its_rounding(ours, theirs):
    image, enhance = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageEnhance")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 28), dtype=np.uint8)
    pixels[8:20, 8:20] //= 4
    for factor in (1.0, 1.1, 1.6):  # the mean, the smoothed image and the result are rounded to integers
        expected = np.asarray(getattr(enhance, theirs)(image.fromarray(pixels)).enhance(factor), dtype=float)
        got = ours(torch.from_numpy(pixels / 255)[None], factor).clamp(0, 1)[0].numpy() * 255
        assert np.abs(got - expected).max() <= 1 + 0.5 * (factor - 1) + 1e-6
        assert (factor == 1) == np.array_equal(expected, pixels)


@pytest.mark.parametrize("space", SPACES)
def test_enhanced_images_keep_the_range_of_each_channel(space):
    x = scan(space) * torch.tensor([3.0, 50.0]).view(-1, *[1] * len(space)) - 7
    axes = list(range(1, x.ndim))
    for index in range(20):
        y = run(Enhance((2.0, 3.0), 1.0), index, image=x.clone())["image"]
        assert (y.amin(axes) >= x.amin(axes) - 1e-9).all()
        assert (y.amax(axes) <= x.amax(axes) + 1e-9).all()
        assert ((y - x).abs().amax(axes) > 0.1 * (x.amax(axes) - x.amin(axes))).all()


def test_enhancement_moves_with_the_scale_of_the_intensities():
    x = scan((9, 7))
    for index in range(10):
        plain, scaled = (run(Enhance(), index, image=image)["image"] for image in (x.clone(), 4 * x - 30))
        torch.testing.assert_close(scaled, 4 * plain - 30)


def test_each_enhancement_comes_with_its_probability_in_any_order():
    x = scan((9, 7))
    draws = [Enhance().get_parameters(image=x)["steps"] for _ in range(600)]
    for i in range(3):
        assert np.mean([i in [step for step, _ in steps] for steps in draws]) == pytest.approx(0.5, abs=0.08)
    factors = [factor for steps in draws for _, factor in steps]
    assert 1 <= min(factors) < 1.01
    assert 1.09 < max(factors) < 1.1
    orders = {tuple(step for step, _ in Enhance(probability=1.0).get_parameters(image=x)["steps"]) for _ in range(100)}
    assert orders == set(itertools.permutations(range(3)))


def test_nothing_chosen_or_a_constant_image_changes_nothing():
    x = scan((9, 7)).float()
    assert torch.equal(Enhance(probability=0.0)(image=x.clone())["image"], x)
    flat = torch.full((1, 9, 7), -3.0)
    assert torch.equal(Enhance((2.0, 3.0), 1.0)(image=flat.clone())["image"], flat)


# ------------------------------------------------------------------------------------------------------ views

KINDS = [(2, False), (3, False), (3, True)]


def coordinates(space, offset=1.0):
    """Return one channel an axis that holds the voxel's coordinate; 0 means outside."""
    axes = torch.meshgrid(*[torch.arange(float(n)) + offset for n in space], indexing="ij")
    return torch.stack(axes)


def crop(toy, dim, flat, image=None):
    """Return a crop of twice the patch's size (the patch's in the slice axis of a pseudo-2D pipeline)."""
    space = [n if flat and i == 0 else 2 * n for i, n in enumerate(toy.patch[dim])]
    return {
        "image": coordinates(space) if image is None else image(space),
        "segmentation": torch.zeros(1, *space, dtype=torch.int16),
    }


def spatial_of(pipeline) -> SpatialTransform:
    return next(step for step in pipeline.transforms if isinstance(step, SpatialTransform))


def views_of(toy, dim, flat=False, rotation=None, intensity=None, use_mask=False):
    """Return the published pipeline, its probabilities set where they are given."""
    stock = toy.stock_transforms(dim, use_mask, do_dummy_2d_data_aug=flat)
    pipeline = published_views(stock)
    if rotation is not None:
        spatial_of(pipeline).p_rotation = rotation
    for step in pipeline.transforms if intensity is not None else []:
        if isinstance(step, Enhance):
            step.probability = intensity
        if hasattr(step, "apply_probability"):
            step.apply_probability = intensity
    return pipeline


@pytest.mark.parametrize(("dim", "flat"), KINDS)
def test_without_rotation_views_are_the_flipped_center(toy, dim, flat):
    pipeline = unlabeled_transforms(views_of(toy, dim, flat, rotation=0, intensity=0))
    data = crop(toy, dim, flat)
    starts = [(n - p) // 2 for n, p in zip(data["image"].shape[1:], toy.patch[dim], strict=True)]
    center = data["image"][(slice(None), *(slice(s, s + p) for s, p in zip(starts, toy.patch[dim], strict=True)))]
    subsets = [axes for k in range(dim + 1) for axes in itertools.combinations(range(1, dim + 1), k)]
    seen = set()
    for index in range(20 * 2**dim):
        weak = run(pipeline, index, **crop(toy, dim, flat))["weak"]
        matching = [axes for axes in subsets if torch.allclose(weak, center.flip(axes), atol=1e-4)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert seen == set(subsets)


@pytest.mark.parametrize(("dim", "flat"), KINDS)
def test_half_of_the_views_are_rotated_by_any_angle(toy, dim, flat):
    pipeline = ComposeTransforms([s for s in views_of(toy, dim, flat, intensity=0).transforms if part_of(s).value == 0])
    angles = []
    for index in range(200):
        image = run(pipeline, index, **crop(toy, dim, flat))["image"]
        grown = [image[-1].diff(dim=axis).mean().item() for axis in (-2, -1)]  # of the last coordinate
        angles.append(np.arctan2(*grown) % (2 * np.pi))
    turned = np.array([a for a in angles if abs(a / np.pi - round(a / np.pi)) > 1e-3])
    assert len(turned) / len(angles) == pytest.approx(0.5, abs=0.1)
    assert np.histogram(turned, bins=4, range=(0, 2 * np.pi))[0].min() > len(turned) / 8


@pytest.mark.parametrize("flat", [False, True])
def test_rotations_in_3d_keep_every_voxel_in_its_slice(toy, flat):
    pipeline = unlabeled_transforms(views_of(toy, 3, flat, rotation=1, intensity=0))
    slices = torch.arange(float(toy.patch[3][0])) + 1 + (0 if flat else toy.patch[3][0] // 2)
    moved = 0
    for index in range(10):
        weak = run(pipeline, index, **crop(toy, 3, flat))["weak"]
        assert weak.shape == (3, *toy.patch[3])
        first = weak[0, :, 4:6, 6:8].mean((1, 2))  # the rotation's center is never outside
        assert torch.allclose(first, slices, atol=1e-3) or torch.allclose(first, slices.flip(0), atol=1e-3)
        moved += weak[2].diff(dim=1).abs().mean().item() > 1e-2  # the last coordinate grows along another axis
    assert moved > 5


@pytest.mark.parametrize(("dim", "flat"), KINDS)
def test_the_weak_view_is_the_geometry_and_only_the_strong_one_changes(toy, dim, flat):
    for intensity in (0.0, 1.0):
        pipeline = views_of(toy, dim, flat, intensity=intensity)
        geometry = ComposeTransforms([step for step in pipeline.transforms if part_of(step) is Part.GEOMETRY])
        for index in range(10):
            views = run(unlabeled_transforms(pipeline), index, **crop(toy, dim, flat))
            expected = run(geometry, index, **crop(toy, dim, flat))
            assert torch.equal(views["weak"], expected["image"])
            assert torch.equal(views["image"], views["weak"]) == (intensity == 0)
            extent = views["weak"].max() - views["weak"].min()
            # at most 10 % of contrast and brightness, and less than a voxel of blur
            assert (views["image"] - views["weak"]).abs().mean() < 0.15 * extent


@pytest.mark.parametrize(("dim", "flat"), KINDS)
def test_image_weak_view_and_labels_share_their_geometry(toy, dim, flat):
    def quarter(space):
        image = torch.zeros(2, *space)
        image[..., space[-2] // 2 - 2 :, : space[-1] // 2] = 1
        return image

    pipeline = labeled_transforms(views_of(toy, dim, flat), weak_view=True)
    for index in range(20):
        data = crop(toy, dim, flat, quarter)
        data["segmentation"] = data["image"][:1].short()
        views = run(pipeline, index, **data)
        labels = views["segmentation"] > 0
        assert 0 < labels.float().mean() < 1
        for view in ("image", "weak"):
            assert ((views[view][:1] > 0.5) != labels).float().mean() < 0.06, view


@pytest.mark.parametrize("dim", [2, 3])
def test_masks_and_label_transforms_stay(toy, dim):
    stock = toy.stock_transforms(dim, True, deep_supervision_scales=[[1.0] * dim, [0.5] * dim])
    pipeline = labeled_transforms(published_views(stock), weak_view=True)
    for index in range(5):
        data = crop(toy, dim, False)
        data["image"] = data["image"][:2]
        data["segmentation"][..., : data["segmentation"].shape[-1] // 2] = -1
        views = run(pipeline, index, **data)
        assert [tuple(s.shape[1:]) for s in views["segmentation"]] == [
            toy.patch[dim],
            tuple(n // 2 for n in toy.patch[dim]),
        ]
        assert all(s.min() >= 0 for s in views["segmentation"])
        outside = [views[name] == 0 for name in ("image", "weak")]
        assert outside[0].any()
        assert torch.equal(*outside)


@pytest.mark.parametrize(("dim", "flat"), KINDS)
def test_what_a_rotation_brings_in_from_outside_is_background(toy, dim, flat):
    pipeline = labeled_transforms(views_of(toy, dim, flat, rotation=1), weak_view=True)
    outside = 0
    for index in range(10):
        image, labels = torch.full((1, *toy.patch[dim]), 5.0), torch.ones(1, *toy.patch[dim], dtype=torch.int16)
        views = run(pipeline, index, image=image, segmentation=labels)
        beyond = views["weak"] == 0
        assert views["segmentation"][beyond].eq(0).all()
        assert views["segmentation"][views["weak"] == 5].eq(1).all()
        outside += beyond.sum()
    assert outside > 100


@pytest.mark.parametrize(("dim", "flat"), KINDS)
def test_nnunets_intensity_block_is_replaced_and_its_pipeline_left_alone(toy, dim, flat):
    stock = toy.stock_transforms(dim, do_dummy_2d_data_aug=flat)
    before = [repr(step) for step in stock.transforms]
    intensity = [step for step in published_views(stock).transforms if part_of(step) is Part.INTENSITY]
    assert [type(getattr(step, "transform", step)) for step in intensity] == [Enhance, GaussianBlurTransform]
    assert [repr(step) for step in stock.transforms] == before
    assert spatial_of(stock).p_rotation == 0.2


@pytest.mark.parametrize("space", SPACES)
def test_the_blur_is_below_a_voxel_and_vanishes_with_its_width(toy, space):
    pipeline = published_views(toy.stock_transforms(len(space)))
    blur = next(s.transform for s in pipeline.transforms if hasattr(s, "apply_probability"))
    low, high = blur.blur_sigma
    assert 0 < low < 0.01
    assert high == 1
    x = scan(space).float()
    blur.blur_sigma = (low, low)
    assert torch.allclose(blur(image=x.clone())["image"], x)
    blur.blur_sigma = (high, high)
    expected = ndimage.gaussian_filter(x.numpy(), (0, *[1] * len(space)), mode="mirror", radius=(0, *[3] * len(space)))
    np.testing.assert_allclose(blur(image=x.clone())["image"], expected, atol=1e-4)
    blur.blur_sigma = (low, high)
    assert len(set(blur.get_parameters(image=x)["sigmas"])) == 1  # one width for all axes, as Pillow's
