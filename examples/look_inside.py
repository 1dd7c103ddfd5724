# %% [markdown]
"""
# Look inside a dictionary
What the weights of an SAE or a transcoder look like, how sparse it is on text, which latents stand
for what. As it is, this runs on a small dictionary of a small model: `python
examples/look_inside.py`, or as a notebook (`jupytext --to notebook look_inside.py`).
"""

# %%
import torch
from opening import open_artefact

import gemmascope_fast as gsf

# %% [markdown]
# ## Yours
# `ARTEFACT` is whatever `gsf.load` reads: a folder, a file, or an artefact on the Hub such as
# `"google/gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium"`; `MODEL` is the model whose
# activations it was trained on, such as `"google/gemma-3-1b-pt"`. The hook point comes from the
# artefact's `config.json`.

# %%
ARTEFACT: str | None = None
MODEL: str | None = None
TEXTS = [
    "The method raises an error when the file does not exist.",
    "An integer is converted to a string before it is compared.",
    "If the list is empty, the loop is not executed at all.",
    "A function without a return statement returns None.",
    "Both operands are evaluated from left to right.",
    "The class may define a method that is called when the object is deleted.",
]

# %%
sae, model, tokenizer = open_artefact(ARTEFACT, MODEL)
print(sae)
print("metadata:", sae.metadata)

# %% [markdown]
# ## The weights
# Gemma Scope's decoder rows have norm 1. A threshold that stayed at its initial value belongs to a
# latent that never trained; an encoder that points away from its decoder row suppresses.


# %%
def quantiles(name: str, t: torch.Tensor) -> None:
    """Print where the values of t lie."""
    at = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0])
    values = t.detach().float().flatten()
    values = values[: 1 << 24].quantile(at)  # the most that quantile takes
    print(f"{name:28s}" + "".join(f"{v:10.3f}" for v in values.tolist()))


print(f"{'':28s}" + "".join(f"{q:>10s}" for q in ("least", "5 %", "median", "95 %", "most")))
encoder, decoder = sae.W_enc.t(), sae.W_dec
quantiles("|W_dec[j]|", torch.linalg.vector_norm(decoder, dim=1, dtype=torch.float32))
quantiles("|W_enc[:, j]|", torch.linalg.vector_norm(encoder, dim=1, dtype=torch.float32))
if encoder.shape == decoder.shape:  # a transcoder's may differ
    quantiles("cos(W_enc[:, j], W_dec[j])", torch.cosine_similarity(encoder, decoder, dim=1))
if sae.threshold is not None:
    quantiles("threshold[j]", sae.theta())
quantiles("b_enc[j]", sae.b_enc)

# %% [markdown]
# ## On text
# `gsf.capture` keeps what the dictionary reads in the model. Special tokens are left out: the
# dictionary has never seen them, and the BOS alone may light up thousands of latents.

# %%
coded = tokenizer(TEXTS, return_tensors="pt", padding=True, return_special_tokens_mask=True)
text = coded.pop("special_tokens_mask") == 0
with gsf.capture(model, sae) as captured, torch.no_grad():
    model(**coded)
reading = captured[sae]
acts = reading.acts  # SparseActs [texts, tokens, d_sae]
found = gsf.evaluate(sae, reading.x[text], reading.target[text])
print(f"{found.tokens} tokens: FVU {found.fvu:.3f}, L0 {found.l0:.1f} (config: ", end="")
print(f"{sae.metadata.get('l0', 'none')}), {sae.d_sae - found.dead} latents fired at all")
print("L0 per token by share of tokens:", found.l0_quantiles)

# %% [markdown]
# A wrong hook point raises no error. It shows here: an L0 far from the config's, or an FVU near 1
# or above.
#
# ## The latents of every token

# %%
words = [tokenizer.convert_ids_to_tokens(row) for row in coded["input_ids"].tolist()]
values, latents = gsf.queries.top_per_token(acts, 4)
for at, word in enumerate(words[0]):
    if text[0, at]:
        pairs = zip(latents[0, at].tolist(), values[0, at].tolist(), strict=True)
        print(f"{word:>14s}  " + "  ".join(f"{j:5d}:{v:6.2f}" for j, v in pairs if j >= 0))

# %% [markdown]
# ## The tokens of every latent
# `TopActivations` takes batches as they come, so that it works over as much text as you like.

# %%
strongest = gsf.queries.top_latents(acts[text], 8).latents
top = gsf.queries.TopActivations(sae.d_sae, 5, strongest)
top.update(acts[text])
flat = [words[i][j] for i, j in text.nonzero().tolist()]
for latent, tokens, values in zip(top.latents, top.tokens, top.values, strict=True):
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    print(f"{int(latent):5d}  " + "  ".join(f"{flat[t]} {v:.1f}" for t, v in pairs if t >= 0))

# %% [markdown]
# ## Neighbours
# Latents whose decoder rows point the same way write the same direction: one feature split in two,
# or a coarse and a fine version of it.

# %%
cosines, neighbours = gsf.queries.cosine_topk(sae.W_dec, sae.W_dec[strongest], 4)
for latent, near, cosine in zip(strongest, neighbours, cosines, strict=True):
    pairs = zip(near.tolist(), cosine.tolist(), strict=True)
    print(f"{int(latent):5d}  " + "  ".join(f"{j:5d} {c:+.2f}" for j, c in pairs if j != latent))
