"""`report.html`: one self-contained page, and the same table for the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .charts import Series, line_chart, marked_chart, rate_histogram
from .evaluate import Check
from .frontier import COLUMNS as POINT_COLUMNS
from .frontier import Point, rows
from .latents import RATES, LatentCard, Piece
from .settings import Settings
from .style import CSS
from .turns import History

COLUMNS = (
    "held-out FVU",
    "L0",
    "never fired",
    "ms/step",
    "tokens/s",
    "peak memory",
)
NAMES = {"sparse": "gemmascope-fast", "dense": "dense PyTorch"}
STYLES = {"sparse": "ours", "dense": "dense"}


@dataclass(frozen=True)
class Results:
    """Everything the report shows.

    Attributes:
        settings: of the run.
        quick: whether this was a quick run.
        model: what the activations are of.
        tokens, width: shape of the activations.
        histories: by kind, `sparse` and `dense`.
        baselines: held-out FVU by name.
        checks: the claims.
        frontier: the dictionaries trained to several targets.
        latents: cards of the sampled latents.
    """

    settings: Settings
    quick: bool
    model: str
    tokens: int
    width: int
    histories: dict[str, History]
    baselines: dict[str, float]
    checks: list[Check]
    frontier: list[Point]
    latents: list[LatentCard]


def table(results: Results) -> list[list[str]]:
    """Rows of the result table, the name first, then `COLUMNS`."""
    rows = []
    for kind, history in results.histories.items():
        dead = sum(count == 0 for count in history.final["counts"])
        share = dead / len(history.final["counts"])
        memory = "-" if history.peak_bytes is None else f"{history.peak_bytes / 2**20:,.0f} MiB"
        rows.append(
            [
                NAMES[kind],
                f"{history.final['fvu']:.4f}",
                f"{history.final['l0']:.1f}",
                f"{dead:,} ({share:.1%})",
                f"{history.step_seconds * 1e3:,.0f}",
                f"{results.settings.batch / history.step_seconds:,.0f}",
                memory,
            ]
        )
    rows += [[name, f"{value:.4f}", *"-----"] for name, value in results.baselines.items()]
    return rows


def render(results: Results) -> str:
    """Return the page."""
    title = "A sparse autoencoder, trained sparsely"
    parts = [
        f"<h1>{title}</h1>{_summary(results)}{_tiles(results)}",
        f"<h2>Results</h2>{table_section(table(results), COLUMNS)}{_checks(results)}",
        f"<h2>Training</h2>{_curves(results)}",
        f"<h2>Reconstruction against sparsity</h2>{_frontier(results)}",
        f"<h2>How often latents fire</h2>{_histogram(results)}",
        f"<h2>What latents stand for</h2>{latents_section(results.latents)}",
        f"<h2>How this was measured</h2>{_method(results)}",
    ]
    return page(title, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """Return a complete HTML page of `parts`."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        + "\n".join(parts)
        + "</main></body></html>\n"
    )


def _summary(results: Results) -> str:
    s = results.settings
    quick = (
        "<p><strong>Quick run:</strong> fewer tokens, latents and steps than the full demo; "
        "its numbers say only that everything works.</p>"
        if results.quick
        else ""
    )
    return (
        f'<p class="soft">{results.tokens:,} tokens of {escape(results.model)}, width '
        f"{results.width}. A JumpReLU SAE with {s.d_sae:,} latents, {s.steps} steps of {s.batch} "
        "tokens, trained twice from the same weights on the same batches: once with "
        "gemmascope-fast, which stores active entries only, once in dense PyTorch.</p>" + quick
    )


def _tiles(results: Results) -> str:
    ours, dense = results.histories["sparse"], results.histories["dense"]
    tiles = [(f"{dense.step_seconds / ours.step_seconds:.1f}&times;", "as fast per training step")]
    if ours.peak_bytes and dense.peak_bytes:
        tiles.append((f"{ours.peak_bytes / dense.peak_bytes:.0%}", "of the dense run's memory"))
    gap = ours.final["fvu"] / dense.final["fvu"] - 1
    tiles.append((f"{ours.final['fvu']:.3f}", f"held-out FVU, {gap:+.2%} against dense"))
    tiles.append(
        (f"{ours.final['l0']:.1f}", f"active latents per token, of {results.settings.d_sae:,}")
    )
    inner = "".join(f'<div class="tile"><b>{big}</b><span>{s}</span></div>' for big, s in tiles)
    return f'<div class="tiles">{inner}</div>'


def table_section(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    """Return an HTML table; our own row stands out."""
    head = "".join(f"<th>{escape(c)}</th>" for c in ("", *columns))
    body = ""
    for row in rows:
        style = ' class="ours"' if row[0] == NAMES["sparse"] else ""
        cells = "".join(f"<td>{'&ndash;' if c == '-' else escape(c)}</td>" for c in row)
        body += f"<tr{style}>{cells}</tr>"
    return f'<div class="panel"><table><tr>{head}</tr>{body}</table></div>'


def _checks(results: Results) -> str:
    items = "".join(
        f"<li{'' if c.holds else ' class=fails'}>{escape(c.text)}</li>" for c in results.checks
    )
    return f'<ul class="checks">{items}</ul>'


def _key() -> str:
    return (
        '<div class="key"><span><i class="ours"></i>gemmascope-fast</span>'
        '<span><i class="dense"></i>dense PyTorch</span></div>'
    )


def _curves(results: Results) -> str:
    order = [(kind, results.histories[kind]) for kind in ("dense", "sparse")]
    top_loss = max(max(step["loss"] for step in h.steps) for _, h in order)
    top_l0 = max(max(step["l0"] for step in h.steps) for _, h in order)
    figures = []
    for label in ("step", "seconds of training"):
        loss, error, l0 = [], [], []
        for kind, h in order:
            time = [float(k + 1) for k in range(len(h.steps))] if label == "step" else h.elapsed
            held = [time[int(mark["step"]) - 1] for mark in h.held_out]
            name = NAMES[kind], STYLES[kind]
            loss.append(Series(*name, time, [s["loss"] for s in h.steps]))
            error.append(Series(*name, held, [mark["fvu"] for mark in h.held_out]))
            l0.append(Series(*name, time, [s["l0"] for s in h.steps]))
        figures.append(line_chart("Loss of the batch", label, loss, (0.0, top_loss)))
        figures.append(line_chart("Held-out FVU", label, error, (0.0, 1.0)))
        figures.append(line_chart("L0 of the batch", label, l0, (0.0, top_l0)))
    return (
        "<p>Against steps the two runs lie on top of each other: they compute the same thing. "
        f'Against time they do not.</p>{_key()}<div class="charts">{"".join(figures)}</div>'
    )


def _frontier(results: Results) -> str:
    points = results.frontier
    places = [point.l0 for point in points], [point.fvu for point in points]
    curve = Series(NAMES["sparse"], STYLES["sparse"], *places)
    labels = [f"target {point.target:g}" for point in points]
    chart = marked_chart("Held-out FVU against L0", "active latents per token", curve, labels)
    return (
        "<p>The same run with other targets for L0; FVU around the mean of the held-out tokens."
        f'</p><div class="chart">{chart}</div>{table_section(rows(points), POINT_COLUMNS)}'
    )


def _histogram(results: Results) -> str:
    series = [
        (NAMES[kind], STYLES[kind], results.histories[kind].final["counts"])
        for kind in ("sparse", "dense")
    ]
    return _key() + histogram_section(series, results.tokens)


def histogram_section(series: Sequence[tuple[str, str, Sequence[int]]], n: int) -> str:
    """Return the histogram of firing rates; series are (name, CSS class, counts per latent)."""
    chart = rate_histogram("Latents by firing rate", series, n)
    return f'<div class="chart">{chart}</div>'


def latents_section(cards: Sequence[LatentCard]) -> str:
    """Return one card per latent, with its top passages."""
    low, high = (f"{100 * rate:g}" for rate in RATES)
    single = sum(card.single_token for card in cards)
    intro = (
        f"<p>{len(cards)} latents drawn at random, not picked, among those that fire on "
        f"{low}&ndash;{high} % of tokens; {single} of them fire almost only on one token. Shading "
        "is the latent's activation relative to its maximum; the outlined token is the peak.</p>"
    )
    inner = "".join(_card(card) for card in cards)
    return f'{intro}<div class="latents">{inner}</div>'


def _card(card: LatentCard) -> str:
    favourite = escape(_one_line(card.favourite))
    tag = '<span class="tag">single token</span>' if card.single_token else ""
    head = (
        f"<header><b>Latent {card.latent}</b><span>{card.rate:.2%} of tokens</span>"
        f"<span>{card.share:.0%} of them <code>{favourite}</code></span>{tag}</header>"
    )
    passages = "".join(f'<p class="passage">{_passage(p)}</p>' for p in card.passages)
    return f'<div class="latent">{head}{passages}</div>'


def _passage(pieces: Sequence[Piece]) -> str:
    parts = []
    for piece in pieces:
        text = escape(_one_line(piece.text))
        if piece.strength > 0:
            peak = ' class="peak"' if piece.peak else ""
            alpha = 0.12 + 0.5 * piece.strength
            text = f'<mark{peak} style="--a:{alpha:.2f}">{text}</mark>'
        parts.append(text + escape(_one_line(piece.gap)))
    return "".join(parts)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _method(results: Results) -> str:
    s = results.settings
    threads = results.histories["dense"].threads
    return (
        "<p>Each run has a process of its own and "
        f"{threads} threads; they take turns of {s.turn} steps, so that the machine's mood hits "
        "both alike. A step (the median is shown) is everything from gathering the batch to "
        "renormalising the decoder. Ours is the trainer of <code>gemmascope_fast.train</code>; "
        "the dense run uses <code>torch.optim.Adam(fused=True)</code>. Memory is the peak "
        "resident set during training minus the resident set before the parameters exist, so it "
        "holds parameters, gradients, Adam moments and activations, not the data. glibc is "
        "told to keep freed memory, which spares the dense run its page faults.</p>"
        "<p>FVU is the squared error over the squared distance to the training mean, on every "
        "20th 128-token block; none of these blocks was trained on. <em>PCA</em> keeps as many "
        "directions as the SAE has active latents. <em>Token mean</em> predicts a token's "
        "activation from its id alone. A latent counts as never fired if it is silent on all "
        "tokens, held-out ones included.</p>"
    )
