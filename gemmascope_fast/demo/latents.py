"""What single latents stand for: the passages on which they fire hardest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import Activations
from .evaluate import Firings

RATES = (0.0005, 0.01)  # rarer: too few passages to judge; commoner: rarely about one thing
REACH = 14  # tokens shown on either side of the peak
SINGLE_TOKEN = 0.9  # share of the firings that fall on one token id


@dataclass(frozen=True)
class Piece:
    """One token of a passage: its text, what follows it, its activation relative to the peak."""

    text: str
    gap: str
    strength: float
    peak: bool


@dataclass(frozen=True)
class LatentCard:
    """One latent of the report.

    Attributes:
        latent: its index.
        rate: share of tokens on which it fires.
        favourite: the token id it fires on most, as text.
        share: share of its firings that fall on that id.
        strongest: its largest activation, in the units of the hidden states.
        passages: its top passages, strongest first.
    """

    latent: int
    rate: float
    favourite: str
    share: float
    strongest: float
    passages: list[list[Piece]]

    @property
    def single_token(self) -> bool:
        """Whether it says little more than which token this is."""
        return self.share >= SINGLE_TOKEN


def choose(found: Firings, count: int, seed: int) -> list[int]:
    """Up to `count` latents drawn at random among those whose rate lies in `RATES`, ascending."""
    rates = found.counts / found.n
    eligible = ((rates >= RATES[0]) & (rates <= RATES[1])).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    drawn = eligible[torch.randperm(len(eligible), generator=generator)[:count]]
    return sorted(drawn.tolist())


def describe(found: Firings, source: Activations, latent: int, passages: int = 4) -> LatentCard:
    """Look up where `latent` fires; passages with the same text are shown once."""
    tokens, values = found.of(latent)
    ids = source.tokens[tokens]
    on_favourite = ids == ids.mode().values
    example = int(tokens[on_favourite][0])
    strengths = torch.zeros(found.n)
    strengths[tokens] = values / values.max()
    shown: dict[str, list[Piece]] = {}
    for position in tokens[values.argsort(descending=True)].tolist():
        pieces = passage(source, position, strengths)
        text = "".join(piece.text for piece in pieces)
        shown.setdefault(text, pieces)
        if len(shown) == passages:
            break
    favourite = span(source, example)
    share = float(on_favourite.float().mean())
    rate = len(tokens) / found.n
    return LatentCard(latent, rate, favourite, share, float(values.max()), list(shown.values()))


def passage(source: Activations, position: int, strengths: Tensor) -> list[Piece]:
    """`REACH` tokens around `position`, as far as the transformer saw them together."""
    start = position // source.block * source.block
    first = max(position - REACH, start)
    last = min(position + REACH, start + source.block - 1)
    pieces = []
    for token in range(first, last + 1):
        stop = int(source.spans[token, 1])
        following = int(source.spans[token + 1, 0]) if token < last else stop
        gap = source.text[stop:following]
        strength = float(strengths[token])
        pieces.append(Piece(span(source, token), gap, strength, token == position))
    return pieces


def span(source: Activations, token: int) -> str:
    """Return the characters of one token."""
    start, stop = source.spans[token].tolist()
    return source.text[start:stop]
