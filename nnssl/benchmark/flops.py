"""Floating point operations of a prediction and of a labeled training pass, against the plan's own network."""

from __future__ import annotations

import argparse
from typing import Any

#: Items of the counted pass: batch norm needs more than one value a channel.
ITEMS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the count."""
    parser.add_argument("dataset", help="planned data set, id or name")
    parser.add_argument("configuration", help="2d, 3d_fullres, ...")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier")
    parser.add_argument("-tr", default="ProtoDiffTrainer", help="trainer whose predicting network is counted")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the trainer")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Count one tile's prediction, and one item's pass with backward, of both networks."""
    from nnssl.cli.train import parse_settings
    from nnssl.trainers.launch import Job, read_plans
    from nnssl.trainers.registry import trainer_class

    job = Job(args.dataset, args.configuration, trainer=args.tr, plans=args.p, settings=parse_settings(args.set))
    plans, dataset_json = read_plans(job)
    config = plans["configurations"][args.configuration]
    control = count(config["architecture"], config["patch_size"], dataset_json)
    cls = trainer_class(args.tr)
    cls.network_plans(plans, args.configuration, cls.settings_class.from_mapping(plans["nnssl"].get(args.tr, {})))
    method = count(config["architecture"], config["patch_size"], dataset_json)
    ratios = {name: method[name] / control[name] for name in control}
    return {"trainer": args.tr, "gflop": method, "control_gflop": control, "ratio": ratios}


def count(architecture: dict[str, Any], patch_size: list[int], dataset_json: dict[str, Any]) -> dict[str, float]:
    """Return GFLOP of a tile's prediction and of one item's training pass (forward and backward).

    Args:
        architecture: the plan's.
        patch_size: voxels.
        dataset_json: number of channels and labels.
    """
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from torch.utils.flop_counter import FlopCounterMode

    from nnssl.networks.label_diffusion import LabelDiffusionNet
    from nnssl.networks.multi_decoder import MultiDecoderUNet

    classes = sum(name != "ignore" for name in dataset_json["labels"])
    channels = len(dataset_json["channel_names"])
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        classes,
        allow_init=False,
        deep_supervision=False,
    )
    x = torch.zeros(ITEMS, channels, *patch_size)
    given: dict[str, Any] = {}
    if isinstance(network, LabelDiffusionNet):
        label = torch.zeros(ITEMS, 1, *patch_size, dtype=torch.int64)
        noise = torch.zeros(ITEMS, *network.latent_shape(patch_size))
        given = {"label": label, "t": torch.full((ITEMS,), 0.5), "noise": noise}
    elif isinstance(network, MultiDecoderUNet):
        given = {"every": True}
    with FlopCounterMode(display=False) as predicting, torch.no_grad():
        network.eval()(x)
    with FlopCounterMode(display=False) as training:
        out = network.train()(x, **given)
        if isinstance(network, LabelDiffusionNet):
            outputs = [out.logits, out.embedding, *out.aux]
        else:
            outputs = out if isinstance(out, list) else [out]
        torch.autograd.backward([o.sum() for o in outputs])
    counts = {"prediction": predicting.get_total_flops(), "training": training.get_total_flops()}
    return {name: flops / ITEMS / 1e9 for name, flops in counts.items()}
