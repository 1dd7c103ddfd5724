"""The command line: `doctor` tells what serves here, `demo` trains, `bench` shows measurements."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit code: 0 for success, 1 for a failed self-test.

    Args:
        argv: arguments without the program's name; default those of the process.
    """
    parser = argparse.ArgumentParser(prog="gemmascope_fast", description=__doc__)
    parser.add_argument("--version", action="version", version=f"gemmascope_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="which code serves which op here, and a self-test")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    commands.add_parser("demo", add_help=False, help="train and compare; --help lists its options")
    commands.add_parser("bench", add_help=False, help="tables of measurements; --help for more")
    args, rest = parser.parse_known_args(argv)
    if args.command == "bench":
        from . import report as measurements

        return measurements.main(rest)
    if args.command == "demo":
        from . import demo

        return int(demo.main(rest) or 0)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from . import doctor as report

    return report.main(as_json=args.json)
