"""`gsf.evaluate`: a dictionary on activations, or a model with dictionaries spliced in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn

from ..arguments import check_count
from ..training import metrics
from ..training.hooks import left_out
from .dictionaries import Dictionary, check_causal, is_dictionary
from .measuring import OP, Ablation, ModelEvaluation, evaluating, measure
from .sites import Dictionaries, Key, Site, sites_of
from .texts import Texts

FORMS = "call evaluate(module, activations) or evaluate(model, saes, tokens)"
Several = Sequence[Dictionary] | Mapping[Key, Dictionary]


@overload
def evaluate(
    module: Dictionary, activations: Tensor, target: Tensor | None = None, *, batch_size: int = 4096
) -> metrics.Evaluation: ...


@overload
def evaluate(
    model: nn.Module,
    saes: Dictionary,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    special_tokens: Iterable[int] | None = None,
    together: bool = False,
    ablation: Ablation = "zero",
    batch_size: int = 4,
) -> ModelEvaluation: ...


@overload
def evaluate(
    model: nn.Module,
    saes: Several,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    special_tokens: Iterable[int] | None = None,
    together: Literal[True],
    ablation: Ablation = "zero",
    batch_size: int = 4,
) -> ModelEvaluation: ...


@overload
def evaluate(
    model: nn.Module,
    saes: Several,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    special_tokens: Iterable[int] | None = None,
    together: Literal[False] = False,
    ablation: Ablation = "zero",
    batch_size: int = 4,
) -> list[ModelEvaluation]: ...


def evaluate(*args: Any, **options: Any) -> Any:
    """Measure a dictionary on activations, or what a model loses when it runs on reconstructions.

        evaluate(module, activations, target=None, *, batch_size=4096) -> Evaluation
        evaluate(model, saes, tokens, *, ...) -> ModelEvaluation, or a list of them

    The first form gives FVU, cosine, L0 and firing counts; see `Evaluation`. The second splices
    each dictionary into the model without error term, at the text tokens: special ones (BOS, EOS,
    padding, images, ...) pass untouched, since dictionaries are not trained on them. A prediction
    counts where its own and the next token are text. Beside its weights the model needs two times
    the logits of a batch, `[batch_size, L, vocabulary]`.

    Args:
        module: an `SAE`, `Transcoder`, `Crosscoder` or `CrossLayerTranscoder`, in the units of the
            activations.
        activations: `[*batch, d_in]` floating point; `[*batch, L, d_model]` of L layers.
        target: `[*batch, d_out]`, or `[*batch, L, d_model]`; default the activations, needed by a
            `Transcoder` or `CrossLayerTranscoder`.
        model: a `transformers` model that returns logits; run in evaluation mode.
        saes: as for `capture`: one dictionary, several, or `{hook point: dictionary}`.
        tokens: `[S, L]` integer ids, L >= 2.
        attention_mask: `[S, L]`, 0 at padding; None where there is none.
        tokenizer: whose special tokens are left out, beside those that the model's config names.
        special_tokens: ids to leave out instead of those of model and tokenizer.
        together: splice several dictionaries at once; else each alone.
        ablation: "zero", or "mean" of what is reconstructed over these tokens (a second pass).
        batch_size: activations (first form) or sequences (second form, default 4) at a time, >= 1.

    Returns:
        First form: an `Evaluation`. Second form: a `ModelEvaluation` of one dictionary or of all
        together, else a list of one per dictionary in the order given.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes disagree, nothing is left to measure, a hook point is missing or names
            nothing in the model, or dictionaries that are spliced together share a place.
    """
    first = args[0] if args else options.get("module", options.get("model"))
    second = args[1] if len(args) > 1 else options.get("activations")
    if isinstance(first, Tensor):
        got = ", ".join(type(arg).__name__ for arg in args[:2]) or "Tensor"
        raise TypeError(f"{OP}: a module or a model comes first, got ({got}): {FORMS}")
    alone = is_dictionary(first) or isinstance(second, Tensor) or "module" in options
    form: Callable[..., Any] = metrics.evaluate if alone else _evaluate_model
    try:
        signature(form).bind(*args, **options)
    except TypeError as error:
        raise TypeError(f"{OP}: {error}: {FORMS}") from None
    return form(*args, **options)


def _evaluate_model(
    model: nn.Module,
    saes: Dictionaries,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    special_tokens: Iterable[int] | None = None,
    together: bool = False,
    ablation: Ablation = "zero",
    batch_size: int = 4,
) -> ModelEvaluation | list[ModelEvaluation]:
    sites = sites_of(OP, model, saes)
    for site in sites:
        check_causal(OP, site.module)
    if together:
        _check_apart(sites)
    if ablation not in get_args(Ablation):
        raise ValueError(f"{OP}: ablation must be one of {get_args(Ablation)}, got {ablation!r}")
    if check_count(OP, "batch_size", batch_size) < 1:
        raise ValueError(f"{OP}: batch_size must be >= 1, got {batch_size}")
    special = left_out(OP, model, tokenizer, special_tokens)
    texts = _texts(tokens, attention_mask, special)
    batches = partial(texts.batches, batch_size, next(model.parameters()).device)
    with torch.no_grad(), evaluating(model, *(site.module for site in sites)):
        results = measure(model, sites, together, batches, ablation)
    return results[0] if together or isinstance(saes, Dictionary) else results


def _check_apart(sites: Sequence[Site]) -> None:
    places = [place for site in sites for place in site.outputs]
    twice = {str(place) for place in places if places.count(place) > 1}
    if twice:
        raise ValueError(
            f"{OP}: saes that are spliced together must write to different places, got "
            f"{', '.join(sorted(twice))} twice"
        )


def _texts(tokens: Any, attention_mask: Any, special: Tensor) -> Texts:
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"{OP}: tokens must be a tensor of integers")
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(f"{OP}: tokens must have shape [S, L >= 2], got {tuple(tokens.shape)}")
    ids = tokens.long()
    text = ~torch.isin(ids, special.to(ids.device))
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"{OP}: attention_mask must be a tensor or None")
        if attention_mask.shape != tokens.shape:
            raise ValueError(
                f"{OP}: attention_mask must have the shape of tokens, {tuple(tokens.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        text &= attention_mask.to(ids.device) != 0
    texts = Texts(ids, attention_mask, text)
    if not bool(texts.counted.any()):
        raise ValueError(f"{OP}: tokens must hold a text token behind another, and hold none")
    return texts
