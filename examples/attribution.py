"""Which latents made the model say that: three answers, from cheap to exact.

Two prompts of equal length differ; `metric` is a number that the logits give, here the difference
of the two that move apart most. Which latents carry the effect of the other prompt?

    python examples/attribution.py                                          # a small random model
    python examples/attribution.py google/gemma-3-1b-it FOLDER_OF_AN_SAE    # a published one

- **Attribution patching**: the gradient times the change, one backward pass for all latents.
- **Integrated gradients**: the gradient's mean along the way from the one prompt's activations to
  the other's; the attributions sum to the effect of all latents patched at once.
- **Activation patching**: each latent set to the other prompt's value, one forward pass for each.

The error that an SAE makes stays what it is ("detach"), so that the latents answer for the effect.
"""

# %%
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gemmascope_fast as gsf

Metric = Callable[[Tensor], Tensor]
"""A scalar, from the logits `[batch, tokens, vocabulary]`."""


# %% The two sets of activations, on the entries that one or the other has. Latents that are off get
# explicit zeros, which is where a gradient for switching them on ends up.
@torch.no_grad()
def endpoints(
    model: Any, saes: Any, clean: Tensor, other: Tensor
) -> tuple[gsf.SparseActs, gsf.SparseActs]:
    """Activations of both prompts over the union of their entries."""
    with gsf.capture(model, saes) as captured:
        model(clean)
        start = captured[0].acts
        model(other)
        end = captured[0].acts
    return start.union(end), end.union(start)


def with_values(acts: gsf.SparseActs, values: Tensor) -> gsf.SparseActs:
    """The entries of `acts` with other values."""
    return gsf.SparseActs(acts.offsets, acts.indices, values, acts.gate, acts.shape)


# %% The gradient of the metric to every entry. The edit hands out leaves: what the latents are is
# ours to say, and backward stops there.
def gradient(model: Any, saes: Any, tokens: Tensor, acts: gsf.SparseActs, metric: Metric) -> Tensor:
    """`[nnz]`: d metric / d values of `acts`, spliced into a pass over `tokens`."""
    leaf = acts.detach().requires_grad_()
    with gsf.splice(model, saes, lambda _acts, _context: leaf):
        metric(model(tokens).logits).backward()
    assert leaf.values.grad is not None
    return leaf.values.grad


def attribution_patching(
    model: Any, saes: Any, clean: Tensor, other: Tensor, metric: Metric
) -> gsf.SparseActs:
    """First-order effect of each entry: gradient at the clean prompt times the change."""
    start, end = endpoints(model, saes, clean, other)
    slope = gradient(model, saes, clean, start, metric)
    return with_values(start, slope * (end.values - start.values))


# %% The same along the way. The midpoint rule has an error of 1 / steps^2 where nothing jumps.
def integrated_gradients(
    model: Any, saes: Any, clean: Tensor, other: Tensor, metric: Metric, steps: int = 16
) -> gsf.SparseActs:
    """`change * mean over t of d metric / d acts(start + t * change)`, entry by entry."""
    start, end = endpoints(model, saes, clean, other)
    change = end.values - start.values
    total = torch.zeros_like(change)
    for step in range(steps):
        t = (step + 0.5) / steps
        total += gradient(model, saes, clean, with_values(start, start.values + t * change), metric)
    return with_values(start, change * total / steps)


# %% The truth for a few latents: what the metric becomes when they take the other prompt's values.
@torch.no_grad()
def activation_patching(
    model: Any, saes: Any, clean: Tensor, other: Tensor, metric: Metric, latents: list[int]
) -> Tensor:
    """`[latents]`: the metric's change when a latent is patched at every token."""
    _, end = endpoints(model, saes, clean, other)
    before = metric(model(clean).logits)
    effects = []
    for latent in latents:
        there = end.latent_range(latent, latent + 1).to_dense().reshape(-1, 1)
        edit = lambda acts, _, at=latent, v=there: acts.set([at], v)  # noqa: E731
        with gsf.splice(model, saes, edit):
            effects.append(metric(model(clean).logits) - before)
    return torch.stack(effects)


# %% The latents that matter most, by each of the three.
def report(model: Any, saes: Any, clean: Tensor, other: Tensor, metric: Metric) -> None:
    """Print the ten latents with the largest attribution, beside what patching them does."""
    _, end = endpoints(model, saes, clean, other)
    with torch.no_grad():
        before, after = (metric(model(ids).logits) for ids in (clean, other))
        with gsf.splice(model, saes, lambda _acts, _context: end):
            patched = metric(model(clean).logits)
    cheap = attribution_patching(model, saes, clean, other, metric)
    better = integrated_gradients(model, saes, clean, other, metric)
    first, mean = (
        torch.zeros(acts.d_sae).index_add(0, acts.latents(), acts.values)
        for acts in (cheap, better)
    )
    top = mean.abs().topk(10).indices.tolist()
    exact = activation_patching(model, saes, clean, other, metric, top)
    print(f"the other prompt changes the metric by {after - before:.4f}")
    print(f"all of its latents patched by {patched - before:.4f}; attributions sum to", end=" ")
    print(f"{mean.sum():.4f} integrated, {first.sum():.4f} by one gradient")
    print("latent  one gradient  integrated   patched")
    for latent, effect in zip(top, exact, strict=True):
        print(f"{latent:6d} {first[latent]:13.4f} {mean[latent]:11.4f} {effect:9.4f}")


# %%
def small() -> tuple[Any, Any, Tensor, Tensor]:
    """A random model, a random SAE for its first layer, and two prompts that differ once."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, initializer_range=0.3)).eval()
    sae = gsf.SAE(32, 128, gsf.JumpReLU(init_threshold=3.0)).requires_grad_(False)
    clean = torch.randint(3, 64, (1, 8))
    other = clean.clone()
    other[0, 3] = 5
    return model.requires_grad_(False), {"model.layers.0.output": sae}, clean, other


def published(name: str, folder: str) -> tuple[Any, Any, Tensor, Tensor]:
    """A published model and dictionary, and two prompts of equal length."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = ["The capital of France is the city of", "The capital of Italy is the city of"]
    clean, other = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
    return model, gsf.load(folder).requires_grad_(False), clean, other


def main(arguments: list[str]) -> None:
    """Compare the answers on the model that `arguments` name."""
    model, saes, clean, other = published(*arguments) if arguments else small()
    with torch.no_grad():
        before, after = (model(ids).logits[0, -1] for ids in (clean, other))
    up, down = int((after - before).argmax()), int((after - before).argmin())
    report(model, saes, clean, other, lambda logits: logits[0, -1, up] - logits[0, -1, down])


if __name__ == "__main__":
    main(sys.argv[1:])
