"""`cfg.json` of sparsify, and the module that computes the same."""

from __future__ import annotations

from typing import Any

from ..activations import TopK
from ..semantics import Semantics
from .config import shown
from .peers import Peer, count, flag
from .validate import SKIP, Sizes

STRUCTURE = {
    *("activation", "expansion_factor", "num_latents", "k", "d_in"),
    *("skip_connection", "transcode"),
}


def read(config: dict[str, Any], where: str) -> Peer:
    """What a config describes.

    Raises:
        ValueError: a value is not valid, or no module here computes what that coder does.
    """
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{where}: activation must be topk, got {shown(config['activation'])}")
    affine = flag(config, "skip_connection", False, where)
    maps = flag(config, "transcode", False, where)
    if affine and not maps:
        raise ValueError(
            f"{where}: skip_connection must come with transcode: no module here has a skip whose "
            "encoder sees x - b_dec"
        )
    d_in = count(config, "d_in", where)
    given = config.get("num_latents", 0) != 0
    d_sae = (
        count(config, "num_latents", where)
        if given
        else d_in * count({"expansion_factor": 32, **config}, "expansion_factor", where)
    )
    names = {"w_enc": "encoder.weight", "b_enc": "encoder.bias", "w_dec": "W_dec", "b_dec": "b_dec"}
    found = {key: value for key, value in config.items() if key not in STRUCTURE}
    return Peer(
        sizes=Sizes(d_in, d_sae, d_in, affine),
        names=names | ({SKIP: "W_skip"} if affine else {}),
        transposed=("w_enc", SKIP),
        zeros=(),
        activation=TopK(count({"k": 32, **config}, "k", where, d_sae)),
        semantics=Semantics.preset("sparsify_1_3", center=not maps),
        config={**found, "type": "transcoder" if maps else "sae"},
    )
