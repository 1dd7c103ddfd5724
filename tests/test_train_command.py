"""`python -m gemmascope_fast train`, its progress, and `gsf.evaluate`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gemmascope_fast as gsf
from gemmascope_fast.cli import main
from gemmascope_fast.training import command, progress
from gemmascope_fast.training.trainer import Trainer


def data(n: int = 300, d: int = 12) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1)) * 3 + 1


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--d-sae", "32", "--steps", "4", "--batch-size", "64"]
    return ["train", str(source), "--out", str(out), *sizes, *more]


def test_the_command_trains_what_the_function_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gsf.sources.write_shards(tmp_path / "x", [data()])
    log = tmp_path / "metrics.jsonl"
    more: tuple[str, ...] = ("--target-l0", "3", "--lr", "0.001", "--beta1", "0.5")
    more += ("--rows", "live", "--seed", "5", "--metrics", str(log))
    assert main(arguments(tmp_path / "x", tmp_path / "run", *more)) == 0
    assert f"{tmp_path / 'run'}: SAE(d_in=12, d_sae=32" in capsys.readouterr().out
    expected = gsf.train(
        *(tmp_path / "x",),
        **{"d_sae": 32, "steps": 4, "batch_size": 64, "target_l0": 3, "seed": 5},  # type: ignore[arg-type]
        rows="live",
        preset=gsf.Preset(lr=0.001, beta1=0.5),
        progress=False,
    )
    assert torch.equal(gsf.load(tmp_path / "run").W_dec, expected.W_dec)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "kind, more, text",
    [
        ("sae", ("--target-l0", "3"), "an artefact in the format gemma_scope_2, which gsf.load"),
        ("sae", ("--activation", "topk", "--k", "3"), "an artefact in the format saelens"),
        ("crosscoder", ("--activation", "topk", "--k", "3"), "NO ARTEFACT was written"),
    ],
)
def test_the_last_line_says_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, more: tuple[str, ...], text: str
) -> None:
    save_file(
        {"x": data() if kind == "sae" else data().view(100, 3, 12)}, tmp_path / "x.safetensors"
    )
    more = ("--kind", kind, *more)
    assert main(arguments(tmp_path / "x.safetensors", tmp_path / "run", *more)) == 0
    assert text in capsys.readouterr().out


def test_a_file_of_pairs_trains_a_transcoder(tmp_path: Path) -> None:
    save_file({"x": data(), "target": data()[:, :5].clone()}, tmp_path / "x.safetensors")
    more = ("--kind", "transcoder", "--affine", "--target-l0", "3")
    assert main(arguments(tmp_path / "x.safetensors", tmp_path / "run", *more)) == 0
    assert isinstance(gsf.load(tmp_path / "run"), gsf.Transcoder)


def test_a_text_is_run_through_a_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = [f"w{i}" for i in range(40)]
    held = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {w: i for i, w in enumerate(["<bos>", "<unk>", *words])}, "<unk>"
        )
    )
    held.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=held, bos_token="<bos>", unk_token="<unk>"
    )
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "head_dim": 8}
    config = transformers.Gemma3TextConfig(
        vocab_size=42,
        num_hidden_layers=2,
        num_key_value_heads=1,
        bos_token_id=0,
        pad_token_id=None,
        **sizes,
    )
    transformers.Gemma3TextModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(words * 20))
    live = ("--model", str(tmp_path / "model"), "--context", "9")
    more = ("--hook", "model.layers.0.output", "--target-l0", "3", "--device", "cpu")
    assert main(arguments(tmp_path / "text", tmp_path / "run", *live, *more)) == 0
    read = gsf.load(tmp_path / "run")
    assert read.d_in == 16 and read.metadata["hf_hook_point_in"] == "model.layers.0.output"
    named = {"model": str(tmp_path / "model"), "target_hook": None, "context": 9}
    source = command._source(tmp_path / "text", "cpu", hook="layers.{0,...}.output", **named)  # type: ignore[arg-type]
    assert isinstance(source, gsf.sources.ModelSource) and (source.layers, source.d_in) == (2, 32)
    source = command._live(tmp_path / "text", "cpu", str(tmp_path / "model"), more[1], None, 9)
    assert len(source.block(0, 0)) == 800 and int(source._ids[0, 0]) == 0


@pytest.mark.parametrize(
    "more, text",
    [
        ((), "jumprelu needs target_l0"),
        (("--target-l0", "3", "--model", "m"), "--model needs --hook"),
        (("--target-l0", "3", "--lr", "0"), "lr must be finite and > 0"),
        (("--activation", "topk", "--k", "2.5"), "k must be an int"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], text: str
) -> None:
    gsf.sources.write_shards(tmp_path / "x", [data()])
    assert main(arguments(tmp_path / "x", tmp_path / "run", *more)) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_files_that_hold_no_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"y": data()}, tmp_path / "x.safetensors")
    assert main(arguments(tmp_path / "x.safetensors", tmp_path / "run", "--target-l0", "3")) == 2
    assert "must hold x [N, d_in], or [N, L, d] of several layers, has y" in capsys.readouterr().err
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    assert main(arguments(tmp_path / "x.safetensors", tmp_path / "run", "--target-l0", "3")) == 2
    assert "is not a safetensors file" in capsys.readouterr().err


def test_an_interrupt_is_a_line_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gsf.sources.write_shards(tmp_path / "x", [data()])
    log, step = tmp_path / "metrics.jsonl", Trainer.step

    def stopped(trainer: Trainer) -> Any:
        if trainer.taken == 3:
            raise KeyboardInterrupt
        return step(trainer)

    more = ("--target-l0", "3", "--metrics", str(log), "--checkpoint-every", "2")
    monkeypatch.setattr(Trainer, "step", stopped)
    assert main(arguments(tmp_path / "x", tmp_path / "run", *more)) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train: stopped after step 3 of 4; ") and "step-000000002" in last
    monkeypatch.undo()
    with open(log, "a") as file:
        file.write('{"step": 3, "lo')  # killed in the middle of a line
    assert main(arguments(tmp_path / "x", tmp_path / "run", *more)) == 0
    assert "train: goes on from step 2, a checkpoint" in capsys.readouterr().err
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]
    assert main(arguments(tmp_path / "x", tmp_path / "other", *more)) == 0  # appends
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == 2 * [1, 2, 3, 4]


def test_an_interrupt_before_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gsf.sources.write_shards(tmp_path / "x", [data()])
    for name, text in (
        ("step", "step 0 of 4; there is no checkpoint"),
        ("_begin", "before the first step"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert main(arguments(tmp_path / "x", tmp_path / "run", "--target-l0", "3")) == 130
        assert text in capsys.readouterr().err.splitlines()[-1]


def test_a_device_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gsf.sources.write_shards(tmp_path / "x", [data()])
    more = ("--target-l0", "3", "--device", "cuda:99")
    assert main(arguments(tmp_path / "x", tmp_path / "run", *more)) == 2
    said = capsys.readouterr().err
    assert "ValueError: train: device must be one that is here, got cuda:99" in said
    assert said.count("\n") == 1
    for op, call in (
        ("SAE", lambda device: gsf.SAE(4, 8, device=device)),
        ("Transcoder", lambda device: gsf.Transcoder(4, 8, device=device)),
        ("Crosscoder", lambda device: gsf.Crosscoder(2, 4, 8, device=device)),
        ("load", lambda device: gsf.load(tmp_path, device=device)),
    ):
        with pytest.raises(ValueError, match=f"{op}: device must be one that is here, got cuda:99"):
            call("cuda:99")


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("absent", [(), ("rich",), ("rich", "tqdm")])
def test_a_bar_is_drawn_by_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...]
) -> None:
    for name in ("rich", "tqdm"):
        if name not in absent:
            pytest.importorskip(name)
    for name in absent:
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.bar(10, True, 64) as shown:
        shown(4, "loss 0.5")
        shown(10, "loss 0.25")
    assert "0.25" in terminal.getvalue()
    assert ("train: step 10 of 10: loss 0.25" in terminal.getvalue()) == (len(absent) == 2)


def test_lines_without_a_terminal_and_nothing_without_a_wish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every 10 s at most, less often in a long run; the last always."""
    clock = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with progress.bar(1000, False, 64) as shown:
        shown(1000, "loss 1")
    assert stream.getvalue() == ""
    with progress.bar(1000, True, 64) as shown:
        for step in range(1, 1001):
            clock = 2.0 * step
            shown(step, "loss 1")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: step 5 of 1,000: loss 1, 32 tokens/s, 0:33:10 left"
    assert lines[-1] == "train: step 1,000 of 1,000: loss 1, 32 tokens/s"
    assert len(lines) < 100


def test_a_run_off_a_terminal_ends_with_its_fvu(capsys: pytest.CaptureFixture[str]) -> None:
    gsf.train(data(), d_sae=32, target_l0=3, steps=3, batch_size=64)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train: step 3 of 3: loss ") and ", FVU " in last and ", L0 " in last


# ---- evaluate


def oracle(sae: Any, x: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
    """The same numbers from dense float64 activations."""
    wide = {name: p.detach().double() for name, p in sae.named_parameters()}
    pre = x.double() @ wide["W_enc"] + wide["b_enc"]
    gate = pre > wide["threshold"]
    recon = (pre * gate) @ wide["W_dec"] + wide["b_dec"]
    if "W_skip" in wide:
        recon = recon + x.double() @ wide["W_skip"]
    error, l0 = (recon - target).square().sum(), gate.sum(1).double()
    return {
        "fvu": float(error / (target - target.double().mean(0)).square().sum()),
        "cosine": float(torch.cosine_similarity(recon, target.double(), dim=1).mean()),
        "l0": float(l0.mean()),
        "l0_std": float(l0.std(correction=0)),
        "counts": gate.sum(0),
        "per_token": l0,
    }


@pytest.mark.parametrize("affine", [None, False, True])
def test_evaluation_against_dense_float64(affine: bool | None) -> None:
    x, generator = data(500), torch.Generator().manual_seed(2)
    target = x if affine is None else x[:, :7] * 2 - 1
    if affine is None:
        sae = gsf.SAE(12, 64, gsf.JumpReLU(init_threshold=2.0), generator=generator)
    else:
        sae = gsf.Transcoder(
            *(12, 64, gsf.JumpReLU(init_threshold=2.0)), d_out=7, affine=affine, generator=generator
        )
        if affine:
            torch.nn.init.normal_(sae.W_skip, generator=generator)
    with torch.no_grad():
        sae.threshold[::4] = 1e6  # type: ignore[index]
    shaped = x.view(5, 100, 12), target.view(5, 100, -1)
    found = gsf.evaluate(sae, shaped[0], None if affine is None else shaped[1], batch_size=77)
    expected = oracle(sae, x, target)
    for name in ("fvu", "cosine", "l0", "l0_std"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-5), name
    assert torch.equal(found.counts, expected["counts"]) and found.tokens == 500
    assert found.dead == int((expected["counts"] == 0).sum()) >= 16
    ordered = expected["per_token"].sort().values
    assert found.l0_quantiles[0.0] == ordered[0] and found.l0_quantiles[1.0] == ordered[-1]
    assert found.l0_quantiles[0.5] == ordered[round(0.5 * 499)]
    json.dumps(found.summary())


def test_the_histogram_counts_every_latent_once() -> None:
    counts = torch.tensor([0, 0, 1, 10, 100, 1000, 1000, 900])
    found = gsf.Evaluation(1000, 0.0, 0.0, 0.0, 0.0, {}, counts)
    bars = found.histogram()
    assert bars[0] == (0.0, 0.0, 2) and sum(latents for _, _, latents in bars) == 8
    assert bars[-1][1] == 1.0 and bars[-1][2] == 3 and bars[1][2] == 1
    assert all(a[1] == b[0] for a, b in zip(bars[1:], bars[2:], strict=False))
    for rate in (0.001, 0.01, 0.1):
        assert [
            b[2] for b in bars[1:] if b[0] < rate * (1 - 1e-6) and rate <= b[1] * (1 + 1e-6)
        ] == [1]


@pytest.mark.parametrize(
    "args, error, text",
    [
        ((torch.zeros(3, 5),), ValueError, "activations must have width 12"),
        ((torch.zeros(0, 12),), ValueError, "at least one"),
        ((torch.zeros(3, 12).int(),), TypeError, "activations must be float32"),
        ((torch.zeros(3, 12), torch.zeros(4, 12)), ValueError, "the same tokens"),
    ],
)
def test_evaluation_refuses(args: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"evaluate: .*{text}"):
        gsf.evaluate(gsf.SAE(12, 32), *args)
    with pytest.raises(ValueError, match="target is needed by a Transcoder"):
        gsf.evaluate(gsf.Transcoder(12, 32), torch.zeros(3, 12))
