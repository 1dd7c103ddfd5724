"""Chosen tokens: padding on either side, masks, and generation with every kind of cache."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import gemmas
import pytest
import torch
from gemmas import RESID, dictionary
from oracle import assert_same
from torch import Tensor

import gemmascope_fast as gsf

LENGTHS = (9, 5, 7)
NEW = 6


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Three prompts of `LENGTHS` tokens and their attention mask."""
    ids, mask = torch.full((3, 9), gemmas.PAD), torch.zeros(3, 9, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        at = slice(0, length) if side == "right" else slice(9 - length, 9)
        ids[row, at], mask[row, at] = gemmas.prompts(3)[row, :length], 1
    return ids, mask


class Seen:
    """An edit that switches latent 7 on and keeps what it was told."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, int]] = []

    def __call__(self, acts: gsf.SparseActs, context: gsf.SpliceContext) -> gsf.SparseActs:
        assert acts.shape == (*context.positions.shape, 96)
        pairs = zip(context.sequences.flatten(), context.positions.flatten(), strict=True)
        self.tokens += [(int(a), int(b)) for a, b in pairs]
        return acts.set([7], 150.0)


def by_length(choose: Any) -> list[tuple[int, int]]:
    return [(row, p) for row, length in enumerate(LENGTHS) for p in choose(list(range(length)))]


CHOICES: dict[str, tuple[Any, Any]] = {
    "int": (3, lambda p: p[3:4]),
    "beyond": (7, lambda p: p[7:8]),
    "last": (-1, lambda p: p[-1:]),
    "third last": (-3, lambda p: p[-3:-2]),
    "from": (slice(2, None), lambda p: p[2:]),
    "last two": (slice(-2, None), lambda p: p[-2:]),
    "all but the last": (slice(None, -1), lambda p: p[:-1]),
    "far": (slice(-8, -2), lambda p: p[-8:-2]),
    "every third": (slice(1, None, 3), lambda p: p[1::3]),
    "list": ([4, 1, -1], lambda p: sorted({1, 4, p[-1]})),
    "tensor": (torch.tensor([0, 2]), lambda p: [0, 2]),
    "range": (range(1, 3), lambda p: [1, 2]),
    "none of them": ([], lambda p: []),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CHOICES)
def test_positions_count_each_sequence_s_own_tokens(name: str, side: str) -> None:
    positions, choose = CHOICES[name]
    model, sae, seen = gemmas.gemma(), dictionary(), Seen()
    ids, mask = padded(side)
    with torch.no_grad(), gsf.splice(model, {RESID: sae}, seen, positions=positions):
        with gsf.capture(model, {RESID: sae}) as after:
            model(ids, attention_mask=mask)
    with torch.no_grad(), gsf.capture(model, {RESID: sae}) as before:
        model(ids, attention_mask=mask)
    assert seen.tokens == by_length(choose)
    changed = (after[0].x != before[0].x).any(-1)
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, -9)
    expected = torch.zeros_like(changed)
    for row, position in seen.tokens:
        expected |= (counted == position) & (torch.arange(3) == row)[:, None]
    assert_same(changed, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_counts_like_input_ids_without_padding(side: str) -> None:
    ids, mask = padded(side)
    model, seen = gemmas.gemma(), Seen()
    wanted = torch.rand(3, 9) < 0.4
    wanted[:, 4] = True
    with gsf.splice(model, {RESID: dictionary()}, seen, positions=wanted):
        model(ids, attention_mask=mask)
    counted = mask.cumsum(1) - 1
    expected = [(int(r), int(counted[r, c])) for r, c in (wanted & (mask != 0)).nonzero()]
    assert seen.tokens == expected


def test_without_a_mask_every_token_counts_and_all_are_chosen_by_none() -> None:
    model, seen, ids = gemmas.gemma(), Seen(), gemmas.prompts()
    with gsf.splice(model, {RESID: dictionary()}, seen):
        model(ids)
    assert seen.tokens == [(r, p) for r in range(2) for p in range(9)]
    ids, mask = padded("left")
    seen = Seen()
    with gsf.splice(model, {RESID: dictionary()}, seen):
        model(ids, attention_mask=mask)
    assert seen.tokens[9:13] == [(1, -1)] * 4 and seen.tokens[13:18] == [(1, p) for p in range(5)]


# ---- generation

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 4},
}


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    """Greedy; 6 tokens, never the end of the text."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=[gemmas.EOS, gemmas.PAD],
        **options,
    )


def by_hand(model: Any, sae: Any, ids: Tensor, positions: Any) -> tuple[Tensor, Tensor]:
    """Greedy generation of one prompt from whole passes, each with the edit at `positions`."""
    logits = []

    def replace(x: Tensor, y: Tensor) -> Tensor:
        acts = gemmas.dense_acts(sae, x)
        edited = acts.clone()
        at = [p for p in range(y.shape[1])[positions]]
        edited[:, at, 7] = 150.0
        return y + gemmas.dense_recon(sae, edited, x) - gemmas.dense_recon(sae, acts, x)

    for _ in range(NEW):
        with gemmas.dense_splice(model, RESID, RESID, replace):
            logits.append(model(ids).logits[:, -1])
        scores = logits[-1].clone()
        scores[:, [gemmas.EOS, gemmas.PAD]] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids, torch.stack(logits, 1)


@pytest.mark.parametrize(
    "kind, attention", [("text", "eager"), ("text", "sdpa"), ("multimodal", "sdpa")]
)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("positions", [slice(4, None), slice(3, 11)], ids=str)
def test_generation_edits_absolute_positions(
    kind: str, attention: str, cache: str, positions: slice
) -> None:
    """Left-padded prompts in a batch are steered as each alone, in whole passes."""
    if cache == "chunks" and pytest.importorskip("transformers").__version__ < "5":
        pytest.skip("transformers 4 runs chunks by model.forward, around the hooks: an error")
    model, sae = gemmas.gemma(kind, attention), dictionary()
    ids, mask = padded("left")
    with torch.no_grad(), gsf.splice(model, {RESID: sae}, Seen(), positions=positions):
        steered = generate(model, ids, mask, **CACHES[cache])
    plain = generate(model, ids, mask)
    with torch.no_grad():
        alone = [
            by_hand(model, sae, ids[row : row + 1, 9 - length :], positions)
            for row, length in enumerate(LENGTHS)
        ]
    ours, theirs = torch.stack(steered.logits, 1), torch.cat([logits for _, logits in alone])
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)
    assert_same(steered.sequences[:, 9:], torch.cat([found[:, -NEW:] for found, _ in alone]))
    assert not torch.equal(steered.sequences, plain.sequences)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_negative_positions_count_from_the_end_of_the_prompt(cache: str) -> None:
    model, sae, (ids, mask) = gemmas.gemma(), dictionary(), padded("left")
    for positions, choose in (
        (-1, lambda n: [n - 1]),
        (slice(-2, None), lambda n: range(n - 2, n + NEW - 1)),
    ):
        seen = Seen()
        with gsf.splice(model, {RESID: sae}, seen, positions=positions):
            generate(model, ids, mask, **CACHES[cache])
        assert sorted(seen.tokens) == [(r, p) for r, n in enumerate(LENGTHS) for p in choose(n)]


def test_without_a_cache_every_pass_is_a_prompt() -> None:
    model, seen, (ids, mask) = gemmas.gemma(), Seen(), padded("left")
    with gsf.splice(model, {RESID: dictionary()}, seen, positions=-1):
        generate(model, ids, mask, use_cache=False)
    assert seen.tokens == [(r, n - 1 + new) for new in range(NEW) for r, n in enumerate(LENGTHS)]


def test_a_mask_ends_with_the_prompt() -> None:
    model, seen, (ids, mask) = gemmas.gemma(), Seen(), padded("left")
    with gsf.splice(model, {RESID: dictionary()}, seen, positions=torch.ones(3, 9) > 0):
        generate(model, ids, mask)
    assert seen.tokens == by_length(lambda p: p)


def test_sampled_sequences_and_beams_keep_their_positions() -> None:
    model, (ids, mask) = gemmas.gemma(), padded("left")
    for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        seen = Seen()
        with gsf.splice(model, {RESID: dictionary()}, seen, positions=slice(6, 10)):
            model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, **options)
        expected = [
            (2 * row + beam, p)
            for row, n in enumerate(LENGTHS)
            for beam in range(2)
            for p in range(6, min(10, n + 2))
        ]
        assert sorted(seen.tokens) == expected


def test_a_later_turn_of_a_conversation_has_its_own_end() -> None:
    """With the context entered before the first turn or after it."""
    model, ids = gemmas.gemma(), gemmas.prompts()
    own = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in own else "past_key_values"
    for early in (True, False):
        seen, cache = Seen(), pytest.importorskip("transformers").DynamicCache()
        with ExitStack() as stack:
            for turn, (start, stop) in enumerate([(0, 5), (5, 8), (8, 9)]):
                if turn == 1 - early:
                    edits = gsf.splice(model, {RESID: dictionary()}, seen, positions=[6, -1])
                    stack.enter_context(edits)
                model(ids[:, start:stop], **{name: cache})
        assert seen.tokens == [(0, 4), (1, 4)] * early + [(0, 6), (0, 7), (1, 6), (1, 7)]


def test_conversations_that_take_turns_keep_their_ends() -> None:
    """As `generate(guidance_scale=...)` makes them do."""
    model, seen = gemmas.gemma(), Seen()
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    prompts = [gemmas.prompts(1, n) for n in (4, 6)]
    with torch.no_grad(), gsf.splice(model, {RESID: dictionary()}, seen, positions=[-1]):
        outs = [model(ids, use_cache=True) for ids in prompts]
        for at in (0, 1, 2):
            for ids, out in zip(prompts, outs, strict=True):
                model(ids[:, [at]], **{name: out[name]})
    assert seen.tokens == [(0, 3), (0, 5)]


# ---- errors


@pytest.mark.parametrize(
    "positions, error, text",
    [
        (True, TypeError, "positions must be an int, a slice, a list of ints, or a bool mask"),
        (1.5, TypeError, "positions must be an int"),
        ("all", TypeError, "positions must be an int, .* got 'all'"),
        ([1, 2.0], TypeError, "positions must be an int"),
        (torch.ones(3), TypeError, "positions must be an int, .* got torch.float32"),
        (torch.ones(2, 2).int(), TypeError, "positions must be an int"),
        (
            torch.ones(3) > 0,
            ValueError,
            r"positions as a mask must have shape \[batch, columns\], got \(3,\)",
        ),
        (slice(0.5, None), TypeError, "positions must be a slice of ints"),
        (slice(5, 2, -1), ValueError, "positions must have a step >= 1, got -1"),
    ],
)
def test_positions_that_name_nothing(positions: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"splice: {text}"):
        gsf.splice(gemmas.gemma(), {RESID: dictionary()}, positions=positions)


def test_passes_that_do_not_fit() -> None:
    model, (ids, mask), sae = gemmas.gemma(), padded("left"), dictionary()
    for positions, text in (
        (-6, "positions must be inside of the prompt, got -6 for a prompt of 5 tokens"),
        (
            torch.ones(2, 9) > 0,
            "positions as a mask must have the batch of the forward pass, 3, got 2",
        ),
    ):
        with pytest.raises(ValueError, match=f"splice: {text}"):
            with gsf.splice(model, {RESID: sae}, positions=positions):
                model(ids, attention_mask=mask)
    with gsf.splice(model, {RESID: sae}):
        with pytest.raises(ValueError, match=r"splice: attention_mask must cover 3 sequences of 9"):
            model(ids, attention_mask=mask[:, :5])
        with pytest.raises(TypeError, match="splice: attention_mask must be a tensor"):
            model(ids, attention_mask=[1])
        with pytest.raises(TypeError, match="splice: the model must be called with input_ids"):
            model()
