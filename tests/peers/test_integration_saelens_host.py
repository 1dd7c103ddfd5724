"""The backend keeps SAELens' contracts: hooks, overrides, files, edits, trainer, compiler."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peer import D, F, batch, close
from saelens_modules import INFERENCE, TRAINED, Largest, make, saes, step_input
from torch import Tensor

from gemmascope_fast.integrations import saelens
from gemmascope_fast.integrations.lazy_acts import LazyActs

registry = pytest.importorskip("sae_lens.registry")
trainers = pytest.importorskip("sae_lens.training.sae_trainer")

KINDS = ("step", "topk", "batchtopk", "matryoshka")


def dense(module: Any, x: Tensor) -> bool:
    """Whether a forward pass makes a tensor of all activations."""
    with torch.no_grad(), Largest() as seen:
        module(x)
    return seen.elements >= len(x) * F


def unchanged(x: Tensor, *rest: Any) -> Tensor:
    return x


def everything() -> dict[Any, Any]:
    """What stands in every class of SAELens' modules, and in its registries."""
    found: dict[Any, Any] = {}
    for module in (saes.sae, saes.jumprelu_sae, saes.topk_sae, saes.batchtopk_sae):
        found |= {module: dict(vars(module))}
    classes = {c for c in vars(saes).values() if inspect.isclass(c)}
    classes |= {c for pair in registry.SAE_CLASS_REGISTRY.values() for c in pair}
    for cls in {base for c in classes for base in c.__mro__}:
        found[cls] = {k: v for k, v in vars(cls).items() if not k.startswith("__")}
    tables = (registry.SAE_CLASS_REGISTRY, registry.SAE_TRAINING_CLASS_REGISTRY)
    found |= {"registries": [dict(t) for t in tables], "trainer": dict(vars(trainers))}
    return found | {"capture": torch._dynamo.config.capture_dynamic_output_shape_ops}


def test_everything_is_given_back() -> None:
    before = everything()
    saelens.install()
    assert everything() != before
    with saelens.install():  # a second one adds nothing, and takes nothing away
        pass
    assert everything() != before
    saelens.uninstall()
    saelens.uninstall()
    assert everything() == before
    with pytest.raises(KeyError), saelens.install(), saelens.register():
        raise KeyError
    assert everything() == before
    module = make(INFERENCE["jumprelu"])
    own = dict(vars(module))
    with saelens.accelerate(module):
        assert not dense(module, batch(0, 160))
    assert vars(module) == own and dense(module, batch(0, 160))


def test_refusals() -> None:
    with pytest.raises(TypeError, match="accelerate: module must be a sae_lens SAE, got Linear"):
        saelens.accelerate(torch.nn.Linear(2, 2))
    standard = saes.StandardSAE(saes.StandardSAEConfig(d_in=D, d_sae=F))
    with pytest.raises(TypeError, match="accelerate: StandardSAE encodes in a way that is not ser"):
        saelens.accelerate(standard)
    expected = standard(batch(0))
    with saelens.install():
        assert torch.equal(standard(batch(0)), expected)


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "jumprelu_skip_transcoder", "step"])
def test_hooks_see_and_change_what_saelens_shows_them(kind: str) -> None:
    stock, ours = (make((INFERENCE | TRAINED)[kind]) for _ in range(2))
    saelens.accelerate(ours)
    x = batch(0, 160)
    expected, cache = stock.run_with_cache(x)
    found, mine = ours.run_with_cache(x)
    assert list(mine) == list(cache) and not dense(ours, x)
    close(found, expected, "forward")
    for name in cache:
        close(mine[name], cache[name], name)
    for point in ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"):
        hooks = [(point, lambda t, hook: 2 * t)]
        expected = stock.run_with_hooks(x, fwd_hooks=hooks)
        close(ours.run_with_hooks(x, fwd_hooks=hooks), expected, point)
    seen: list[list[Tensor]] = [[], []]
    for module, kept in zip((stock, ours), seen, strict=True):
        module.hook_sae_acts_post.add_hook(lambda g, hook, kept=kept: kept.append(g), dir="bwd")
        module(x).square().sum().backward()
    assert dense(ours, x)
    close(seen[1][0][0], seen[0][0][0], "backward hook")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "step"])
def test_error_term(kind: str) -> None:
    stock, ours = (make((INFERENCE | TRAINED)[kind]) for _ in range(2))
    saelens.accelerate(ours)
    for module in (stock, ours):
        module.use_error_term = True
    close(ours(batch(0)), stock(batch(0)), "with error term")
    hooks = [("hook_sae_acts_post", lambda t, hook: 0 * t)]
    close(*(m.run_with_hooks(batch(0), fwd_hooks=hooks) for m in (ours, stock)), "ablated")


def test_overridden_methods_stay_in_charge() -> None:
    class Doubled(saes.JumpReLUTrainingSAE):
        def calculate_aux_loss(self, **given: Any) -> dict[str, Tensor]:
            found = super().calculate_aux_loss(**given)
            return {name: 2 * value for name, value in found.items()}

    class Shifted(saes.JumpReLUSAE):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x) + 1

    given = (TRAINED["step"][0][1], {"jumprelu_bandwidth": 0.25})
    doubled = make(((Doubled, given[0]), given[1]))
    shifted = make(((Shifted, INFERENCE["jumprelu"][0][1]), {}))
    changed = make(INFERENCE["jumprelu"])
    changed.activation_fn = torch.nn.Tanh()
    expected = doubled.training_forward_pass(step_input(batch(0))).loss
    outputs = [m(batch(0)) for m in (shifted, changed)]
    with saelens.install():
        close(doubled.training_forward_pass(step_input(batch(0))).loss, expected, "aux loss")
        for module, before in zip((shifted, changed), outputs, strict=True):
            close(module(batch(0)), before, type(module).__name__)


def test_dense_batches_are_saelens() -> None:
    """Half of all latents fire when a JumpReLU starts to train."""
    module, x = make(TRAINED["step"]), batch(0, 160)
    module.threshold.data.zero_()
    expected = module.training_forward_pass(step_input(x))
    with saelens.install():
        found = module.training_forward_pass(step_input(x))
    assert type(found) is type(expected) and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("kind", ["jumprelu", "topk rescaled"])
def test_edits_of_data_are_seen(kind: str) -> None:
    stock, ours = (make(INFERENCE[kind]) for _ in range(2))
    saelens.accelerate(ours)
    for edit in (
        lambda m: m.fold_W_dec_norm(),
        lambda m: m.fold_activation_norm_scaling_factor(1.5),
        lambda m: m.W_enc.data.mul_(1.1),
        lambda m: setattr(m.W_enc, "data", m.W_enc.data.flip(1)),
        lambda m: m.b_enc.data.sub_(0.1),
    ):
        before = ours(batch(0))
        for module in (stock, ours):
            edit(module)
        close(ours(batch(0)), stock(batch(0)), "forward")
        assert not torch.equal(ours(batch(0)), before) or kind == "topk rescaled"


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_saelens(kind: str, tmp_path: Path) -> None:
    module = make(TRAINED[kind])
    with saelens.install():
        module.training_forward_pass(step_input(batch(0))).loss.backward()
        module.save_model(tmp_path / "ours")
        module.save_inference_model(tmp_path / "ours inference")
        assert isinstance(pickle.loads(pickle.dumps(module.cfg)), type(module.cfg))
    module.save_model(tmp_path / "stock")
    module.save_inference_model(tmp_path / "stock inference")
    for name in ("", " inference"):
        folders = [tmp_path / f"{who}{name}" for who in ("ours", "stock")]
        for a, b in zip(*(sorted(f.iterdir()) for f in folders), strict=True):
            assert a.read_bytes() == b.read_bytes()
    loaded = saes.sae.SAE.load_from_disk(tmp_path / "ours inference")
    assert type(loaded).__module__.startswith("sae_lens.")
    assert (loaded.encode(batch(0)) != 0).any()


@pytest.mark.parametrize("name", ["jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"])
def test_architectures_of_our_own_name(name: str, tmp_path: Path) -> None:
    options = {"matryoshka_widths": [10, F], "k": 5} if "topk" in name else {}
    given = {"d_in": D, "d_sae": F, "architecture": name, **options}
    stock = saes.TrainingSAE.from_dict(given)
    with saelens.register():
        ours = saes.TrainingSAE.from_dict({**given, "architecture": f"gemmascope_fast_{name}"})
        assert isinstance(ours, type(stock)) and ours.cfg.architecture() != name
        ours.load_state_dict(stock.state_dict())
        for module in (ours, stock):
            if name == "jumprelu":
                module.threshold.data.fill_(1.0)
                module.W_enc.data.mul_(8)
        mine, theirs = (m.training_forward_pass(step_input(batch(0))) for m in (ours, stock))
        assert isinstance(mine.feature_acts, LazyActs)
        close(mine.loss, theirs.loss, "loss")
        for who, module in (("ours", ours), ("stock", stock)):
            module.save_model(tmp_path / who / "training")
            module.save_inference_model(tmp_path / who / "inference")
    for folder in ("training", "inference"):
        mine, theirs = (tmp_path / who / folder for who in ("ours", "stock"))
        weights, settings = (mine / n for n in ("sae_weights.safetensors", "cfg.json"))
        assert json.loads(settings.read_text())["architecture"] in (name, "jumprelu")
        assert weights.read_bytes() == (theirs / weights.name).read_bytes()
    assert type(saes.TrainingSAE.load_from_disk(tmp_path / "ours" / "training")) is type(stock)
    assert (saes.sae.SAE.load_from_disk(tmp_path / "ours" / "inference").encode(batch(0)) > 0).any()


def test_copies_of_an_accelerated_module_are_saelens_own() -> None:
    module, x = make(INFERENCE["jumprelu"]), batch(0, 160)
    for name in ("run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out"):
        setattr(module, name, unchanged)  # SAELens keeps lambdas, which no pickle holds
    module.reshape_fn_in = module.reshape_fn_out = unchanged
    own = set(vars(module))
    with saelens.accelerate(module):
        twins = [copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        assert not dense(module, x)
    for twin in twins:
        assert set(vars(twin)) == own and dense(twin, x)
        close(twin(x), module(x), "forward")
        with saelens.accelerate(twin):
            assert not dense(twin, x)
    twins[1].b_dec.data.add_(1)
    assert not torch.allclose(twins[1](x), module(x))


def test_accelerated_twice() -> None:
    module, x = make(INFERENCE["jumprelu"]), batch(0, 160)
    own = dict(vars(module))
    first, second = saelens.accelerate(module), saelens.accelerate(module)
    first.undo()
    assert not dense(module, x)
    second.undo()
    assert vars(module) == own and dense(module, x)
    with saelens.accelerate(module):
        with saelens.accelerate(module):
            pass
        assert not dense(module, x)
    assert vars(module) == own


def test_hidden_pre_is_refused_once_the_weights_have_moved() -> None:
    module = make(TRAINED["step"])
    with saelens.install():
        read, unread = (module.training_forward_pass(step_input(batch(0))) for _ in range(2))
        assert read.hidden_pre.shape == (40, F)
        with torch.no_grad():
            module.W_enc.add_(1)
        assert read.hidden_pre.shape == (40, F)
        with pytest.raises(RuntimeError, match="hidden_pre: the weights have changed since"):
            _ = unread.hidden_pre


@pytest.mark.parametrize("name", ["feature_acts", "hidden_pre"])
@pytest.mark.parametrize("kind", KINDS)
def test_writes_to_what_a_step_returns(kind: str, name: str) -> None:
    stock, ours = (make(TRAINED[kind]) for _ in range(2))
    saelens.accelerate(ours)
    outputs = [m.training_forward_pass(step_input(batch(0))) for m in (stock, ours)]
    for output in outputs:
        with torch.no_grad():
            assert getattr(output, name).abs().any()
        getattr(output, name).mul_(2)
        getattr(output, name).detach()[:, 3:7] = 0.5
    written = [getattr(output, name) for output in outputs]
    close(written[1] * 1, written[0], name)
    close((written[1] > 0).sum(0), (written[0] > 0).sum(0), "fired")
    close(ours.decode(written[1]), stock.decode(written[0]), "decode")
    grads = [
        torch.autograd.grad(acts.abs().sum(), (m.W_enc, m.b_enc))
        for m, acts in zip((stock, ours), written, strict=True)
    ]
    for theirs, mine in zip(*grads, strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_feature_acts(kind: str) -> None:
    """Refused where they would lack the loss's part; a backward hook of SAELens' has them."""
    module, seen = make(TRAINED[kind]), list[Tensor]()
    output = module.training_forward_pass(step_input(batch(0)))
    (expected,) = torch.autograd.grad(output.loss, output.feature_acts)
    with saelens.install():
        output = module.training_forward_pass(step_input(batch(0)))
        for ask in (
            lambda: torch.autograd.grad(output.loss, output.feature_acts),
            lambda: output.feature_acts.retain_grad(),
            lambda: output.feature_acts.register_hook(print),
        ):
            with pytest.raises(RuntimeError, match="without these dense activations"):
                ask()
        module.hook_sae_acts_post.add_hook(lambda g, hook: seen.append(g), dir="bwd")
        module.training_forward_pass(step_input(batch(0))).loss.backward()
    close(seen[0], expected, "feature_acts")


def test_second_derivatives_are_refused_without_a_hook() -> None:
    module, x = make(INFERENCE["jumprelu"]), batch(0, 160).requires_grad_()
    with saelens.install():
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="sae_backward is not differentiable: second deriv"):
            first.square().sum().backward()
        module.hook_sae_acts_pre.add_hook(lambda pre, hook: None)  # SAELens' code has them
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), x)[0].any()


@pytest.mark.parametrize("kind", ["step", "quadratic", "topk", "batchtopk"])
def test_compiled_as_saelens_compiles(kind: str) -> None:
    """Eager's values, and no break of ours (BatchTopK has one, in its running threshold)."""
    stock, ours = (make(TRAINED[kind]) for _ in range(2))
    with saelens.install():
        torch._dynamo.reset()
        found = torch._dynamo.explain(ours.training_forward_pass)(step_input(batch(1)))
        places = [str(reason.user_stack[-1]) for reason in found.break_reasons]
        assert all("update_topk_threshold" in place for place in places)
        assert found.graph_break_count == 0 or kind == "batchtopk"
        torch._dynamo.reset()
        stock.load_state_dict(ours.state_dict())
        expected = stock.training_forward_pass(step_input(batch(0)))
        run = torch.compile(ours.training_forward_pass, backend="aot_eager")
        output = run(step_input(batch(0)))
        assert isinstance(output.feature_acts, LazyActs)
        for result in (expected, output):
            result.loss.backward()
    close(output.loss, expected.loss, "loss")
    for (name, p), q in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        close(q[1].grad, p.grad, name)
