"""Tiny preprocessed data sets in nnU-Net's own format, and nnU-Net's own augmentation for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl.data.loader import IndexedLoader, LabeledLoader, PairedLoader, UnlabeledLoader
from nnssl.data.unlabeled import UnlabeledDataset
from nnssl.data.views import labeled_transforms, unlabeled_transforms

PATCH = {2: (16, 12), 3: (12, 10, 14)}
INITIAL = {2: (20, 18), 3: (16, 16, 18)}
SHAPE = (18, 20, 22)


def write_case(folder: Path, name: str, data: np.ndarray, seg: np.ndarray, properties: dict | None = None) -> None:
    """Write one preprocessed case: data (c, z, y, x), seg (1, z, y, x)."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = dict(chunks=data.shape, blocks=(1, *data.shape[1:]), chunks_seg=seg.shape, blocks_seg=seg.shape)
    nnUNetDatasetBlosc2.save_case(
        data.astype(np.float32), seg.astype(np.int16), properties or {}, str(folder / name), **chunks
    )


def random_case(number: int, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Make a two-channel case with a nonzero mask: -1 in the first quarter of the last axis, 0 elsewhere."""
    data = np.random.default_rng(number).normal(size=(2, *shape))
    seg = np.zeros((1, *shape))
    seg[..., : shape[-1] // 4] = -1
    return data, seg


def stock_transforms(dim: int, use_mask: bool = False, **kwargs):
    """Return nnU-Net's training pipeline for a patch of `PATCH`."""
    settings = dict(
        patch_size=PATCH[dim],
        rotation_for_DA=(-0.5, 0.5),
        deep_supervision_scales=None,
        mirror_axes=tuple(range(dim)),
        do_dummy_2d_data_aug=False,
        use_mask_for_norm=[use_mask, use_mask],
    )
    return nnUNetTrainer.get_training_transforms(**{**settings, **kwargs})


def set_intensity_probability(pipeline, probability: float) -> None:
    """Set how often nnU-Net's intensity transforms are applied."""
    for step in pipeline.transforms:
        if hasattr(step, "apply_probability"):
            step.apply_probability = probability


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """Return this file's helpers (test modules cannot import a conftest)."""
    return SimpleNamespace(
        patch=PATCH,
        initial=INITIAL,
        write_case=write_case,
        random_case=random_case,
        stock_transforms=stock_transforms,
        set_intensity_probability=set_intensity_probability,
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> SimpleNamespace:
    """Write three labeled and four unlabeled cases."""
    root = tmp_path_factory.mktemp("preprocessed")
    for number in range(3):
        data, seg = random_case(number)
        seg[:, 8:12, 8:12, 8:12] = 1
        locations = {1: np.argwhere(seg == 1), (-1, 0, 1): np.argwhere(seg >= -1)[::7]}
        write_case(root / "labeled", f"lab_{number}", data, seg, {"class_locations": locations})
    for number in range(4):
        write_case(root / "unlabeled", f"un_{number}", *random_case(10 + number))
    return SimpleNamespace(root=root, labeled=root / "labeled", unlabeled=root / "unlabeled")


@pytest.fixture
def make_loader(folders) -> Callable[..., IndexedLoader]:
    """Return a function that builds a paired loader as a trainer would."""

    def make(
        dim: int = 3,
        start_index: int = 0,
        unlabeled: bool = True,
        use_mask: bool = False,
        weak_view: bool = False,
        seed: int = 7,
        rank: int = 0,
        folder: Path | None = None,
    ) -> PairedLoader:
        stock = stock_transforms(dim, use_mask)
        sizes = (INITIAL[dim], PATCH[dim], LabelManager({"background": 0, "organ": 1}, None))
        labeled = LabeledLoader(
            nnUNetDatasetBlosc2(str(folders.labeled)),
            2,
            *sizes,
            oversample_foreground_percent=0.33,
            transforms=labeled_transforms(stock, weak_view),
        )
        cases = UnlabeledDataset(folder or folders.unlabeled, use_mask=use_mask)
        stream = UnlabeledLoader(cases, 3, *sizes, transforms=unlabeled_transforms(stock))
        return PairedLoader(labeled, stream if unlabeled else None, seed=seed, rank=rank, start_index=start_index)

    return make
