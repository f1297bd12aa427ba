"""``nnssl_reproduce``: run a published table and print our numbers beside the reported ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.cli._common import run_command
from nnssl.errors import UserError

if TYPE_CHECKING:
    from nnssl.reproduce.table import Row, Table

NAME = "nnssl_reproduce"
DESCRIPTION = """Run the rows of a published table: subset, plan, training, prediction, evaluation under the paper's
protocol and in mm, for several seeds; then print our mean and spread beside the reported numbers, with the known flaws
of the paper's protocol. A stopped call goes on with the same command."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; loads nothing heavy."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("paper", nargs="?", metavar="PAPER", help="such as diffcl; without it --list shows all tables")
    parser.add_argument("table", nargs="?", metavar="TABLE", help="such as LA-4")
    what = parser.add_argument_group("what to run")
    what.add_argument("--row", nargs="+", metavar="ROW", help="rows by method (default: all that can be run)")
    instead = what.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print one independent command a row and stop")
    instead.add_argument("--report", action="store_true", help="run nothing, print the table from what is there")
    what.add_argument("--budget", type=float, default=1.0, metavar="SHARE", help="share of the paper's iterations")
    seeds = what.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="train seeds 0 to N - 1 (default: %(default)s)"
    )
    seeds.add_argument("--seed", type=int, metavar="K", help="train this seed only")
    what.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of --row")
    data = parser.add_argument_group("data")
    data.add_argument("-d", metavar="ID", help="the converted data set (default: the one in nnUNet_raw that fits)")
    data.add_argument("--test_ids", type=Path, metavar="FILE", help="substitute test cases, out of training altogether")
    data.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar="MM",
        help="plan at this voxel size (z y x); patch and strides keep their extent in mm",
    )
    how = parser.add_argument_group("how to run")
    how.add_argument("-o", type=Path, metavar="DIR", help="folder for all but data and models (default: in results)")
    how.add_argument("-device", choices=("cuda", "mps", "cpu"), help="default: the best there is")
    how.add_argument("-num_gpus", type=int, default=1, metavar="N", help="GPUs of one training (default: 1)")
    how.add_argument("-np", type=int, metavar="N", help="worker processes that prepare data")
    how.add_argument("--precision", metavar="NAME", help="as for nnssl_train: auto, fp32, bf16")
    return parser


def execute(args: argparse.Namespace) -> int:
    """List, run or report."""
    from nnssl.reproduce.run import Job, compare, default_root, run_job
    from nnssl.reproduce.table import find_table

    if args.list:
        print("\n".join(_listed(args)))
        return 0
    if args.paper is None or args.table is None:
        rule = "PAPER and TABLE name what to run"
        raise UserError(rule, "no TABLE" if args.paper else "none", None, f"{NAME} --list shows all")
    table = find_table(args.paper, args.table)
    chosen = _rows(table, args)
    request, test_ids = _request(args, chosen), _test_ids(args)
    job = Job(
        table, tuple(chosen or table.rows), request, args.d, test_ids, args.o.resolve() if args.o else default_root()
    )
    if not args.report:
        run_job(job)
    print(compare(job))
    return 0


def _request(args: argparse.Namespace, chosen: Sequence[object]):
    from nnssl.cli.train import parse_settings
    from nnssl.reproduce.recipe import Request

    if args.seeds < 1:
        raise UserError("--seeds must be a number of seeds", args.seeds, "1 or more")
    if args.set and len(chosen) != 1:
        raise UserError("--set belongs to one row", f"{len(chosen)} rows", None, "name it with --row")
    parse_settings(args.set)
    return Request(
        budget=args.budget,
        seeds=tuple(range(args.seeds)) if args.seed is None else (args.seed,),
        spacing=tuple(args.spacing) if args.spacing else None,
        settings=tuple(args.set),
        device=args.device,
        num_gpus=args.num_gpus,
        precision=args.precision,
        processes=args.np,
    )


def _test_ids(args: argparse.Namespace) -> tuple[str, ...] | None:
    from nnssl.cli.make_subset import read_ids

    return read_ids(args.test_ids)


def _listed(args: argparse.Namespace) -> list[str]:
    """Return what ``--list`` prints: one command a row, or one line a table without PAPER."""
    from nnssl.reproduce.run import all_tables, commands
    from nnssl.reproduce.table import find_table, tables_of

    if args.table is None and (args.row or args.set):
        raise UserError("--row and --set belong to one table", "no TABLE", None, "name it after PAPER")
    if args.paper is None:
        return all_tables()
    tables = list(tables_of(args.paper).values()) if args.table is None else [find_table(args.paper, args.table)]
    lines = []
    for table in tables:
        chosen = _rows(table, args)
        _request(args, chosen)  # what a command of a row would be refused for is refused here
        lines += commands(table, chosen or table.rows, _rest(args))
    return lines


def _rows(table: Table, args: argparse.Namespace) -> list[Row]:
    """Return the rows asked for, each once; none: all."""
    return list({row.slug: row for row in map(table.row, args.row or ())}.values())


def _rest(args: argparse.Namespace) -> list[str]:
    """Return the words of the call that every row's command repeats: all that were given but ``--row``."""
    words: list[str] = []
    for action in build_parser()._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or action.dest in ("help", "row", "list") or value == action.default:
            continue
        words.append(action.option_strings[-1])
        if value is not True:
            words += [_word(one) for one in (value if isinstance(value, list) else [value])]
    return words


def _word(value: object) -> str:
    return str(value.resolve() if isinstance(value, Path) else value)  # the command may run elsewhere


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnssl_reproduce``."""
    return run_command(NAME, build_parser, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
