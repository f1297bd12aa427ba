import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform

from nnssl.data.seeding import derive_seed, seed_cpu
from nnssl.data.views import ViewTransforms, labeled_transforms, part_of, reproducible, unlabeled_transforms


class Affine(ImageOnlyTransform):
    """A strong view whose effect is known: 3 x + 50."""

    def _apply_to_image(self, img, **params):
        return img.mul_(3).add_(50)


class Halve(ImageOnlyTransform):
    def _apply_to_image(self, img, **params):
        return img[:, ::2]


def crop(toy, dim, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    segmentation = torch.zeros((1, *toy.initial[dim]), dtype=torch.int16)
    segmentation[..., :5] = -1
    return {"image": torch.randn((channels, *toy.initial[dim]), generator=generator), "segmentation": segmentation}


def run(pipeline, index, **data):
    seed_cpu(derive_seed(0, 0, 0, index))
    return pipeline(**data)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize("weak_view", [False, True])
def test_labeled_images_and_targets_are_those_of_nnunet(toy, dim, use_mask, weak_view):
    stock = toy.stock_transforms(dim, use_mask, deep_supervision_scales=[[1.0] * dim, [0.5] * dim])
    ours = labeled_transforms(stock, weak_view)
    stock = reproducible(stock)
    for index in range(20):
        expected, got = run(stock, index, **crop(toy, dim)), run(ours, index, **crop(toy, dim))
        assert torch.equal(got["image"], expected["image"])
        assert all(torch.equal(a, b) for a, b in zip(got["segmentation"], expected["segmentation"], strict=True))
        assert ("weak" in got) == weak_view


@pytest.mark.parametrize("dim", [2, 3])
def test_labeled_weak_view_shares_the_geometry_of_the_image(toy, dim):
    stock = toy.stock_transforms(dim, True)
    stock.transforms = [t for t in stock.transforms if not isinstance(t, RandomTransform)]
    stock.transforms.insert(1, Affine())
    moved = 0
    for index in range(20):
        views = run(labeled_transforms(stock, weak_view=True), index, **crop(toy, dim))
        inside = views["weak"][:1] != 0
        assert torch.equal(views["image"][:1][inside], views["weak"][:1][inside] * 3 + 50)
        moved += not torch.equal(
            views["weak"], run(ViewTransforms(stock.transforms[:1]), index, **crop(toy, dim))["weak"]
        )
    assert moved > 10  # mirroring comes after the intensity block and still reaches the weak view


@pytest.mark.parametrize("dim", [2, 3])
def test_views_are_equal_when_no_intensity_transform_is_applied(toy, dim):
    stock = toy.stock_transforms(dim, True)
    for probability, equal in ((0, True), (1, False)):
        toy.set_intensity_probability(stock, probability)
        pipeline = unlabeled_transforms(stock)
        for index in range(10):
            views = run(pipeline, index, **crop(toy, dim))
            assert torch.equal(views["image"], views["weak"]) == equal


@pytest.mark.parametrize("dim", [2, 3])
def test_weak_view_is_the_geometry_alone(toy, dim):
    """Coordinates as intensities: the weak view must be the stock geometry, untouched by the strong one."""
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in toy.initial[dim]], indexing="ij")
    image = torch.stack(axes)
    stock = toy.stock_transforms(dim)
    geometry = ComposeTransforms([t for t in stock.transforms if part_of(t).name == "GEOMETRY"])
    toy.set_intensity_probability(stock, 1)
    for index in range(10):
        data = {"image": image.clone(), "segmentation": crop(toy, dim)["segmentation"]}
        expected = run(geometry, index, image=image.clone(), segmentation=data["segmentation"].clone())
        views = run(unlabeled_transforms(stock), index, **data)
        assert torch.equal(views["weak"], expected["image"])
        assert torch.equal(views["segmentation"], expected["segmentation"])


@pytest.mark.parametrize("dim", [2, 3])
def test_a_methods_own_strong_view_replaces_the_intensity_block(toy, dim):
    pipeline = unlabeled_transforms(toy.stock_transforms(dim), strong=[Affine()])
    for index in range(10):
        views = run(pipeline, index, **crop(toy, dim))
        assert torch.equal(views["image"], views["weak"] * 3 + 50)


def test_no_strong_transforms_give_two_equal_views_that_share_no_memory(toy):
    views = run(unlabeled_transforms(toy.stock_transforms(3), strong=[]), 0, **crop(toy, 3))
    assert torch.equal(views["image"], views["weak"])
    views["image"].zero_()
    assert views["weak"].abs().sum() > 0


@pytest.mark.parametrize("dim", [2, 3])
def test_masking_comes_last_on_both_views(toy, dim):
    pipeline = unlabeled_transforms(toy.stock_transforms(dim, True), strong=[Affine()])
    for index in range(10):
        views = run(pipeline, index, **crop(toy, dim))
        outside = (views["segmentation"] < 0).expand_as(views["weak"])
        assert outside.any()
        assert views["weak"][outside].eq(0).all()
        assert views["image"][outside].eq(0).all()
        assert views["image"][~outside].ne(0).all()


def test_label_transforms_are_left_out_of_the_unlabeled_pipeline(toy):
    stock = toy.stock_transforms(
        3,
        True,
        deep_supervision_scales=[[1.0] * 3, [0.5] * 3],
        is_cascaded=True,
        foreground_labels=[1, 2],
        regions=[[1, 2], [2]],
    )
    views = run(unlabeled_transforms(stock), 0, **crop(toy, 3))
    assert views["image"].shape[0] == 2
    assert isinstance(views["segmentation"], torch.Tensor)
    assert set(np.unique(views["segmentation"])) <= {-1, 0}


def test_dummy_2d_keeps_shapes_and_slices(toy):
    stock = toy.stock_transforms(3, do_dummy_2d_data_aug=True, mirror_axes=None)
    toy.set_intensity_probability(stock, 0)
    data = crop(toy, 3)
    data["image"] = torch.arange(16.0)[None, :, None, None].expand(2, *toy.initial[3]).clone()
    data = {key: value[:, :12] for key, value in data.items()}
    for index in range(10):
        views = run(unlabeled_transforms(stock), index, **data)
        assert views["weak"].shape == (2, 12, 10, 14)
        centers = views["weak"][0, :, 5, 7]
        assert torch.allclose(centers, torch.arange(12.0), atol=1e-4)  # in-plane geometry only


def test_the_stock_pipeline_is_left_as_it_was_and_the_copy_never_times_its_blur(toy):
    stock = toy.stock_transforms(3)
    copies = [labeled_transforms(stock), labeled_transforms(stock, True), unlabeled_transforms(stock)]

    def blurs(pipeline):
        steps = pipeline.transforms if hasattr(pipeline, "transforms") else [step for _, step in pipeline.steps]
        inner = [getattr(step, "transform", step) for step in steps]
        return [step.benchmark for step in inner if isinstance(step, GaussianBlurTransform)]

    assert blurs(stock) == [True]
    assert [blurs(copied) for copied in copies] == [[False]] * 3


def test_transforms_of_unknown_or_mixed_kind_are_refused(toy):
    with pytest.raises(TypeError, match="mixes"):
        part_of(OneOfTransform([Affine(), MirrorTransform((0,))]))
    with pytest.raises(TypeError, match="share their geometry"):
        unlabeled_transforms(toy.stock_transforms(3), strong=[MirrorTransform((0,))])
    with pytest.raises(ValueError, match="shape"):
        run(unlabeled_transforms(toy.stock_transforms(3), strong=[Halve()]), 0, **crop(toy, 3))
