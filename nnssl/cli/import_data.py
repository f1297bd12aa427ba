"""``nnssl_import``: plain folders of scans -> raw data set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnssl.cli._common import run_command


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Make the raw data set nnUNet_raw/DatasetXXX_NAME from folders of scans. Reads NIfTI, NRRD, "
        "MHA/MHD, DICOM (one sub-folder a case) and, for 2D, PNG. Image and label of a case have the same name; "
        "several channels are CASE_0000, CASE_0001, ...",
    )
    parser.add_argument("-d", dest="dataset_id", type=int, required=True, help="id of the new data set, 1 to 999")
    parser.add_argument("-n", dest="name", required=True, help="name of the new data set")
    parser.add_argument("--labeled", type=Path, required=True, help="folder with the labeled images")
    parser.add_argument("--labels", type=Path, required=True, help="folder with their labels")
    parser.add_argument("--unlabeled", type=Path, help="folder with unlabeled images")
    parser.add_argument("--test", type=Path, help="folder with images to predict later")
    parser.add_argument("--channels", nargs="+", help="channel names in order: MRI, CT, ... (CT: CT normalization)")
    parser.add_argument("--label_names", nargs="+", help="names of the label values 1, 2, ... (default label1 ...)")
    parser.add_argument("--label_map", help="old:new label values, e.g. 1:1,2:1; 0 drops a class")
    parser.add_argument("--patient_pattern", help="regular expression; its group is the patient, e.g. '(patient\\d+)_'")
    parser.add_argument("--domains", type=Path, help="CSV: CASE,DOMAIN[,MODALITY] (scanner, site, ...)")
    parser.add_argument("--link", action="store_true", help="link files that need no conversion instead of copying")
    parser.add_argument("-np", dest="num_processes", type=int, help="processes (default: nnUNet_def_n_proc or cores)")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Import, and print what was found and what comes next."""
    from nnssl.cli._conversion import finish, plain_warnings
    from nnssl.dataset_conversion.folders import FolderImport, import_folders
    from nnssl.dataset_conversion.labels import parse_label_map
    from nnssl.plans.parallel import default_processes

    request = FolderImport(
        labeled=args.labeled,
        labels=args.labels,
        unlabeled=args.unlabeled,
        test=args.test,
        channels=tuple(args.channels) if args.channels else None,
        label_names=tuple(args.label_names) if args.label_names else None,
        label_map=parse_label_map(args.label_map),
        patient_pattern=args.patient_pattern,
        domains=args.domains,
        link=args.link,
    )
    with plain_warnings("nnssl_import"):
        processes = args.num_processes or default_processes()
        folder, set_aside = import_folders(args.dataset_id, args.name, request, processes)
    finish("nnssl_import", folder, set_aside)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnssl_import``."""
    return run_command("nnssl_import", build_parser, execute, argv)
