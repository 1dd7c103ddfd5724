"""capture: what dictionaries read, by pass and generation, and artefacts of several layers."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import gemmas
import pytest
import torch
from gemmas import ATTN, MLP_IN, MLP_OUT, RESID, dictionary
from oracle import assert_same
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.hook_points import expand
from gemmascope_fast.multilayer import Crosscoder, CrossLayerTranscoder

LAYERS_IN = "model.layers.{0,...}.pre_feedforward_layernorm.output"
LAYERS_OUT = "model.layers.{0,...}.post_feedforward_layernorm.output"


# ---- single layers


@pytest.mark.parametrize("kind, attention", [("text", "eager"), ("multimodal", "sdpa")])
def test_x_acts_and_target_are_those_of_the_forward_pass(kind: str, attention: str) -> None:
    model, ids = gemmas.gemma(kind, attention), gemmas.prompts()
    sae, heads, coder = dictionary(), dictionary(48), dictionary(transcoder=True, affine=True)
    heads.metadata = {"hf_hook_point_in": ATTN}
    coder.metadata = {"hf_hook_point_in": MLP_IN, "hf_hook_point_out": MLP_OUT}
    sae.metadata = {"hf_hook_point_in": RESID, "hf_hook_point_out": RESID}
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        before = gemmas.hook_count(model)
        with gsf.capture(model, [sae, heads, coder]) as captured:
            model(ids)
    assert gemmas.hook_count(model) == before
    layer = gemmas.text_model(model).layers[1]
    with torch.no_grad():
        written = layer.post_feedforward_layernorm(layer.mlp(captured[coder].x))
        attended = layer.post_attention_layernorm(layer.self_attn.o_proj(captured[heads].x))
    assert_same(captured[sae].x, hidden[2])
    assert_same(captured[coder].target, written)
    torch.testing.assert_close(hidden[1] + attended + written, hidden[2])
    for key, module in ((RESID, sae), (ATTN, heads), (2, coder)):
        reading = captured[key]
        assert reading is captured[module] and reading.module is module
        assert_same(reading.acts.to_dense(), module.encode(reading.x).to_dense())
        assert reading.acts is reading.acts, "encoded once"
    assert_same(captured[sae].target, captured[sae].x)
    assert [r.key for r in captured] == [RESID, ATTN, MLP_IN] and len(captured) == 3


def test_gradients_flow_through_what_was_captured() -> None:
    model, ids, sae = gemmas.gemma(), gemmas.prompts(), dictionary()
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    with gsf.capture(model, {RESID: sae}) as captured:
        hidden = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[2]
    acts = captured[sae].acts
    (ours,) = torch.autograd.grad(acts.values.sum(), embeds, retain_graph=True)
    (theirs,) = torch.autograd.grad(gemmas.dense_acts(sae, hidden).sum(), embeds)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    rows, latents = torch.tensor([3, 17]), torch.tensor([1, 2])
    pre = gsf.pre_at(captured[sae].x, sae.W_enc, sae.b_enc, rows, latents)
    assert bool((pre < sae.threshold[latents]).all()), "latents that are off"
    assert pre.requires_grad


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}], ids=["cache", "none"])
def test_a_generation_is_joined_and_the_next_forgets_it(cache: Any) -> None:
    model, ids, sae = gemmas.gemma(), gemmas.prompts(), dictionary()
    with torch.no_grad(), gsf.capture(model, {RESID: sae}) as captured:
        made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, **cache)
        generated, acts = captured[sae].x, captured[sae].acts
        model(made[:, :-1])
        whole = captured[sae].x
        assert captured[sae].acts is not acts
    torch.testing.assert_close(generated, whole, atol=1e-4, rtol=1e-4)
    assert acts.shape == (2, 13, 96)


def test_guesses_that_were_taken_back_are_forgotten() -> None:
    """Assisted generation runs several tokens at once and crops the cache to those it accepts."""
    model, ids, sae, lengths = gemmas.gemma(), gemmas.prompts(1), dictionary(), []
    ids[:, 3:] = ids[:, 1:3].repeat(1, 3)
    model.register_forward_pre_hook(
        lambda _m, _a, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad(), gsf.capture(model, {RESID: sae}) as captured:
        options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
        made = model.generate(ids, prompt_lookup_num_tokens=3, **options)
        generated, acts = captured[sae].x, captured[sae].acts
        model(input_ids=made[:, :-1])
        assert sum(lengths[:-1]) > generated.shape[1], "no guess was taken back"
        torch.testing.assert_close(generated, captured[sae].x, atol=1e-4, rtol=1e-4)
    assert acts.shape == (1, 17, 96)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_conversations_are_not_joined_to_one_another(lengths: tuple[int, int]) -> None:
    model, sae = gemmas.gemma(), dictionary()
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    turns = [gemmas.prompts(1, n + 2, seed=n + i) for i, n in enumerate(lengths)]
    with torch.no_grad(), gsf.capture(model, {RESID: sae}) as captured:
        outs = [model(ids[:, :-2], use_cache=True) for ids in turns]
        for at in (-2, -1):
            for ids, out in zip(turns, outs, strict=True):
                model(ids[:, [at]], **{name: out[name]})
                last = captured[sae].x
                assert last.shape == (1, 1, gemmas.HIDDEN)
        model(turns[1])
        torch.testing.assert_close(last[0, 0], captured[sae].x[0, -1], atol=1e-4, rtol=1e-4)


def test_what_was_read_between_passes_is_made_anew() -> None:
    model, ids, sae = gemmas.gemma(), gemmas.prompts(), dictionary()
    with torch.no_grad(), gsf.capture(model, {RESID: sae}) as captured:
        out = model(ids[:, :5], use_cache=True)
        assert captured[sae].acts.shape == (2, 5, 96)
        name = "cache" if "cache" in out else "past_key_values"
        model(ids[:, 5:], **{name: out[name]})
    assert captured[sae].acts.shape == (2, 9, 96)


def test_a_pass_that_gradients_run_again_is_kept_once() -> None:
    model, ids = gemmas.gemma().train(), gemmas.prompts()
    gemmas.checkpoint(model, True)
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    edit = lambda acts, _: acts.scale(range(96), 0.5)  # noqa: E731
    coder, seen = dictionary(transcoder=True), []
    with gsf.splice(model, {(MLP_IN, MLP_OUT): coder}, edit, error="none"):
        with gsf.capture(model, {(MLP_IN, MLP_OUT): coder}) as captured:
            logits = model(inputs_embeds=embeds, use_cache=False).logits
            logits.square().sum().backward()
            seen.append(captured[coder].target.shape)
    assert seen == [(2, 9, 32)]
    again = embeds.detach().requires_grad_()
    gemmas.checkpoint(model, False)
    with gsf.splice(model, {(MLP_IN, MLP_OUT): coder}, edit, error="none"):
        model(inputs_embeds=again, use_cache=False).logits.square().sum().backward()
    assert embeds.grad is not None and again.grad is not None
    torch.testing.assert_close(embeds.grad, again.grad)


def test_readings_that_are_not_there() -> None:
    model, sae, other = gemmas.gemma(), dictionary(), dictionary()
    twice = {RESID: sae, ATTN: dictionary(48), "model.layers.2.output": sae}
    captured = gsf.capture(model, twice)
    with pytest.raises(KeyError, match="capture: SAE names 2 of"):
        captured[sae]
    with pytest.raises(KeyError, match="capture: SAE names 0 of"):
        captured[other]
    with pytest.raises(KeyError, match=r"capture: model.layers.3.output names 0 of"):
        captured["model.layers.3.output"]
    with pytest.raises(RuntimeError, match="capture: no forward pass has reached .*layers.1.out"):
        _ = captured[RESID].x
    with pytest.raises(ValueError, match="capture: model.layers.1.output must have shape"):
        with gsf.capture(model, {RESID: dictionary(20)}):
            model(gemmas.prompts())


# ---- several layers


def several(kind: Any, layers: int, **options: Any) -> Any:
    """A JumpReLU artefact whose decoders reach every output that they may."""
    generator = torch.Generator().manual_seed(layers)
    activation = gsf.JumpReLU(0.5, init_threshold=3.0 if kind is Crosscoder else 1.0)
    made = kind(layers, gemmas.HIDDEN, 40, activation, generator=generator, **options)
    with torch.no_grad():
        for t in (*made.W_dec, *made.b_enc, made.b_dec, *(getattr(made, "W_skip", None) or ())):
            t.copy_(0.3 * torch.randn(t.shape, generator=generator))
    return made.requires_grad_(False)


def crosscoder() -> Any:
    made = several(Crosscoder, 2)
    points = "model.layers.{0,2}.output"
    made.metadata = {"hf_hook_point_in": points, "hf_hook_point_out": points}
    return made


def clt(**options: Any) -> Any:
    made = several(CrossLayerTranscoder, gemmas.LAYERS, **options)
    made.metadata = {"hf_hook_point_in": LAYERS_IN, "hf_hook_point_out": LAYERS_OUT}
    return made


MAKERS = {"crosscoder": crosscoder, "clt": clt, "affine": lambda: clt(affine=True)}


@pytest.mark.parametrize("kind", ["text", "multimodal"])
@pytest.mark.parametrize("name", MAKERS)
def test_layers_are_stacked(name: str, kind: str) -> None:
    module, model, ids = MAKERS[name](), gemmas.gemma(kind), gemmas.prompts()
    with torch.no_grad(), gsf.capture(model, module) as captured:
        hidden = model(ids, output_hidden_states=True).hidden_states
    reading, layers = captured[module], gemmas.text_model(model).layers
    assert reading.key == module.metadata["hf_hook_point_in"]
    assert reading.x.shape == reading.target.shape == (2, 9, module.n_layers, gemmas.HIDDEN)
    if name == "crosscoder":
        assert_same(reading.x[:, :, 0], hidden[1])
        assert_same(reading.target, reading.x)
    else:
        for at, layer in enumerate(layers):
            with torch.no_grad():
                written = layer.post_feedforward_layernorm(layer.mlp(reading.x[:, :, at]))
            assert_same(reading.target[:, :, at], written)
    for ours, theirs in zip(reading.acts, module.encode(reading.x), strict=True):
        assert ours.nnz > 10
        assert_same(ours.to_dense(), theirs.to_dense())


def test_a_batchtopk_of_several_layers_evaluates_in_a_model_as_its_jumprelu() -> None:
    sizes = 2, gemmas.HIDDEN, 40, gsf.BatchTopK(4.0)
    module, model, ids = Crosscoder(*sizes, ema_decay=0.9), gemmas.gemma(), gemmas.prompts()
    module.metadata = crosscoder().metadata
    with torch.no_grad():
        with gsf.capture(model, module) as captured:
            model(ids)
        assert len(captured[module].acts) == 2  # encoded now, in training mode
        assert bool((module.ema_threshold > 0).all())
        module.eval().ema_threshold.mul_(1.5)
        found = []
        for each in (module, module.to_jumprelu()):
            with gsf.capture(model, each) as captured:
                model(ids)
            with gsf.splice(model, each, error="none"):
                found.append((captured[each].acts, model(ids).logits))
    (acts, logits), (theirs, expected) = found
    assert_same(logits, expected)
    for layer, other in zip(acts, theirs, strict=True):
        assert_same(layer.to_dense(), other.to_dense())
        assert 0 < layer.nnz != 4 * layer.n


def dense_layers(module: Any, xs: list[Tensor], keep: Tensor) -> Tensor:
    """Reconstruction of the last layer in `xs`, latents outside of `keep` ablated."""
    at = len(xs) - 1
    recon = module.b_dec[at].clone()
    for source, x in enumerate(xs):
        pre = x @ module.W_enc[source] + module.b_enc[source]
        acts = torch.where(pre > module.threshold[source], pre, 0.0) * keep
        recon = recon + acts @ module.decoder(source)[:, at - source]
    skip = getattr(module, "W_skip", None)
    return recon if skip is None else recon + xs[at] @ skip[at]


@pytest.mark.parametrize("error", ["detach", "grad", "none"])
@pytest.mark.parametrize("name", MAKERS)
def test_layers_are_written_from_the_latents_of_those_before(name: str, error: str) -> None:
    module, model, ids = MAKERS[name](), gemmas.gemma(), gemmas.prompts()
    points = ["model.layers.0.output", "model.layers.2.output"]
    pairs = [(p, p) for p in points]
    if name != "crosscoder":
        places = [expand("test", model, p) for p in (LAYERS_IN, LAYERS_OUT)]
        pairs = list(zip(*places, strict=True))
    keep, every = (torch.arange(40) % 3 > 0).float(), torch.ones(40)
    xs: list[Tensor] = []

    def replace(x: Tensor, y: Tensor) -> Tensor:
        xs.append(x)
        left = y - dense_layers(module, xs, every)
        left = {"none": torch.zeros(()), "grad": left, "detach": left.detach()}[error]
        return dense_layers(module, xs, keep) + left

    seen = []

    def edit(acts: gsf.SparseActs, context: gsf.SpliceContext) -> gsf.SparseActs:
        seen.append(context.layer)
        return acts.ablate(range(0, 40, 3))

    results = []
    for ours in (False, True):
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        with ExitStack() as stack:
            if ours:
                stack.enter_context(gsf.splice(model, module, edit, error=error))
            for pair in [] if ours else pairs:
                stack.enter_context(gemmas.dense_splice(model, *pair, replace))
            logits = model(inputs_embeds=embeds).logits
        logits.square().sum().backward()
        results.append((logits.detach(), embeds.grad))
    assert seen == list(range(module.n_layers))
    (expected, d_expected), (logits, d_embeds) = results
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        d_embeds, d_expected, atol=2e-4 * float(d_expected.abs().max()), rtol=1e-3
    )


@pytest.mark.parametrize("name", MAKERS)
def test_unedited_layers_pass_bit_for_bit_in_generation_too(name: str) -> None:
    module, model, ids = MAKERS[name](), gemmas.gemma(dtype=torch.bfloat16), gemmas.prompts()
    same = lambda acts, _: acts.scale([1], 1.0)  # noqa: E731
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    with torch.no_grad():
        clean = torch.stack(model.generate(ids, **options).logits)
        for edit in (None, same):
            with gsf.splice(model, module, edit, positions=slice(2, None)):
                spliced = torch.stack(model.generate(ids, **options).logits)
            assert torch.equal(spliced, clean)
        with gsf.splice(model, module, same, positions=slice(2, None), error="none"):
            assert not torch.equal(model(ids).logits[:, 2:], clean[0])


def test_layers_that_cannot_be_spliced() -> None:
    model = gemmas.gemma()
    backward = several(CrossLayerTranscoder, gemmas.LAYERS, packed=False)
    points = (LAYERS_IN, LAYERS_OUT)
    with pytest.raises(ValueError, match="splice: saes must be causal: the latents of layer 1 "):
        gsf.splice(model, {points: backward})
    with gsf.capture(model, {points: backward}):
        model(gemmas.prompts())
    with pytest.raises(ValueError, match="name the 2 layers of its Crosscoder, and names 3"):
        gsf.splice(model, {"model.layers.{0,...}.output": crosscoder()})
    with pytest.raises(ValueError, match="give a CrossLayerTranscoder the pair"):
        gsf.splice(model, {LAYERS_IN: clt()})
    gemmas.checkpoint(model.train(), True)
    with pytest.raises(RuntimeError, match="splice: an artefact of several layers needs gradient"):
        with gsf.splice(model, clt()):
            model(gemmas.prompts(), use_cache=False)


# ---- hook points of several layers


@pytest.mark.parametrize(
    "braces, layers",
    [
        ("{0,2}", [0, 2]),
        ("{0,...}", [0, 1, 2]),
        ("{1,...}", [1, 2]),
        ("{0, 1, ..., 2}", [0, 1, 2]),
        ("{0,...,2}", [0, 1, 2]),
        ("{2,...}", [2]),
        ("1", [1]),
    ],
)
def test_braces_stand_for_layers(braces: str, layers: list[int]) -> None:
    for kind in ("text", "multimodal"):
        point = f"model.layers.{braces}.mlp.input"
        found = expand("capture", gemmas.gemma(kind), point)
        assert found == [f"model.layers.{layer}.mlp.input" for layer in layers]


@pytest.mark.parametrize("braces", ["{}", "{...}", "{2,0}", "{1,1}", "{a}", "{-1}", "{0}.{1}"])
def test_braces_that_name_no_layers(braces: str) -> None:
    with pytest.raises(ValueError, match="capture: hook point .* must list ascending layers in"):
        expand("capture", gemmas.gemma(), f"model.layers.{braces}.output")
