"""The README's part between the markers: rows of first interest, and every missed target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import charts
from .gemma import model
from .rows import (
    OURS,
    STEP_BETA1,
    Found,
    Results,
    Row,
    commit_of,
    cpu_rows,
    gpu_rows,
    machine_of,
    markdown,
    mebibytes,
    milliseconds,
    peers,
)
from .tables import GPU_COMMAND, NEVER, document, machine, origin, pictures

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COMPLETE = "docs/benchmarks.md"
CPU_COMMAND = "make bench-cpu"
HEAD = ("what", "tokens", "d (Gemma 3)", "latents", "time", "times as fast as", "memory", "targets")


@dataclass(frozen=True)
class Choice:
    """Which row of an op is shown, by parts of its shape, and what a stranger calls it.

    `ours` is the way through this library that is shown, `beside` the contenders: all unless named.
    Targets are told unless they speak of another way.
    """

    op: str
    title: str
    shape: dict[str, Any]
    ours: str = OURS
    beside: tuple[str, ...] = ()
    judged: bool = True

    def takes(self, row: Row) -> bool:
        """Whether a row is this one; text need only begin alike."""
        return (
            row["op"] == self.op
            and "median_s" in row["times"].get(self.ours, {})
            and all(
                str(row["shape"].get(name)).startswith(value)
                if isinstance(value, str)
                else row["shape"].get(name) == value
                for name, value in self.shape.items()
            )
        )


K16, K65, K262, M1 = 2**14, 2**16, 2**18, 2**20
DENSE = ("matmul", "dense eager", "torch.compile")
ADAM = ("ours, with Adam(fused=True)", ("dense eager, with fused torch Adam",))
CPU = (
    Choice("jumprelu_encode", "JumpReLU encode", {"n": 256, "d": 1152, "d_sae": K65}),
    Choice("jumprelu_encode", "JumpReLU encode", {"n": 256, "d": 5376, "d_sae": K65}),
    Choice("jumprelu_encode", "JumpReLU encode, one token", {"n": 1, "d_sae": K65}),
    Choice("topk_encode", "TopK encode, k = 64", {"n": 256, "d": 1152, "d_sae": K65}),
    Choice("decode", "decode", {"n": 1024, "d_sae": K65, "inputs": "fp32, uniform"}),
    Choice("decode", "decode, recorded trace", {"n": 1024, "inputs": "fp32, trace"}),
    Choice("training", "loss and all gradients", {"n": 1024, "d_sae": K65}),
    Choice("step", "training step with Adam", {"n": 1024, "d_sae": K65}),
    Choice("clt", "training step, CLT of 6 layers", {"n": 512}),
    Choice("clt", "training step, CLT of 18 layers", {"n": 1024}),
    Choice("crosscoder", "training step, crosscoder of 4 layers", {"n": 512}),
)
GPU = (
    Choice("encode", "JumpReLU encode", {"d_sae": K65, "firing": "uniform"}),
    Choice("topk", "TopK encode, k = 64", {"d_sae": K65, "firing": "uniform"}),
    Choice("decode", "decode", {"d_sae": K65, "firing": "uniform"}),
    Choice("decode", "decode", {"d_sae": M1, "firing": "uniform"}),
    Choice("backward", "all gradients", {"d_sae": K16, "firing": "uniform"}),
    Choice("step", "forward and backward", {"d_sae": K65, "firing": "uniform"}, OURS, DENSE, False),
    Choice("step", "training step with Adam", {"d_sae": K65, "firing": "uniform"}, *ADAM),
    Choice("step", "training step with Adam", {"d_sae": K262, "firing": "uniform"}, *ADAM),
    Choice(
        STEP_BETA1, "the same, beta1 = 0.9", {"d_sae": K262, "firing": "uniform"}, OURS, ADAM[1]
    ),
)


def part(found: Found) -> str:
    """What stands between the markers."""
    gpus = [
        section(machine(results), name, GPU_COMMAND, gpu_rows(results), GPU)
        for name, results in found.gpu.items()
    ]
    rows = [row for results in found.gpu.values() for row in gpu_rows(results)]
    rows += [row for results in found.cpu.values() for row in cpu_rows(results)]
    return "\n\n".join([*(gpus or [NEVER]), *cpu_tables(found.cpu), missed(rows)])


def update(readme: Path, found: Found) -> list[Path]:
    """Rewrite the README's part, and `docs/benchmarks.md` with its curves; paths that were written.

    Raises:
        ModuleNotFoundError: there are curves to draw, and matplotlib is not installed.
        ValueError: the README has no place for its part.
    """
    complete = readme.parent / COMPLETE
    written = {readme: replaced(readme.read_text(), part(found)), complete: document(found)}
    for name, (title, rows, over) in pictures(found).items():
        written[complete.parent / name] = charts.curve(rows, title, over)
    complete.parent.mkdir(exist_ok=True)
    for path, text in written.items():
        path.write_text(text)
    return list(written)


def replaced(text: str, part: str) -> str:
    """`text` with what lies between the markers replaced.

    Raises:
        ValueError: the markers are missing, repeated or in the wrong order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and then {END}, once each")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def cpu_tables(files: dict[str, Results]) -> list[str]:
    """A table per machine, of all its files."""
    machines: dict[str, list[str]] = {}
    for name, results in files.items():
        machines.setdefault(machine_of(results), []).append(name)
    found = []
    for told, names in machines.items():
        if body := chosen([row for name in names for row in cpu_rows(files[name])], CPU):
            links = [f"[{n}](bench/results/{n}) ({commit_of(files[n])})" for n in names]
            source = f"From {', '.join(links)}, by `{CPU_COMMAND}`."
            found.append(f"CPU: {told}. Medians. {source}\n\n{markdown(HEAD, body)}")
    return found


def section(
    told: str, name: str, command: str, rows: Iterable[Row], choices: Sequence[Choice]
) -> str:
    """A table with what it is from."""
    return f"{told} {origin(name, command, '')}\n\n{markdown(HEAD, chosen(rows, choices))}"


def chosen(rows: Iterable[Row], choices: Sequence[Choice]) -> list[list[str]]:
    """The first row of each choice that was measured, as text."""
    known = list(rows)
    found = [(c, next((row for row in known if c.takes(row)), None)) for c in choices]
    return [cells(choice, row) for choice, row in found if row is not None]


def cells(choice: Choice, row: Row) -> list[str]:
    """A row in the README's columns; a contender's memory in brackets."""
    shape, ours, ratios = row["shape"], row["times"][choice.ours], {OURS: 1.0, **row["ratios"]}
    name = model(shape["d"])
    shown = [p for p in peers(row) if p in ratios and (not choice.beside or p in choice.beside)]
    faster = [f"{ratios[peer] / ratios[choice.ours]:.3g}x {peer}" for peer in shown]
    dense = [m for peer in shown if (m := row["times"][peer].get("peak_extra_bytes"))]
    return [
        choice.title,
        f"{shape['n']:,}",
        f"{shape['d']:,}" + (f" ({name})" if name else ""),
        f"{shape['d_sae']:,}",
        milliseconds(ours["median_s"]),
        ", ".join(faster),
        mebibytes(ours.get("peak_extra_bytes")) + (f" ({mebibytes(dense[0])})" if dense else ""),
        judged(row) if choice.judged else "",
    ]


def judged(row: Row) -> str:
    """How many of a row's targets are met."""
    found = [bool(target["met"]) for target in row["targets"] if target["met"] is not None]
    if not found:
        return ""
    told = f"{sum(found)} of {len(found)} met"
    return told if all(found) else f"{told}, **{len(found) - sum(found)} missed**"


# ---- what was missed


def missed(rows: Iterable[Row]) -> str:
    """Every target that is missed somewhere: in how many of its rows, by how much, and in which."""
    held: dict[tuple[str, str, str], list[tuple[Row, dict[str, Any]]]] = {}
    for row in rows:
        for target in row["targets"]:
            if target["met"] is not None:
                sign = "<=" if target["at_most"] else ">="
                words = f"{sign} {target['goal']:g} {target['text']}"
                device = "GPU" if "firing" in row["shape"] else "CPU"
                held.setdefault((device, row["op"], words), []).append((row, target))
    verdicts = [bool(target["met"]) for pairs in held.values() for _, target in pairs]
    told = f"{sum(verdicts)} of {len(verdicts)} targets are met ([every row]({COMPLETE}))."
    body = [
        [*key[:2], key[2], f"{sum(bool(v['met']) for _, v in pairs)} of {len(pairs)}", where(pairs)]
        for key, pairs in held.items()
        if not all(target["met"] for _, target in pairs)
    ]
    head = ("on", "op", "target", "met in", "found where it is missed")
    return f"{told} Missed:\n\n{markdown(head, body)}" if body else told


def where(pairs: Sequence[tuple[Row, dict[str, Any]]]) -> str:
    """What was found where a target is missed, with the part of the sizes that tells rows apart."""
    sizes = [place(row) for row, _ in pairs]
    told = [name for name in sizes[0] if len({size[name] for size in sizes}) > 1]
    told = told or ["d_sae", "inputs"]
    return "; ".join(
        f"{target['found']:.3g} ({', '.join(size[name] for name in told)})"
        for size, (_, target) in zip(sizes, pairs, strict=True)
        if not target["met"]
    )


def place(row: Row) -> dict[str, str]:
    """The sizes and inputs of a row, each in a few words."""
    shape = row["shape"]
    words = str(shape.get("inputs") or shape["firing"]).split(", ")
    return {
        "n": f"n {shape['n']:,}",
        "d": f"d {shape['d']:,}",
        "d_sae": f"{shape['d_sae']:,} latents",
        "inputs": " ".join(word for word in words if "touched" not in word),
    }
