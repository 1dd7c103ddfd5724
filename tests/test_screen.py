"""`module.screen()`: whose codes an encoder uses while its weights change.

The codes of this processor take the place of CUDA's: they are exact, and those of latents whose
weights have changed since would miss entries. `quantised` says what was quantised when.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import native_absent
from oracle import assert_same
from screening import ENCODERS
from torch.utils._python_dispatch import TorchDispatchMode

import gemmascope_fast as gsf
from gemmascope_fast import packing, screening

ABSENT = native_absent(ENCODERS)
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)

D, F = 128, 200


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """ "pack", "all", or the number of latents that a step moved."""
    log: list[Any] = []
    known: dict[int, torch.Tensor] = {}

    def pack(W_enc: torch.Tensor, **options: Any) -> gsf.PackedEncoder:
        log.append("pack")
        packed = packing.pack(W_enc, **options)
        assert packed.codes is not None
        known[packed.codes.data_ptr()] = W_enc.detach().clone()
        return packed

    def repack(codes: torch.Tensor, W_enc: torch.Tensor, *moved: Any) -> None:
        weights = known[codes.data_ptr()]
        if moved:
            touched_at, step, tail = moved
            live = (touched_at > 0) & (step - touched_at <= tail)
            weights[:, live] = W_enc[:, live]
        else:
            weights.copy_(W_enc)
        log.append(int(live.sum()) if moved else "all")
        codes.copy_(packing.pack(weights).codes)

    monkeypatch.setenv("GEMMASCOPE_FAST_SCREEN", "always")
    monkeypatch.setattr(screening, "served", lambda W_enc: True)
    monkeypatch.setattr(screening, "pack", pack)
    monkeypatch.setattr(screening, "repack", repack)
    return log


def sae(activation: Any = None, **options: Any) -> gsf.SAE:
    g = torch.Generator().manual_seed(1)
    return gsf.SAE(D, F, activation or gsf.JumpReLU(0.2, 2.2), generator=g, **options)


def batch(step: int, n: int = 2) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(50 + step))


def loss_of(module: gsf.SAE, x: torch.Tensor) -> torch.Tensor:
    acts = module.encode(x)
    return (module.decode(acts) - x).square().sum(-1).mean() + 1e-2 * acts.l0().mean()


def train(module: gsf.SAE, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(module, batch(step)).backward()
        optimizer.step()


def assert_screened(module: gsf.SAE, x: torch.Tensor) -> None:
    """The codes that serve are those of the weights, and so are the entries."""
    acts = module.encode(x)
    assert gsf.explain().packed and gsf.explain().path == "screened"
    codes = module.screened.encoder(module.W_enc).codes
    assert_same(codes, gsf.pack(module.W_enc.detach()).codes)
    plain = copy.deepcopy(module).unscreen().encode(x)
    assert not gsf.explain().packed and plain.nnz > 0
    for name in ("offsets", "indices", "values", "gate"):
        assert_same(getattr(acts, name).detach(), getattr(plain, name).detach(), name)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "rule",
    [
        {"betas": (0.0, 0.99)},
        {"betas": (0.9, 0.99)},
        {"betas": (0.3, 0.99), "rows": "live"},
        {"moments": "8bit", "remove_parallel": True, "unit_norm": True},
    ],
    ids=str,
)
def test_adam_keeps_the_codes_those_of_the_weights(
    quantised: list[Any], fused: bool, rule: Any
) -> None:
    module, plain = sae().screen(), sae()
    optimizers = [gsf.optim.Adam(m, 1e-2, fused=fused, **rule) for m in (module, plain)]
    for step in range(4):
        for m, optimizer in zip((module, plain), optimizers, strict=True):
            train(m, optimizer, 1, step)
        assert_screened(module, batch(step, 20))
    assert quantised[0] == "pack" and len(quantised) == 5, "the encoders found nothing to do"
    assert all(0 < moved < F for moved in quantised[1:])
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert_same(p.detach(), q.detach())


def test_loss_uses_the_codes(quantised: list[Any]) -> None:
    module, plain = sae().screen(), sae()
    for fused in (True, False):
        for m in (module, plain):
            optimizer = gsf.optim.Adam(m, 1e-2, fused=fused)
            for step in range(3):
                optimizer.zero_grad()
                m.loss(batch(step))[0].backward()
                assert gsf.explain().packed == (m is module)
                optimizer.step()
            m.deferred = None
        assert_screened(module, batch(9, 20))
    assert quantised[0] == "pack" and "all" not in quantised and len(quantised) == 7
    assert_same(module.W_enc.detach(), plain.W_enc.detach())


def test_parameters_in_groups_are_followed_too(quantised: list[Any]) -> None:
    module = sae().screen()
    optimizer = gsf.optim.Adam([{"params": [module.W_enc]}, {"params": [module.W_dec]}], 1e-2)
    train(module, optimizer, 3)
    assert quantised[0] == "pack" and all(type(n) is int for n in quantised[1:])
    optimizer.zero_grad()
    optimizer.step()
    assert len(quantised) == 4, "nothing moved"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: train(m, torch.optim.Adam(m.parameters(), lr=1e-2), 1),
        lambda m: train(m, torch.optim.Adam(m.parameters(), lr=1e-2, fused=True), 1),
        lambda m: m.W_enc[:, 3].mul_(5),
        lambda m: m.W_enc.t()[7].zero_(),
        lambda m: m.load_state_dict(copy.deepcopy(sae()).state_dict()),
        lambda m: m.reset_parameters(torch.Generator().manual_seed(5)),
    ],
    ids=["optimizer", "torch's fused", "in place", "a view", "load_state_dict", "reset_parameters"],
)
def test_after_other_changes_all_latents_are_quantised(quantised: list[Any], change: Any) -> None:
    module = sae().screen()
    train(module, gsf.optim.Adam(module, 1e-2), 1)
    module.encode(batch(0))
    quantised.clear()
    with torch.set_grad_enabled(change.__code__.co_names[0] == "train"):
        change(module)
    assert_screened(module, batch(1, 20))
    assert quantised == ["all"]
    train(module, gsf.optim.Adam(module, 1e-2), 1, 1)
    assert quantised[0] == "all" and type(quantised[1]) is int and len(quantised) == 2


def test_a_step_from_codes_that_were_not_current_quantises_all(quantised: list[Any]) -> None:
    module = sae().screen()
    optimizer = gsf.optim.Adam(module, 1e-2)
    loss_of(module, batch(0)).backward()
    with torch.no_grad():
        module.W_enc[:, 11] *= 3
    optimizer.step()
    assert quantised == ["pack"]
    assert_screened(module, batch(1, 20))
    assert quantised == ["pack", "all"]


@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_weights_that_are_tied_are_quantised_all(
    quantised: list[Any], fused: bool, grads: bool
) -> None:
    """The decoder's momentum moves rows that the encoder's own step says nothing about."""
    module = sae().screen()
    module.W_dec = torch.nn.Parameter(module.W_enc.t())
    optimizer = gsf.optim.Adam(module, 1e-1, betas=(0.9, 0.99), rows="live", fused=fused)
    optimizer.param_groups[0]["betas"] = (0.0, 0.99)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(module, batch(step)).backward()
        if not grads:
            module.W_enc.grad = None
        optimizer.step()
        assert_screened(module, batch(9, 20))
    assert quantised == ["pack", "all", "all", "all"]


@pytest.mark.parametrize("optimizer", [gsf.optim.Adam, torch.optim.Adam])
def test_modules_that_share_an_encoder_have_codes_each(
    quantised: list[Any], optimizer: Any
) -> None:
    module, other = sae().screen(), sae(gsf.TopK(5)).screen()
    other.W_enc = module.W_enc
    options = {"fused": True} if optimizer is torch.optim.Adam else {}
    stepped = optimizer(module.parameters(), 1e-2, **options)
    for m in (module, other):
        m.encode(batch(0))
    train(module, stepped, 2)
    for m in (module, other):
        assert_screened(m, batch(9, 20))
    assert quantised[:2] == ["pack", "pack"]
    assert ("all" in quantised) == (optimizer is torch.optim.Adam)


def test_a_compiled_step_of_an_optimizer_makes_codes_old(quantised: list[Any]) -> None:
    module = sae().screen()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2, fused=True)
    module.encode(batch(0))
    loss_of(module, batch(0)).backward()
    torch.compile(optimizer.step, backend="eager")()
    assert_screened(module, batch(9, 20))
    assert quantised == ["pack", "all"]


def test_an_optimizer_of_a_view_moves_the_encoder(quantised: list[Any]) -> None:
    module = sae().screen()
    module.W_dec = torch.nn.Parameter(module.W_enc.t())
    module.encode(batch(0))
    train(module, torch.optim.SGD([module.W_dec], 0.1, fused=True), 1)
    assert_screened(module, batch(9, 20))
    assert quantised == ["pack", "all"]


@torch.no_grad()
def take_as_old_a_parameter(module: gsf.SAE) -> None:
    """Over the same memory, with a version of its own that has come to the same number."""
    twin = torch.nn.Parameter(module.W_enc.data)
    while twin._version < module.W_enc._version:
        twin.mul_(1.5)
    module.W_enc = twin


@torch.no_grad()
def reuse_the_address(module: gsf.SAE) -> None:
    """Another storage, where that of the codes was, as allocators give out what was freed."""
    memory = module.W_enc.detach().t().numpy()
    module.W_enc.data = torch.from_numpy(memory).t()


@pytest.mark.parametrize(
    "change",
    [
        take_as_old_a_parameter,
        reuse_the_address,
        lambda m: setattr(m, "W_enc", torch.nn.Parameter(m.W_enc.detach().clone())),
        lambda m: setattr(m.W_enc, "data", m.W_enc.data.clone()),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.screen(center=torch.ones(D)),
    ],
    ids=["alias", "address", "parameter", "data", "dtype", "screen"],
)
def test_another_tensor_is_packed_anew(quantised: list[Any], change: Any) -> None:
    module = sae().screen()
    module.encode(batch(0))
    change(module)
    module.encode(batch(0))
    assert quantised == ["pack", "pack"]
    assert gsf.explain().packed and gsf.explain().path == "screened"


@pytest.mark.parametrize("steps", [0, 1])
def test_check_finds_what_no_version_tells(quantised: list[Any], steps: int) -> None:
    module = sae().screen(check=True)
    optimizer = gsf.optim.Adam(module, 1e-2)
    train(module, optimizer, 2)
    assert_screened(module, batch(0))
    still = int((optimizer.state[module.W_enc]["touched_at"] == 0).nonzero()[0])
    loss_of(module, batch(1)).backward()
    module.W_enc.data[5, still] += 1
    if steps:
        optimizer.step()
    with pytest.raises(RuntimeError, match=f"weights of 1 latents changed .* being {still};"):
        module.encode(batch(0))
    assert_screened(module.screen(check=True), batch(0))


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        (gsf.TopK(5), {}),
        (gsf.BatchTopK(5), {}),
        (gsf.JumpReLU(0.2, 2.2), {"semantics": "saelens_6"}),
    ],
    ids=str,
)
def test_other_activations_and_semantics(
    quantised: list[Any], activation: Any, options: Any
) -> None:
    runs = []
    for screened in (True, False):
        module = sae(activation, **options)
        module = module.screen() if screened else module
        train(module, gsf.optim.Adam(module, 1e-2), 3)
        assert gsf.explain().packed == screened
        runs.append(module)
    assert quantised[0] == "pack" and "all" not in quantised
    for p, q in zip(*(m.parameters() for m in runs), strict=True):
        assert_same(p.detach(), q.detach())


class Calls(TorchDispatchMode):
    """Guesses of `batchtopk_encode`, and of each selecting encoder whether it had codes."""

    def __init__(self) -> None:
        super().__init__()
        self.guesses: list[float | None] = []
        self.had_codes: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packed = {"topk_encode": 5, "batchtopk_encode": 7}.get(func.name().split("::")[1])
        if packed is not None and args[1].shape[1] == F:  # AuxK encodes a part of the latents
            self.had_codes.append(len(args) > packed and args[packed] is not None)
            if packed == 7:
                self.guesses.append(args[4])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("screened", [True, False])
def test_the_threshold_of_a_batch_is_the_guess_of_the_next(
    quantised: list[Any], screened: bool
) -> None:
    module = sae(gsf.BatchTopK(5))
    module = module.screen() if screened else module
    thresholds = []
    with Calls() as calls:
        for step in range(2):
            thresholds.append(module.encode(batch(step, 20)).threshold)
        module.loss(batch(2, 20))[0].backward()
        module.encode(batch(3, 20))
    assert calls.had_codes == [screened] * 4
    first, second, third, fourth = calls.guesses
    if not screened:
        assert calls.guesses == [None] * 4
        return
    assert first is None and [second, third] == [float(t) for t in thresholds]
    assert fourth == float(
        gsf.batchtopk_encode(batch(2, 20), module.W_enc, module.b_enc, 5).threshold
    )


def test_a_copy_and_new_codes_have_no_guess(quantised: list[Any]) -> None:
    module = sae(gsf.BatchTopK(5)).screen()
    module.encode(batch(0))
    assert module.screened is not None and module.screened.guess() is not None
    assert copy.deepcopy(module).screened.guess() is None
    assert module.screen().screened.guess() is None


@pytest.mark.parametrize("activation", [gsf.TopK(5), gsf.BatchTopK(5)], ids=str)
def test_loss_of_a_selection_uses_the_codes(quantised: list[Any], activation: Any) -> None:
    losses = []
    for module in (sae(activation).screen(), sae(activation)):
        with Calls() as calls:
            losses.append(module.loss(batch(0, 20))[0].detach())
        assert set(calls.had_codes) == {module.screened is not None}
    assert_same(*losses)


def test_weights_that_are_rescaled_in_every_call_have_no_codes(quantised: list[Any]) -> None:
    module = sae(gsf.TopK(5), semantics="saelens_6").screen()
    assert module.semantics.rescale
    module.encode(batch(0))
    assert quantised == [] and not gsf.explain().packed


def test_compiled_graphs_get_the_plain_encoder(quantised: list[Any]) -> None:
    module = sae().screen()
    compiled = torch.compile(module.encode, backend="eager", fullgraph=True)
    with torch.no_grad():
        acts = compiled(batch(0))
        assert quantised == []
        assert_same(acts.values, module.encode(batch(0)).values)
    assert quantised == ["pack"]


def test_copies_make_codes_of_their_own(quantised: list[Any]) -> None:
    module = sae().screen(center=torch.ones(D))
    module.encode(batch(0))
    names = set(module.state_dict())
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.W_enc[:, 3] *= 2
    twin.encode(batch(0))
    assert quantised == ["pack", "pack"] and gsf.explain().centered
    assert twin.screened is not module.screened
    assert names == set(sae().state_dict())
    module.unscreen().encode(batch(0))
    assert module.screened is None and not gsf.explain().packed


def test_a_frozen_module_uses_the_codes_of_freeze(quantised: list[Any]) -> None:
    module = sae().screen().freeze()
    module.encode(batch(0))
    assert quantised == [] and gsf.explain().packed
    module.unfreeze().encode(batch(0))
    assert quantised == ["pack"]


def test_on_a_cpu_nothing_changes() -> None:
    module = sae()
    before = module.encode(batch(0))
    assert module.screen(check=True) is module
    after = module.encode(batch(0))
    assert not gsf.explain().packed
    assert_same(after.values.detach(), before.values.detach())
    assert module.screened is not None and not module.screened.current(module.W_enc)


def test_bad_input_of_screen() -> None:
    module = sae()
    with pytest.raises(ValueError, match="screen: center must have shape"):
        module.screen(center=torch.ones(3))
    with pytest.raises(TypeError, match="screen: center must be"):
        module.screen(center=[1.0])  # type: ignore[arg-type]
    assert module.screened is None


# ---- gsf.train


def run(**options: Any) -> gsf.SAE:
    rows = torch.randn(400, D, generator=torch.Generator().manual_seed(3))
    sizes: dict[str, Any] = {"d_sae": F, "target_l0": 8.0, "batch_size": 40, "steps": 6}
    return gsf.train(rows, **sizes | options, progress=False)


@pytest.mark.parametrize("fused", [True, False])
def test_train_on_screened_codes(quantised: list[Any], fused: bool) -> None:
    screened = run(precision="screened", fused=fused)
    assert quantised[0] == "pack" and "all" not in quantised[1:]
    moved = [n for n in quantised if type(n) is int]
    assert len(moved) == 6 and max(moved) <= F
    assert screened.screened is None, "the result encodes exactly"
    for p, q in zip(screened.parameters(), run(fused=fused).parameters(), strict=True):
        assert_same(p.detach(), q.detach())


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_train_a_selection_on_screened_codes(quantised: list[Any], activation: str) -> None:
    chosen: dict[str, Any] = {"activation": activation, "k": 8, "target_l0": None}
    with Calls() as calls:
        screened = run(precision="screened", **chosen)
    assert calls.had_codes[:6] == [True] * 6
    assert not any(calls.had_codes[6:]), "the result encodes exactly"
    if activation == "batchtopk":
        assert calls.guesses[0] is None and None not in calls.guesses[1:]
    for p, q in zip(screened.parameters(), run(**chosen).parameters(), strict=True):
        assert_same(p.detach(), q.detach())


def test_a_resumed_run_is_of_the_same_precision(quantised: list[Any], tmp_path: Any) -> None:
    whole = run(precision="screened")
    stopped = {"out": tmp_path, "checkpoint_every": 3, "precision": "screened"}

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(**stopped, on_metrics=stop)
    with pytest.raises(ValueError, match="precision=screened, and now precision=None"):
        run(out=tmp_path)
    for p, q in zip(run(**stopped).parameters(), whole.parameters(), strict=True):
        assert_same(p.detach(), q.detach())


def test_bad_precision() -> None:
    with pytest.raises(ValueError, match="precision must be one of exact, screened, got 'int8'"):
        run(precision="int8")
    with pytest.raises(ValueError, match="precision='screened' is for one device: drop mesh"):
        run(precision="screened", mesh=object())


def test_memory_of_the_codes() -> None:
    sizes: dict[str, Any] = {"d_in": 130, "d_sae": 1000, "batch_size": 64, "device": "cuda"}
    plain, screened = (
        gsf.estimate_memory(**sizes, precision=precision) for precision in ("exact", "screened")
    )
    assert screened.phases["step"]["codes"] == 1000 * (256 + 8)
    assert not plain.phases["step"]["codes"]
    there = gsf.estimate_memory(**sizes | {"device": "cpu"}, precision="screened")
    assert not there.phases["step"]["codes"]


@pytest.fixture
def swapping() -> Iterator[None]:
    """Conversions swap the contents of parameters, which takes that nothing refers to them."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_conversions_that_swap_parameters(quantised: list[Any], swapping: None) -> None:
    module = sae().screen()
    assert_screened(module, batch(0))
    module.to(torch.bfloat16)
    assert module.W_enc.dtype == torch.bfloat16 and module.b_enc.dtype == torch.float32
    assert_screened(module, batch(1, 20).bfloat16())
    assert quantised == ["pack", "pack"]
    module.freeze().to(torch.float32)
    assert module.packed is None and module.W_enc.requires_grad
    optimizer = gsf.optim.Adam(module, 1e-2, fused=True)
    train(module, optimizer, 2)
    del optimizer
    assert_screened(module.to(torch.bfloat16), batch(1, 20).bfloat16())
