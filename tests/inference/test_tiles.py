"""Tiles as the literature lays them: where they lie, that they count alike, and that no precision is lost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnssl.cli.predict import build_parser, main
from nnssl.errors import UserError
from nnssl.inference.predict import PredictOptions
from nnssl.inference.tiles import StridePredictor, tile_starts


@pytest.mark.parametrize(
    ("size", "patch", "stride", "expected"),
    [
        (183, 112, 18, [0, 18, 36, 54, 71]),  # LA: 5 x 3 x 3 = 45 tiles of a scan of 183 x 140 x 88
        (140, 112, 18, [0, 18, 28]),
        (88, 80, 4, [0, 4, 8]),
        (96, 96, 64, [0]),
        (97, 96, 64, [0, 1]),
        (160, 96, 64, [0, 64]),
    ],
)
def test_tiles_start_where_the_literatures_code_starts_them(size, patch, stride, expected):
    assert tile_starts(size, patch, stride) == expected


def predictor(stride, patch, answer, regions=False) -> StridePredictor:
    """Return a predictor whose network is ``answer``: tile (1, 1, ...) -> logits (1, C, ...)."""
    found = StridePredictor(stride, device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    softmax = torch.sigmoid if regions else lambda x: torch.softmax(x, 0)
    found.configuration_manager = SimpleNamespace(patch_size=patch)
    found.label_manager = SimpleNamespace(num_segmentation_heads=2, has_regions=regions, apply_inference_nonlin=softmax)
    found._internal_maybe_mirror_and_predict = answer
    return found


def averaged(found: StridePredictor, image: torch.Tensor) -> torch.Tensor:
    slicers = found._internal_get_sliding_window_slicers(image.shape[1:])
    return found._internal_predict_sliding_window_return_logits(image, slicers, False)


@pytest.mark.parametrize("regions", [False, True])
def test_probabilities_are_averaged_and_every_tile_counts_alike(regions):
    logits = iter(torch.tensor([[4.0, 0.0], [0.0, 1.0], [-2.0, 0.5]]))

    def answer(tile):
        return next(logits)[None, :, None, None].expand(1, 2, *tile.shape[2:])

    found = averaged(predictor((2, 2), (4, 4), answer, regions), torch.zeros(1, 1, 4, 8))
    chance = torch.sigmoid if regions else lambda x: torch.softmax(x, 0)
    tiles = [chance(torch.tensor(v)) for v in ([4.0, 0.0], [0.0, 1.0], [-2.0, 0.5])]
    expected = [tiles[0], (tiles[0] + tiles[1]) / 2, (tiles[1] + tiles[2]) / 2, tiles[2]]
    for x in range(8):
        torch.testing.assert_close(chance(found[:, 0, 0, x]), expected[x // 2], atol=1e-6, rtol=0)


def test_a_voxel_under_hundreds_of_tiles_keeps_single_precision():
    found = predictor((1, 1, 1), (16, 16, 16), lambda x: torch.stack([x[:, 0] + 0.001, x[:, 0]], 1))
    logits = averaged(found, torch.zeros(1, 24, 24, 24))
    assert torch.allclose(torch.softmax(logits, 0)[0], torch.sigmoid(torch.tensor(0.001)), atol=2e-5, rtol=0)
    assert (logits.argmax(0) == 0).all()


def test_slices_of_a_volume_are_tiled_one_by_one():
    found = predictor((4, 4), (8, 8), lambda x: x.new_zeros(1, 2, 8, 8))
    tiles = found._internal_get_sliding_window_slicers((3, 8, 12))
    assert [(t[1], t[2].start, t[3].start) for t in tiles] == [(z, 0, x) for z in range(3) for x in (0, 4)]


@pytest.mark.parametrize("stride", [(4, 4, 4), (4, 9)])
def test_strides_that_do_not_fit_the_patch_are_refused(stride):
    found = predictor(stride, (8, 8), None)
    with pytest.raises(UserError, match="--stride"):
        found._internal_get_sliding_window_slicers((8, 8))


def test_the_command_takes_strides_from_flags_above_the_preset(tmp_path: Path, capsys):
    from nnssl.cli.predict import _stride

    parse = build_parser().parse_args
    base = ["-i", "a", "-o", "b"]
    chosen = {"stride": [4, 18, 18]}
    assert _stride(parse(base), chosen) == (4, 18, 18)
    assert _stride(parse([*base, "--stride", "2", "9", "9"]), chosen) == (2, 9, 9)
    assert _stride(parse([*base, "-step_size", "0.5"]), chosen) is None
    assert _stride(parse(base), {}) is None
    with pytest.raises(UserError, match="whole numbers"):
        _stride(parse(base), {"stride": [4, "18", 18]})
    with pytest.raises(UserError, match="--stride or by -step_size"):
        _stride(parse([*base, "-step_size", "0.5", "--stride", "2"]), {})
    for bad in ((0, 1), (1,), (1, 1, 1, 1)):
        with pytest.raises(UserError, match="distances of tiles"):
            PredictOptions(stride=bad)


@pytest.mark.usefixtures("results")
def test_a_model_predicts_with_strides(results: Path, images: Path, tmp_path: Path):
    import json

    import SimpleITK
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(json.loads((results / "plans.json").read_text()))
    torch.manual_seed(0)
    network = nnUNetTrainer.build_network_architecture(plans, plans.get_configuration("2d"), 1, 3, False)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "2d"},
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint, results / "fold_all" / "checkpoint_final.pth")
    base = ["-i", str(images), "-m", str(results), "-npp", "0", "-nps", "0", "-device", "cpu", "--disable_tta"]
    masks = {}
    for name, flags in (("strides", ["--stride", "3", "5"]), ("stock", [])):
        assert main([*base, "-o", str(tmp_path / name), *flags]) == 0
        read = SimpleITK.ReadImage(str(tmp_path / name / "case_1.nii.gz"))
        masks[name] = SimpleITK.GetArrayFromImage(read)
    assert len(np.unique(masks["strides"])) > 1
    assert (masks["strides"] != masks["stock"]).any()
    assert (masks["strides"] == masks["stock"]).mean() > 0.5
