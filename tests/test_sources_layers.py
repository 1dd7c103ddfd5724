"""Sources of several layers: a row holds their activations end to end, wherever it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gemmas
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemmascope_fast.hook_points import collapse
from gemmascope_fast.sources import Block, ModelSource, ShardSource, TensorSource, write_shards
from gemmascope_fast.training import command, shards
from gemmascope_fast.training.sources import Stream

L, D = 3, 4
MLP_IN = "model.layers.{0,...}.pre_feedforward_layernorm.output"
MLP_OUT = "model.layers.{0,...}.post_feedforward_layernorm.output"


def layered(n: int = 50, layers: int = L, d: int = D, seed: int = 1) -> Tensor:
    """`[n, layers, d]`, no number twice."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n * layers * d, generator=generator)
    return order.view(n, layers, d).float()


def flat(x: Tensor) -> Tensor:
    """Rows with one layer after the other, by slicing."""
    return torch.cat([x[:, layer] for layer in range(x.shape[1])], 1)


def rows_of(block: Block) -> tuple[Tensor, Tensor | None]:
    return block.take(0, len(block))


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether both have these rows, in this order, or are None."""
    if found is None or expected is None:
        return found is expected
    return found.dtype == expected.dtype and torch.equal(found, expected)


# ---- in memory


@pytest.mark.parametrize("layers", [1, L])
def test_rows_are_those_of_the_layers_in_the_same_order(layers: int) -> None:
    x, target = layered(layers=layers), layered(layers=layers, seed=2).bfloat16()
    mask = torch.arange(50) % 7 != 0
    source, alone = TensorSource(x, target, mask), TensorSource(flat(x), flat(target), mask)
    assert source.layers == layers and alone.layers is None
    assert source.d_in == source.d_out == layers * D
    streams = [Stream(s, 5) for s in (source, alone)]
    for _ in range(4):  # over the end of a pass
        (found, other), (expected, wanted) = (stream.next(17) for stream in streams)
        assert same(found, expected) and same(other, wanted)
    numbers = torch.arange(50, dtype=torch.float32)[:, None]
    order = [int(at) for at in rows_of(TensorSource(numbers, mask=mask).block(5, 0))[0]]
    assert same(rows_of(source.block(5, 0))[0].view(-1, layers, D), x[order])


def test_layers_are_copied_only_where_they_have_to_be() -> None:
    x = layered()
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert TensorSource(x).x.data_ptr() == x.data_ptr()
    assert same(TensorSource(apart).x, flat(x))
    cpu, held = torch.device("cpu"), TensorSource(x).held_bytes(torch.device("cpu"))
    assert TensorSource(apart).held_bytes(cpu) - held == x.nbytes
    assert TensorSource(x, apart).held_bytes(cpu) - held == x.nbytes
    assert TensorSource(apart).held_bytes(torch.device("cuda")) == 0


def test_identity_tells_layers_apart() -> None:
    x = layered()
    assert TensorSource(x).identity() == TensorSource(x.clone()).identity()
    assert TensorSource(x).identity() != TensorSource(flat(x)).identity()
    assert TensorSource(x).identity() != TensorSource(x.reshape(50, D, L)).identity()
    assert TensorSource(x).identity()["shapes"] == [[50, L, D]]
    # as it was before there were layers: runs that are there resume
    assert TensorSource(flat(x), flat(x)[:, :5]).identity()["shapes"] == [[50, L * D], [50, 5]]


@pytest.mark.parametrize(
    "x, target, text",
    [
        (torch.zeros(2, 3, 4, 5), None, r"x must have shape \[N >= 1, d >= 1\], or \[N, L, d\]"),
        (torch.zeros(2, 0, 4), None, r"x must have shape .*, got \(2, 0, 4\)"),
        (layered(), layered()[:, :, 0], r"target must have the layers .* \(3, 4\), got \(3,\)"),
        (layered()[:, 0], layered(), r"target must have the layers .* \(4,\), got \(3, 4\)"),
        (layered(), layered(layers=2), r"target must have the layers .* \(3, 4\), got \(2, 4\)"),
        (layered(), layered(d=5), r"target must have the layers .* \(3, 4\), got \(3, 5\)"),
        (layered(), layered(4), "target must have as many rows as x, 50, got 4"),
    ],
)
def test_layers_that_do_not_fit(x: Tensor, target: Tensor | None, text: str) -> None:
    with pytest.raises(ValueError, match=f"train: {text}"):
        TensorSource(x, target)


def test_a_file_of_layers(tmp_path: Path) -> None:
    path, x = tmp_path / "x.safetensors", layered()
    save_file({"x": x, "target": 2 * x, "mask": torch.arange(50) % 2}, path)
    source = command._source(path, "cpu", None, None)
    assert isinstance(source, TensorSource)
    assert (source.layers, source.d_in, source.d_out) == (L, L * D, L * D)
    found, target = rows_of(source.block(0, 0))
    assert len(found) == 25 and same(target, 2 * found)
    save_file({"y": x}, path)
    with pytest.raises(ValueError, match=r"must hold x \[N, d_in\], or \[N, L, d\] of several"):
        command._source(path, "cpu", None, None)


# ---- shards


def written(folder: Path, *, pairs: bool, layers: bool = True) -> ShardSource:
    """200 rows in three shards, of which token 2 is special."""
    x = layered(200)
    each = {"x": x, "tokens": torch.arange(200) % 5, "mask": torch.arange(200) % 11}
    each |= {"target": (2 * x).half()} if pairs else {}
    if not layers:
        each |= {name: flat(each[name]) for name in ("x", "target") if name in each}
    cuts = ((0, 70), (70, 70), (70, 160), (160, 200))
    parts = [{name: t[a:b] for name, t in each.items()} for a, b in cuts]
    write_shards(folder, parts, special_tokens=[2])
    return ShardSource(folder, block_rows=72)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_shards_of_layers_are_read_as_those_of_rows(
    pairs: bool, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK", 4)
    source = written(tmp_path / "layers", pairs=pairs)
    alone = written(tmp_path / "rows", pairs=pairs, layers=False)
    assert source.layers == L and alone.layers is None
    assert (source.d_in, source.d_out) == (L * D, L * D if pairs else None)
    device = torch.device("cpu")
    assert source.held_bytes(device) == alone.held_bytes(device)
    seen = []
    for index in range(3):
        for rank in range(ranks):
            found, expected = (s.part(4, index, rank, ranks) for s in (source, alone))
            assert torch.equal(found.order, expected.order)
            (x, target), (other, wanted) = rows_of(found), rows_of(expected)
            assert same(x, other) and same(target, wanted)
            seen.append(x)
    x = torch.cat(seen)
    keep = (torch.arange(200) % 5 != 2) & (torch.arange(200) % 11 != 0)
    kept = layered(200)[keep]
    assert same(x[x[:, 0].argsort()].view(-1, L, D), kept[kept[:, 0, 0].argsort()])


def test_what_a_folder_of_layers_holds(tmp_path: Path) -> None:
    x = layered(8)
    source = write_shards(tmp_path / "layers", [x])
    manifest = json.loads((tmp_path / "layers" / "manifest.json").read_text())
    assert (manifest["layers"], manifest["d_in"], manifest["version"]) == (L, L * D, 1)
    with safe_open(tmp_path / "layers" / "shard-00000.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), x)
    plain = write_shards(tmp_path / "rows", [flat(x)])
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert "layers" not in manifest and plain.layers is None
    assert source.identity() != plain.identity()
    one = write_shards(tmp_path / "one", [x[:, :1]])
    assert one.layers == 1 and one.d_in == D


@pytest.mark.parametrize(
    "parts, text",
    [
        (
            [layered(), flat(layered())],
            "must be like part 0, d_in=12, d_out=None, layers=3, .*; got .*layers=None",
        ),
        ([layered(layers=4, d=3), layered(layers=3, d=4)], "part 1 must be like part 0"),
        ([torch.zeros(2, 3, 4, 5)], r"floating-point x \[rows, d_in\], or of .* \[rows, L, d\]"),
        ([torch.zeros(2, 0, 4)], "must have a floating-point x"),
        ([{"x": layered(), "target": flat(layered())}], r"target of part 0 must have the layers"),
        ([{"x": layered(), "target": layered(d=5)}], r"target of part 0 .* \(3, 4\), got \(3, 5\)"),
        ([{"x": layered(), "mask": layered().int()}], "mask of part 0 must have 50 rows"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, parts: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"write_shards: .*{text}"):
        write_shards(tmp_path, parts)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"layers": 5}, "layers that divide d_in"),
        ({"layers": 0}, "layers that divide d_in"),
        ({"layers": True}, "layers that divide d_in"),
        ({"layers": "3"}, "layers that divide d_in"),
        ({"d_out": 8}, "d_out null or d_in"),
        ({"layers": 4}, r"must have shape \[50, 4, 3\], got \[50, 3, 4\]"),
        ({"layers": None}, r"must have shape \[50, 12\], got \[50, 3, 4\]"),
        ({"d_in": 15, "d_out": 15}, r"must have shape \[50, 3, 5\], got \[50, 3, 4\]"),
    ],
)
def test_manifests_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    write_shards(tmp_path, [{"x": layered(), "target": layered()}])
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"train: .*{text}"):
        ShardSource(tmp_path)


# ---- live from a model


def expected_rows(model: Any, ids: Tensor, keep: Tensor, points: list[str]) -> Tensor:
    """`[kept tokens, layers, d]` by plain hooks, one forward pass for each point."""
    found = []
    for point in points:
        module, side = model.get_submodule(point.rpartition(".")[0]), point.rpartition(".")[2]
        held: list[Tensor] = []

        def visit(_m: Any, args: Any, out: Any, held: Any = held, side: str = side) -> None:
            value = args if side == "input" else out
            held.append(value[0] if isinstance(value, tuple) else value)

        handle = module.register_forward_hook(visit)
        model(input_ids=ids)
        handle.remove()
        found.append(held[0][keep])
    return torch.stack(found, 1)


def named(layers: list[int], tail: str = "output") -> list[str]:
    return [f"model.layers.{layer}.{tail}" for layer in layers]


@pytest.mark.parametrize(
    "given, layers",
    [
        ("model.layers.{0,2}.output", [0, 2]),
        ("model.layers.{0,...}.output", [0, 1, 2]),
        ("model.layers.{1}.output", [1]),
        (named([2, 0]), [2, 0]),
        (tuple(named([1])), [1]),
    ],
)
def test_blocks_hold_the_layers_in_order(given: Any, layers: list[int]) -> None:
    model, ids = gemmas.gemma(), gemmas.prompts(6)
    ids[3, 4] = gemmas.EOS
    source = ModelSource(model, ids, given, batch_sequences=6, block_sequences=6)
    assert (source.layers, source.d_in) == (len(layers), len(layers) * gemmas.HIDDEN)
    assert source.d_out is None
    found, target = rows_of(source.block(0, 0))
    keep = (ids != gemmas.BOS) & (ids != gemmas.EOS)
    expected = flat(expected_rows(model, ids, keep, named(layers)))
    assert target is None and found.shape == expected.shape == (47, source.d_in)
    order = [x[:, 0].argsort() for x in (found, expected)]
    torch.testing.assert_close(found[order[0]], expected[order[1]], atol=1e-4, rtol=1e-5)


def test_pairs_of_all_layers_come_from_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = gemmas.gemma(), gemmas.prompts(6)
    source = ModelSource(model, ids, MLP_IN, target_hook_point=MLP_OUT)
    assert (source.layers, source.d_in, source.d_out) == (3, 96, 96)
    forward, passes = model.forward, []
    monkeypatch.setattr(model, "forward", lambda **kw: passes.append(1) or forward(**kw))
    x, target = rows_of(source.block(0, 0))
    assert passes == [1] and target is not None and len(x) == 48
    for layer, (read, wrote) in enumerate(zip(x.split(32, 1), target.split(32, 1), strict=True)):
        own = model.model.layers[layer]
        expected = own.post_feedforward_layernorm(own.mlp(read))
        torch.testing.assert_close(wrote, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_rows_of_a_model(ranks: int) -> None:
    ids = gemmas.prompts(6)
    options: dict[str, Any] = {"target_hook_point": MLP_OUT, "batch_sequences": 1}
    source = ModelSource(gemmas.gemma(), ids, MLP_IN, **options)
    whole = rows_of(source.block(1, 0))
    parts = [rows_of(source.part(1, 0, rank, ranks)) for rank in range(ranks)]
    for at in range(2):
        sides = [side for side in (part[at] for part in parts) if side is not None]
        together, expected = torch.cat(sides), whole[at]
        assert expected is not None
        order = [x[:, 0].argsort() for x in (together, expected)]
        assert torch.equal(together[order[0]], expected[order[1]])


def test_metadata_names_the_layers_as_configs_do() -> None:
    model, ids = gemmas.gemma(), gemmas.prompts(1)

    def places(*points: Any) -> tuple[Any, Any]:
        target = points[1] if len(points) > 1 else None
        found = ModelSource(model, ids, points[0], target_hook_point=target).metadata()
        return found.get("hf_hook_point_in"), found.get("hf_hook_point_out")

    assert places(MLP_IN, MLP_OUT) == (MLP_IN, MLP_OUT)
    braces = "model.layers.{0,2}.output"
    assert places(braces) == places(named([0, 2])) == (braces, braces)
    assert places(named([1])) == ("model.layers.1.output",) * 2
    assert places(named([2, 0])) == (None, None)  # braces ascend


@pytest.mark.parametrize(
    "points, expected",
    [
        (named([0, 5, 12]), "model.layers.{0,5,12}.output"),
        (named([9, 10]), "model.layers.{9,10}.output"),
        (named([3]), "model.layers.3.output"),
        (named([5, 0]), None),
        (named([5, 5]), None),
        (["layers.0.output", "model.layers.1.output"], None),
        (["layers.0.mlp.output", "layers.1.attn.output"], None),
        (["layers.a.output", "layers.b.output"], None),
        (["layers.01.output", "layers.2.output"], None),
        (["layers.1.input", "layers.1.output"], None),
    ],
)
def test_several_hook_points_as_one(points: list[str], expected: str | None) -> None:
    assert collapse(points) == expected


def test_identity_tells_layers_from_a_pair() -> None:
    model, ids, points = gemmas.gemma(), gemmas.prompts(2), named([0, 1])
    layers = ModelSource(model, ids, points).identity()
    pair = ModelSource(model, ids, points[0], target_hook_point=points[1]).identity()
    assert layers["hook_points"] == pair["hook_points"] == points
    assert layers != pair and "layers" not in pair
    assert layers == ModelSource(model, ids, "model.layers.{0,1}.output").identity()


POINT = "model.layers.0.output"


@pytest.mark.parametrize(
    "given, target, error, text",
    [
        (MLP_IN, POINT, ValueError, "target_hook_point must name as many layers .*, 3, got 1"),
        (POINT, MLP_OUT, ValueError, "target_hook_point must name as many layers .*, 1, got 3"),
        ([], None, ValueError, "hook_point must name at least one layer, each once"),
        ([POINT, POINT], None, ValueError, "hook_point must name at least one layer, each once"),
        (POINT, [], ValueError, "target_hook_point must name at least one layer"),
        ("model.layers.{2,0}.output", None, ValueError, "must list ascending layers"),
        ("model.layers.{0,9}.output", None, ValueError, r"layers\.9\.output' must name one module"),
        ([POINT, "model.layers.9.output"], None, ValueError, "must name one module"),
        (["model.layers.{0,1}.output"], None, ValueError, "must name one module"),
        ([POINT, 5], None, TypeError, "hook point must be a string, got int"),
        (7, None, TypeError, "hook point must be a string, got int"),
        (
            [POINT, "model.layers.1.self_attn.o_proj.input"], None, ValueError,
            r"one width, and hook points have 32 \(model.layers.0.output\), 48 \(model.layers.1",
        ),
        (
            "model.layers.{0,1}.output", "model.layers.{0,1}.self_attn.o_proj.input", ValueError,
            "layers must have one width",
        ),
    ],
)  # fmt: skip
def test_hook_points_that_do_not_fit(
    given: Any, target: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"train: .*{text}"):
        ModelSource(gemmas.gemma(), gemmas.prompts(1), given, target_hook_point=target)


def test_a_pair_of_one_layer_may_differ_in_width() -> None:
    wide = "model.layers.0.self_attn.o_proj.input"
    source = ModelSource(gemmas.gemma(), gemmas.prompts(1), POINT, target_hook_point=wide)
    assert (source.layers, source.d_in, source.d_out) == (None, 32, 48)


def test_multimodal_models_have_the_layers_too() -> None:
    source = ModelSource(gemmas.gemma("multimodal"), gemmas.prompts(2), MLP_IN)
    assert (source.layers, source.d_in) == (3, 96)
    assert all("vision" not in str(place) for place in source._points.places)
