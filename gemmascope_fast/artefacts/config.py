"""`config.json` of Gemma Scope 2: schema, inference where it is missing, and writing."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .files import CONFIG_LIMIT
from .validate import Sizes

LATENTS = "latents"  # which latents of the published dictionary these are
DEPTH_LIMIT = 16  # nesting; published ones have 1
SINGLE_LAYER = ("sae", "transcoder")
MULTI_LAYER = ("crosscoder", "clt")
METADATA = ("l0", "model_name", "hf_hook_point_in", "hf_hook_point_out", LATENTS)
STRUCTURE = ("type", "architecture", "width", "affine_connection")  # what the weights decide
ORDER = (
    *("type", "architecture", "width", "l0", "affine_connection", "model_name"),
    *("hf_hook_point_in", "hf_hook_point_out"),
)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _jumprelu(value: Any) -> bool:
    return isinstance(value, str) and value.lower().replace("_", "") == "jumprelu"


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


def _number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and 0 <= value <= sys.float_info.max)


def _range(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not _count(value[1]):
        return value is None
    return type(value[0]) is int and 0 <= value[0] < value[1]


# Key: its test, and what is expected. `latents` is ours; the last three are other tools', and
# ignoring them would change the maths silently.
_SCHEMA: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (lambda v: v in SINGLE_LAYER + MULTI_LAYER, "sae, transcoder, crosscoder or clt"),
    "architecture": (_jumprelu, "'jump_relu', the only activation of this format"),
    "width": (_count, "an int >= 1"),
    "l0": (_number, "a number >= 0"),
    "affine_connection": (lambda v: v is None or isinstance(v, bool), "true or false"),
    "model_name": (_text, "a string"),
    "hf_hook_point_in": (_text, "a string"),
    "hf_hook_point_out": (_text, "a string"),
    LATENTS: (_range, "[start, stop] with 0 <= start < stop"),
    "activation": (_jumprelu, "'jump_relu', the only activation of this format"),
    "activation_fn": (_jumprelu, "'jump_relu', the only activation of this format"),
    "apply_b_dec_to_input": (lambda v: not v, "false: b_dec is not subtracted from x"),
}


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Validated config; unknown keys are kept.

    Raises:
        ValueError: it is not what `parse_object` reads, or a value is outside the schema.
    """
    config = parse_object(data, where)
    check(config, where, _SCHEMA)
    return config


def check(config: Mapping[str, Any], where: str, keys: Iterable[str]) -> None:
    """Values under these keys are within the schema.

    Raises:
        ValueError: one is not.
    """
    for key in keys:
        valid, expected = _SCHEMA[key]
        if key in config and not valid(config[key]):
            raise ValueError(f"{where}: {key} must be {expected}, got {shown(config[key])}")


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: too big, not a JSON object, duplicate keys, NaN, or nested too deeply.
    """
    if len(data) > CONFIG_LIMIT:
        raise ValueError(f"{where}: must have at most {CONFIG_LIMIT} bytes, and has more")
    try:
        config = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=_not_json
        )
    except RecursionError:
        raise ValueError(f"{where}: must be nested at most {DEPTH_LIMIT} deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: must be UTF-8 JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(config).__name__}")
    if not _shallow(config, DEPTH_LIMIT):
        raise ValueError(f"{where}: must be nested at most {DEPTH_LIMIT} deep")
    return config


def shown(value: Any) -> str:
    """A value of a config for an error's text."""
    got = repr(value)
    return got if len(got) <= 80 else got[:77] + "..."


def complete(config: dict[str, Any] | None, path: Path, sizes: Sizes) -> dict[str, Any]:
    """The config, inferred from path and tensors where it is missing.

    Raises:
        ValueError: nothing tells a crosscoder from a CLT.
    """
    if config is not None and "type" in config:
        return config
    kind = kind_of_path(path)
    if sizes.n_layers is None and kind not in MULTI_LAYER:
        maps = kind == "transcoder" or sizes.affine or sizes.d_in != sizes.d_out
        kind = "transcoder" if maps else "sae"
    elif kind is None and sizes.affine:
        kind = "clt"
    if kind is None:
        raise ValueError(
            f"load: {path}: whether this is a crosscoder or a clt must be said by a config.json "
            'like {"type": "clt"}, or by a path like clt/width_262k_l0_big, and neither is there'
        )
    return {"type": kind, **(_metadata_of_path(path, sizes) if config is None else config)}


def metadata(config: dict[str, Any], latents: slice, d_sae: int) -> dict[str, Any]:
    """What the config says beyond the weights, and which latents were chosen of `d_sae`."""
    found = {key: value for key, value in config.items() if key not in STRUCTURE}
    if latents != slice(0, d_sae):
        first = (config.get(LATENTS) or [0])[0]
        found[LATENTS] = [first + latents.start, first + latents.stop]
    return found


def to_json(config: dict[str, Any], where: str) -> bytes:
    """The text of `config.json`.

    Raises:
        TypeError: a value has no JSON form.
        ValueError: the text would not be read back.
    """
    known = {key: config[key] for key in ORDER if key in config}
    text = plain_json({**known, **config}, where)
    parse(text, where)
    return text


def plain_json(config: dict[str, Any], where: str) -> bytes:
    """The text of a config of any format.

    Raises:
        TypeError: a value has no JSON form.
        ValueError: `parse_object` would not read the text.
    """
    try:
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    except TypeError as error:
        raise TypeError(f"{where}: metadata must be plain JSON values: {error}") from error
    except (ValueError, RecursionError) as error:  # NaN, cycles, depth
        raise ValueError(f"{where}: metadata must be plain JSON values: {error}") from error
    parse_object(text.encode(), where)
    return text.encode()


def kind_of_path(path: Path) -> str | None:
    """The type that a published path spells, or None."""
    for part, below in _parts(path):
        if re.match(r"(layer_\d+(_\d+)*_)?width_", below):
            site = part.removesuffix("_all")
            if site in _HOOKS:
                return site if site in ("transcoder", *MULTI_LAYER) else "sae"
        if match := re.search(r"gemma-scope-(2b|9b|27b)-pt-(res|mlp|att|transcoders)$", part):
            return "transcoder" if match[2] == "transcoders" else "sae"
    return None


_HOOKS = {  # site: where x and the target come from, below `model.layers.{layer}.`
    "resid_post": ("output", "output"),
    "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
_HOOKS |= {"crosscoder": _HOOKS["resid_post"], "clt": _HOOKS["transcoder"]}


def _metadata_of_path(path: Path, sizes: Sizes) -> dict[str, Any]:
    """What a published path says: model and hook points (Gemma Scope 2), L0 (Gemma Scope 1)."""
    found: dict[str, Any] = {}
    for part, below in _parts(path):
        site, layers = _HOOKS.get(part.removesuffix("_all")), _layers(part, below, sizes)
        if site and layers:
            for key, point in zip(("hf_hook_point_in", "hf_hook_point_out"), site, strict=True):
                found[key] = f"model.layers.{layers}.{point}"
        if match := re.search(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)$", part):
            found["model_name"] = f"google/gemma-3-{match[1]}-{match[2]}"
        if match := re.fullmatch(r"average_l0_(\d{1,6})", part):
            found["l0"] = int(match[1])
    return found


def _layers(site: str, below: str, sizes: Sizes) -> str | None:
    """How a hook point spells the layers of an artefact, `17` or `{5,9,12,15}`, if it is known."""
    if site == "clt" and below.startswith("width_"):
        return "{" + ",".join(map(str, range(sizes.n_layers or 0))) + "}"
    match = re.match(r"layer_(\d{1,3}(?:_\d{1,3})*)_width_", below)
    layers = [str(int(layer)) for layer in match[1].split("_")] if match else []
    if len(layers) != (sizes.n_layers or 1):
        return None
    return layers[0] if sizes.n_layers is None else "{" + ",".join(layers) + "}"


def _parts(path: Path) -> list[tuple[str, str]]:
    """Each component of the absolute path with the one below it."""
    parts = Path(os.path.abspath(path)).parts
    return list(zip(parts, (*parts[1:], ""), strict=True))


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `json.loads(..., object_pairs_hook=unique)`.

    Raises:
        ValueError: it has a key twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _shallow(value: Any, limit: int) -> bool:
    """Whether `value` is nested at most `limit` deep."""
    if not isinstance(value, (dict, list)):
        return True
    children = value.values() if isinstance(value, dict) else value
    return limit > 0 and all(_shallow(child, limit - 1) for child in children)
