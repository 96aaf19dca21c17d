"""The ledger closes on models whose symmetries were found, not declared: convolution with BatchNorm, GPT-2, Llama."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from noetherflow.discovery import find_symmetries
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.rules import AdamRule, SGDRule, rule_for
from test_ledger import OPTIMIZERS, assert_closed
from zoo import ZOO, Case

pytest.importorskip("transformers")

MODELS = ("cnn_batchnorm", "nanogpt", "gpt2", "llama")


def shuffled(case: Case, rng: torch.Generator) -> Any:
    """A bootstrap batch of the case's four samples."""
    pick = torch.randint(4, (4,), generator=rng)

    def take(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[pick]
        if isinstance(value, dict):
            return {k: take(v) for k, v in value.items()}
        return type(value)(take(v) for v in value) if isinstance(value, (tuple, list)) else value

    return take(case.batch)


QUICK = {("cnn_batchnorm", "nesterov"), ("gpt2", "adamw"), ("llama", "momentum"), ("llama", "adamw")}
PAIRS = [(n, o) for n in MODELS for o in ("momentum", "nesterov", "adam-l2", "adamw", "rmsprop")]


@pytest.mark.parametrize(
    ("name", "optimizer"), [pytest.param(*p, marks=() if p in QUICK else pytest.mark.slow) for p in PAIRS]
)
def test_closes_on_found_symmetries(name: str, optimizer: str) -> None:
    case = ZOO[name]().double()
    syms = find_symmetries(case.model, case.inputs).trainable(case.model)
    model = case.model.train()
    kind, options = OPTIMIZERS[optimizer]
    opt = kind(model.parameters(), **{**options, "lr": options["lr"] / 10})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 500, eta_min=options["lr"] / 100)
    rng = torch.Generator().manual_seed(0)
    ledger = Ledger(model, opt, syms, detail="symmetry", every=1).attach()
    for _ in range(500):
        opt.zero_grad()
        case.loss_fn(model, shuffled(case, rng)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
    assert_closed(ledger.records("family"), 500)
    assert_closed(ledger.records("symmetry"), 500)
    exact = {s.name for s in syms if s.eps is None}
    for row in ledger.estimates():
        if row["symmetry"] in exact:
            assert row["check"] < 1e-7


@pytest.mark.parametrize("optimizer", ["sgd-decay", "adamw"])
def test_translations_move_by_decay_alone_unless_preconditioned(optimizer: str) -> None:
    """`|u^T X|^2` of every key bias and LayerNorm mean direction, against the charges before and after each step."""
    case = ZOO["gpt2"]().double()
    syms = find_symmetries(case.model, case.inputs).trainable(case.model)
    model = case.model.eval()  # dropout on the stream would break the mean directions
    kind, options = OPTIMIZERS[optimizer]
    opt = kind(model.parameters(), **options)
    ledger = Ledger(model, opt, syms, detail="symmetry", translations=True, estimate_every=2, every=1).attach()
    names = {t.name: t for t in syms.translations}
    assert {t.family for t in syms.translations} == {"translation", "null"}
    params = {n: p.detach() for n, p in model.named_parameters()}
    rng = torch.Generator().manual_seed(0)
    for _ in range(4):
        before = {n: float(t.charge(params).square().sum()) for n, t in names.items()}
        opt.zero_grad()
        case.loss_fn(model, shuffled(case, rng)).mean().backward()
        opt.step()
        rows = {r["symmetry"]: r for r in ledger.records("symmetry")[-len(syms) - len(names) :]}
        assert len(rows) == len(syms) + len(names)
        for n, t in names.items():
            r, change = rows[n], float(t.charge(params).square().sum()) - before[n]
            assert r["charge"] == pytest.approx(before[n], rel=1e-12, abs=1e-30)
            assert r["change"] == pytest.approx(change, rel=1e-9, abs=1e-14)
            assert abs(r["residual"]) < 1e-13 + 1e-12 * r["norm"]
            if optimizer == "sgd-decay":
                shrink = (1 - options["lr"] * options["weight_decay"]) ** 2 - 1
                assert r["change"] == pytest.approx(shrink * before[n], rel=1e-8, abs=1e-15)
    if optimizer == "adamw":
        assert max(abs(rows[n]["preconditioner"]) for n in names) > 1e-7
    missing = [r["norm"] for r in ledger.estimates() if r["symmetry"] in names]
    assert len(missing) == 2 * len(names)
    assert all(math.isnan(v) for v in missing)


def test_adamw_keeps_its_rule_whatever_was_built_before() -> None:
    """torch wraps `step` per class on first use, in an order that depends on the program."""
    weight = [nn.Parameter(torch.ones(2))]
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.AdamW):
        assert isinstance(rule_for(kind(weight)), AdamRule)
    assert isinstance(rule_for(torch.optim.SGD(weight, lr=0.1)), SGDRule)

    class Wild(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            """Not SGD's step."""

    assert not isinstance(rule_for(Wild(weight, lr=0.1)), SGDRule)
