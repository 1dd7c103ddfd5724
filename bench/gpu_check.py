"""Builds, tests and measures the library on the GPU of this machine: `make gpu-check`.

    python bench/gpu_check.py                          all parts, each at most 8 minutes
    python bench/gpu_check.py --parts smoke,decode     some of them
    python bench/gpu_check.py --device cpu --quick     toy sizes on the CPU: does the program work?

Needs Python >= 3.11, torch >= 2.11, triton, pytest and numpy; a checkout is enough, nothing is
fetched or installed. Each part is a process of its own, and every row is written as soon as it is
measured: a run that was stopped goes on where it was (`--redo` measures anew). Writes
`gpu_check_<device>.json` and the same as Markdown into `--out`. Part `sparsify` needs EleutherAI's
package, or its folder in the environment variable GPU_CHECK_SPARSIFY.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from gpu.context import COMMIT, Settings  # noqa: E402
from gpu.machine import slug  # noqa: E402
from gpu.state import Results  # noqa: E402
from gpu.supervise import LIMIT_S, PARTS, command_of, run_part, work  # noqa: E402
from gpu.targets import unmeasured  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    settings = Settings(args.device, args.quick, args.latents, args.l0s, args.brief)
    if args.commit:
        os.environ[COMMIT] = args.commit
    if args.worker:
        work(args.worker, settings, args.state, args.limit)
        return 0
    unknown = set(args.parts) - {*PARTS, "summary"}
    if unknown:
        arguments().error(f"unknown parts: {', '.join(sorted(unknown))}; there are {names()}")
    suffix = "_quick" if args.quick else ""
    path = args.out.resolve() / f"gpu_check_{slug(args.device)}{suffix}.json"
    failed = run(args, settings, path)
    print(f"\n{summarise(path)}\n{path}")
    return 1 if failed else 0


def run(args: argparse.Namespace, settings: Settings, path: Path) -> list[str]:
    """Run the chosen parts that are not done, as they were named; returns those that failed."""
    start = command_of(Path(__file__).resolve(), settings, path)
    began, failed = time.monotonic(), []
    first = [] if Results(path).data["device"] else ["environment"]
    for part in (p for p in dict.fromkeys([*first, *args.parts]) if p in PARTS):
        results = Results(path, args.quick)
        if args.redo:
            results.forget(part)
        if results.part_done(part):
            print(f"== {part}: done before (--redo measures it anew)")
            continue
        limit = min(args.limit, args.total - (time.monotonic() - began))
        if limit < min(30.0, args.limit):
            print(f"== {part}: left for the next run, --total is spent")
            continue
        print(f"== {part}", flush=True)
        status = run_part(part, path, args.quick, start, limit)
        print(f"== {part}: {status}\n", flush=True)
        if status == "failed":
            failed.append(part)
        if not Results(path).data["device"]:
            print("without a device there is nothing more to do")
            break
    return failed


def summarise(path: Path) -> str:
    """Write the Markdown beside the results; returns its head."""
    from gemmascope_fast import report

    results = Results(path).data
    text = report.summary({**results, "unmeasured": unmeasured(results["rows"])})
    path.with_suffix(".md").write_text(text)
    return report.overview(results)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument(
        "--parts",
        **{"type": lambda text: text.split(","), "default": [*PARTS]},
        help=f"some of {names()}, in the order in which they are to run",
    )
    sizes = {"type": lambda text: tuple(int(t) for t in text.split(",")), "default": ()}
    parser.add_argument("--latents", **sizes, help="only dictionaries of these sizes")
    parser.add_argument("--l0s", **sizes, help="only these mean counts of active latents")
    told = "fewer repetitions, without torch.compile: a minute of compilation less"
    parser.add_argument("--brief", action="store_true", help=told)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--redo", action="store_true", help="measure the chosen parts anew")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of each part")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds of this run")
    parser.add_argument("--commit", help="state of the checkout, where git cannot tell")
    parser.add_argument("--worker", choices=[*PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    return parser


def names() -> str:
    return ", ".join([*PARTS, "summary"])


if __name__ == "__main__":
    sys.exit(main())
