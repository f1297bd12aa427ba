"""What every command shares: errors in one line, exit codes, the check for a foreign ``nnssl``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from nnssl.errors import UserError


def add_model_arguments(group: argparse._ArgumentGroup, dataset: str, instead: str) -> None:
    """Add the flags that name a trained model.

    Args:
        group: where they go.
        dataset: help of ``-d``.
        instead: the flags that ``-m`` stands for.
    """
    group.add_argument("-d", metavar="ID", help=dataset)
    group.add_argument("-c", metavar="CONFIG", help="configuration, such as 2d or 3d_fullres")
    group.add_argument("-tr", metavar="TRAINER", help="trainer the model was trained with")
    group.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans name (default: %(default)s)")
    group.add_argument("--run", metavar="NAME", help="name of the run, if it was trained with one")
    group.add_argument("-m", metavar="MODEL_FOLDER", help=f"TRAINER__PLANS__CONFIG folder, instead of {instead}")
    group.add_argument("-f", nargs="+", default=["all"], metavar="FOLD", help="folds to average (default: all)")
    group.add_argument("-chk", metavar="FILE", help="checkpoint (default: checkpoint_final.pth)")


def run_command(
    name: str,
    build_parser: Callable[[], argparse.ArgumentParser],
    execute: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse ``argv``, call ``execute`` and turn a :class:`UserError` into one line on stderr and exit code 2.

    ``build_parser`` must not import anything heavy, so that ``--help`` answers at once. ``--debug`` is added here.
    """
    parser = build_parser()
    parser.prog = name
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        from nnssl.environment import check_environment  # detects a foreign nnssl

        check_environment()
        from nnssl.training.signals import leave_when_asked

        with leave_when_asked():
            return execute(args) or 0
    except UserError as error:
        if args.debug:
            raise
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
