"""The trainers that exist, as metadata that loads no torch."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.errors import UserError, nearest

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class TrainerInfo:
    """What is known of a trainer without importing it.

    Args:
        module: dotted module that defines the class of the same name.
        method: name of the method in the literature.
        paper: where it was published.
        family: mechanism, in the field's words.
        step_cost: counted cost of a step's networks in supervised steps, with as many unlabeled as labeled items.
        memory_factor: memory in units of the supervised trainer at the same plan.
        predicts: which network the checkpoint's ``network_weights`` hold.
    """

    module: str
    method: str
    paper: str
    family: str
    step_cost: float
    memory_factor: float
    predicts: str


#: One entry a trainer, in alphabetical order; a test holds modules, registry and documentation pages together.
TRAINERS: dict[str, TrainerInfo] = {
    "ACISISTrainer": TrainerInfo(
        "nnssl.trainers.acisis",
        "ACISIS",
        "Basak et al., MICCAI 2022",
        "EMA teacher, voxels sampled by how well their class is known",
        7 / 3,
        1.3,
        "the student",
    ),
    "ACMTTrainer": TrainerInfo(
        "nnssl.trainers.ac_mt",
        "AC-MT",
        "Xu et al., MedIA 2023",
        "EMA teacher, consistency on ambiguous voxels",
        7 / 3,
        1.3,
        "the student",
    ),
    "AdshTrainer": TrainerInfo(
        "nnssl.trainers.adsh",
        "Adsh",
        "Guo and Li, ICML 2022",
        "two peers, thresholds of classes",
        4.0,
        2.2,
        "the first network",
    ),
    "BCPTrainer": TrainerInfo(
        "nnssl.trainers.bcp",
        "Bidirectional copy-paste",
        "Bai et al., CVPR 2023",
        "EMA teacher, labeled and unlabeled crops in one image",
        4 / 3,
        1.3,
        "the student",
    ),
    "CAMLTrainer": TrainerInfo(
        "nnssl.trainers.caml",
        "CAML",
        "Gao et al., MICCAI 2023",
        "two networks, cross-sample attention, correlations with a memory",
        4.0,
        4.0,
        "the vanilla network",
    ),
    "CLDTrainer": TrainerInfo(
        "nnssl.trainers.cld",
        "CLD",
        "Lin et al., MICCAI 2022",
        "two peers, rarity weights, sampling by confidence",
        4.0,
        2.2,
        "the first network",
    ),
    "CPSTrainer": TrainerInfo(
        "nnssl.trainers.cps",
        "Cross pseudo supervision",
        "Chen et al., CVPR 2021",
        "two peers, hard pseudo-labels",
        4.0,
        2.2,
        "the first network",
    ),
    "CReSTTrainer": TrainerInfo(
        "nnssl.trainers.crest",
        "CReST",
        "Wei et al., CVPR 2021",
        "two peers, classes weigh by reversed rank",
        4.0,
        2.2,
        "the first network",
    ),
    "DHCTrainer": TrainerInfo(
        "nnssl.trainers.dhc",
        "DHC",
        "Wang and Li, MICCAI 2023",
        "two peers, weights by difficulty and by distribution",
        4.0,
        2.2,
        "the first network",
    ),
    "DSTTrainer": TrainerInfo(
        "nnssl.trainers.dst",
        "DST",
        "Chen et al., NeurIPS 2022",
        "one encoder, decoders for labels, pseudo-labels and the worst case",
        3.5,
        1.6,
        "the encoder and the first decoder",
    ),
    "DTCTrainer": TrainerInfo(
        "nnssl.trainers.dtc",
        "DTC",
        "Luo et al., AAAI 2021",
        "segmentation and signed distances, dual-task consistency",
        2.0,
        1.1,
        "the network (the distance head lies beside it)",
    ),
    "DePLTrainer": TrainerInfo(
        "nnssl.trainers.depl",
        "DePL",
        "Wang et al., CVPR 2022",
        "two peers, debiased pseudo-labels",
        4.0,
        2.2,
        "the first network",
    ),
    "DiffCLTrainer": TrainerInfo(
        "nnssl.trainers.diffcl",
        "Diff-CL",
        "Guo et al., arXiv 2503.09408",
        "diffusion and convolutional network, cross pseudo-supervision",
        4.0,
        2.6,
        "the convolutional network CS",
    ),
    "DiffRectTrainer": TrainerInfo(
        "nnssl.trainers.diffrect",
        "DiffRect",
        "Liu et al., MICCAI 2024",
        "weak and strong views, latent diffusion rectifies pseudo-labels",
        5.5,
        2.2,
        "the segmentation network",
    ),
    "FixMatchTrainer": TrainerInfo(
        "nnssl.trainers.fixmatch",
        "FixMatch",
        "Sohn et al., NeurIPS 2020",
        "weak and strong views, confident hard pseudo-labels",
        7 / 3,
        1.1,
        "the network",
    ),
    "GenericSSLTrainer": TrainerInfo(
        "nnssl.trainers.generic_ssl",
        "A&D",
        "Wang and Li, NeurIPS 2023",
        "denoising and difficulty-aware decoders teach a predictor",
        3.9,
        1.3,
        "image stem, encoder and predictor decoder theta (the other decoders lie beside them)",
    ),
    "ICTTrainer": TrainerInfo(
        "nnssl.trainers.ict",
        "Interpolation consistency training",
        "Verma et al., IJCAI 2019",
        "EMA teacher, mixup",
        7 / 3,
        1.3,
        "the student",
    ),
    "INCLTrainer": TrainerInfo(
        "nnssl.trainers.incl",
        "INCL",
        "Zhu et al., MIDL 2023",
        "class queries on the decoder, consistent between a labeled and an unlabeled reader",
        2.0,
        1.1,
        "the network (both readers lie beside it)",
    ),
    "MCNetTrainer": TrainerInfo(
        "nnssl.trainers.mc_net",
        "MC-Net, MC-Net+",
        "Wu et al., MICCAI 2021, MedIA 2022",
        "one encoder, several decoders, mutual consistency",
        3.2,
        1.6,
        "encoder and first decoder (the others lie beside them)",
    ),
    "MLRPLTrainer": TrainerInfo(
        "nnssl.trainers.ml_rpl",
        "ML-RPL",
        "Su et al., MedIA 2024",
        "one encoder, two decoders, weighted hard pseudo-labels",
        3.2,
        1.6,
        "encoder and first decoder (the other lies beside them)",
    ),
    "MeanTeacherTrainer": TrainerInfo(
        "nnssl.trainers.mean_teacher",
        "Mean teacher",
        "Tarvainen and Valpola, NeurIPS 2017",
        "EMA teacher, consistency",
        7 / 3,
        1.3,
        "the student",
    ),
    "ProtoDiffTrainer": TrainerInfo(
        "nnssl.trainers.proto_diff",
        "Prototype-anchored label diffusion",
        "Xi et al., DGM4MICCAI 2025",
        "label-embedding diffusion decoder, prototypes",
        2.3,
        2.6,
        "the whole network, by sampling",
    ),
    "SASSNetTrainer": TrainerInfo(
        "nnssl.trainers.sassnet",
        "SASSNet",
        "Li et al., MICCAI 2020",
        "segmentation and signed distances, adversary on shapes",
        2.2,
        1.3,
        "the network (distance head and adversary lie beside it)",
    ),
    "SSNetTrainer": TrainerInfo(
        "nnssl.trainers.ss_net",
        "SS-Net",
        "Wu et al., MICCAI 2022",
        "virtual adversarial smoothness, class prototypes",
        16 / 3,
        2.0,
        "the network (its heads lie beside it)",
    ),
    "SimiSTrainer": TrainerInfo(
        "nnssl.trainers.simis",
        "SimiS",
        "Chen et al., arXiv 2211.11086",
        "two peers, classes weigh by what they lack",
        4.0,
        2.2,
        "the first network",
    ),
    "SupervisedTrainer": TrainerInfo(
        "nnssl.trainers.supervised",
        "Supervised control",
        "Isensee et al., Nature Methods 2021",
        "labeled cases only, same budget",
        1.0,
        1.0,
        "the network",
    ),
    "UAMTTrainer": TrainerInfo(
        "nnssl.trainers.ua_mt",
        "Uncertainty-aware mean teacher",
        "Yu et al., MICCAI 2019",
        "EMA teacher, Monte Carlo dropout masks uncertain voxels",
        5.0,
        1.3,
        "the student",
    ),
    "URPCTrainer": TrainerInfo(
        "nnssl.trainers.urpc",
        "URPC",
        "Luo et al., MICCAI 2021",
        "consistency over resolutions, weighted by their divergence",
        2.0,
        1.3,
        "the network",
    ),
}


def trainer_info(name: str) -> TrainerInfo:
    """Return the entry of a trainer.

    Raises:
        UserError: for a name that is not registered, with the nearest ones.
    """
    if name not in TRAINERS:
        raise UserError(
            "-tr must name an nnssl trainer", repr(name), nearest(name, TRAINERS), "see nnssl_info trainers"
        )
    return TRAINERS[name]


def trainer_class(name: str) -> type[SemiSupervisedTrainer]:
    """Import and return a trainer class (loads torch and nnU-Net)."""
    return getattr(importlib.import_module(trainer_info(name).module), name)


def shim_folder() -> Path:
    """Return the folder for nnU-Net's variable ``nnUNet_extTrainer``: it only re-exports our trainers."""
    return Path(__file__).parent / "nnunet_ext"


def expose_to_nnunet() -> None:
    """Append the shim to ``nnUNet_extTrainer``, so that stock look-ups find our trainers (children inherit it)."""
    folders = [f for f in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if f]
    if str(shim_folder()) not in folders:
        os.environ["nnUNet_extTrainer"] = os.pathsep.join([*folders, str(shim_folder())])
