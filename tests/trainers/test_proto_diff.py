"""What ProtoDiff promises beyond the contract: what reaches the image path, weights files, masks of unknown quality."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nnssl_test_tools import same, weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl.errors import UserError
from nnssl.networks import visual_encoders
from nnssl.networks.visual_encoders import ViTLevels
from nnssl.trainers.base import SemiSupervisedTrainer, to_device
from nnssl.trainers.proto_diff import boundary
from nnssl.trainers.proto_diff_settings import NETWORK, ProtoDiffSettings, network_architecture, planned_levels

SMALL_VIT = {"embed_dim": 64, "depth": 4, "num_heads": 2}
IMAGE_PATH = ("visual", "lateral", "branches", "interaction", "prediction", "aux_heads", "time_embedding")


@pytest.fixture
def made(build):
    """Return a function that builds a trainer."""

    def make(configuration="2d", start=True, **settings):
        return build("ProtoDiffTrainer", configuration, settings, None, start)

    return make


@pytest.fixture
def small_vit(monkeypatch):
    """Let the smallest backbone be a quarter million weights."""
    original = ViTLevels.__init__

    def init(self, *arguments, **kwargs):
        original(self, *arguments, **{**kwargs, "model": SMALL_VIT})

    monkeypatch.setattr(visual_encoders.ViTLevels, "__init__", init)


def groups(trainer, batch):
    return list(trainer.compute_losses(to_device(batch, trainer.device)))


def gradient(trainer, loss) -> dict[str, torch.Tensor]:
    named = [(n, p) for n, p in trainer.network.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    return {n: g for (n, _), g in zip(named, grads, strict=True) if g is not None and bool(g.abs().sum() > 0)}


# ----------------------------------------------------------------------------------------- who learns from what


@pytest.mark.parametrize("proto_on", ["gt", "pred"])
def test_prototype_losses_reach_the_image_path_only_through_the_prediction(made, proto_on):
    trainer = made(proto_on=proto_on, w_inter=1.0, w_intra=1.0)
    (group,) = groups(trainer, next(trainer.dataloader_train))
    reached = gradient(trainer, group.terms["loss_inter"] + group.terms["loss_intra"])
    assert any(n.startswith("label_encoder") for n in reached)
    assert any(n.startswith(IMAGE_PATH) for n in reached) == (proto_on == "pred")


def test_weights_scale_their_terms_and_zero_leaves_them_out(made):
    base = made(w_inter=1.0, w_intra=1.0, aux_weight=1.0)
    batch = next(base.dataloader_train)
    terms = base.train_step(copy.deepcopy(batch))
    scaled = made(w_inter=0.5, w_intra=0.25, aux_weight=0.125).train_step(copy.deepcopy(batch))
    for name, factor in {"supervised": 1, "inter": 0.5, "intra": 0.25, "auxiliary": 0.125}.items():
        assert scaled[f"loss_{name}"] == pytest.approx(factor * terms[f"loss_{name}"], rel=1e-4), name
    bare = made(w_inter=0.0, w_intra=0.0, aux_weight=0.0).train_step(copy.deepcopy(batch))
    assert set(bare) == {"loss_supervised"}


def test_ignored_voxels_give_no_gradient_and_no_prototype(made):
    """What the label says where it is ignored changes neither loss nor prototypes; there, logits get no gradient."""
    trainer = made(loss="ce")
    space = trainer.label_space
    trainer.label_space = type(space)(space.num_heads, False, 9)
    batch = next(trainer.dataloader_train)
    batch["target"][:, :, :16] = 0
    batch["target"][:, :, 16:] = 9
    captured = {}
    original = trainer.segmentation_loss

    def watched(logits, target):
        logits.retain_grad()
        captured.setdefault("logits", logits)
        return original(logits, target)

    trainer.segmentation_loss = watched
    (group,) = groups(trainer, batch)
    sum(group.terms.values()).backward()
    grad = captured["logits"].grad
    assert grad[:, :, 16:].abs().sum() == 0
    assert grad[:, :, :16].abs().sum() > 0
    assert trainer.prototypes.seen.tolist() == [True, False, False]


def test_boundaries_are_where_a_neighbor_differs():
    cells = torch.zeros(1, 4, 5, dtype=torch.int64)
    cells[0, :, 3:] = 1
    assert boundary(cells)[0].int().tolist() == [[0, 0, 1, 1, 0]] * 4
    assert not boundary(torch.ones(2, 3, 3, 3, dtype=torch.int64)).any()


def test_masks_of_unknown_quality_are_learned_by_their_weight(made):
    trainer = made(w_inter=0.0, w_intra=0.0)
    batch = next(trainer.dataloader_train)
    pseudo = {"data": batch["data"], "target": batch["target"], "weight": torch.tensor([1.0, 0.0]), "keys": ["a", "b"]}
    first, second = groups(trainer, {**batch, "pseudo": pseudo})
    assert (first.step, second.step) == ((), ("network",))
    assert set(second.terms) == {"loss_pseudo", "loss_pseudo_auxiliary"}
    half = made(w_inter=0.0, w_intra=0.0, pseudo_weight=0.5)
    whole = made(w_inter=0.0, w_intra=0.0)
    a = whole.train_step({**batch, "pseudo": pseudo})["loss_pseudo"]
    assert half.train_step({**batch, "pseudo": pseudo})["loss_pseudo"] == pytest.approx(0.5 * a, rel=1e-4)
    none = made(w_inter=0.0, w_intra=0.0)
    silent = {**pseudo, "weight": torch.zeros(2)}
    assert none.train_step({**batch, "pseudo": silent})["loss_pseudo"] == 0
    (alone,) = groups(made(pseudo_weight=0.0), {**batch, "pseudo": pseudo})
    assert alone.step == ("network",)


def test_times_are_continuous_or_steps(made):
    for time, check in (("discrete", lambda t: (t * 8).frac() == 0), ("continuous", lambda t: (t > 0) & (t < 0.999))):
        trainer, seen = made(time=time, timesteps=8), []
        trainer.network.register_forward_pre_hook(lambda _, __, kw, seen=seen: seen.append(kw["t"]), with_kwargs=True)
        batch = next(trainer.dataloader_train)
        for _ in range(6):
            trainer.train_step(batch)
        times = torch.cat(seen)
        assert check(times).all()
        assert len(times.unique()) > 3


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize(
    "settings",
    [
        {"norm": "batch", "aux": "per_level", "loss": "ce", "label_down": "area", "time": "discrete"},
        {
            "level_fusion": "softmax",
            "assign": "sinkhorn",
            "assign_update": "gumbel",
            "accumulate": True,
            "randsteps": 2,
        },
        {"diffusion": False, "num_prototypes": 1, "stride": 2, "cells_per_class": 16},
    ],
)
def test_every_switch_trains_and_predicts(made, configuration, settings):
    trainer = made(configuration, proto_on="pred", **settings)
    batch = next(trainer.dataloader_train)
    scalars = [trainer.train_step(batch) for _ in range(2)][-1]
    assert all(np.isfinite(v) for v in scalars.values())
    trainer.network.eval()
    with torch.no_grad():
        outputs = trainer.branches(batch["data"])
    assert set(outputs) == ({"network"} if settings.get("diffusion") is False else {"network", "one_step", "blank"})
    assert all(o.shape == (2, 3, *batch["data"].shape[2:]) for o in outputs.values())


def test_switching_the_method_off_is_warned_of(made, capsys):
    made(w_inter=0.0, w_intra=0.0, diffusion=False)
    said = capsys.readouterr().out
    assert "WARNING: w_inter=0 w_intra=0" in said
    assert "WARNING: diffusion=False" in said


# ------------------------------------------------------------------------------------------------ the plan's network


def plans(ndim=2, patch=(128, 128), strides=6, schemes=("ZScoreNormalization",), batch=8) -> dict:
    kwargs = {
        "n_stages": strides,
        "features_per_stage": [8 * 2**i for i in range(strides)],
        "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
        "strides": [[1] * ndim, *[[2] * ndim] * (strides - 1)],
    }
    architecture = {"network_class_name": "PlainConvUNet", "arch_kwargs": kwargs, "_kw_requires_import": ["conv_op"]}
    config = {"architecture": architecture, "patch_size": list(patch), "batch_size": batch}
    return {"configurations": {"x": {**config, "normalization_schemes": list(schemes)}}}


def adapted(plan: dict, **settings) -> dict:
    network_architecture(plan, "x", ProtoDiffSettings.from_mapping(settings))
    return plan["configurations"]["x"]["architecture"]["arch_kwargs"]


@pytest.mark.parametrize(
    ("patch", "count", "stride", "stages", "cell"),
    [
        ((512, 512), 8, None, [2, 4, 5, 7], [16, 16]),
        ((256, 256), 7, None, [1, 3, 4, 6], [8, 8]),
        ((128, 128), 6, None, [0, 2, 3, 5], [4, 4]),
        ((128, 128), 6, 16, [2, 3, 4, 5], [16, 16]),
        ((32, 32), 3, None, [0, 1, 2], [4, 4]),
        ((128, 128, 128), 6, None, [1, 2, 4, 5], [8, 8, 8]),
    ],
)
def test_stride_and_levels_follow_the_patch(patch, count, stride, stages, cell):
    strides = [[1] * len(patch), *[[2] * len(patch)] * (count - 1)]
    assert planned_levels(strides, patch, stride) == (stages, cell)


def test_cells_are_no_larger_than_the_plans_pooling_along_an_axis():
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert planned_levels(strides, (16, 256, 256), None)[1] == [4, 16, 16]


def test_the_architecture_says_all_a_network_needs_and_is_adapted_once():
    plan = plans()
    first = copy.deepcopy(adapted(plan, steps=5, noise_seed=7, scale=0.1))
    assert first["sampling"] == {
        "steps": 5,
        "difference": 1.0,
        "starts": 1,
        "accumulate": False,
        "intermediate_stride": "fine",
        "reencode": "hard",
        "seed": 7,
    }
    assert (first["decoder"]["width"], first["decoder"]["embedding"], first["decoder"]["scale"]) == (32, 21, 0.1)
    assert first["decoder"]["norm"] == "batch"
    assert adapted(plan, steps=9) == first
    assert adapted(plans(batch=2))["decoder"]["norm"] == "group"
    wide = adapted(plans(patch=(512, 512), strides=8))  # 8 base features, stride 16
    assert (wide["decoder"]["width"], wide["decoder"]["upsample"]) == (96, [4, 4])
    deep = adapted(plans(3, (128, 128, 128)))
    assert (deep["decoder"]["width"], deep["encoder"]["cell"]) == (48, [8, 8, 8])


def test_a_vits_padded_grid_and_input_range_stand_in_the_plan():
    kwargs = adapted(plans(patch=(480, 854), schemes=["RGBTo01Normalization"] * 3), backbone="vit_base")
    assert kwargs["encoder"] == {
        "kind": "vit",
        "name": "vit_base_patch16_384",
        "size": [480, 864],
        "drop_path": 0.15,
        "unit_range": True,
    }
    assert (kwargs["decoder"]["width"], kwargs["decoder"]["embedding"]) == (384, 256)
    assert not adapted(plans(), backbone="vit_tiny")["encoder"]["unit_range"]
    with pytest.raises(UserError, match="2D"):
        adapted(plans(3, (16, 64, 64)), backbone="vit_tiny")


@pytest.mark.parametrize(
    "wrong",
    [
        {"deep_supervision": True},
        {"backbone_weights": "some.pth"},
        {"backbone": "vit_base", "stride": 8},
        {"width": 18},
        {"stride": 5},
    ],
)
def test_settings_that_exclude_each_other_are_refused(wrong):
    with pytest.raises(UserError):
        ProtoDiffSettings.from_mapping(wrong)


# ----------------------------------------------------------------------------------------------------- a ViT's weights


def started(trainer, monkeypatch):
    """Run what a training does before its first step."""
    monkeypatch.setattr(SemiSupervisedTrainer, "on_train_start", lambda self: None)
    trainer.on_train_start()
    return trainer


def test_a_trained_vit_predicts_without_its_weights_file(made, small_vit, tmp_path, monkeypatch):
    torch.manual_seed(3)
    source = ViTLevels(1, "vit_tiny_patch16_224", (32, 32))
    file = tmp_path / "vit.pth"
    torch.save(source.vit.state_dict(), file)
    settings = {"backbone": "vit_tiny", "backbone_weights": str(file), "width": 16}
    trainer = started(made(**settings), monkeypatch)
    assert same(weights(trainer.network.visual.vit), weights(source.vit))
    trainer.train_step(next(trainer.dataloader_train))
    trainer.save_checkpoint(str(tmp_path / "state.pth"))
    file.unlink()
    checkpoint = torch.load(tmp_path / "state.pth", weights_only=True)
    init = checkpoint["init_args"]
    arch = init["plans"]["configurations"]["2d"]["architecture"]
    assert arch["network_class_name"] == NETWORK
    stock = get_network_from_plans(arch["network_class_name"], arch["arch_kwargs"], arch["_kw_requires_import"], 1, 3)
    stock.load_state_dict(checkpoint["network_weights"])
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(stock.eval()(x), trainer.network.eval()(x))
    again = made(start=False, **settings)
    again.load_checkpoint(str(tmp_path / "state.pth"))
    started(again, monkeypatch)  # a continued run asks for no file
    assert same(weights(again.network), weights(trainer.network))
    with pytest.raises(UserError, match="nothing is downloaded"):
        started(made(**settings), monkeypatch)


def test_a_vit_without_weights_is_warned_of(made, small_vit, monkeypatch, capsys):
    started(made(backbone="vit_tiny", width=16), monkeypatch)
    assert "WARNING: vit_tiny starts from random weights" in capsys.readouterr().out


def test_a_pretrained_vit_learns_slower_than_its_decoder(made, small_vit):
    trainer = made(backbone="vit_tiny", backbone_weights="later.pth", backbone_lr=0.25, width=16, initial_lr=0.02)
    trainer.train_step(next(trainer.dataloader_train))
    rates = {id(p): g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    expected = {True: 0.25 * 0.02, False: 0.02}
    for name, p in trainer.network.named_parameters():
        assert rates[id(p)] == pytest.approx(expected[name.startswith("visual.")]), name
    plain = made(backbone="vit_tiny", width=16)
    assert len(plain.optimizer.param_groups) == 1
