"""Attention heads in a run's log: the numbers against loops over heads, planted heads named, healthy ones not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noetherflow as nf
from noetherflow.diagnosis import heads
from noetherflow.diagnosis.facts import LayerBalance
from noetherflow.monitor.head_rows import heads_of_header
from noetherflow.monitor.rundata import RunData

pytestmark = pytest.mark.usefixtures("every_finding_says_what_to_do")

HEADS, WIDTH, WORDS = 4, 16, 11


class Attention(nn.Module):
    """One attention layer without biases, in front of a classifier of the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        split = lambda t: t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(x)), split(self.v(x)))
        return self.out(self.norm(x + self.o(mixed.transpose(1, 2).flatten(2))))[:, -1]


def planted(change=lambda model: None):
    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        change(model)
    return model


def run(model, optimizer, steps=150, run_dir=None, **options):
    """A ledger of so many steps of a task that attention can learn."""
    torch.manual_seed(1)
    syms = nf.find_symmetries(model, torch.randint(WORDS, (2, 6)))
    ledger = nf.Ledger(model, optimizer, syms, run_dir=run_dir, every=1, **{"estimate_every": 10, **options}).attach()
    for _ in range(steps):
        ids = torch.randint(WORDS, (32, 6))
        loss = F.cross_entropy(model(ids), ids.sum(1) % WORDS)
        optimizer.zero_grad()
        loss.backward()
        ledger.note(loss)
        optimizer.step()
    ledger.close()
    return ledger


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def loop_over_heads(model):
    """Charge and squared norm of each head of `q -> k` and `v -> o`, entry by entry."""
    q, k, v = (p.detach().double().unflatten(0, (HEADS, -1)) for p in (model.q.weight, model.k.weight, model.v.weight))
    o = model.o.weight.detach().double().unflatten(1, (HEADS, -1)).transpose(0, 1)
    squares = [[float(p[h].square().sum()) for h in range(HEADS)] for p in (q, k, v, o)]
    charge = [a - b for plus, minus in (squares[:2], squares[2:]) for a, b in zip(plus, minus, strict=True)]
    norm = [a + b for plus, minus in (squares[:2], squares[2:]) for a, b in zip(plus, minus, strict=True)]
    return np.array(charge), np.array(norm)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_charges_and_norms_are_those_of_a_loop_over_heads(make, tmp_path):
    model = planted()
    ledger = run(model, make(model), steps=20, run_dir=tmp_path)
    for data in (RunData.load(tmp_path), ledger.run_data()):
        assert data.heads == [(name, h) for name in ("q -> k", "v -> o") for h in range(HEADS)]
        charge, norm = loop_over_heads(model)
        order = np.sign(data.head["charge"][-1] * charge)
        assert np.allclose(data.head["norm"][-1], norm, rtol=1e-5)
        assert np.allclose(np.abs(data.head["charge"][-1]), np.abs(charge), rtol=1e-3, atol=1e-5 * norm.max())
        assert len(set(order[:HEADS])) == len(set(order[HEADS:])) == 1, "one sign per symmetry"


def test_distances_of_plain_sgd_are_those_of_single_gradients():
    """At the first estimate, lr small: `1/4 log` of the squared gradients of one side over the other."""
    model = planted()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    ledger = run(model, optimizer, steps=1)
    torch.manual_seed(1)
    torch.randint(WORDS, (2, 6))
    ids = torch.randint(WORDS, (32, 6))
    twin = planted()
    F.cross_entropy(twin(ids), ids.sum(1) % WORDS).backward()
    v = twin.v.weight.grad.double().unflatten(0, (HEADS, -1)).square().sum((1, 2))
    o = twin.o.weight.grad.double().unflatten(1, (HEADS, -1)).square().sum((0, 2))
    found = ledger.run_data().head["distance"][0][HEADS:]
    assert np.allclose(np.abs(found), np.abs((0.25 * (o / v).log()).numpy()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_head_out_of_balance_is_named_from_the_log(make, tmp_path):
    def unbalance(model):
        model.v.weight[8:12] *= 20
        model.o.weight[:, 8:12] /= 20

    model, healthy = planted(unbalance), planted()
    run(model, make(model), run_dir=tmp_path / "sick")
    run(healthy, make(healthy), run_dir=tmp_path / "well")
    found = nf.diagnose_run(tmp_path / "sick")["balance-heads"]
    assert found.severity == "act" or found.is_note
    assert "head 2 of `v -> o`" in found.title
    assert "scale the two sides of" in found.advice
    well = nf.diagnose_run(tmp_path / "well")["balance-heads"]
    assert well.severity == "good"
    assert "none stands out from its layer" in well.title
    assert "moved most in 150 steps" in well.title
    assert "nf.diagnose(model, loss_fn, loader, optimizer)" in well.title, "what is open, and what answers it"


def test_a_head_without_weight_is_named_from_the_log(tmp_path):
    def fade(model):
        model.v.weight[4:8] *= 1e-2
        model.o.weight[:, 4:8] *= 1e-2

    model = planted(fade)
    ledger = run(model, sgd(model), steps=60)
    found = ledger.diagnose()["frozen-heads"]
    assert "head 1 of `v -> o`" in found.title
    well = planted()
    assert not [f for f in run(well, sgd(well), steps=60).diagnose() if f.rule == "frozen-heads"]


def test_one_estimate_leaves_heads_open():
    model = planted()
    found = run(model, sgd(model), steps=3, estimate_every=0).diagnose()["balance-heads"]
    assert found.severity == "open"
    assert "fewer than two estimates" in found.title


def test_logs_of_earlier_versions_have_no_heads(tmp_path):
    model = planted()
    run(model, sgd(model), steps=30, run_dir=tmp_path)
    log = tmp_path / "ledger.jsonl"
    old = [line.replace('"heads"', '"other"').replace('"head"', '"other"') for line in log.read_text().splitlines()]
    log.write_text("\n".join(old) + "\n")
    assert RunData.load(tmp_path).heads == []
    assert nf.diagnose_run(tmp_path)["balance-heads"].severity == "open"


def test_a_run_without_equilibria_tells_the_drift_and_leaves_the_rest_open():
    balance = LayerBalance("v -> o", "attention-vo", "head", *[np.full(3, math.nan)] * 2, math.nan)
    facts = heads.RunHeads(balance, np.array([0.1, -0.4, 0.1]), np.ones(3), 100.0)
    (found,) = heads.heads_in_run([facts], 1000)
    assert found.severity == "open"
    assert "head 1 of `v -> o` moved most in 100 steps, by -0.4 of its squared weights (median of its layer 0.1)" in (
        found.title
    )


def test_two_errors_are_taken_off():
    off = np.array([0.0, 0.0, 1.3, 0.0])
    make = lambda error: heads.RunHeads(
        LayerBalance("v -> o", "attention-vo", "head", off, np.full(4, error), 10.0), np.zeros(4), np.ones(4), 100.0
    )
    assert [heads.heads_in_run([make(e)], 1000)[0].severity for e in (0.01, 0.2)] == ["watch", "good"]


def test_a_model_without_attention_has_no_heads():
    assert heads_of_header({}) == []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = sgd(model)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, torch.randn(2, 6)), every=1, estimate_every=1) as ledger:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
    assert ledger.run_data().heads == []
    assert ledger.run_data().head == {}
    assert not [f for f in ledger.diagnose() if f.rule == "balance-heads"]
