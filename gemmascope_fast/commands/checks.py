"""Verdicts of `inspect`: "ok", "warn" (unusual, read the detail) or "fail" (wrong)."""

from __future__ import annotations

import math
from typing import Any

from .measuring import Measured

UNIT = 0.01  # how far from 1 the norms of an SAE's decoder rows may be
L0_RATIO = 2.0  # between what is measured and what the config says, either way

Check = dict[str, str]


def failed(name: str, detail: str) -> Check:
    """A check that failed."""
    return {"name": name, "verdict": "fail", "detail": detail}


def of(found: dict[str, Any], measured: Measured | None) -> list[Check]:
    """The checks of what `describe` and `measure` found."""
    layers = found["layers"]
    broken = sorted({name for layer in layers for name in layer["not_finite"]})
    made = [_check("finite", not broken, "fail", "no NaN, no infinity", f"in {', '.join(broken)}")]
    if broken:
        return made
    made += _thresholds(layers)
    silent, total = sum(layer["silent"] for layer in layers), found["d_sae"] * len(layers)
    made.append(
        _check(
            *("latents", silent == 0, "warn", "every latent has an encoder and a decoder"),
            f"{silent:,} of {total:,} latents have an encoder or decoder vector that is 0",
        )
    )
    if found["type"] == "sae":
        low, high = layers[0]["decoder"]["min"], layers[0]["decoder"]["max"]
        unit = abs(low - 1) <= UNIT and abs(high - 1) <= UNIT
        away = f"norms of decoder rows are {low:.4g} to {high:.4g}, published SAEs' are 1"
        made.append(_check("decoder", unit, "warn", "decoder rows have unit norm", away))
    if found["n_layers"] is not None:
        backwards = sum(layer["backwards"] for layer in layers)
        away = f"{backwards:,} decoder elements reach outputs before their source"
        made.append(_check("causal", not backwards, "warn", "no output before its source", away))
    return made + ([] if measured is None else _of_measured(found, measured))


def _thresholds(layers: list[dict[str, Any]]) -> list[Check]:
    if any(layer["threshold"] is None for layer in layers):
        return []
    negative = sum(layer["negative"] for layer in layers)
    away = f"{negative:,} thresholds are negative: libraries that rectify compute something else"
    return [_check("thresholds", negative == 0, "warn", "none is negative", away)]


def _of_measured(found: dict[str, Any], measured: Measured) -> list[Check]:
    l0, published = sum(measured.l0), found["metadata"].get("l0")
    made = [_check("active", l0 > 0, "fail", f"L0 {l0:.4g}", "no latent is active on any token")]
    if published:
        near = published / L0_RATIO <= l0 <= published * L0_RATIO
        text = f"L0 {l0:.4g}, the config says {published:.4g}"
        # whether that is the sum over layers is not published
        otherwise = "fail" if found["n_layers"] is None else "warn"
        away = f"{text}: another model, hook point or scale"
        made.append(_check("l0", near, otherwise, text, away))
    if measured.fvu is None:
        made.append(_check("fvu", False, "warn", "", "not measured: the file has no target"))
    else:
        worst = max(measured.fvu, key=lambda v: math.inf if math.isnan(v) else v)
        text = f"fraction of variance unexplained {worst:.4g}"
        text += " in the worst layer" if len(measured.fvu) > 1 else ""
        away = f"{text}: worse than the mean"
        made.append(_check("fvu", worst < 1, "fail", text, away))
    return made


def _check(name: str, holds: bool, otherwise: str, good: str, bad: str) -> Check:
    return {
        "name": name,
        "verdict": "ok" if holds else otherwise,
        "detail": good if holds else bad,
    }
