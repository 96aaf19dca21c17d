"""Real training against the flow from the optimiser's state, averaged over snapshots: the slope is 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.workloads import digits
from noetherflow_paper.experiment import generator
from noetherflow_paper.experiments import transformer
from noetherflow_paper.experiments.transformer import RunSums, TextRun, TransformerConfig, TransformerPoint


def digits_run(steps: int) -> tuple[nn.Module, torch.optim.AdamW, Callable[[], None]]:
    """A ReLU net on digits of which 30 % have random labels, AdamW with decay, after some steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = digits()
    x = x.float()
    y = torch.where(torch.rand(len(y)) < 0.3, torch.randint(0, 10, y.shape), y)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    def step() -> None:
        chosen = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return net, optimizer, step


def slope(measured: Tensor, predicted: Tensor) -> float:
    return float(measured @ predicted / (predicted @ predicted))


def charge_of_units(theta: dict[str, Tensor], over: dict[str, Tensor]) -> Tensor:
    """`sum a (s + eps) theta^2` of every hidden unit, written out."""
    part = {n: theta[n].double().square() * over[n] for n in over}
    return part["0.weight"].sum(1) + part["0.bias"] - part["2.weight"].sum(0)


def test_digits_with_adamw_move_as_the_mean_of_snapshots_says() -> None:
    net, optimizer, step = digits_run(800)
    syms = nf.declare(net, "diagonal", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])
    measured, snapshots, steps = torch.zeros(32, dtype=torch.float64), [], 600
    for k in range(steps):
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        step()
        t = 801 + k
        over = {
            n: (optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.99**t)).sqrt() + 1e-8
            for n, p in net.named_parameters()
        }
        after = {n: p.detach() for n, p in net.named_parameters()}
        measured += charge_of_units(after, over) - charge_of_units(before, over)
        if k % 2 == 0:
            snapshots.append(nf.RunSnapshot.of(net, optimizer))
    (flow,) = nf.noether_flow(net, syms, optimizer=snapshots).details
    assert abs(slope(measured, steps * flow.from_momentum.drift) - 1) < 0.01
    few = nf.noether_flow(net, syms, optimizer=snapshots[::30]).details[0].from_momentum
    alive = few.error > 0
    z = ((measured / steps - few.drift) / few.error)[alive]
    assert int(alive.sum()) > 25
    assert 0.5 < float(z.square().mean().sqrt()) < 2.5, "errors are those of the scatter over ten snapshots"
    assert abs(slope(measured, steps * (flow.from_momentum.noise)) - 1) > 0.05, "decay is part of it"


def test_a_small_llama_moves_as_its_state_says() -> None:
    config = TransformerConfig(
        width=16, layers=1, heads=2, context=24, batch=8, before=200, steps=700, every=5, starts=1
    )
    point = TransformerPoint(name="Llama 0", model="Llama", start=0)
    data = transformer.compute(config, point)
    for family in ("norm-gain", "gated"):
        found = {k: torch.tensor(v, dtype=torch.float64) for k, v in data[family].items()}
        assert abs(slope(found["change"], found["snapshots"]) - 1) < 0.01, family
        assert abs(slope(found["change"], found["momentum"] - found["decay"]) - 1) < 0.01, family


def test_sums_over_a_run_are_the_charges_of_its_steps() -> None:
    """The experiment's sums against charges from the weights themselves, at every step's own preconditioner."""
    config = TransformerConfig(width=8, layers=1, heads=2, context=8, batch=4, before=5, steps=5, every=5, starts=1)
    run, syms = TextRun.of(config, TransformerPoint(name="GPT 0", model="GPT", start=0))
    rng = generator(0)
    for _ in run.train(5, rng):
        pass
    sums, symmetry = RunSums.none(run.model), next(s for s in syms if s.family == "rescaling")
    total, momentum = torch.zeros(symmetry.blocks, dtype=torch.float64), torch.zeros(symmetry.blocks).double()
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in run.train(3, rng):
        sums.add(run, before)
        flow = nf.noether_flow(run.model, syms, optimizer=run.optimizer)[symmetry.name]
        moved = nf.noether_flow(run.model, syms, optimizer=[nf.RunSnapshot(run.optimizer.state_dict(), before)])[
            symmetry.name
        ]
        total += flow.charge - moved.charge
        momentum += flow.best.noise
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    found = {k: transformer._signed(symmetry, sums.by_kind[k]) for k in ("change", "momentum")}
    torch.testing.assert_close(found["change"], total, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found["momentum"], momentum, rtol=1e-5, atol=0.0)
