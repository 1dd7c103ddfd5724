"""Changes to a host library can be undone, whatever happened in between."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import types
from importlib import metadata

import pytest
import torch

from gemmascope_fast.integrations.patching import Changes, Installation, fusing, require


class Base:
    def method(self) -> str:
        return "base"


def test_attributes_and_entries_come_back() -> None:
    class Host(Base):
        kept = 1

    host, table = Host(), {"a": 1}
    with Changes() as changes:
        changes.attribute(Host, "kept", 2)
        changes.attribute(Host, "method", lambda self: "ours")
        changes.attribute(host, "method", lambda: "instance")
        changes.entry(table, "a", 2)
        changes.entry(table, "b", 3)
        assert (Host.kept, Host().method(), host.method()) == (2, "ours", "instance")
        assert table == {"a": 2, "b": 3}
    assert (Host.kept, Host().method(), host.method()) == (1, "base", "base")
    assert "method" not in vars(Host) and "method" not in vars(host)
    assert table == {"a": 1}


def test_copies_are_made_without_the_methods() -> None:
    host, changes = Base(), Changes()
    host.kept = [1]  # type: ignore[attr-defined]
    changes.methods(host, {"method": types.MethodType(lambda self: "ours", host)})
    twins = [copy.copy(host), copy.deepcopy(host), pickle.loads(pickle.dumps(host))]
    for twin in twins:
        assert (vars(twin), twin.method()) == ({"kept": [1]}, "base")
    assert host.method() == "ours"
    host.method = "theirs"  # type: ignore[assignment, method-assign]
    assert vars(copy.copy(host)) == {"kept": [1], "method": "theirs"}
    changes.undo()
    assert vars(host) == {"kept": [1], "method": "theirs"}


def test_the_same_name_changed_twice_comes_back_to_the_first() -> None:
    module = types.SimpleNamespace(f="stock")
    changes = Changes()
    changes.attribute(module, "f", "one")
    changes.attribute(module, "f", "two")
    changes.undo()
    assert module.f == "stock"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_changes_to_one_place_come_back_in_any_order(order: tuple[int, ...]) -> None:
    host, table = types.SimpleNamespace(), {"a": "stock"}
    three = [Changes() for _ in range(3)]
    for at, changes in enumerate(three):
        changes.attribute(host, "f", f"change {at}")
        changes.entry(table, "a", f"change {at}")
    left = set(range(3))
    for at in order:
        three[at].undo()
        left.remove(at)
        top = f"change {max(left)}" if left else "stock"
        assert (getattr(host, "f", "stock"), table["a"]) == (top, top)
    assert not vars(host)


def test_what_stood_there_may_be_put_there_again() -> None:
    host, stock, ours = types.SimpleNamespace(), object(), object()
    host.f = stock
    with Changes() as first:
        first.attribute(host, "f", ours)
        with Changes() as second:
            second.attribute(host, "f", stock)
        assert host.f is ours
    assert host.f is stock


def test_what_somebody_else_put_there_stays() -> None:
    module, table = types.SimpleNamespace(f="stock"), {"a": 1}
    with Changes() as changes:
        changes.attribute(module, "f", "ours")
        changes.entry(table, "a", 2)
        module.f, table["a"] = "theirs", 5
    assert (module.f, table) == ("theirs", {"a": 5})


def test_undone_once_and_on_errors_too() -> None:
    calls: list[str] = []
    changes = Changes(undone=lambda: calls.append("undone"))
    module = types.SimpleNamespace(f="stock")
    with pytest.raises(KeyError), changes:
        changes.attribute(module, "f", "ours")
        raise KeyError
    changes.undo()
    assert (module.f, calls) == ("stock", ["undone"])


def test_an_absent_or_other_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match='no-such-host is not installed: pip install "no-such'):
        require("no_such_host", "no-such-host", at_least="1.0", below="2")
    for found, served in (("1.9", False), ("2.0", True), ("2.10.1rc1", True), ("3.0.0", False)):
        monkeypatch.setattr(metadata, "version", lambda _, found=found: found)
        if served:
            assert require("json", "host", at_least="2.0", below="3").__name__ == "json"
        else:
            with pytest.raises(ImportError, match=f"host must be >= 2.0 and < 3, .*; {found} is"):
                require("json", "host", at_least="2.0", below="3")


def test_a_trainers_adam_becomes_fused_and_no_other_optimizer() -> None:
    class Trainer:
        def __init__(self, kind: type[torch.optim.Optimizer]) -> None:
            self.weight = torch.nn.Parameter(torch.ones(40))
            self.optimizer = kind([self.weight], lr=0.1)  # type: ignore[call-arg]

    class Several(Trainer):
        def __init__(self) -> None:
            super().__init__(torch.optim.Adam)
            self.optimizers = [self.optimizer, torch.optim.SGD([self.weight], lr=0.1)]

    stock = Trainer(torch.optim.Adam)
    with Changes() as changes:
        changes.attribute(Trainer, "__init__", fusing(Trainer.__init__))
        ours, sgd, adamw = (
            Trainer(kind) for kind in (torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW)
        )
    changes = Changes()
    changes.attribute(Several, "__init__", fusing(Several.__init__))
    for trainer in (stock, ours, Several()):
        for step in range(3):
            trainer.weight.grad = torch.arange(40.0) - 10 * step
            trainer.optimizer.step()
        torch.testing.assert_close(trainer.weight, stock.weight)
    assert ours.optimizer.param_groups[0]["fused"] and not stock.optimizer.param_groups[0]["fused"]
    assert not sgd.optimizer.param_groups[0]["fused"]
    assert not adamw.optimizer.param_groups[0]["fused"]
    assert Several().optimizers[0].param_groups[0]["fused"]
    assert not Trainer(torch.optim.Adam).optimizer.param_groups[0]["fused"]


def test_a_second_install_adds_nothing_and_takes_nothing_away() -> None:
    host, installation = types.SimpleNamespace(f="stock"), Installation()

    def make(changes: Changes) -> None:
        changes.attribute(host, "f", f"ours, of {host.f}")

    first = installation.begin(make)
    with installation.begin(make):
        assert host.f == "ours, of stock"
    assert host.f == "ours, of stock"
    first.undo()
    assert host.f == "stock"
    with installation.begin(make):
        assert host.f == "ours, of stock"
    installation.begin(make)
    installation.end()
    installation.end()
    assert host.f == "stock"


def test_an_install_that_fails_leaves_nothing_behind() -> None:
    host, installation = types.SimpleNamespace(f="stock"), Installation()

    def make(changes: Changes) -> None:
        changes.attribute(host, "f", "ours")
        raise KeyError

    with pytest.raises(KeyError):
        installation.begin(make)
    assert host.f == "stock"
    with installation.begin(lambda changes: changes.attribute(host, "f", "again")):
        assert host.f == "again"


def test_threads_install_once() -> None:
    host, installation = types.SimpleNamespace(f="stock"), Installation()
    start = threading.Barrier(8)

    def make(changes: Changes) -> None:
        seen = host.f
        threading.Event().wait(0.01)
        changes.attribute(host, "f", f"ours, of {seen}")

    def run() -> None:
        start.wait()
        installation.begin(make)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert host.f == "ours, of stock"
    installation.end()
    assert host.f == "stock"
