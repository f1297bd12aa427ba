"""``nnssl_evaluate``: measure predictions against references, and compare several predictions case by case."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli._common import run_command
from nnssl.errors import UserError

_PROTOCOLS = ("mm", "literature-la", "literature-acdc", "literature-diffrect", "literature-ad")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``nnssl_evaluate``."""
    parser = argparse.ArgumentParser(
        description="Dice, Jaccard, HD95, ASSD and NSD per case and class, and mIoU over all pixels of the set; "
        "several -pred are compared case by case."
    )
    parser.add_argument("-ref", required=True, type=Path, metavar="DIR", help="folder of reference masks")
    parser.add_argument(
        "-pred", required=True, nargs="+", type=Path, metavar="DIR", help="folders of predictions, same file names"
    )
    parser.add_argument(
        "-djfile",
        type=Path,
        metavar="FILE",
        help="dataset.json with the labels and domains (default: the one in -pred, else the values in the references)",
    )
    parser.add_argument(
        "--protocol",
        default="mm",
        metavar="NAME",
        help=f"one of {', '.join(_PROTOCOLS)}; literature-*: voxel units, for comparison with papers (default: mm)",
    )
    parser.add_argument("--nsd_tolerance", type=float, default=1.0, metavar="MM", help="tolerance of NSD in mm")
    parser.add_argument("-np", type=int, metavar="N", help="processes (default: nnUNet_def_n_proc, else at most 8)")
    parser.add_argument(
        "-o",
        type=Path,
        metavar="FILE",
        help="result file, .json, with a .csv beside it (default: nnssl_evaluation.json in each -pred)",
    )
    return parser


def execute(args: argparse.Namespace) -> int:
    """Evaluate, write the files, print the tables."""
    _check(args)
    from nnssl.evaluation.compare import compare
    from nnssl.evaluation.evaluate import evaluate_folders
    from nnssl.evaluation.labels import LabelSet, read_domains, read_provenance
    from nnssl.evaluation.masks import match_masks
    from nnssl.evaluation.report import comparison_table, result_table, write_files

    labels = None if args.djfile is None else LabelSet.from_dataset_json(args.djfile)
    domains = None if args.djfile is None else read_domains(args.djfile)
    provenance = None if args.djfile is None else read_provenance(args.djfile)
    for folder in args.pred:  # a gap in the last folder must not show after an hour on the first
        match_masks(args.ref, folder)
    results = {}
    for name, folder in zip(_names(args.pred), args.pred, strict=True):
        results[name] = evaluate_folders(
            args.ref, folder, labels, args.protocol, args.nsd_tolerance, args.np, domains, provenance
        )
    _require_same_classes(results)
    comparison = compare(results) if len(results) > 1 else []
    files = _files(args, results, comparison)
    write_files(files)
    for result in results.values():
        print(result_table(result), end="\n\n")
    if comparison:
        print("Paired differences over cases (Dice: higher is better, HD95: lower is better)")
        print(comparison_table(comparison), end="\n\n")
    print("written: " + ", ".join(map(str, files)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnssl_evaluate``."""
    return run_command("nnssl_evaluate", build_parser, execute, argv)


def _check(args: argparse.Namespace) -> None:
    if args.o is not None and args.o.suffix != ".json":
        raise UserError("-o must name a .json file", args.o, None, f"-o {args.o}.json")
    resolved = [folder.resolve() for folder in args.pred]
    if len(set(resolved)) < len(resolved):
        raise UserError("each -pred must be another folder", ", ".join(map(str, args.pred)), None, "give each once")


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _require_same_classes(results: dict) -> None:
    first, *others = results.items()
    for name, result in others:
        if result["labels"] != first[1]["labels"]:
            got = f"{first[1]['labels']} in {first[0]}, {result['labels']} in {name}"
            raise UserError("compared predictions must have the same labels", got, None, "give one -djfile for all")


def _files(args: argparse.Namespace, results: dict, comparison: list) -> dict[Path, str]:
    """Return the texts of the result files: with ``-o`` one file for all predictions, else one in each folder."""
    from nnssl.evaluation.report import as_csv, to_json

    if args.o is not None:
        data = {"predictions": results, "comparison": comparison} if comparison else next(iter(results.values()))
        return {args.o: to_json(data), args.o.with_suffix(".csv"): as_csv(results)}
    files = {}
    for (name, result), folder in zip(results.items(), args.pred, strict=True):
        files[folder / "nnssl_evaluation.json"] = to_json(result)
        files[folder / "nnssl_evaluation.csv"] = as_csv({name: result})
    if comparison:
        files[args.pred[0] / "nnssl_comparison.json"] = to_json(comparison)
    return files


if __name__ == "__main__":
    sys.exit(main())
