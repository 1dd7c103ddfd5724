"""evaluate on models: against losses computed densely, and what counts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import gemmas
import pytest
import torch
import torch.nn.functional as F
from gemmas import MLP_IN, MLP_OUT, RESID, dense_acts, dense_recon, dense_splice, dictionary
from test_splicing_capture import clt
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast.splicing import texts

CODER = (MLP_IN, MLP_OUT)


def corpus() -> tuple[Tensor, Tensor, Tensor]:
    """Five sequences, BOS first, an EOS in the middle, one padded left: `(ids, mask, text)`."""
    ids = gemmas.prompts(5, 8)
    ids[1, 4] = gemmas.EOS
    mask = torch.ones_like(ids)
    ids[3] = torch.cat([torch.full((3,), 17), ids[3, :5]])  # what is masked looks like text
    mask[3, :3] = 0
    text = (ids >= 3) & (mask != 0)
    return ids, mask, text


def losses(logits: Tensor, clean: Tensor, ids: Tensor, text: Tensor) -> tuple[float, float]:
    """Cross-entropy and KL of the counted predictions, in float64."""
    counted = text[:, :-1] & text[:, 1:]
    new = logits[:, :-1][counted].double().log_softmax(-1)
    old = clean[:, :-1][counted].double().log_softmax(-1)
    ce = F.nll_loss(new, ids[:, 1:][counted])
    return float(ce), float(F.kl_div(new, old, log_target=True, reduction="batchmean"))


def replaced(model: Any, ids: Tensor, mask: Tensor, splices: Any) -> Tensor:
    """Logits with `(in, out, replacement)` of every token of the text."""
    with ExitStack() as stack:
        for each in splices:
            stack.enter_context(dense_splice(model, *each))
        return model(ids, attention_mask=mask).logits


@torch.no_grad()
def expected(model: Any, saes: dict[Any, Any], ablation: str) -> dict[str, float]:
    """All dictionaries of `saes` at once, by dense hooks."""
    ids, mask, text = corpus()
    clean = replaced(model, ids, mask, [])
    spliced, ablated, seen = [], [], {}
    for key, sae in saes.items():
        pair = key if isinstance(key, tuple) else (key, key)

        def keep(x: Tensor, y: Tensor, key: Any = key) -> Tensor:
            seen[key] = x[text], y[text]
            return y

        replaced(model, ids, mask, [(*pair, keep)])
        mean = seen[key][1].mean(0) if ablation == "mean" else torch.zeros(gemmas.HIDDEN)

        def rebuild(x: Tensor, y: Tensor, sae: Any = sae) -> Tensor:
            return torch.where(text[..., None], dense_recon(sae, dense_acts(sae, x), x), y)

        def remove(x: Tensor, y: Tensor, mean: Tensor = mean) -> Tensor:
            return torch.where(text[..., None], mean, y)

        spliced.append((*pair, rebuild))
        ablated.append((*pair, remove))
    found = {"ce_clean": losses(clean, clean, ids, text)[0]}
    for name, splices in (("spliced", spliced), ("ablated", ablated)):
        ce, kl = losses(replaced(model, ids, mask, splices), clean, ids, text)
        found |= {f"ce_{name}": ce, "kl" if name == "spliced" else "kl_ablated": kl}
    for key, sae in saes.items():
        x, y = (t.double() for t in seen[key])
        acts = dense_acts(sae, seen[key][0])
        error = dense_recon(sae, acts, seen[key][0]).double() - y
        found[f"fvu {key}"] = float(error.square().sum() / (y - y.mean(0)).square().sum())
        found[f"l0 {key}"] = float((acts > 0).sum(1).double().mean())
    return found


def flat(result: gsf.ModelEvaluation) -> dict[str, float]:
    names = ("ce_clean", "ce_spliced", "ce_ablated", "kl", "kl_ablated")
    found = {name: getattr(result, name) for name in names}
    found |= {f"fvu {key}": value for key, value in result.fvu.items()}
    return found | {f"l0 {key}": value for key, value in result.l0.items()}


@pytest.mark.parametrize("kind", ["text", "multimodal"])
@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("together", [False, True])
def test_numbers_are_those_of_dense_hooks(
    kind: str, ablation: Any, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "CHUNK", 3 * gemmas.VOCABULARY)  # three predictions at a time
    model, (ids, mask, text) = gemmas.gemma(kind), corpus()
    saes: dict[Any, Any] = {RESID: dictionary(), CODER: dictionary(transcoder=True, affine=True)}
    options = {"attention_mask": mask, "ablation": ablation, "batch_size": 2}
    results = gsf.evaluate(model, saes, ids, together=together, **options)
    groups = [saes] if together else [{key: sae} for key, sae in saes.items()]
    for result, group in zip([results] if together else results, groups, strict=True):
        assert result.keys == tuple(group)
        assert result.tokens == int((text[:, :-1] & text[:, 1:]).sum()) == 5 * 7 - 5 - 4 - 1
        assert flat(result) == pytest.approx(expected(model, group, ablation), rel=2e-4)
        lost = result.ce_ablated - result.ce_clean
        assert result.ce_recovered == (result.ce_ablated - result.ce_spliced) / lost


def test_one_dictionary_has_one_result_and_modes_come_back() -> None:
    model, sae, (ids, mask, text) = gemmas.gemma(), dictionary(), corpus()
    sae.metadata = {"hf_hook_point_in": RESID, "hf_hook_point_out": RESID}
    model.train(), model.model.layers[0].eval(), sae.train()
    result = gsf.evaluate(model, sae, ids, attention_mask=mask)
    assert result == gsf.evaluate(model, [sae], ids, attention_mask=mask)[0]
    assert model.training and not model.model.layers[0].training and sae.training
    with torch.no_grad(), gsf.capture(model, sae) as captured:
        model(ids, attention_mask=mask)
    plain = gsf.evaluate(sae, captured[sae].x[text])
    assert isinstance(plain, gsf.Evaluation)
    assert (result.fvu[RESID], result.l0[RESID]) == pytest.approx((plain.fvu, plain.l0))
    by_name = gsf.evaluate(module=sae, activations=captured[sae].x[text])
    assert by_name.fvu == plain.fvu
    assert gsf.evaluate(model=model, saes=sae, tokens=ids, attention_mask=mask) == result


def test_special_tokens_are_left_out_and_can_be_chosen() -> None:
    model, saes, ids = gemmas.gemma(), {RESID: dictionary()}, gemmas.prompts(2, 9)

    class Tokenizer:
        all_special_ids, unk_token_id = [int(ids[0, 4])], None

    assert gsf.evaluate(model, saes, ids)[0].tokens == 14
    assert gsf.evaluate(model, saes, ids, special_tokens=[])[0].tokens == 16
    fewer = gsf.evaluate(model, saes, ids, tokenizer=Tokenizer())[0].tokens
    assert fewer == 14 - 2 * int((ids == ids[0, 4]).sum())


def test_a_perfect_dictionary_loses_nothing() -> None:
    model, ids = gemmas.gemma(), gemmas.prompts(2, 9)
    copy = gsf.SAE(32, 64, gsf.JumpReLU(init_threshold=0.0)).requires_grad_(False)
    both = torch.cat([torch.eye(32), -torch.eye(32)])
    copy.W_enc.copy_(both.t())
    copy.W_dec.copy_(both)
    (result,) = gsf.evaluate(model, {RESID: copy}, ids)
    assert result.fvu[RESID] == result.kl == 0 and result.ce_recovered == 1
    assert result.l0[RESID] == 32 and result.kl_ablated > 0.1


def test_artefacts_of_several_layers() -> None:
    model, module, ids = gemmas.gemma(), clt(affine=True), gemmas.prompts(3, 9)
    key = module.metadata["hf_hook_point_in"]
    result = gsf.evaluate(model, module, ids, batch_size=2)
    with torch.no_grad(), gsf.capture(model, module) as captured:
        clean = model(ids).logits
    text = ids >= 3
    x, y = captured[0].x[text], captured[0].target[text].double()
    error = (module(x).double() - y).square().sum() / (y - y.mean(0)).square().sum()
    l0 = sum(float(acts.l0().mean()) for acts in module.encode(x))
    assert (result.fvu[key], result.l0[key]) == pytest.approx((float(error), l0), rel=1e-5)
    with torch.no_grad(), gsf.splice(model, module, positions=text, error="none"):
        ce, kl = losses(model(ids).logits, clean, ids, text)
    assert (result.ce_spliced, result.kl) == pytest.approx((ce, kl), rel=1e-4)


def test_arguments_that_do_not_fit() -> None:
    model, sae, ids = gemmas.gemma(), dictionary(), gemmas.prompts()
    saes = {RESID: sae}
    for args, options, error, text in (
        ((model, saes, ids.float()), {}, TypeError, "tokens must be a tensor of integers"),
        ((model, saes, ids[0]), {}, ValueError, r"tokens must have shape \[S, L >= 2\], got"),
        ((model, saes, ids), {"attention_mask": ids[:1]}, ValueError, "the shape of tokens, "),
        ((model, saes, ids), {"attention_mask": [1]}, TypeError, "attention_mask must be a tensor"),
        ((model, saes, ids), {"ablation": "half"}, ValueError, r"ablation must be one of \('zero"),
        ((model, saes, ids), {"special_tokens": 2}, TypeError, "special_tokens must be integers"),
        ((model, saes, ids), {"special_tokens": ["a"]}, TypeError, r"be integers, got \['a'\]"),
        ((model, saes, ids), {"special_tokens": [2.5]}, TypeError, "be integers, got"),
        ((model, saes, ids), {"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ((model, saes, ids % 3), {}, ValueError, "a text token behind another, and hold none"),
        ((model, [sae], ids), {}, ValueError, "metadata of this SAE have no hf_hook_point_in"),
        ((model, saes, ids, ids), {}, TypeError, "too many positional arguments: call evaluate"),
        ((model, saes), {}, TypeError, "missing a required argument: 'tokens': call evaluate"),
        ((model, saes, ids), {"mask": ids}, TypeError, "unexpected keyword argument 'mask': call"),
        ((ids, sae), {}, TypeError, r"comes first, got \(Tensor, SAE\): call evaluate"),
        ((sae,), {}, TypeError, "missing a required argument: 'activations': call evaluate"),
        ((model.model, saes, ids), {}, TypeError, "model must return logits, got a BaseModelOut"),
        (
            (model, {RESID: sae, f"language_{RESID}": sae}, ids), {"together": True}, ValueError,
            "must write to different places, got model.layers.1.output twice",
        ),
        ((sae, saes), {}, TypeError, "activations must be a torch.Tensor, got dict"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"evaluate: .*{text}"):
            gsf.evaluate(*args, **options)
