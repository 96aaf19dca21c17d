"""Norms of layers and the live gradient noise scale, against a loop that keeps every gradient."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.diagnosis import norms
from noetherflow.diagnosis.facts import NormHistory
from noetherflow.monitor.sinks import scalars

STEPS = 30
ASKED = {
    "momentum": (torch.optim.SGD, {"momentum": 0.8}),
    "dampened, coupled decay": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.5}),
    "nesterov, ascent": (torch.optim.SGD, {"momentum": 0.7, "nesterov": True, "maximize": True}),
    "adam, coupled decay": (torch.optim.Adam, {"betas": (0.8, 0.99), "weight_decay": 0.3}),
    "adamw, ascent": (torch.optim.AdamW, {"betas": (0.8, 0.99), "weight_decay": 0.3, "maximize": True}),
}


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return model, torch.randn(64, 5).double(), torch.randn(64, 3).double()


def trained(optimizer_of: Any, options: dict[str, Any], lr: float = 0.0, steps: int = STEPS, **ledger: Any) -> Any:
    """A ledger that estimates at every step, and the flat gradients of all steps. With `lr=0` the weights stay."""
    model, x, y = problem()
    optimizer = optimizer_of(model.parameters(), lr=lr, **options)
    syms = nf.find_symmetries(model, x[:2])
    gradients = []
    generator = torch.Generator().manual_seed(0)
    with nf.Ledger(model, optimizer, syms, every=1, estimate_every=1, capacity=steps, **ledger) as book:
        for _ in range(steps):
            at = torch.randint(64, (8,), generator=generator)
            optimizer.zero_grad()
            (model(x[at]) - y[at]).square().sum(1).mean().backward()
            gradients.append([p.grad.clone().flatten() for p in model.parameters()])
            optimizer.step()
    return book, gradients, model


def share_by_hand(gradients: list[list[torch.Tensor]], weights: list[float]) -> float:
    """The ratio of averages (memory 0.9) of `<g_t, h_t>` and `|g_t|^2`; `weights[k]` is of the gradient k steps ago."""
    squares = products = 0.0
    for t in range(1, len(gradients)):
        own = [weights[k] if t - k > 0 else weights[k] * weights[-1] for k in range(1, t + 1)]
        past = [sum(w * gradients[t - k][i] for k, w in enumerate(own, 1)) / sum(own) for i in range(4)]
        g = gradients[t]
        squares = 0.9 * squares + 0.1 * sum(float(a @ a) for a in g)
        products = 0.9 * products + 0.1 * sum(float(a @ b) for a, b in zip(g, past, strict=True))
    return products / squares


@pytest.mark.parametrize("case", ASKED)
def test_the_mean_gradients_share_is_that_of_a_loop_over_all_gradients(case: str) -> None:
    """The first gradient of a dampened buffer counts in full, `1 / (1 - dampening)` times the others."""
    optimizer_of, options = ASKED[case]
    book, gradients, _ = trained(optimizer_of, options)
    m = options.get("momentum", options.get("betas", (0.0,))[0])
    first = 1 / (1 - options.get("dampening", 0.0))
    expected = share_by_hand(gradients, [m**k for k in range(STEPS)] + [first])
    last = [row for row in book.layers() if row["layer"] == "all"][-1]
    assert last["mean_share"] == pytest.approx(expected, rel=1e-9)
    assert last["noise_batches"] == pytest.approx(max(1 / expected - 1, 0.0) if expected > 0 else math.inf, rel=1e-9)


def test_it_is_the_noise_scale_of_all_samples() -> None:
    """With weights that stay, against `tr Sigma / |gbar|^2` of the whole data, within 4 of its own standard errors."""
    steps = 1500
    book, *_ = trained(torch.optim.AdamW, {"betas": (0.9, 0.999)}, steps=steps)
    model_, x, y = problem()
    rows = [[p.grad.clone() for p in _gradient_of(model_, x[i], y[i])] for i in range(64)]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    noise, signal = float(flat.var(0, correction=0).sum()), float(flat.mean(0).square().sum())
    expected = signal / (signal + noise / 8)
    shares = np.array([r["mean_share"] for r in book.layers() if r["layer"] == "all"])[50::50]
    error = shares.std(ddof=1) / math.sqrt(len(shares))
    assert abs(shares.mean() - expected) < 4 * error + 0.01 * expected
    assert error < 0.2 * expected


def _gradient_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[nn.Parameter]:
    model.zero_grad()
    (model(x) - y).square().sum().backward()
    return list(model.parameters())


def test_without_momentum_the_noise_scale_is_not_known_and_norms_are() -> None:
    book, *_ = trained(torch.optim.SGD, {}, lr=0.05)
    last = {row["layer"]: row for row in book.layers() if row["step"] == STEPS - 1}
    assert all(math.isnan(row["noise_batches"]) for row in last.values())
    assert set(last) == {"all", "0", "2"}
    first = next(row for row in book.layers() if row["step"] == 0 and row["layer"] == "0")
    start = problem()[0]
    assert first["norm"] == pytest.approx(norm_of(start[0]))
    assert last["0"]["norm"] != pytest.approx(norm_of(start[0]))


def norm_of(module: nn.Module) -> float:
    return math.sqrt(sum(float(p.detach().square().sum()) for p in module.parameters()))


def test_log_sinks_and_run_data_have_the_row(tmp_path: Any) -> None:
    rows: list[Any] = []
    book, *_ = trained(torch.optim.AdamW, {}, lr=1e-3, run_dir=tmp_path, sinks=[rows.append])
    live = [scalars(row) for row in rows if row["kind"] == "estimates"][-1]
    last = [row for row in book.layers() if row["layer"] == "all"][-1]
    assert live["noether/mean_share"] == pytest.approx(last["mean_share"])
    assert {"noether/layer/0/norm", "noether/layer/2/mean_share"} <= live.keys()
    data = book.run_data()
    assert data.layers == ["0", "2"]
    assert data.layer["norm"].shape == (STEPS, 2)
    assert data.mean_share[-1] == pytest.approx(last["mean_share"], rel=1e-6)


def test_logs_of_earlier_versions_are_read(tmp_path: Any) -> None:
    trained(torch.optim.AdamW, {}, lr=1e-3, run_dir=tmp_path)
    path = tmp_path / "ledger.jsonl"
    new = ("layer", "layers", "mean_share", "noise_batches")
    lines = [{k: v for k, v in json.loads(line).items() if k not in new} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    diagnosis = nf.diagnose_run(tmp_path)
    assert all(f.rule != "grown-layers" for f in diagnosis)


def test_averages_go_on_after_a_checkpoint() -> None:
    """A ledger that resumes half way says what one says that saw it all."""
    whole, *_ = trained(torch.optim.SGD, {"momentum": 0.9})
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    syms, generator = nf.find_symmetries(model, x[:2]), torch.Generator().manual_seed(0)
    ledger = nf.Ledger(model, optimizer, syms, every=1, estimate_every=1).attach()
    for step in range(STEPS):
        if step == STEPS // 2:
            state = ledger.state_dict()
            ledger.close()
            ledger = nf.Ledger(model, optimizer, syms, every=1, estimate_every=1).attach()
            ledger.load_state_dict(state)
        at = torch.randint(64, (8,), generator=generator)
        optimizer.zero_grad()
        (model(x[at]) - y[at]).square().sum(1).mean().backward()
        optimizer.step()
    assert ledger.layers()[-3]["mean_share"] == pytest.approx(whole.layers()[-3]["mean_share"], rel=1e-12)


class TestRule:
    def history(self, factor: float, name: str = "lm_head") -> NormHistory:
        return NormHistory(name, factor**2, 1 / factor, 350.0)

    def test_a_layer_that_grew_tenfold_is_named(self) -> None:
        (found,) = norms.grown_layers([self.history(91.0), self.history(1.2, "embed"), self.history(0.9, "norm")])
        assert found.severity == "watch"
        assert "2 of 3 layers grew in 350 steps (from step 0 to 350): 46.1 times in the median, most" in found.title
        assert found.title.endswith("most `lm_head` 91 times; 1 shrank: `norm` to 0.9 times.")
        assert found.where == ("lm_head",)

    def test_usual_growth_is_said_and_nothing_to_do(self) -> None:
        (found,) = norms.grown_layers([self.history(2.0)])
        assert found.severity == "good"
        assert norms.grown_layers([self.history(0.5)])[0].title == "No layer's norm grew in 350 steps."
        assert norms.grown_layers([]) == []


def test_the_diagnosis_of_a_run_names_layers_outside_symmetries() -> None:
    """No symmetry of the network touches the scale of its last layer, whose norm grows twelvefold."""
    model, x, y = problem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, x[:2]), every=1, estimate_every=5) as ledger:
        for _ in range(26):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                model[2].weight.mul_(1.1)
                model[2].bias.mul_(1.1)
    found = ledger.diagnose()["grown-layers"]
    assert found.is_note
    assert found.where == ("2",)
