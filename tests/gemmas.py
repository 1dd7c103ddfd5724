"""Small random Gemma 3 models, dictionaries for their hook points, and dense splices of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gemmascope_fast as gsf

HIDDEN, HEADS, HEAD_DIM, LAYERS, VOCABULARY = 32, 4, 12, 3, 64
PAD, EOS, BOS, IMAGE = 0, 1, 2, 60

RESID = "model.layers.1.output"
ATTN = "model.layers.1.self_attn.o_proj.input"
MLP_IN = "model.layers.1.pre_feedforward_layernorm.output"
MLP_OUT = "model.layers.1.post_feedforward_layernorm.output"


def text_config(transformers: Any) -> Any:
    return transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def gemma(kind: str = "text", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """`Gemma3ForCausalLM`, or for kind "multimodal" `Gemma3ForConditionalGeneration`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = text_config(transformers)
    config.initializer_range = 0.3  # logits that differ from token to token
    if kind == "multimodal":
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        vision = {"num_hidden_layers": 3, "image_size": 28, "patch_size": 14, **sizes}
        config = transformers.Gemma3Config(
            text_config=config.to_dict(),
            vision_config={"model_type": "siglip_vision_model", **vision},
            image_token_index=IMAGE,
            boi_token_index=61,
            eoi_token_index=62,
            mm_tokens_per_image=4,
        )
    config._attn_implementation = attention
    names = {"text": "Gemma3ForCausalLM", "multimodal": "Gemma3ForConditionalGeneration"}
    return getattr(transformers, names[kind])(config).to(dtype).eval().requires_grad_(False)


def prompts(batch: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    """Text tokens behind a BOS."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (batch, length), generator=generator)
    ids[:, 0] = BOS
    return ids


def dictionary(
    d_in: int = HIDDEN, d_sae: int = 96, *, transcoder: bool = False, seed: int = 5, **options: Any
) -> Any:
    """A JumpReLU dictionary with about a tenth of its latents active on the small models."""
    generator = torch.Generator().manual_seed(seed)
    kind = gsf.Transcoder if transcoder else gsf.SAE
    threshold = 4.0 if d_in == HIDDEN and not transcoder else 1.0  # of the stream; of its parts
    activation = options.pop("activation", gsf.JumpReLU(0.5, init_threshold=threshold))
    made = kind(d_in, d_sae, activation, generator=generator, **options)
    with torch.no_grad():
        for bias in (made.b_enc, made.b_dec):
            bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
        if transcoder and made.W_skip is not None:
            made.W_skip.copy_(0.3 * torch.randn(made.W_skip.shape, generator=generator))
    return made.requires_grad_(False)


def dense_acts(sae: Any, x: Tensor) -> Tensor:
    """`[*batch, d_sae]`, by the definition."""
    pre = x.float() @ sae.W_enc + sae.b_enc
    return torch.where(pre > sae.threshold, pre, 0.0)


def dense_recon(sae: Any, acts: Tensor, x: Tensor) -> Tensor:
    skip = getattr(sae, "W_skip", None)
    return acts @ sae.W_dec + sae.b_dec + (0.0 if skip is None else x.float() @ skip)


Replace = Callable[[Tensor, Tensor], Tensor]
"""`(x read, y to be reconstructed) -> what replaces y`."""


@contextmanager
def dense_splice(model: Any, point_in: str, point_out: str, replace: Replace) -> Iterator[None]:
    """Plain hooks on the text model's layers, written without the library."""
    held: list[Tensor] = []

    def visit(point: str, function: Callable[[Tensor], Tensor | None]) -> Any:
        path, side = point.removeprefix("model.").rsplit(".", 1)
        module = text_model(model).get_submodule(path)
        if side == "input":
            return module.register_forward_pre_hook(
                lambda _m, args: None if (v := function(args[0])) is None else (v,)
            )
        return module.register_forward_hook(lambda _m, _a, out: changed(out, function))

    def changed(out: Any, function: Callable[[Tensor], Tensor | None]) -> Any:
        value = function(out[0] if isinstance(out, tuple) else out)
        if value is None:
            return None
        return (value, *out[1:]) if isinstance(out, tuple) else value

    if point_in == point_out:
        handles = [visit(point_out, lambda y: replace(y, y))]
    else:
        handles = [
            visit(point_in, lambda x: held.append(x)),
            visit(point_out, lambda y: replace(held.pop(), y)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def text_model(model: Any) -> nn.Module:
    """The module that has the decoder's layers."""
    inner = model.model
    return getattr(inner, "language_model", inner)


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def checkpoint(model: Any, on: bool) -> None:
    """Whether layers run again for their gradients; transformers 5 has another name for it."""
    verb = "enable" if on else "disable"
    new = getattr(model, f"activation_checkpointing_{verb}", None)
    (new or getattr(model, f"gradient_checkpointing_{verb}"))()
