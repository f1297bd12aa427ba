"""Cost of preprocessing: an unlabeled case against the same image with its label."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from nnssl.benchmark.timing import interleaved, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the preprocessing benchmark."""
    parser.add_argument("dataset", help="planned data set, id or name")
    parser.add_argument("configuration", help="2d, 3d_fullres, ...")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier")
    parser.add_argument("--repeats", type=int, default=10, help="timed cases of each side (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Preprocess the labeled cases in turns with and without their labels, by the functions the commands use."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnssl.layout import RawDataset, find_dataset, variable

    raw = RawDataset.load(find_dataset(args.dataset))
    folder = variable("nnUNet_preprocessed") / raw.name
    plans = json.loads((folder / f"{args.p}.json").read_text(encoding="utf-8"))
    manager = PlansManager(plans)
    configuration = manager.get_configuration(args.configuration)
    cases = list(raw.cases("imagesTr").items())
    stock = DefaultPreprocessor(verbose=False)
    # numbered: a case that comes again must not meet its own file
    turns = {side: enumerate(cases * (args.repeats + 1)) for side in ("labeled", "unlabeled")}
    with tempfile.TemporaryDirectory() as out:

        def labeled() -> None:
            number, (case, images) = next(turns["labeled"])
            label = str(raw.label_file("imagesTr", case))
            target = str(Path(out, f"{case}_l{number}"))
            stock.run_case_save(target, [str(i) for i in images], label, manager, configuration, raw.json)

        def unlabeled() -> None:
            number, (case, images) = next(turns["unlabeled"])
            target = str(Path(out, f"{case}_u{number}"))  # as nnssl.plans.preprocess does for every unlabeled case
            stock.run_case_save(target, [str(i) for i in images], None, manager, configuration, raw.json)

        seconds = interleaved({"labeled": labeled, "unlabeled": unlabeled}, args.repeats)
    pairs = zip(seconds["unlabeled"], seconds["labeled"], strict=True)
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "time_ratio": statistics.median(a / b for a, b in pairs),
    }
