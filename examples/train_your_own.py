# %% [markdown]
"""
# Train a dictionary on your own activations
Hidden states of a model become shards on disk, shards become a dictionary, the dictionary an
artefact that others can load. As it is, this trains on MiniLM and the language reference that
Python carries: `python examples/train_your_own.py`, or as a notebook
(`jupytext --to notebook train_your_own.py`).
"""

# %%
from pathlib import Path

import torch
from opening import PRESET

import gemmascope_fast as gsf
from gemmascope_fast.demo.activations import load_model, special_tokens, standard_text

# %% [markdown]
# ## Yours
# Any `transformers` model and any text. `HOOK_POINT` is a module's name and the side of it that is
# read; in a Gemma it is `"model.layers.17.output"`. A run worth keeping sees 10^8 tokens and more;
# `PRESET` is for runs of a few hundred steps: drop it for Gemma Scope 2's own recipe.

# %%
model, tokenizer = load_model(None)  # AutoModel.from_pretrained(...), AutoTokenizer...
TEXT = standard_text()[:60_000]
HOOK_POINT = "encoder.layer.3.output"
LENGTH = 64  # tokens of a sequence
RUN = {"d_sae": 1024, "target_l0": 20, "steps": 150, "batch_size": 256, "preset": PRESET}
SHARDS, OUT = Path("my_shards"), Path("my_sae")

# %% [markdown]
# ## Activations
# Sequences of equal length, each with the special tokens that the model expects; their rows are
# dropped, because a BOS norm would dominate every mean. `sources.capture` stops the forward pass
# at the hook point.

# %%
before, after = special_tokens(tokenizer)
ids = tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
block = LENGTH - len(before) - len(after)
rows = torch.tensor(ids[: len(ids) // block * block]).view(-1, block)
left, right = (torch.tensor(t).long().expand(len(rows), -1) for t in (before, after))
sequences = torch.cat([left, rows, right], 1)


def activations(part: torch.Tensor) -> torch.Tensor:
    """Hidden states of the text tokens of some sequences."""
    (found,) = gsf.sources.capture(model, [HOOK_POINT], input_ids=part)
    return found[:, len(before) : len(before) + block].flatten(0, 1)


held_out = activations(sequences[::20])  # whole sequences: no context is shared
training = torch.cat([sequences[at::20] for at in range(1, 20)])
if not (SHARDS / "manifest.json").exists():  # those of an earlier run; delete them to renew them
    gsf.sources.write_shards(SHARDS, (activations(part) for part in training.split(16)))

# %% [markdown]
# Too much for a disk? `gsf.sources.ModelSource(model, sequences, HOOK_POINT, tokenizer=tokenizer)`
# in place of the folder runs the model while training.
#
# ## Training
# The estimate is an upper bound. With `out`, a run that was stopped goes on where it was, to the
# same bits; here an earlier one is removed.

# %%
width = held_out.shape[1]
sizes = {name: RUN[name] for name in ("d_sae", "batch_size", "target_l0")}
print("memory:", gsf.estimate_memory(d_in=width, **sizes, preset=PRESET))
curve: list[dict[str, float]] = []
sae = gsf.train(
    SHARDS,
    **RUN,
    out=OUT,
    resume=False,
    on_metrics=curve.append,
    metadata={"hf_hook_point_in": HOOK_POINT, "hf_hook_point_out": HOOK_POINT},
    progress=False,
)
for metrics in [*curve[:: max(len(curve) // 5, 1)], curve[-1]]:
    print("step {step:4.0f}  fvu {fvu:.3f}  l0 {l0:5.1f}  dead {dead:4.0f}".format(**metrics))

# %% [markdown]
# ## How good is it?
# On held-out tokens, in the units of the model: the scale that training used is folded away.

# %%
found = gsf.evaluate(sae, held_out)
print(f"held out: FVU {found.fvu:.3f}, cosine {found.cosine:.3f}, L0 {found.l0:.1f}")
print(f"{found.dead} of {sae.d_sae} latents fired on none of {found.tokens} tokens")
for low, high, latents in found.histogram():
    print(f"  fire on {100 * low:7.3f} to {100 * high:7.3f} % of tokens: {latents}")

# %% [markdown]
# A model that returns logits can also be asked what it loses with the reconstruction in place:
# `gsf.evaluate(model, sae, input_ids).ce_recovered`.
#
# ## An artefact
# `OUT` holds Gemma Scope 2's files; what is loaded from there encodes to the same bits.

# %%
again = gsf.load(OUT)
same = torch.equal(again.encode(held_out).to_dense(), sae.encode(held_out).to_dense())
print("files:", sorted(path.name for path in OUT.iterdir() if path.is_file()))
print("reloaded, it encodes to the same bits:", same)
