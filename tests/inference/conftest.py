"""A trained-looking model folder: hand-written plans, a small network with random weights, toy images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

NAME = "SupervisedTrainer__nnUNetPlans__2d"
NORMS = {"norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d", "nonlin": "torch.nn.LeakyReLU"}


def toy_plans() -> dict:
    """Return plans with a 2d configuration (patch 16, three stages) and a cascade beside it."""
    resample = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    kernels = [[3, 3]] * 3
    network = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": "torch.nn.modules.conv.Conv2d",
            "kernel_sizes": kernels,
            "strides": [[1, 1], [2, 2], [2, 2]],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin_kwargs": {"inplace": True},
            **NORMS,
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 16],
        "median_image_size_in_voxels": [20.0, 20.0],
        "spacing": [1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resample,
        "resampling_fn_seg_kwargs": {**resample, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resample, "order": 1},
        "architecture": network,
        "batch_dice": True,
    }
    return {
        "dataset_name": "Dataset501_Toy",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [4.0, 1.0, 1.0],
        "original_median_shape_after_transp": [3, 20, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "2d": configuration,
            "3d_cascade_fullres": {"inherits_from": "2d", "previous_stage": "3d_lowres"},
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
    }


def write_image(path: Path, seed: int = 0, shape: tuple[int, int, int] = (3, 20, 22)) -> None:
    """Write a small image with a grid that is not the default one: spacing, origin, rotated and flipped axes."""
    image = SimpleITK.GetImageFromArray(np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32))
    image.SetSpacing((1.2, 0.9, 4.0))
    image.SetOrigin((-12.5, 30.25, 7.0))
    image.SetDirection((0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0))
    SimpleITK.WriteImage(image, str(path))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a results folder with one model: metadata and an empty checkpoint, enough for every refusal."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    folder = tmp_path / "results" / "Dataset501_Toy" / NAME
    (folder / "fold_all").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(toy_plans()))
    labels = {"background": 0, "a": 1, "b": 2}
    dataset = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    (folder / "fold_all" / "checkpoint_final.pth").write_bytes(b"")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder with two single-channel images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (1, 2):
        write_image(folder / f"case_{number}_0000.nii.gz", number)
    return folder
