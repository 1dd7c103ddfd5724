"""The command line: doctor, demo, train, bench; convert, inspect and encode for artefacts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__

ARTEFACTS = {
    "convert": "write an artefact in another format",
    "inspect": "what an artefact holds, with checks",
    "encode": "sparse activations of a file of activations",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit code.

    0 for success, 1 for a check or a self-test that failed, 2 for what cannot be used.

    Args:
        argv: arguments without the program's name; default those of the process.
    """
    parser = argparse.ArgumentParser(prog="gemmascope_fast", description=__doc__)
    parser.add_argument("--version", action="version", version=f"gemmascope_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="which code serves which op here, and a self-test")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    commands.add_parser("demo", add_help=False, help="train and compare; --help lists its options")
    commands.add_parser("train", add_help=False, help="train an SAE; --help lists its options")
    commands.add_parser("bench", add_help=False, help="measure this machine; --help for more")
    for name, text in ARTEFACTS.items():
        commands.add_parser(name, add_help=False, help=f"{text}; --help lists its options")
    args, rest = parser.parse_known_args(argv)
    if args.command in ARTEFACTS:
        return _on_artefacts(args.command, rest)
    if args.command == "bench":
        from . import report as measurements

        return measurements.main(rest)
    if args.command == "demo":
        from . import demo

        return int(demo.main(rest) or 0)
    if args.command == "train":
        from .training import command

        return command.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from . import doctor as report

    return report.main(as_json=args.json)


def _on_artefacts(command: str, rest: Sequence[str]) -> int:
    from .commands import convert, encode, inspection

    mains = {"convert": convert.main, "inspect": inspection.main, "encode": encode.main}
    return mains[command](rest)
