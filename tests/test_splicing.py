"""splice: exact pass-through, edits against dense hooks, gradients, hooks that leave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gemmas
import pytest
import torch
from gemmas import ATTN, MLP_IN, MLP_OUT, RESID, dense_acts, dense_recon, dense_splice, dictionary
from oracle import assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gemmascope_fast as gsf

ATTN_WIDTH = gemmas.HEADS * gemmas.HEAD_DIM
SITES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "resid": (RESID, RESID, lambda: dictionary()),
    "attn": (ATTN, ATTN, lambda: dictionary(ATTN_WIDTH)),
    "mlp": (MLP_OUT, MLP_OUT, lambda: dictionary(activation=gsf.TopK(7))),
    "transcoder": (MLP_IN, MLP_OUT, lambda: dictionary(transcoder=True)),
    "affine": (MLP_IN, MLP_OUT, lambda: dictionary(transcoder=True, affine=True)),
}
Case = tuple[str, str, Any, Any]


@pytest.fixture(params=SITES)
def case(request: pytest.FixtureRequest) -> Case:
    """`(hook point in, hook point out, dictionary, what to pass as saes)`."""
    point_in, point_out, make = SITES[request.param]
    sae = make()
    sae.metadata = {"hf_hook_point_in": point_in, "hf_hook_point_out": point_out}
    return point_in, point_out, sae, sae


def unchanged(acts: gsf.SparseActs, context: gsf.SpliceContext) -> gsf.SparseActs:
    """Another object with the same entries."""
    return acts.scale([3, 4], 1.0)


# ---- pass-through


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, attention", [("text", "eager"), ("multimodal", "sdpa")])
def test_what_is_not_edited_passes_bit_for_bit(
    case: Case, kind: str, attention: str, dtype: torch.dtype
) -> None:
    model, ids = gemmas.gemma(kind, attention, dtype), gemmas.prompts()
    with torch.no_grad():
        clean = model(ids).logits
        without = clean
        for error in ("detach", "grad"):
            for edit in (None, unchanged, lambda acts, _: acts):
                with gsf.splice(model, case[3], edit, error=error):
                    assert torch.equal(model(ids).logits, clean)
        with gsf.splice(model, case[3], error="none"):
            without = model(ids).logits
    assert not torch.equal(without, clean)
    for error in ("detach", "grad"):
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        with gsf.splice(model, case[3], error=error):
            assert torch.equal(model(inputs_embeds=embeds).logits, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_that_an_edit_leaves_alone_keep_their_bits(dtype: torch.dtype) -> None:
    """The others are rounded once."""
    model, ids, sae = gemmas.gemma(dtype=dtype), gemmas.prompts(3), dictionary()
    edit = lambda acts, _: acts.set([7, 8], 5.0, rows=(1, slice(4, 6)))  # noqa: E731
    with torch.no_grad(), gsf.splice(model, {RESID: sae}, edit):
        with gsf.capture(model, {RESID: sae}) as after:
            model(ids)
    with torch.no_grad(), gsf.capture(model, {RESID: sae}) as before:
        model(ids)
    x, acts = before[0].x, before[0].acts
    same = (after[0].x == x).all(-1)
    expected = torch.ones_like(same)
    expected[1, 4:6] = False
    assert_same(same, expected)
    change = sae.decode(edit(acts, None)) - sae.decode(acts)
    assert_same(after[0].x, (x.float() + change).to(dtype))


@pytest.mark.parametrize("edit", [unchanged, lambda acts, _: acts.set([7], 5.0, rows=(1, 4))])
def test_zeros_keep_their_signs(edit: Any) -> None:
    model, ids, seen = gemmas.gemma(), gemmas.prompts(), []
    negative = torch.arange(gemmas.HIDDEN) % 3 == 0
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda _m, _a, out: torch.where(negative, -0.0, out))
    with torch.no_grad(), gsf.splice(model, {RESID: dictionary()}, edit):
        layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
        model(ids)
    assert torch.signbit(seen[0][0, :, negative]).all()


# ---- against dense hooks

EDITS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "none": (None, lambda f: f),
    "ablate": (lambda acts, _: acts.ablate(range(40)), lambda f: f * (torch.arange(96) >= 40)),
    "scale": (
        lambda acts, _: acts.scale(range(96), -2.0),
        lambda f: -2 * f,
    ),
    "set": (
        lambda acts, _: acts.set([5, 90], torch.tensor([30.0, 9.0])),
        lambda f: f.index_copy(-1, torch.tensor([5, 90]), torch.tensor([30.0, 9]).expand(2, 9, 2)),
    ),
}


def dense(sae: Any, x: Tensor) -> Tensor:
    if isinstance(sae.activation, gsf.TopK):
        pre = torch.relu(x.float() @ sae.W_enc + sae.b_enc)
        kept = pre.topk(sae.activation.k, -1).indices
        return torch.zeros_like(pre).scatter(-1, kept, pre.gather(-1, kept))
    return dense_acts(sae, x)


def replacement(sae: Any, edit: Any, error: str) -> gemmas.Replace:
    """The definition: reconstruction plus error term."""

    def replace(x: Tensor, y: Tensor) -> Tensor:
        acts = dense(sae, x)
        recon = dense_recon(sae, edit(acts), x)
        left = y - dense_recon(sae, acts, x)
        return recon + {"none": 0.0, "grad": left, "detach": left.detach()}[error]

    return replace


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("error", ["detach", "grad", "none"])
def test_values_and_gradients_are_those_of_dense_hooks(case: Case, name: str, error: str) -> None:
    point_in, point_out, sae, saes = case
    model, ids = gemmas.gemma(), gemmas.prompts()
    edit, dense_edit = EDITS[name]
    sae.W_dec.requires_grad_(), sae.b_dec.requires_grad_(), sae.W_enc.requires_grad_()
    leaves = [model.get_input_embeddings()(ids).requires_grad_(), sae.W_dec, sae.b_dec, sae.W_enc]
    weights = torch.randn(2, 9, gemmas.VOCABULARY)
    with dense_splice(model, point_in, point_out, replacement(sae, dense_edit, error)):
        expected = model(inputs_embeds=leaves[0]).logits
    with gsf.splice(model, saes, edit, error=error):
        logits = model(inputs_embeds=leaves[0]).logits
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    ours = torch.autograd.grad((logits * weights).sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine is None) <= (error == "grad"), "only an error with its gradient is unused"
        mine, wanted = (torch.zeros(1) if g is None else g for g in (mine, wanted))
        scale = float(wanted.abs().max()) + float(theirs[0].abs().max())
        torch.testing.assert_close(mine.expand_as(wanted), wanted, atol=2e-5 * scale, rtol=1e-3)


def test_an_edit_learns_where_it_is(case: Case) -> None:
    point_in, _, sae, saes = case
    model, ids, seen = gemmas.gemma(), gemmas.prompts(), []
    with gsf.splice(model, saes, lambda acts, context: seen.append((acts, context)) or acts):
        model(ids)
    ((acts, context),) = seen
    assert (context.key, context.module, context.layer) == (point_in, sae, 0)
    assert acts.nnz > 50
    assert acts.shape == (2, 9, 96) and context.x.shape[:2] == (2, 9)
    assert_same(acts.to_dense(), sae.encode(context.x).to_dense())
    assert context.sequences.tolist() == [[0] * 9, [1] * 9]
    assert context.positions.tolist() == [list(range(9))] * 2


def test_several_dictionaries_at_once_and_nested_act_in_the_order_of_the_model() -> None:
    model, ids = gemmas.gemma(), gemmas.prompts()
    low, high = dictionary(seed=1), dictionary(seed=2)
    points = ["model.layers.0.output", RESID]
    ablate = lambda acts, _: acts.ablate(range(50))  # noqa: E731

    def halved(f):
        return f * (torch.arange(96) >= 50)

    with torch.no_grad():
        with (
            dense_splice(model, points[0], points[0], replacement(low, halved, "none")),
            dense_splice(model, points[1], points[1], replacement(high, halved, "none")),
        ):
            expected = model(ids).logits
        with gsf.splice(model, dict(zip(points, (low, high), strict=True)), ablate, error="none"):
            together = model(ids).logits
        with (
            gsf.splice(model, {points[1]: high}, ablate, error="none"),
            gsf.splice(model, {points[0]: low}, ablate, error="none"),
        ):
            nested = model(ids).logits
        with (
            dense_splice(model, RESID, RESID, replacement(low, halved, "none")),
            dense_splice(model, RESID, RESID, replacement(high, halved, "none")),
        ):
            twice = model(ids).logits
        with (
            gsf.splice(model, {RESID: low}, ablate, error="none"),
            gsf.splice(model, {RESID: high}, ablate, error="none"),
        ):
            assert_close_logits(model(ids).logits, twice)
    assert_close_logits(together, expected)
    assert_same(nested, together)
    assert float((twice - expected).abs().max()) > 0.1


def assert_close_logits(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


def test_the_gradient_reaches_latents_that_an_edit_made_leaves() -> None:
    """Of the latents that are off, too: those that another prompt has."""
    model, ids, sae = gemmas.gemma(), gemmas.prompts(), dictionary()
    with torch.no_grad(), gsf.capture(model, {RESID: sae}) as captured:
        model(gemmas.prompts(seed=8))
    other, held = captured[sae].acts, []

    def leaves(acts: gsf.SparseActs, _: Any) -> gsf.SparseActs:
        held.append(acts.union(other).detach().requires_grad_())
        return held[0]

    with gsf.splice(model, {RESID: sae}, leaves):
        model(ids).logits[:, -1, 7].sum().backward()
    made: list[Tensor] = []

    def dense_leaves(x: Tensor, y: Tensor) -> Tensor:
        made.append(dense_acts(sae, x).requires_grad_())
        return dense_recon(sae, made[0], x) + (y - dense_recon(sae, made[0], x)).detach()

    with dense_splice(model, RESID, RESID, dense_leaves):
        model(ids).logits[:, -1, 7].sum().backward()
    assert made[0].grad is not None and held[0].values.grad is not None
    union = held[0]
    expected = made[0].grad.reshape(-1)[union._keys()]
    torch.testing.assert_close(union.values.grad, expected, atol=1e-5, rtol=1e-3)
    off = union.gate == 0
    assert int((expected[off] != 0).sum()) > 20


# ---- what a context leaves behind, and what it never makes


def test_hooks_leave_after_exceptions_and_contexts_are_entered_once(case: Case) -> None:
    model, ids = gemmas.gemma(), gemmas.prompts()
    before, clean = gemmas.hook_count(model), model(ids).logits

    def fail(acts: gsf.SparseActs, _: Any) -> gsf.SparseActs:
        raise ZeroDivisionError

    context = gsf.splice(model, case[3], fail)
    for _ in range(2):  # a context that was left can be entered again
        with pytest.raises(ZeroDivisionError), context:
            assert gemmas.hook_count(model) > before
            with pytest.raises(RuntimeError, match="splice: this context is entered already"):
                context.__enter__()
            model(ids)
        assert gemmas.hook_count(model) == before
    assert torch.equal(model(ids).logits, clean)


def test_a_copy_of_a_spliced_model_is_not_spliced() -> None:
    model, ids = gemmas.gemma(), gemmas.prompts()
    clean = model(ids).logits
    with gsf.splice(model, {ATTN: dictionary(ATTN_WIDTH), RESID: dictionary()}, error="none"):
        other = copy.deepcopy(model)
        assert torch.equal(other(ids).logits, clean)
        assert not torch.equal(model(ids).logits, clean)
        shorter = other(ids[:, :4]).logits  # nor does the context follow it
    assert torch.equal(other(ids).logits, clean)
    assert torch.equal(other(ids[:, :4]).logits, shorter)


@pytest.mark.parametrize("first", [0, 1])
def test_contexts_are_left_in_any_order(first: int) -> None:
    """Threads do so: compiled code runs eagerly till the last is left, and no longer."""
    ran: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: ran.append(1) or graph(*args)

    double = torch.compile(lambda x: x + x, backend=backend)
    both = [gsf.splice(gemmas.gemma(), {RESID: dictionary()}) for _ in range(2)]
    for context in both:
        context.__enter__()
    for context in (both[first], both[1 - first]):
        double(torch.ones(2))
        assert not ran
        context.__exit__(None, None, None)
    double(torch.ones(2))
    assert ran == [1]


def test_a_pass_that_failed_leaves_nothing_to_the_next() -> None:
    model, sae, ids = gemmas.gemma(), dictionary(), gemmas.prompts()
    fails = lambda acts, _: acts.nothing  # noqa: E731
    with gsf.splice(model, {RESID: sae}, fails, positions=[7], error="none"):
        with pytest.raises(AttributeError, match="nothing"):
            model(ids)
        shorter = model(ids[:, :5]).logits
    assert torch.equal(shorter, model(ids[:, :5]).logits)


def test_runs_repeat_their_bits() -> None:
    model, ids, sae = gemmas.gemma(), gemmas.prompts(), dictionary()
    edit = lambda acts, _: acts.scale(range(0, 96, 2), 1.5)  # noqa: E731
    found = []
    for _ in range(2):
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        with gsf.splice(model, {RESID: sae, (MLP_IN, MLP_OUT): dictionary(transcoder=True)}, edit):
            logits = model(inputs_embeds=embeds).logits
            logits.square().sum().backward()
        found.append((logits, embeds.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("error", ["detach", "grad", "none"])
def test_nothing_of_size_tokens_times_latents_is_made(error: str) -> None:
    model, ids, sae = gemmas.gemma(), gemmas.prompts(16, 20), dictionary(d_sae=8192)
    edit = lambda acts, _: acts.set([1, 5000], 3.0).ablate([7])  # noqa: E731
    with Largest() as largest:
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        with gsf.capture(model, {RESID: sae}) as captured:
            with gsf.splice(model, {RESID: sae}, edit, error=error):
                model(inputs_embeds=embeds).logits.sum().backward()
        assert captured[sae].acts.nnz > 0
    assert largest.elements < ids.numel() * sae.d_sae / 4


# ---- other models: outputs in tuples, activations by keyword, the older nesting


class Block(nn.Module):
    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        return scale * hidden_states, "cache"


class Spare(Block):
    used = False


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.spare = Spare()
        self.vision_tower = nn.ModuleDict({"model": nn.ModuleDict({"layers": self.layers[:1]})})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, kept = layer(scale=2.0, hidden_states=x)
            assert kept == "cache"
        return self.spare(x)[0] if self.spare.used else x


class Older(nn.Module):
    """`language_model.model.layers`, as transformers before 4.52 nested them."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.model = Decoder()

    def forward(self, inputs_embeds: Tensor, attention_mask: Any = None, **more: Any) -> Tensor:
        return self.language_model.model(inputs_embeds)


@pytest.mark.parametrize("side, factor", [("output", 2.0), ("input", 4.0)])
def test_tuples_keywords_and_the_older_nesting(side: str, factor: float) -> None:
    model, x, sae = Older(), torch.randn(2, 3, gemmas.HIDDEN), dictionary()
    point = f"model.language_model.layers.1.{side}"
    with gsf.splice(model, {point: sae}, error="none"), gsf.capture(model, {point: sae}) as after:
        out = model(inputs_embeds=x)
    seen = 8 * x / factor if side == "input" else 4 * x
    recon = dense_recon(sae, dense_acts(sae, seen), seen)
    torch.testing.assert_close(out, recon * (2.0 if side == "input" else 1.0))
    torch.testing.assert_close(after[sae].x, recon)


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward"])
def test_compiled_models_are_spliced_all_the_same(how: str) -> None:
    """Compiled, and run, before there were hooks."""
    model, ids, sae = gemmas.gemma(), gemmas.prompts(), dictionary()
    edit = lambda acts, _: acts.set([3], 200.0)  # noqa: E731
    with torch.no_grad():
        with gsf.splice(model, {RESID: sae}, edit):
            expected = model(ids).logits
        if how == "wrapped":
            model = torch.compile(model, backend="eager")
        elif how == "in place":
            model.compile(backend="eager")
        else:
            model.forward = torch.compile(model.forward, backend="eager")
        clean = model(ids).logits
        with gsf.splice(model, {RESID: sae}, edit):
            assert_same(model(ids).logits, expected)
        assert_same(model(ids).logits, clean)
    assert not torch.equal(expected, clean)


# ---- errors


def test_arguments_that_do_not_fit() -> None:
    model, sae, coder = gemmas.gemma(), dictionary(), dictionary(transcoder=True)
    elsewhere = dictionary()
    elsewhere.metadata = {"hf_hook_point_in": RESID, "hf_hook_point_out": "model.layers.7.output"}
    half = dictionary(transcoder=True)
    half.metadata = {"hf_hook_point_in": MLP_IN}
    for saes, options, error, text in (
        (sae, {}, ValueError, "metadata of this SAE have no hf_hook_point_in; pass {hook point"),
        (half, {}, ValueError, "metadata of this Transcoder have no hf_hook_point_out"),
        (elsewhere, {}, ValueError, r"'model.layers.7.output' must name one module .* names none"),
        ({"model.layers.1": sae}, {}, ValueError, "must be a module's name and .input or .output"),
        ({3: sae}, {}, TypeError, "hook point must be a string, got int"),
        ({MLP_IN: coder}, {}, ValueError, r"give a Transcoder the pair \(hook point in, hook"),
        ({"model.layers.{0,1}.output": sae}, {}, ValueError, "name the 1 layers of its SAE, and"),
        ([], {}, ValueError, "saes must hold at least one SAE"),
        ({RESID: model}, {}, TypeError, "got a Gemma3ForCausalLM in it"),
        (model, {}, TypeError, "saes must be an SAE, .* got Gemma3ForCausalLM"),
        ({RESID: sae}, {"error": "keep"}, ValueError, r"error must be one of \('detach', 'grad'"),
        ({RESID: sae}, {"edit": 3}, TypeError, "edit must be a function or None, got int"),
    ):
        with pytest.raises(error, match=f"splice: .*{text}"):
            gsf.splice(model, saes, **options)
    with pytest.raises(TypeError, match=r"splice: model must be a torch.nn.Module, got str"):
        gsf.splice("gemma", {RESID: sae})  # type: ignore[arg-type]


def test_activations_and_edits_that_do_not_fit() -> None:
    model, ids = gemmas.gemma(), gemmas.prompts()
    width = r"model.layers.1.output must have shape \(2, 9, 20\) .* of the SAE.\), got \(2, 9, 32\)"
    for saes, edit, error, text in (
        ({RESID: dictionary(20)}, None, ValueError, width),
        ({RESID: dictionary(device="meta")}, None, ValueError, "is on cpu, its SAE on meta: move"),
        ({RESID: dictionary()}, lambda a, _: None, TypeError, "return SparseActs, got NoneType"),
        (
            {RESID: dictionary()}, lambda a, _: a[:1], ValueError,
            r"edit must return SparseActs of shape \(2, 9, 96\) on cpu, got \(1, 9, 96\)",
        ),
        ({"model.output": dictionary()}, None, TypeError, "tuple that starts with one, got a Base"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"splice: .*{text}"), gsf.splice(model, saes, edit):
            model(ids)
    with gsf.splice(model, {RESID: dictionary()}):
        with pytest.raises(RuntimeError, match="splice: a hooked module ran outside of a call of"):
            model.model(ids)
    older, x = Older(), torch.zeros(1, 2, gemmas.HIDDEN)
    with gsf.splice(older, {"model.spare.output": dictionary()}):
        older.language_model.model.spare.used = True
        older(inputs_embeds=x)
        older.language_model.model.spare.used = False
        with pytest.raises(RuntimeError, match="splice: .* did not reach .*model.spare.output"):
            older(inputs_embeds=x)
