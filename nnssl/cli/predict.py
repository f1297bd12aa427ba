"""``nnssl_predict``: masks for a folder of images, on each image's own grid."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnssl.cli._common import add_model_arguments, run_command
from nnssl.errors import UserError

DESCRIPTION = """Predict a folder of images with a trained model.

The model is named by -d, -c and -tr (and -p, --run), or by its folder with -m.
The masks equal those of nnUNetv2_predict."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; loads nothing heavy."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", required=True, metavar="DIR", help="images CASE_0000.ending, one file a channel")
    parser.add_argument("-o", required=True, metavar="DIR", help="folder for the masks; created when absent")
    model = parser.add_argument_group("the model")
    add_model_arguments(model, "data set id or name", "-d, -c and -tr")
    how = parser.add_argument_group("how to predict")
    how.add_argument("--preset", metavar="NAME|FILE", help="apply the predict section of a preset, below the flags")
    how.add_argument("-step_size", type=float, help="tile distance in patch sizes (default: 0.5)")
    how.add_argument(
        "--stride",
        type=int,
        nargs="+",
        metavar="N",
        help="tile distance in voxels, one number an axis of the patch; tiles count alike, probabilities are averaged",
    )
    how.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, a little less accurate")
    how.add_argument("--save_probabilities", action="store_true", help="also write CASE.npz with class probabilities")
    how.add_argument("--continue_prediction", action="store_true", help="skip cases whose mask exists")
    how.add_argument("-device", metavar="DEVICE", help="cuda, mps or cpu (default: the best there is)")
    npp, nps = _count("nnUNet_npp"), _count("nnUNet_nps")
    how.add_argument(
        "-npp",
        type=int,
        default=npp,
        metavar="N",
        help="preprocessing processes; -npp 0 -nps 0: no workers (default: %(default)s)",
    )
    how.add_argument("-nps", type=int, default=nps, metavar="N", help="export processes (default: %(default)s)")
    how.add_argument("--not_on_device", action="store_true", help="collect logits in main memory (large images)")
    how.add_argument("--disable_progress_bar", action="store_true", help="no progress bars")
    how.add_argument("--verbose", action="store_true", help="report what nnU-Net does")
    return parser


def _count(name: str, default: int = 3) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def execute(args: argparse.Namespace) -> int:
    """Resolve the model, check the inputs, predict."""
    from nnssl.inference.inputs import list_inputs, prepare_output
    from nnssl.inference.models import FINAL_CHECKPOINT, load_model

    chosen = _predict_section(args.preset) if args.preset else {}
    model = load_model(_model_folder(args), args.f, args.chk or chosen.get("chk", FINAL_CHECKPOINT))
    cases = list_inputs(Path(args.i), model.file_ending, model.channels)  # before torch takes seconds to load
    prepare_output(Path(args.o), Path(args.i))
    from nnssl.inference.predict import PredictOptions, best_device, predict_cases

    options = PredictOptions(
        step_size=chosen.get("step_size", 0.5) if args.step_size is None else args.step_size,
        stride=_stride(args, chosen),
        mirroring=not (args.disable_tta or chosen.get("disable_tta", False)),
        save_probabilities=args.save_probabilities,
        overwrite=not args.continue_prediction,
        preprocessing_processes=args.npp,
        export_processes=args.nps,
        on_device=not args.not_on_device,
        progress=sys.stderr.isatty() and not args.disable_progress_bar,
        verbose=args.verbose,
    )
    device = best_device(args.device)
    folds = " ".join(map(str, model.folds))
    print(f"nnssl_predict: {len(cases)} cases, {model.folder.name}, fold {folds}, {device.type}")
    print("Please cite nnU-Net (Isensee et al., Nature Methods 2021) and the method (nnssl_info trainers).", flush=True)
    predict_cases(model, cases, Path(args.o), options, device)
    print(f"nnssl_predict: masks of {len(cases)} cases are in {args.o}")
    return 0


#: Keys of a preset's predict section, named as the flags, with the types of their values.
PREDICT_KEYS: dict[str, type | tuple[type, ...]] = {
    "step_size": (int, float),
    "stride": list,
    "disable_tta": bool,
    "chk": str,
}


def _stride(args: argparse.Namespace, chosen: dict[str, Any]) -> tuple[int, ...] | None:
    """Return the strides of the flags, else of the preset; ``-step_size`` beside a preset switches its strides off."""
    if args.stride is not None and args.step_size is not None:
        raise UserError("tiles are placed by --stride or by -step_size", "both", None, "choose one")
    given = args.stride if args.stride is not None or args.step_size is not None else chosen.get("stride")
    if given is not None and not all(isinstance(v, int) and not isinstance(v, bool) for v in given):
        raise UserError(
            "stride must be a list of whole numbers", given, "for example [4, 18, 18]", "correct the preset"
        )
    return None if given is None else tuple(given)


def _predict_section(preset: str) -> dict[str, Any]:
    from nnssl.plans.preset import load_preset

    section = load_preset(preset).get("predict", {})
    for key, value in section.items():
        if key not in PREDICT_KEYS or not isinstance(value, PREDICT_KEYS[key]):
            rule = f"the predict section of preset {preset} must hold known keys with values of their type"
            raise UserError(rule, f"{key} = {value!r}", ", ".join(PREDICT_KEYS), "correct the preset")
    return section


def _model_folder(args: argparse.Namespace) -> Path:
    named = {"-d": args.d, "-c": args.c, "-tr": args.tr, "--run": args.run}
    given = [flag for flag, value in named.items() if value is not None]
    if args.m:
        if given:
            raise UserError(
                "a model is named by -m or by -d, -c and -tr", f"-m and {' '.join(given)}", "one of the two"
            )
        return Path(args.m)
    missing = [flag for flag, value in named.items() if value is None and flag != "--run"]
    if missing:
        raise UserError("a model is named by -d, -c and -tr, or by -m", f"no {' '.join(missing)}", None, "add them")
    from nnssl.inference.models import find_model_folder

    return find_model_folder(args.d, args.tr, args.p, args.c, args.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnssl_predict``."""
    return run_command("nnssl_predict", build_parser, execute, argv)


if __name__ == "__main__":
    raise SystemExit(main())
