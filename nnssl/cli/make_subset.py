"""``nnssl_make_subset``: few labeled patients of a raw data set, the rest unlabeled."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from nnssl.cli._common import run_command
from nnssl.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Make a new raw data set in which N patients keep their labels and all other training images are "
        "unlabeled; the hidden labels are not in it. Id files hold one case or patient id a line.",
    )
    parser.add_argument("-d", dest="source", required=True, help="id or name of the data set to draw from")
    parser.add_argument("-o", dest="dataset_id", type=int, required=True, help="id of the new data set, 1 to 999")
    parser.add_argument("-n", dest="name", help="name of the new data set (default: SOURCE_labeledN)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--labeled", metavar="N|all", help="number of labeled patients, drawn by --seed (nested)")
    which.add_argument(
        "--labeled_per_domain", metavar="N|P%", help="labeled patients of each labeled domain, or a share, rounded up"
    )
    which.add_argument("--labeled_ids", type=Path, metavar="FILE", help="labeled ids")
    which.add_argument("--published", metavar="NAME", help="published protocol, e.g. LA-4 or ACDC-7")
    parser.add_argument(
        "--labeled_domains", nargs="+", metavar="DOMAIN", help="labels come from these domains only (default: all)"
    )
    parser.add_argument(
        "--unseen_domains", nargs="+", default=[], metavar="DOMAIN", help="domains that become test cases as a whole"
    )
    parser.add_argument("--val_ids", type=Path, metavar="FILE", help="ids for imagesVal, watched only")
    parser.add_argument("--test_ids", type=Path, metavar="FILE", help="ids for imagesTs")
    parser.add_argument("--label_map", help="old:new label values, e.g. 1:1,2:1; 0 drops a class")
    parser.add_argument("--label_names", nargs="+", help="names of the new values 1, 2, ... (default: joined with +)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    parser.add_argument("--link", action="store_true", help="link files that stay as they are instead of copying")
    parser.add_argument("-np", dest="num_processes", type=int, help="processes (default: nnUNet_def_n_proc or cores)")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Make the subset, and print the counts and what comes next."""
    from nnssl.cli._conversion import finish, plain_warnings
    from nnssl.dataset_conversion.labels import parse_label_map
    from nnssl.dataset_conversion.subset import SubsetRequest, make_subset
    from nnssl.layout import RawDataset, find_dataset
    from nnssl.plans.parallel import default_processes
    from nnssl.plans.verify import listed

    request = SubsetRequest(
        labeled="all" if args.labeled == "all" else read_count("--labeled", args.labeled, "N|all"),
        labeled_per_domain=read_share("--labeled_per_domain", args.labeled_per_domain),
        labeled_domains=tuple(dict.fromkeys(args.labeled_domains)) if args.labeled_domains else None,
        unseen_domains=tuple(dict.fromkeys(args.unseen_domains)),
        labeled_ids=read_ids(args.labeled_ids),
        val_ids=read_ids(args.val_ids),
        test_ids=read_ids(args.test_ids),
        published=args.published,
        label_map=parse_label_map(args.label_map),
        label_names=tuple(args.label_names) if args.label_names else None,
        seed=args.seed,
        link=args.link,
    )
    source = RawDataset.load(find_dataset(args.source))
    command = shlex.join(["nnssl_make_subset", *args.command_line])
    with plain_warnings("nnssl_make_subset"):
        processes = args.num_processes or default_processes()
        folder, selection = make_subset(source, args.dataset_id, args.name, request, command, processes)
    print(f"labeled patients: {listed(selection.patients, 20)}")
    if selection.left_out:
        print(f"in no role, left out: {len(selection.left_out)} cases: {listed(selection.left_out)}")
    finish("nnssl_make_subset", folder, {})
    return 0


def read_count(option: str, text: str | None, form: str) -> int | None:
    """Read a whole number."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+", text):
        raise UserError(f"{option} is a number of patients", repr(text), form, f"mend {option}")
    return int(text)


def read_share(option: str, text: str | None) -> int | Fraction | None:
    """Read a whole number, or a percentage such as ``5%`` or ``2.5%``."""
    if text is None or not (match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text)):
        return read_count(option, text, "N, or P% of the domain's labeled patients")
    if not 0 < (share := Fraction(match[1]) / 100) <= 1:
        raise UserError(f"{option} takes a share of a domain", text, "more than 0%, at most 100%", f"mend {option}")
    return share


def read_ids(path: Path | None) -> tuple[str, ...] | None:
    """Read an id file: one id a line, blank lines and lines from ``#`` on are skipped."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("an id file must be readable text", error, "one id a line", "check the path") from error
    ids = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not ids:
        raise UserError("an id file names at least one id", f"none in {path}", "one id a line", "check the file")
    return ids


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnssl_make_subset``."""

    def parser() -> argparse.ArgumentParser:
        built = build_parser()
        built.set_defaults(command_line=list(sys.argv[1:] if argv is None else argv))
        return built

    return run_command("nnssl_make_subset", parser, execute, argv)
