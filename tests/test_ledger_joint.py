"""One ledger over several optimisers: the books of their joint step close, whoever moves what (theory.md section 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from noetherflow.errors import DataError
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import read_log
from noetherflow.report import write_run_report
from test_ledger import assert_closed, backward, batches, column, mlp, mlp_symmetries

DECAY = 0.1


def pair(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (SGD where torch has none), AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    muon: Any = getattr(torch.optim, "Muon", None)
    first = torch.optim.SGD(matrices, lr=0.05) if muon is None else muon(matrices, lr=0.02, weight_decay=DECAY)
    return [first, torch.optim.AdamW(rest, lr=1e-2, weight_decay=DECAY)]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> list[dict[str, torch.Tensor]]:
    """The weights before each step and after the last."""
    path = []
    for batch in batches(steps):
        path.append({n: p.detach().clone() for n, p in model.named_parameters()})
        for o in optimizers:
            o.zero_grad()
        backward(model, batch)
        for o in optimizers:
            o.step()
    return [*path, {n: p.detach().clone() for n, p in model.named_parameters()}]


@pytest.mark.parametrize("turned", [False, True])
def test_entries_of_two_optimisers_add_up_to_the_charge(tmp_path: Path, turned: bool) -> None:
    model = mlp()
    optimizers = pair(model)
    syms = mlp_symmetries(model)
    with Ledger(model, optimizers, syms, detail="symmetry", run_dir=tmp_path, every=1) as ledger:
        path = train(model, optimizers[::-1] if turned else optimizers, 40)
    rows = ledger.records("symmetry")
    assert_closed(rows, 40)
    for s in syms:
        own = [r for r in rows if r["symmetry"] == s.name]
        trace = lambda c, s=s: float(c.sum() if s.is_torus else c.diagonal(dim1=-2, dim2=-1).sum())
        charges = [trace(s.charge(theta)) for theta in path]
        torch.testing.assert_close(
            column(own, "charge"), torch.tensor(charges[:-1], dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
        whole = sum(r[k] for r in own for k in ("decay", "other", "second_order", "outside"))
        assert whole == pytest.approx(charges[-1] - charges[0], abs=1e-10)
        assert all(r["outside"] == 0 for r in own)
    header = next(iter(read_log(tmp_path)))
    name = " + ".join(type(o).__name__ for o in optimizers)
    assert header["optimizer"] == name
    assert len(header["groups"]) == 2
    assert name in Path(write_run_report(tmp_path)).read_text()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch.optim.Muon")
def test_decoupled_decay_of_every_optimiser_is_split_off() -> None:
    model = mlp()
    optimizers = pair(model)
    syms = mlp_symmetries(model)
    with Ledger(model, optimizers, syms, detail="symmetry", every=1) as ledger:
        path = train(model, optimizers, 3)
    rates = {n: o.param_groups[0]["lr"] for o in optimizers for n, p in model.named_parameters() if _holds(o, p)}
    for s in [s for s in syms if s.is_torus]:
        for step, row in enumerate(r for r in ledger.records("symmetry") if r["symmetry"] == s.name):
            shares = {n: (rates[n] * DECAY) ** 0.5 * path[step][n] for n in s.parameters}
            assert row["decay"] == pytest.approx(-2 * float(s.charge(shares).sum()), rel=1e-10)


def _holds(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("skipping", [0, 1])
@pytest.mark.parametrize("when", [2, 5])
def test_where_one_optimiser_does_not_step_the_joint_step_is_the_others(skipping: int, when: int) -> None:
    model = mlp()
    optimizers = pair(model)
    syms = mlp_symmetries(model)
    charges = []
    with Ledger(model, optimizers, syms, detail="symmetry", every=1) as ledger:
        for k, batch in enumerate(batches(6)):
            model.zero_grad()
            backward(model, batch)
            charges.append(float(syms[0].charge({n: p.detach() for n, p in model.named_parameters()}).sum()))
            for i, o in enumerate(optimizers):
                if (i, k) != (skipping, when):
                    o.step()
    rows = ledger.records("symmetry")
    assert sorted({r["step"] for r in rows}) == list(range(6))
    own = [r for r in rows if r["symmetry"] == syms[0].name]
    assert [r["charge"] for r in own] == pytest.approx(charges, rel=1e-12)
    assert all(abs(r["residual"]) < 1e-13 * r["norm"] for r in rows)
    assert ledger.events == []


def test_a_ledger_lets_go_of_its_optimisers() -> None:
    model = mlp()
    optimizers = pair(model)
    ledger = Ledger(model, optimizers, mlp_symmetries(model), every=1).attach()
    train(model, optimizers, 2)
    ledger.detach()
    train(model, optimizers, 2)
    ledger.attach()
    train(model, optimizers, 2)
    ledger.close()
    assert {r["step"] for r in ledger.records()} == {0, 1, 2, 3}
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in optimizers)


def test_what_cannot_be_watched_together_is_refused() -> None:
    model = mlp()
    syms = mlp_symmetries(model)
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.Adam(list(model.parameters())[:1])
    with pytest.raises(DataError, match="same parameter"):
        Ledger(model, [one, other], syms)
    with pytest.raises(DataError, match="at least one optimiser"):
        Ledger(model, [], syms)
