"""``nnssl_plan_and_preprocess``: plan a raw data set and preprocess its labeled and unlabeled cases."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnssl.cli._common import run_command

if TYPE_CHECKING:
    from nnssl.plans.options import PlanningOptions
    from nnssl.plans.pipeline import Prepared

NAME = "nnssl_plan_and_preprocess"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        description="Plan and preprocess a data set with labeled and unlabeled cases. A rerun does only what changed.",
        epilog="--patch_size, --batch_size and --base_features apply to exactly one -c. These, --spacing, -tr, "
        "-gpu_memory_target and --preset write a plan under a name of its own, which is printed, unless no plan exists "
        "yet or -overwrite_plans_name is given.",
    )
    add = parser.add_argument
    add("-d", required=True, metavar="ID", help="data set id or name, such as 501")
    add("-c", nargs="+", metavar="CONFIG", help="configurations (default: 2d, 3d_fullres and 3d_lowres where planned)")
    add("-pl", metavar="PLANNER", help="nnU-Net planner, such as nnUNetPlannerResEncM (default: ExperimentPlanner)")
    add("-gpu_memory_target", type=float, metavar="GB", help="GPU memory to plan for (default: the planner's)")
    add("-np", type=int, metavar="N", help="worker processes (default: nnUNet_def_n_proc, or the cores up to 8)")
    add("--verify_dataset_integrity", action="store_true", help="also run nnU-Net's own integrity check")
    add("-tr", metavar="TRAINER", help="plan for the memory that this trainer takes")
    add("--patch_size", type=int, nargs="+", metavar="N", help="voxels an axis, in the plan's axis order")
    add("--batch_size", type=int, metavar="N", help="labeled items a step")
    add("--base_features", type=int, metavar="N", help="feature maps of the first stage (nnU-Net: 32)")
    add(
        "--spacing",
        type=float,
        nargs="+",
        metavar="MM",
        help="target spacing: three numbers, in the image's z y x order",
    )
    add("--preset", metavar="NAME|FILE", help="apply the plan section of a preset")
    add("-overwrite_plans_name", metavar="NAME", help="write the plan under this name, even if it exists")
    add("--clean", action="store_true", help="forget earlier runs: plan and preprocess everything anew")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Run the command."""
    from nnssl.layout import RawDataset, find_dataset, variable

    variable("nnUNet_raw")
    variable("nnUNet_preprocessed")
    dataset = RawDataset.load(find_dataset(args.d))
    options, configurations = planning_options(args)

    from nnssl.cli._conversion import plain_warnings
    from nnssl.plans.parallel import default_processes
    from nnssl.plans.pipeline import plan_and_preprocess

    processes = args.np or default_processes()
    with plain_warnings(NAME):
        prepared = plan_and_preprocess(
            dataset, configurations, options, processes, args.verify_dataset_integrity, args.clean, _report
        )
    _conclude(dataset.folder.name, prepared, args.tr)
    return 0


def planning_options(args: argparse.Namespace) -> tuple[PlanningOptions, list[str] | None]:
    """Return the options of the command line, on top of the preset's plan section, and the configurations.

    Raises:
        UserError: if an option is out of range or overrides do not apply to exactly one configuration.
    """
    from nnssl.plans.options import Overrides, PlanningOptions, one_configuration, plan_section
    from nnssl.plans.preset import load_preset

    preset = load_preset(args.preset) if args.preset else None
    section = plan_section(preset)
    given = {k: getattr(args, k) for k in ("patch_size", "batch_size", "base_features", "spacing")}
    section.update({key: value for key, value in given.items() if value is not None})
    preset_configuration = section.pop("configuration", None)
    spacing = section.pop("spacing", None)
    override = Overrides(**section)
    configurations = args.c
    overrides = {}
    if override:
        configuration = one_configuration(args.c, preset_configuration)
        overrides, configurations = {configuration: override}, [configuration]
    options = PlanningOptions(
        planner=args.pl,
        gpu_memory_target=args.gpu_memory_target,
        trainer=args.tr,
        memory_factor=_memory_factor(args.tr),
        spacing=spacing,
        overrides=overrides,
        preset=preset["name"] if preset else None,
        plans_name=args.overwrite_plans_name,
    )
    return options, configurations


def _memory_factor(trainer: str | None) -> float:
    if trainer is None:
        return 1.0
    from nnssl.trainers.registry import trainer_info

    return trainer_info(trainer).memory_factor


def _report(line: str) -> None:
    print(line, flush=True)


def _conclude(dataset: str, prepared: Prepared, trainer: str | None) -> None:
    """Print what was set aside, where everything lies and which command comes next."""
    manifest = prepared.manifest
    for name, why in manifest["set_aside"].items():
        print(f"{NAME}: warning: set aside {name}: {why}", file=sys.stderr)
    if not manifest["cases"]:
        print(f"{NAME}: warning: no unlabeled case in imagesUn: training will be supervised", file=sys.stderr)
    for configuration, counts in prepared.processed.items():
        done = ", ".join(f"{n} {part}" for part, n in counts.items() if n) or "nothing, all up to date"
        print(f"Preprocessed {configuration}: {done}")
    print(f"Plan: {prepared.folder / (prepared.plans_name + '.json')}")
    print(f"Data: {prepared.folder}")
    plans = "" if prepared.plans_name == "nnUNetPlans" else f" -p {prepared.plans_name}"
    for configuration in prepared.configurations:
        print(f"Next: nnssl_train {int(dataset[7:10])} {configuration} -tr {trainer or 'DiffCLTrainer'}{plans}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(NAME, build_parser, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
