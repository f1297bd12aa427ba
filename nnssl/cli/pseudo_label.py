"""``nnssl_pseudo_label``: masks of unknown quality for unlabeled images, once or in rounds of training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl.cli._common import add_model_arguments, run_command
from nnssl.errors import UserError

if TYPE_CHECKING:
    from nnssl.inference.pseudo_label import Request
    from nnssl.inference.pseudo_label_filter import Box

NAME = "nnssl_pseudo_label"
DESCRIPTION = """Predict imagesUn with a trained model and keep what is sure, as labelsPseudo.

The model is named by -d, -c and -tr (and -p, --run), or by its folder with -m; then -d may name another data set
with the same channels and labels. With --rounds the model is trained again on labels and masks, and labels anew."""
EPILOG = """--train takes the rest of the line: arguments of nnssl_train, such as --epochs 60 --set initial_lr=0.005.
A stopped --rounds goes on where it was with the same command."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; loads nothing heavy."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("data set and model")
    add_model_arguments(model, "data set id or name (default with -m: the model's)", "-c and -tr")
    kept = parser.add_argument_group("what is kept")
    tau = kept.add_mutually_exclusive_group()
    tau.add_argument("--threshold", type=float, metavar="P", help="confidence below which a voxel is unsure")
    tau.add_argument(
        "--threshold_quantile",
        type=float,
        default=0.5,
        metavar="Q",
        help="threshold per class: this quantile of its confidences, at most 0.9 (default: %(default)s)",
    )
    tau.add_argument("--keep_all", action="store_true", help="no voxel is unsure: the plain predictions")
    kept.add_argument(
        "--min_component",
        type=float,
        default=1e-4,
        metavar="FRACTION",
        help="smaller components are unsure, as a share of the image (default: %(default)s)",
    )
    kept.add_argument("--largest_component", action="store_true", help="of each class only the largest one is sure")
    kept.add_argument("--keep", type=float, default=1.0, metavar="SHARE", help="share of cases, the most stable ones")
    kept.add_argument(
        "--weight_by", choices=("none", "confidence", "stability"), default="none", help="how often a case is drawn"
    )
    kept.add_argument("--boxes", metavar="JSON", help='{case: [{"label": 1, "box": [[z, y, x], [z, y, x]]}, ...]}')
    kept.add_argument("--refiner", default="none", metavar="SPEC", help="MODULE:FUNCTION or folder:EXPORT_DIR")
    kept.add_argument("--overwrite", action="store_true", help="replace masks that this command made before")
    how = parser.add_argument_group("how to predict")
    how.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, but stability is unknown")
    how.add_argument("-step_size", type=float, default=0.5, help="tile distance in patch sizes (default: %(default)s)")
    how.add_argument("-device", metavar="DEVICE", help="cuda, mps or cpu (default: the best there is)")
    how.add_argument("-npp", type=int, default=3, metavar="N", help="preprocessing processes (default: %(default)s)")
    how.add_argument("-nps", type=int, default=3, metavar="N", help="export processes (default: %(default)s)")
    how.add_argument("-np", type=int, metavar="N", help="processes that check and preprocess images")
    rounds = parser.add_argument_group("iterated training")
    rounds.add_argument("--rounds", type=int, metavar="N", help="label, train as RUN-r1, label with it, ... N times")
    rounds.add_argument("--train", nargs=argparse.REMAINDER, default=[], metavar="ARGS", help="see below; goes last")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Make masks once, or in rounds."""
    if args.train and args.rounds is None:
        raise UserError("--train belongs to --rounds", "--train alone", None, "add --rounds N")
    if args.rounds is not None:
        from nnssl.cli._pseudo_rounds import run_rounds

        return run_rounds(args)
    record = label_once(args, model_folder(args), args.overwrite, {})
    if record is not None:
        print(
            f"Next: nnssl_plan_and_preprocess -d {_dataset_of(args)}, then nnssl_train ... --set supervision=gt+pseudo"
        )
    return 0


def label_once(
    args: argparse.Namespace, folder: Path, overwrite: bool, origin: dict[str, Any]
) -> dict[str, Any] | None:
    """Make masks with the model of a folder; return their record, None if they wait for a tool outside."""
    from nnssl.inference.models import FINAL_CHECKPOINT, load_model
    from nnssl.layout import RawDataset, find_dataset
    from nnssl.plans.parallel import default_processes

    model = load_model(folder, args.f, args.chk or FINAL_CHECKPOINT)
    dataset = RawDataset.load(find_dataset(_dataset_of(args)))
    request = _request(args, overwrite, origin)
    from nnssl.cli._conversion import plain_warnings
    from nnssl.inference.predict import best_device
    from nnssl.inference.pseudo_label import make_masks

    device = best_device(args.device)
    print(f"{NAME}: {model.folder.name} labels {dataset.name} on {device.type}", flush=True)
    with plain_warnings(NAME):
        record = make_masks(dataset, model, request, device, args.np or default_processes(), _report)
    if record is not None:
        _conclude(dataset.folder / "labelsPseudo", record)
    return record


def _request(args: argparse.Namespace, overwrite: bool, origin: dict[str, Any]) -> Request:
    from nnssl.inference.predict import PredictOptions
    from nnssl.inference.pseudo_label import Request
    from nnssl.inference.pseudo_label_filter import FilterOptions
    from nnssl.inference.pseudo_label_refine import load_refiner

    filters = FilterOptions(
        threshold=args.threshold,
        quantile=args.threshold_quantile,
        keep_all=args.keep_all,
        min_component=args.min_component,
        largest_component=args.largest_component,
        keep=args.keep,
        weight_by=args.weight_by,
    )
    predict = PredictOptions(
        step_size=args.step_size,
        mirroring=not args.disable_tta,
        preprocessing_processes=args.npp,
        export_processes=args.nps,
        progress=sys.stderr.isatty(),
    )
    kind, _, rest = args.refiner.partition(":")
    exchange = Path(rest or "refine") / (f"round_{origin['round']}" if "round" in origin else "")
    return Request(
        filters,
        predict,
        _read_boxes(Path(args.boxes)) if args.boxes else None,
        load_refiner(args.refiner) if kind not in ("none", "folder") else None,
        exchange if kind == "folder" else None,
        args.refiner,
        overwrite,
        origin,
    )


def _read_boxes(path: Path) -> dict[str, list[Box]]:
    """Read ``{case: [{"label": 1, "box": [first voxel, voxel behind the last]}]}`` with voxels as (z, y, x)."""
    from nnssl.inference.pseudo_label_filter import Box

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        boxes = {
            case: [Box(int(b["label"]), tuple(map(int, b["box"][0])), tuple(map(int, b["box"][1]))) for b in members]
            for case, members in content.items()
        }
        for box in (box for members in boxes.values() for box in members):
            if len(box.low) != 3 or len(box.high) != 3 or any(a >= b for a, b in zip(box.low, box.high, strict=True)):
                raise ValueError(f"box {box.low} to {box.high}")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        allowed = '{case: [{"label": 1, "box": [[z, y, x], [z, y, x]]}, ...]}, the second voxel behind the last'
        raise UserError("--boxes must be a JSON file of boxes", f"{path}: {error}", allowed, "mend it") from error
    return boxes


def model_folder(args: argparse.Namespace) -> Path:
    """Return the folder of the model that the flags name."""
    if args.m:
        named = {"-c": args.c, "-tr": args.tr, "--run": args.run}
        if given := [flag for flag, value in named.items() if value is not None]:
            rule = "a model is named by -m or by -d, -c and -tr"
            raise UserError(rule, f"-m and {' '.join(given)}", "one of the two")
        return Path(args.m)
    named = {"-d": args.d, "-c": args.c, "-tr": args.tr}
    if missing := [flag for flag, value in named.items() if value is None]:
        raise UserError("a model is named by -d, -c and -tr, or by -m", f"no {' '.join(missing)}", None, "add them")
    from nnssl.inference.models import find_model_folder

    return find_model_folder(args.d, args.tr, args.p, args.c, args.run)


def _dataset_of(args: argparse.Namespace) -> str:
    return args.d if args.d is not None else Path(args.m).resolve().parent.name


def _report(line: str) -> None:
    print(line, flush=True)


def _conclude(folder: Path, record: dict[str, Any]) -> None:
    """Print what was kept and how sure it is."""
    cases = record["cases"]
    unsure = sum(case["voxels"].get(str(record["ignore"]), 0) for case in cases.values())
    total = sum(sum(case["voxels"].values()) for case in cases.values())
    thresholds = ", ".join(f"{label}: {value:.3f}" for label, value in record["origin"]["thresholds"].items())
    print(f"Thresholds by label: {thresholds}")
    print(f"Masks of {len(cases)} cases in {folder}; {100 * unsure / max(1, total):.1f} % of the voxels are unsure")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnssl_pseudo_label``."""
    return run_command(NAME, build_parser, execute, argv)


if __name__ == "__main__":
    raise SystemExit(main())
