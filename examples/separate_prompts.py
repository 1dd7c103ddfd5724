# %% [markdown]
"""
# Which latents separate two sets of prompts?
An audit compares what a text says with what goes on in the model that reads it. Two sets of
prompts differ in something; this finds the latents that tell them apart, tests them, checks them
on prompts that were held out, and asks of each whether it knows more than a word of the text.
As it is, this runs on a small dictionary of a small model: `python examples/separate_prompts.py`,
or as a notebook (`jupytext --to notebook separate_prompts.py`).
"""

# %%
import torch
from opening import open_artefact
from torch import Tensor

import gemmascope_fast as gsf

# %% [markdown]
# ## Yours
# `ARTEFACT` and `MODEL` as in `look_inside.py`: None is a small dictionary of MiniLM. The prompts
# of a set should differ in everything but what you ask about. Here: something that goes wrong,
# against a computation.

# %%
ARTEFACT: str | None = None
MODEL: str | None = None
A = [
    "An exception is raised when the file cannot be opened.",
    "The import fails if the module does not exist.",
    "A syntax error is reported by the parser.",
    "The handler catches whatever the body of the try block raises.",
    "If the lookup fails, an error message is printed.",
    "When the connection is lost, the program stops with a traceback.",
    "The assertion failed, and nothing handled it.",
    "A missing attribute makes the statement fail.",
    "The operation is not supported, so it raises an error.",
    "Unhandled exceptions terminate the interpreter.",
    "The except clause handles a failure of the call.",
    "An invalid name results in an exception.",
    "If nobody catches it, the error ends the program.",
    "The finally clause runs although the call has failed.",
    "The key was not found, which raises an exception.",
    "A wrong argument causes the method to fail.",
    "Deleting it twice is an error that the caller must handle.",
    "Parsing stops with an error at the first invalid character.",
]
B = [
    "The product of two integers is an integer.",
    "The remainder of a division has the sign of the divisor.",
    "Two numbers are added before the sum is multiplied.",
    "A float is rounded to the nearest integer.",
    "The power operator binds more tightly than multiplication.",
    "The quotient of the operands is converted to a float.",
    "Complex numbers have a real and an imaginary part.",
    "The result of the subtraction is a negative number.",
    "Each digit is shifted to the left by two bits.",
    "The absolute value of the number is returned.",
    "A decimal point separates the integer from the fraction.",
    "The precision says how many digits follow the point.",
    "Integers are compared by their numeric value.",
    "The sum is divided by the number of items.",
    "Multiplication by zero yields zero.",
    "The exponent of a float may be negative.",
    "Both operands are converted to a common numeric type.",
    "A binary number is written with the digits zero and one.",
]
HELD_OUT = 6  # prompts of each set, the last ones
PERMUTATIONS = 2000
PICTURE = "separate_prompts.png"

# %% [markdown]
# ## Each prompt as a row
# A prompt's score for a latent is the latent's largest activation on its text tokens. Only latents
# that fire somewhere have a column.

# %%
sae, model, tokenizer = open_artefact(ARTEFACT, MODEL)
coded = tokenizer(A + B, return_tensors="pt", padding=True, return_special_tokens_mask=True)
text = coded.pop("special_tokens_mask") == 0
with gsf.capture(model, sae) as captured, torch.no_grad():
    model(**coded)
acts = captured[sae].acts
latents = acts[text].fired().nonzero()[:, 0]
active = gsf.queries.activations_of(acts, latents) * text[..., None]  # [prompts, tokens, latents]
scores = active.amax(1)
in_a = torch.arange(len(A + B)) < len(A)
position = torch.cat([torch.arange(len(A)), torch.arange(len(B))])
held = position >= torch.where(in_a, len(A), len(B)) - HELD_OUT
print(f"{len(A)} and {len(B)} prompts, {len(latents)} of {sae.d_sae} latents fire on them")

# %% [markdown]
# ## The statistic and its test
# AUC: the chance that a prompt of A scores higher than one of B (a tie counts half); 0.5 says
# nothing. Thousands of latents are looked at, so the best one looks good by chance alone. The test
# therefore shuffles which prompts are A's and keeps the largest |AUC - 0.5| over all latents: a
# latent's p is the share of shuffles whose best latent is as good. That bounds the chance of even
# one false find. Prompts are shuffled, not tokens: tokens of a prompt are not independent.


# %%
def ranks(scores: Tensor) -> Tensor:
    """Rank of each prompt in each column, from 1; ties share the mean of theirs."""
    rows = [(scores < row).sum(0) + ((scores == row).sum(0) + 1) / 2 for row in scores]
    return torch.stack(rows)


def auc(ranked: Tensor, in_a: Tensor) -> Tensor:
    """`[..., columns]` from ranks `[prompts, columns]` and membership `[..., prompts]`."""
    a = in_a.sum(-1, keepdim=True)
    wins = in_a.to(ranked.dtype) @ ranked - a * (a + 1) / 2
    return wins / (a * (in_a.shape[-1] - a))


def separate(scores: Tensor, in_a: Tensor) -> tuple[Tensor, Tensor]:
    """AUC of every column, and its p over all columns."""
    ranked = ranks(scores)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(PERMUTATIONS, len(in_a), generator=generator).argsort(1)
    best = (auc(ranked, in_a[order]) - 0.5).abs().amax(1)
    found = auc(ranked, in_a)
    as_good = (best >= (found - 0.5).abs()[:, None] - 1e-6).sum(1)
    return found, (1 + as_good) / (1 + PERMUTATIONS)


auc_found, p = separate(scores[~held], in_a[~held])
auc_held = auc(ranks(scores[held]), in_a[held])

# %% [markdown]
# ## What the text says
# The same test with words for latents: does the set show in the text itself?

# %%
ids = coded["input_ids"]
vocabulary = ids[text].unique()
said = ((ids[..., None] == vocabulary) & text[..., None]).any(1).float()  # [prompts, words]
auc_word, p_word = separate(said[~held], in_a[~held])
best = (auc_word - 0.5).abs().argsort(descending=True)[:5]
print("words that separate best:")
for at in best.tolist():
    word = tokenizer.convert_ids_to_tokens(int(vocabulary[at]))
    print(f"  {word:>12s}  AUC {auc_word[at]:.2f}  p {p_word[at]:.3f}")

# %% [markdown]
# ## Which latents fire
# "held out" is the AUC on prompts that chose nothing. "word" is the token on which the latent is
# strongest, and "without" its AUC where it is not allowed to see that word: if that falls to 0.5,
# the latent repeats the text; if it stays, the latent says more than any one word of it.

# %%
peak = torch.where(text[..., None], active, -1.0).flatten(0, 1).argmax(0)  # token, by latent
favourite = ids.flatten()[peak]
elsewhere = active.masked_fill(ids[..., None] == favourite, 0.0).amax(1)
auc_without = auc(ranks(elsewhere), in_a)
share_a, share_b = ((scores[rows] > 0).float().mean(0) for rows in (in_a, ~in_a))
order = (auc_found - 0.5).abs().argsort(descending=True)[:10].tolist()
print("latent    AUC      p  held out  fires on A, B   word          without")
for at in order:
    word = tokenizer.convert_ids_to_tokens(int(favourite[at]))
    print(
        f"{int(latents[at]):6d}  {auc_found[at]:5.2f}  {p[at]:5.3f}  {auc_held[at]:8.2f}"
        f"  {100 * share_a[at]:4.0f} % {100 * share_b[at]:4.0f} %   {word:12s}"
        f"  {auc_without[at]:7.2f}"
    )
print(f"{int((p < 0.05).sum())} latents separate with p < 0.05, {int((p_word < 0.05).sum())} words")

# %% [markdown]
# A latent that separates is a lead, not a verdict: it may stand for anything that goes with the
# difference. `examples/attribution.py` asks whether it matters to what the model says.
#
# ## Pictures
# Left: on what share of each set's prompts every latent fires. Right: where the best one does.


# %%
def draw(path: str) -> None:
    """Write both pictures to `path`; needs matplotlib."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 7), width_ratios=[2, 3])
    jitter = 0.02 * torch.randn(2, len(latents), generator=torch.Generator().manual_seed(0))
    for chosen, style in ((p >= 0.05, "0.7"), (p < 0.05, "tab:red")):
        x, y = share_b[chosen] + jitter[0, chosen], share_a[chosen] + jitter[1, chosen]
        left.scatter(
            x.numpy(), y.numpy(), s=14, c=style, label="p < 0.05" if style != "0.7" else "p >= 0.05"
        )
    left.set(xlabel="share of B's prompts on which it fires", ylabel="share of A's prompts")
    left.legend()
    at = order[0]
    shown = active[..., at].masked_fill(~text, torch.nan)
    right.imshow(shown.numpy(), aspect="auto", cmap="Oranges")
    for row, tokens in enumerate(ids.tolist()):
        for column, token in enumerate(tokenizer.convert_ids_to_tokens(tokens)):
            if text[row, column]:
                right.text(column, row, token, ha="center", va="center", fontsize=6)
    right.axhline(len(A) - 0.5, color="black", linewidth=1)
    right.set_title(f"latent {int(latents[at])}: A above the line, B below")
    right.set_xticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


try:
    draw(PICTURE)
    print("pictures:", PICTURE)
except ModuleNotFoundError as error:
    print(f"no pictures: {error}; pip install matplotlib")
