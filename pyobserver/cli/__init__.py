"""The command line: ``python -m pyobserver info`` and ``python -m pyobserver demo``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import demo, info

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments after the program's name; None takes those of the process.

    Returns:
        The exit status: 0, or 2 where a package that the subcommand needs is missing.

    Raises:
        SystemExit: 2 for arguments that cannot be understood, 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(prog="pyobserver", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo")
    commands.add_parser("info", help="what is installed, and which kernels are loaded")
    shown = commands.add_parser(
        "demo", help="train, calibrate and quantize a small network, beside torch.ao"
    )
    shown.add_argument(
        "--output", type=Path, default=Path("demo.png"), help="the picture; a second lies beside it"
    )
    shown.add_argument("--quick", action="store_true", help="less training, fewer repeats")
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        return info.run()
    return demo.run(arguments.output, arguments.quick)
