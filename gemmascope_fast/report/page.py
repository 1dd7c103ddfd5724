"""`report.html`: what was measured in one self-contained page, tables and plots."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from . import charts, gemma
from .rows import Found, Results, Row, commit_of, cpu_rows, gpu_rows, machine_of, measured
from .tables import HEAD, cells, cpu_shape, machine

CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c1c1c;background:#fff;margin:0}
main{max-width:1080px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:20px;margin:36px 0 6px}
h3{font-size:16px;margin:24px 0 4px}
p{margin:6px 0;max-width:80ch}.soft{color:#5a5a5a}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;margin:8px 0}
th,td{padding:4px 9px;border-bottom:1px solid #e4e4e4;text-align:left;vertical-align:top}
th{font-weight:600;background:#f6f6f4}.missed{color:#a4241a;font-weight:600}
figure{margin:12px 0}figure svg{width:100%;height:auto;max-width:860px}
.gap{background:#faf6e8;border-left:3px solid #d9b44a;padding:6px 12px}
"""
CPU_HEAD = ("op", "n", "d", "latents", "L0", "inputs", *HEAD[4:])


def check() -> None:
    """Raise where the plots' library is not installed.

    Raises:
        ModuleNotFoundError: matplotlib is not there.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "bench: --report draws with matplotlib, which is not installed: pip install matplotlib"
        )


def write(folder: Path, found: Found) -> Path:
    """Write `folder/report.html`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "report.html"
    file.write_text(render(found), encoding="utf-8")
    return file


def render(found: Found) -> str:
    """The page."""
    parts = ["<h1>gemmascope-fast, measured</h1>"]
    parts += [of_gpu(name, results) for name, results in found.gpu.items()]
    machines: dict[str, dict[str, Results]] = {}
    for name, results in found.cpu.items():
        machines.setdefault(machine_of(results), {})[name] = results
    parts += [of_cpu(told, files) for told, files in machines.items()]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = "<title>gemmascope-fast, measured</title>"
    return (
        f'<!doctype html><html lang="en"><head>{head}{title}<style>{CSS}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def of_cpu(told: str, files: dict[str, Results]) -> str:
    """Everything of one machine: plots, then every row."""
    rows = [row for results in files.values() for row in cpu_rows(results)]
    origins = {name: (commit_of(r), r.get("command", "")) for name, r in files.items()}
    commands = "".join(
        f"<br>{escape(name)}, {commit}: <code>{escape(command)}</code>"
        for name, (commit, command) in origins.items()
    )
    widths = gemma.places(row["shape"]["d"] for row in rows)
    parts = [
        f"<h2>{escape(told)}</h2>",
        f'<p class="soft">Medians of interleaved rounds.{commands}</p>',
        f"<p>Widths in Gemma 3: {escape(widths)}.</p>" if widths else "",
        plots(rows),
        "<h3>Every row</h3>",
        table(CPU_HEAD, ([*cpu_shape(row), *measured(row)] for row in rows)),
    ]
    return "".join([*parts, *(integrations(results) for results in files.values())])


def of_gpu(name: str, results: Results) -> str:
    """Everything of one GPU's run."""
    rows = gpu_rows(results, every=True)
    told = f'<h2>{escape(machine(results))}</h2><p class="soft">{escape(name)}</p>'
    return told + plots(rows) + "<h3>Every row</h3>" + table(HEAD, map(cells, rows))


def plots(rows: Sequence[Row]) -> str:
    """The plots for which there is data, and a word on each for which there is none."""
    limits = "Points are our ops, lines the ceilings measured between their rounds: operations of "
    limits += "the int8 tile and of float32 units, bytes of a copy and of random rows. Operations "
    limits += "are those of the dense float32 encoder product and of the sparse passes; a screened "
    limits += "encoder does most of them in int8, and may lie above the float32 ceilings."
    shares = "Timed inside the same steps. Under Adam(fused=True) the gradients of the matrices "
    shares += "are made by the optimizer. Medians of the parts; their sum is printed."
    parts = [figure("Roofline", limits, charts.roofline(rows), "costs and ceilings of a CPU run")]
    for over, title in (("d_sae", "Over the width of the dictionary"), ("l0", "Over L0")):
        drawn = [charts.curve(held, name, over) for name, held in charts.curves(rows, over).items()]
        told = "" if over == "d_sae" else "Where sparse products stop being faster than dense ones."
        lacking = f"three sizes that differ in {over} alone: bench --sweep measures them"
        parts.append(figure(title, told, "".join(drawn) or None, lacking))
    lacking = "steps that time their parts: the suite `step` does"
    return "".join([*parts, figure("Parts of a step", shares, charts.breakdown(rows), lacking)])


def figure(title: str, told: str, svg: str | None, lacking: str) -> str:
    """A plot with its title, or what would be needed for it."""
    if svg is None:
        return (
            f'<h3>{title}</h3><p class="gap">Not drawn. These results lack {escape(lacking)}.</p>'
        )
    return f"<h3>{title}</h3><p>{escape(told)}</p><figure>{svg}</figure>"


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """An HTML table of cells that may hold Markdown's bold."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{bold(c)}</td>' for c in cells)}</tr>" for cells in body)
    return f'<div class="wide"><table><tr>{top}</tr>{lines}</table></div>'


def bold(cell: str) -> str:
    """`**missed**` stands out."""
    return escape(cell).replace("**missed**", '<span class="missed">missed</span>')


def integrations(results: Results) -> str:
    """Tables of other libraries with and without this backend, where a run has them."""
    parts = []
    for host, found in results.get("integrations", {}).items():
        body = [
            [
                feature,
                f"{row['stock']['median_ms']:.0f} ms",
                f"{row['backend']['median_ms']:.0f} ms",
                f"{row['stock']['median_ms'] / row['backend']['median_ms']:.2f}x",
            ]
            for feature, row in found["rows"].items()
        ]
        head = ("call", "as shipped", "with this backend", "times as fast")
        parts.append(f"<h3>{escape(host)}</h3>{table(head, body)}")
    return "".join(parts)
