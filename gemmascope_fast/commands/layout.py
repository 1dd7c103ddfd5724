"""The report of `inspect` as plain text."""

from __future__ import annotations

from typing import Any

from . import size

COLUMNS = ("encoder", "decoder", "threshold", "b_enc", "b_dec")
TITLES = {"encoder": "encoder norm", "decoder": "decoder norm"}


def text(found: dict[str, Any]) -> str:
    """Lay out what `inspect` found."""
    lines = [found["path"]]
    if "layers" in found:
        lines += [_head(found), *_metadata(found["metadata"]), "", *_tensors(found), ""]
        lines += _statistics(found["layers"])
        if "measured" in found:
            lines += ["", *_measured(found["measured"])]
        lines.append("")
    return "\n".join(lines + _checks(found["checks"]))


def table(rows: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _head(found: dict[str, Any]) -> str:
    sizes = f"d_in {found['d_in']:,}, d_sae {found['d_sae']:,}, d_out {found['d_out']:,}"
    if found["n_layers"] is not None:
        sizes = f"{found['n_layers']} layers of d {found['d_in']:,}, d_sae {found['d_sae']:,} each"
    files = found["files"]
    total = size(sum(file["bytes"] for file in files))
    held = f"{total} in {files[0]['name'] if len(files) == 1 else f'{len(files)} files'}"
    return f"{found['type']}{', affine skip' if found['affine'] else ''}: {sizes}; {held}"


def _metadata(values: dict[str, Any]) -> list[str]:
    shown = {key: value for key, value in values.items() if value is not None}
    wide = max(map(len, shown), default=0)
    return [f"{key:{wide}}  {value}" for key, value in shown.items()]


def _tensors(found: dict[str, Any]) -> list[str]:
    rows = [["tensor", "shape", "dtype"]]
    for name, spec in found["tensors"].items():
        rows.append([name, " x ".join(map(str, spec["shape"])), spec["dtype"]])
    return table(rows)


def _statistics(layers: list[dict[str, Any]]) -> list[str]:
    """One line per layer and quantity: smallest, median, largest."""
    several = len(layers) > 1
    rows = [["layer" if several else "", "min", "median", "max"]]
    for i, layer in enumerate(layers):
        for column in COLUMNS:
            spread = layer[column]
            if spread is not None:
                name = TITLES.get(column, column)
                label = f"{i:>3} {name}" if several else name
                rows.append([label, *(f"{spread[key]:.4g}" for key in ("min", "median", "max"))])
    return table(rows)


def _measured(found: dict[str, Any]) -> list[str]:
    several = len(found["l0"]) > 1
    rows = [["layer" if several else "", "L0", "never active", "FVU"]]
    for i, l0 in enumerate(found["l0"]):
        fvu = "" if found["fvu"] is None else f"{found['fvu'][i]:.4g}"
        label = f"{i:>3}" if several else f"{found['tokens']:,} tokens"
        rows.append([label, f"{l0:.4g}", f"{found['silent'][i]:,}", fvu])
    if several:
        total = f"{found['tokens']:,} tokens"
        rows.append([total, f"{sum(found['l0']):.4g}", f"{sum(found['silent']):,}", ""])
    return table(rows)


def _checks(checks: list[dict[str, str]]) -> list[str]:
    wide = max(len(check["name"]) for check in checks)
    return [f"{c['verdict']:4}  {c['name']:{wide}}  {c['detail']}" for c in checks]
