"""A report as plain text, at most 100 columns wide where its words allow."""

from __future__ import annotations

import textwrap
from typing import Any

from .serving import DEVICES

WIDTH = 100


def as_text(found: dict[str, Any]) -> str:
    """Lay out a report: facts, one row per op, reasons, and at the end what to do."""
    lines = _facts(found)
    lines += ["", f"{'op':18}" + "".join(f"{device:22}" for device in DEVICES).rstrip()]
    for name, devices in found["ops"].items():
        lines.append(
            f"{name:18}" + "".join(f"{_cell(row):22}" for row in devices.values()).rstrip()
        )
    lines += ["", *_reasons(found["ops"]), "", *_advice(found)]
    return "\n".join(lines)


def _facts(found: dict[str, Any]) -> list[str]:
    cpu, build = found["cpu"], found["build"]
    cores = f" of {cpu['cores']} cores" if cpu["cores"] else ""
    simd = f", SIMD target {cpu['simd_target']}" if build is not None else ""
    int8 = " with int8 dot products" if cpu["int8"] else ""
    devices = [
        f"{d['name']} (compute capability {d['capability']})" for d in found["gpu"]["devices"]
    ]
    facts = [
        _pairs(found["versions"]),
        f"package: {found['install']['path']}",
        f"cpu: {cpu['machine']}, {cpu['threads']} threads{cores}{simd}{int8}",
        f"cpu features: {' '.join(cpu['features']) or 'none known'}",
        "gpu: " + (", ".join(devices) or "none that torch can use"),
        "build: " + ("not built" if build is None else _pairs(build)),
        "environment: "
        + (_pairs(found["environment"] | found["thread_settings"]) or "nothing set"),
    ]
    return [line for fact in facts for line in _wrapped(fact, "  ")]


def _advice(found: dict[str, Any]) -> list[str]:
    rows = found["ops"].values()
    serving = {row["implementation"] for devices in rows for row in devices.values()} - {"none"}
    lines = []
    for advice in found["advice"]:
        lines += _wrapped(f"{advice['level'] + ':':9}{advice['what']}", " " * 9)
        lines += _wrapped(" " * 9 + f"-> {advice['do']}", " " * 12) if advice["do"] else []
    if any(a["level"] == "problem" for a in found["advice"]):
        return lines
    tested = f"all {len(rows)} ops pass their self-test"
    more = "" if any(a["do"] for a in found["advice"]) else "; nothing to do"
    return [*lines, f"ok: {tested}, served by {' and '.join(sorted(serving))}{more}"]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def _pairs(values: dict[str, Any]) -> str:
    def shown(v: Any) -> str:
        return (",".join(v) if isinstance(v, list) else str(v)) or "none"

    return "  ".join(f"{k} {shown(v)}" for k, v in values.items())


def _cell(row: dict[str, Any]) -> str:
    verdict = row["self_test"] if row["self_test"] in ("pass", "") else "FAIL"
    return f"{row['implementation']} {verdict}"


def _reasons(rows: dict[str, Any]) -> list[str]:
    """One paragraph per device, implementation and reason, naming the ops it holds for."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for name, devices in rows.items():
        for device, row in devices.items():
            for implementation, reason in row["why_not"].items():
                grouped.setdefault((device, implementation, reason), []).append(name)
    whole: dict[tuple[str, str], list[str]] = {}
    for (device, implementation, reason), names in sorted(grouped.items()):
        part = "" if len(names) == len(rows) else f" ({', '.join(names)})"
        whole.setdefault((device, reason + part), []).append(implementation)
    return [
        line
        for (device, reason), absent in whole.items()
        for line in _wrapped(f"not {', '.join(absent)} on {device}: {reason}", "  ")
    ]
