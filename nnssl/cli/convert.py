"""``nnssl_convert``: a public data set as downloaded -> raw data set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli._common import run_command


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Convert a public data set as downloaded to nnUNet_raw/DatasetXXX_NAME, with its published splits. "
        "A conversion that was killed goes on when the same command is given again. "
        "nnssl_info datasets lists the data sets; documentation/datasets describes the layouts.",
    )
    parser.add_argument("source_name", metavar="NAME", help="which data set it is, e.g. LA or MOSXAV")
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the unpacked download")
    parser.add_argument("-d", dest="dataset_id", type=int, required=True, help="id of the new data set, 1 to 999")
    parser.add_argument("-n", dest="name", help="name of the new data set (default: NAME)")
    parser.add_argument("--channels", nargs="+", help="channel names instead of the default; noNorm: no normalization")
    parser.add_argument("--with_unlabeled", action="store_true", help="also write images without labels, to imagesUn")
    parser.add_argument(
        "--literature_crop",
        action="store_true",
        help="cut scans, test scans too, around the reference label as published code did; every result is marked",
    )
    parser.add_argument("--link", action="store_true", help="link files that need no conversion instead of copying")
    parser.add_argument("-np", dest="num_processes", type=int, help="processes (default: nnUNet_def_n_proc or cores)")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Convert, and print what was found and what comes next."""
    from nnssl.cli._conversion import finish, plain_warnings
    from nnssl.dataset_conversion import CONVERTERS
    from nnssl.dataset_conversion.convert import ConvertOptions, convert
    from nnssl.plans.parallel import default_processes

    with plain_warnings("nnssl_convert"):
        processes = args.num_processes or default_processes()
        channels = tuple(args.channels) if args.channels else None
        options = ConvertOptions(channels, args.link, args.with_unlabeled, args.literature_crop)
        folder, set_aside = convert(args.source_name, args.source, args.dataset_id, args.name, options, processes)
    converter = CONVERTERS[args.source_name]
    print(f"{converter.TITLE}; licence: {converter.LICENCE}; source: {converter.SOURCE_URL}")
    finish("nnssl_convert", folder, set_aside, subset=not args.with_unlabeled)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnssl_convert``."""
    return run_command("nnssl_convert", build_parser, execute, argv)
