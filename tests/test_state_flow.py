"""The flow from an optimiser's state: the identity over runs, its expectation, equilibria and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.equilibrium.averages import read_averages
from noetherflow.equilibrium.state_flow import state_flow
from noetherflow.equilibrium.state_result import StateFlow
from noetherflow.errors import CheckpointError, DataError
from noetherflow.workloads import digits

A, B = "0.weight", "2.weight"


def leaky_net(seed: int = 0) -> tuple[nn.Sequential, nf.SymmetrySet, tuple[Tensor, Tensor]]:
    """`6-4-3` leaky ReLU net without biases, anisotropic inputs, noisy labels of a teacher."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.LeakyReLU(0.3), nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(64, 6, dtype=torch.float64) * torch.linspace(0.3, 2.0, 6, dtype=torch.float64)
    y = net(x).detach() + torch.randn(64, 3, dtype=torch.float64) * torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    return net, nf.declare(net, "diagonal", [(A, 0)], [(B, 1)]), (x, y)


def train(net: nn.Module, data: tuple[Tensor, Tensor], optimizer: Any, steps: int, seed: int = 0) -> Any:
    """Yields after each step; minibatches of 8 with replacement."""
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(data[0]), (8,), generator=rng)
        optimizer.zero_grad()
        (net(data[0][chosen]) - data[1][chosen]).square().sum(1).mean().backward()
        optimizer.step()
        yield step


def signed_sums(over_first: Tensor, over_second: Tensor) -> Tensor:
    """`sum_i a_i x_i` for each hidden unit: rows of the first layer less columns of the second."""
    return over_first.sum(1) - over_second.sum(0)


def adam_terms(net: nn.Module, optimizer: Any, before: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`C_P' - C_P` at the step's own D, `sum a d m^2` and `theta^T A m`, written out."""
    change, second, cross = {}, {}, {}
    for name, p in net.named_parameters():
        state, group = optimizer.state[p], optimizer.param_groups[0]
        b1, b2 = group["betas"]
        t = int(state["step"])
        d = 1 / ((state["exp_avg_sq"] / (1 - b2**t)).sqrt() + group["eps"])
        m = state["exp_avg"] / (1 - b1**t)
        change[name] = (p.detach() ** 2 - before[name] ** 2) / d
        second[name], cross[name] = d * m * m, before[name] * m
    return tuple(signed_sums(terms[A], terms[B]) for terms in (change, second, cross))  # type: ignore[return-value]


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_state_identity_of_adam_over_a_run(b1: float) -> None:
    """`sum (C_P' - C_P)` is the sum of the flow from momentum, up to what the first and last `theta^T A m` hold."""
    net, syms, data = leaky_net()
    lr = 0.01
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(b1, 0.99))
    for _ in train(net, data, optimizer, 500):
        pass
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    measured, predicted = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    crosses, last = [], torch.zeros(4, dtype=torch.float64)
    for _ in train(net, data, optimizer, 300, seed=1):
        change, second, cross = adam_terms(net, optimizer, before)
        measured += change
        predicted += state_flow(net, syms, optimizer).details[0].from_momentum.noise
        crosses.append(cross)
        last = b1 * (cross - lr * second)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
    ends = -2 * lr * (crosses[0] - last) / (1 - b1)
    torch.testing.assert_close(measured, predicted + ends, rtol=1e-9, atol=1e-12)
    assert float((ends.abs() / predicted.abs()).max()) < 0.2
    if b1:
        crossed = torch.stack(crosses).sum(0)
        assert float((2 * lr * crossed / predicted).abs().min()) > 0.5, "most of it comes from the memory"


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_state_identity_of_momentum_over_a_run(decay: float) -> None:
    """SGD's charge: `theta^T A b` obeys `q' = mu (q - lr Q) + w C`, so decay enters with `2 lr w / (1 - mu)`."""
    net, syms, data = leaky_net()
    lr, mu = 0.004, 0.9
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=mu, weight_decay=decay)
    for _ in train(net, data, optimizer, 50):
        pass
    symmetry = syms[0]

    def charge() -> Tensor:
        return symmetry.charge({n: p.detach() for n, p in net.named_parameters()})

    def cross(theta: dict[str, Tensor]) -> Tensor:
        b = {n: optimizer.state[p]["momentum_buffer"] for n, p in net.named_parameters()}
        return signed_sums(theta[A] * b[A], theta[B] * b[B])

    start, first, total = charge(), None, torch.zeros(4, dtype=torch.float64)
    before, decays = {n: p.detach().clone() for n, p in net.named_parameters()}, torch.zeros(4, dtype=torch.float64)
    for _ in train(net, data, optimizer, 200, seed=1):
        q = cross(before)
        first = q if first is None else first
        flow = state_flow(net, syms, optimizer).details[0]
        total += flow.from_momentum.noise
        decays += flow.decay
        noise = flow.from_momentum.noise * (1 - mu) / (1 + mu) / lr
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
    after = mu * (q - noise) + decay * charge()
    ends = -2 * lr * (first - after) / (1 - mu)
    torch.testing.assert_close(charge() - start, total - decays + ends, rtol=1e-9, atol=1e-12)
    assert flow.from_squares is None
    assert flow.persistence is None


def written_state(
    net: nn.Module, data: tuple[Tensor, Tensor], optimizer: Any, draws: list[tuple[int, ...]]
) -> dict[str, Tensor]:
    """Put the exact second moment of the minibatch gradient into Adam's state; returns every minibatch gradient."""
    gradients: dict[str, list[Tensor]] = {n: [] for n, _ in net.named_parameters()}
    for draw in draws:
        net.zero_grad()
        (net(data[0][list(draw)]) - data[1][list(draw)]).square().sum(1).mean().backward()
        for n, p in net.named_parameters():
            gradients[n].append(p.grad.clone())
    stacked = {n: torch.stack(g) for n, g in gradients.items()}
    for n, p in net.named_parameters():
        b2 = optimizer.param_groups[0]["betas"][1]
        square = stacked[n].square().mean(0) * (1 - b2**1000)
        optimizer.state[p] = {
            "step": torch.tensor(1000.0), "exp_avg": stacked[n].mean(0), "exp_avg_sq": square,
        }  # fmt: skip
    return stacked


@pytest.mark.parametrize("eps", [1e-12, 0.05])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_flow_from_squares_is_the_mean_over_every_minibatch(eps: float, decay: float) -> None:
    """All pairs of 8 samples, AdamW without memory at frozen D: the mean of `C_P' - C_P`."""
    net, syms, (x, y) = leaky_net()
    lr = 0.02
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.0, 0.99), eps=eps, weight_decay=decay)
    draws = list(itertools.product(range(8), repeat=2))
    gradients = written_state(net, (x[:8], y[:8]), optimizer, draws)
    d = {n: 1 / (g.square().mean(0).sqrt() + eps) for n, g in gradients.items()}
    theta = {n: p.detach() for n, p in net.named_parameters()}
    changes = {n: ((1 - lr * decay) * theta[n] - lr * d[n] * g) ** 2 / d[n] - theta[n] ** 2 / d[n]
               for n, g in gradients.items()}  # fmt: skip
    expected = signed_sums(changes[A].mean(0), changes[B].mean(0))
    flow = state_flow(net, syms, optimizer).details[0]
    torch.testing.assert_close(flow.from_squares.drift, expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(flow.charge, signed_sums(theta[A] ** 2 / d[A], theta[B] ** 2 / d[B]))
    plain = {n: ((1 - lr * decay) * theta[n] - lr * d[n] * g) ** 2 - theta[n] ** 2 for n, g in gradients.items()}
    wrong = signed_sums(plain[A].mean(0), plain[B].mean(0))
    assert float(((wrong - expected).abs() / expected.abs()).max()) > 0.5, "the plain charge is another story"


def by_hand(
    theta: Tensor, s: Tensor, m: Tensor, p: float, sign: int, lr: float, w: float, law: dict[str, Any]
) -> float:
    """`a (noise - decay)` of all entries of one coordinate on one leg, moved by `p`, one by one."""
    total = 0.0
    for x, root, mean in zip(theta.tolist(), s.tolist(), m.tolist(), strict=True):
        x, root, mean = x * p**sign, root / p**sign, mean / p**sign
        over = root + law["eps"]
        noise = (1 + law["b1"]) / (1 - law["b1"]) * mean * mean / over if law["momentum"] else root * root / over
        decay = (2 * w - lr * w * w) * x * x * over if law["decoupled"] else 2 * w * x * x
        total += sign * law["lr"] * (lr * noise - decay)
    return total


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_equilibrium_is_where_the_drift_written_out_stops(momentum: bool, decoupled: bool, eps: float) -> None:
    """By bisection on sums over single entries, with rates that differ between the legs."""
    net, syms, data = leaky_net()
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    groups = [{"params": [net[0].weight], "lr": 0.01, "weight_decay": 0.3},
              {"params": [net[2].weight], "lr": 0.004, "weight_decay": 0.1}]  # fmt: skip
    optimizer = kind(groups, betas=(0.5, 0.9), eps=eps)
    for _ in train(net, data, optimizer, 200):
        pass
    flow = state_flow(net, syms, optimizer).details[0]
    found = flow.from_momentum if momentum else flow.from_squares
    law = {"eps": eps, "b1": 0.5, "momentum": momentum, "decoupled": decoupled, "lr": 0.01}
    first, second = (optimizer.state[p] for p in (net[0].weight, net[2].weight))

    def drift(unit: int, p: float) -> float:
        roots = [s["exp_avg_sq"].div(1 - 0.9**200).sqrt() for s in (first, second)]
        plus = (net[0].weight[unit], roots[0][unit], first["exp_avg"][unit])
        minus = (net[2].weight[:, unit], roots[1][:, unit], second["exp_avg"][:, unit])
        return by_hand(*plus, p, 1, 0.01, 0.3, law) + by_hand(*minus, p, -1, 0.004, 0.1, law)

    for unit in range(4):
        low, high = 1e-3, 1e3
        for _ in range(100):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if drift(unit, middle) > 0 else (low, middle)
        assert float(found.element[unit]) == pytest.approx(low, rel=1e-6)
        assert float(found.drift[unit]) == pytest.approx(drift(unit, 1.0), rel=1e-9)
    assert bool(found.finite.all())
    assert float((found.element.log().abs()).max()) > 0.05, "the move must be visible"


def test_equilibrium_without_eps_minimises_the_sum_of_roots() -> None:
    """`Psi = sum (lr s + 2 w s theta^2)` over `p`, by golden section on the moved entries."""
    from scipy.optimize import minimize_scalar

    net, syms, data = leaky_net()
    lr, w = 0.01, 0.05
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), eps=0.0, weight_decay=w)
    for _ in train(net, data, optimizer, 300):
        pass
    s = {n: (optimizer.state[p]["exp_avg_sq"] / (1 - 0.99**300)).sqrt() for n, p in net.named_parameters()}
    theta = {n: p.detach() for n, p in net.named_parameters()}
    found = state_flow(net, syms, optimizer).details[0].from_squares
    for unit in range(4):
        plus, minus = (s[A][unit], theta[A][unit]), (s[B][:, unit], theta[B][:, unit])

        def psi(lam: float, plus: Any = plus, minus: Any = minus) -> float:
            out = 0.0
            for (root, x), a in ((plus, 1), (minus, -1)):
                moved = root * torch.tensor(-a * lam).exp()
                decay = 2 * w - lr * w * w
                out += float((lr * moved + decay * moved * (x * torch.tensor(a * lam).exp()) ** 2).sum())
            return out

        best = minimize_scalar(psi, bracket=(-1, 1), tol=1e-12)
        assert float(found.element[unit].log()) == pytest.approx(best.x, abs=1e-6)


def move_with_state(net: nn.Module, syms: nf.SymmetrySet, optimizer: Any, elements: dict[str, Tensor]) -> None:
    """Weights, averages of gradients and of their squares moved along the orbit."""
    tensors = nf.tensors_of(net)
    for s in syms:
        e = elements[s.name]
        held = {n: optimizer.state[tensors[n]] for n in s.parameters}
        for key in ("exp_avg", "momentum_buffer", "exp_avg_sq"):
            if all(key in h for h in held.values()):
                moved = s.act_on_gradients({n: h[key] for n, h in held.items()}, e)
                again = s.act_on_gradients(moved, e) if key == "exp_avg_sq" else moved
                for n, value in again.items():
                    optimizer.state[tensors[n]][key] = value
        s.act_(tensors, e)


@pytest.mark.parametrize("kind", ["adam", "adam with eps", "sgd"])
def test_at_the_equilibrium_the_flow_stops_and_relaxes_as_it_says(kind: str) -> None:
    net, syms, data = leaky_net()
    if kind == "sgd":
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.004, momentum=0.9, weight_decay=0.1)
    else:
        eps = 0.1 if kind == "adam with eps" else 1e-12
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, eps=eps, weight_decay=0.1)
    for _ in train(net, data, optimizer, 300):
        pass
    (before,) = state_flow(net, syms, optimizer).details
    element = before.from_momentum.element
    move_with_state(net, syms, optimizer, {before.name: element})
    (there,) = state_flow(net, syms, optimizer).details
    assert float(there.from_momentum.imbalance.max()) < 1e-8 < 1e-2 < float(before.from_momentum.imbalance.max())
    torch.testing.assert_close(there.from_momentum.relaxation_steps, before.from_momentum.relaxation_steps, rtol=1e-4,
                               atol=0.0)  # fmt: skip
    small = torch.full((4,), 1e-3, dtype=torch.float64).exp()
    move_with_state(net, syms, optimizer, {before.name: small})
    (beside,) = state_flow(net, syms, optimizer).details
    frozen = net[0].weight.new_zeros(4)
    for n, p in net.named_parameters():
        state = optimizer.state[p]
        over = torch.ones_like(p) if kind == "sgd" else (state["exp_avg_sq"] / (1 - 0.999**300)).sqrt() + eps
        gain = (p.detach() ** 2 * over * (1 - (-2e-3 if n == A else 2e-3))) - p.detach() ** 2 * over
        frozen = frozen + (gain.sum(1) if n == A else -gain.sum(0))
    expected = -frozen / beside.from_momentum.drift
    torch.testing.assert_close(before.from_momentum.relaxation_steps, expected.abs(), rtol=5e-3, atol=0.0)
    assert bool((beside.from_momentum.drift < 0).all())


def test_general_linear_flow_of_momentum() -> None:
    """Charge, noise and decay against matrices written out; moved to the equilibrium, the flow stops."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False)).double()
    x = torch.randn(64, 5, dtype=torch.float64) * torch.linspace(0.3, 2.0, 5, dtype=torch.float64)
    data = (x, net(x).detach() + torch.randn(64, 4, dtype=torch.float64))
    syms = nf.declare(net, "general_linear", [("0.weight", 0)], [("1.weight", 1)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.004, momentum=0.9, weight_decay=0.02)
    for _ in train(net, data, optimizer, 200):
        pass
    (flow,) = state_flow(net, syms, optimizer).details
    w, u = net[0].weight.detach(), net[1].weight.detach()
    bw, bu = (optimizer.state[p]["momentum_buffer"] for p in net.parameters())
    noise = 19 * 0.004**2 * (bw @ bw.T - bu.T @ bu)
    torch.testing.assert_close(flow.from_momentum.noise[0], noise)
    torch.testing.assert_close(flow.charge[0], w @ w.T - u.T @ u)
    torch.testing.assert_close(flow.decay[0], 2 * 0.004 * 0.02 / 0.1 * (w @ w.T - u.T @ u))
    assert bool(flow.from_momentum.finite.all())
    assert float(flow.from_momentum.imbalance.max()) > 0.05
    move_with_state(net, syms, optimizer, {flow.name: flow.from_momentum.element})
    (there,) = state_flow(net, syms, optimizer).details
    assert float(there.from_momentum.imbalance.max()) < 1e-9
    adam = torch.optim.Adam(net.parameters())
    for _ in train(net, data, adam, 3):
        pass
    assert "does not commute" in state_flow(net, syms, adam).excluded[flow.name]


def test_errors_are_those_of_repeated_averages() -> None:
    """Momentum of independent Gaussian gradients with correlated entries, drawn many times."""
    net, syms, data = leaky_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1.0, betas=(0.9, 0.99), eps=0.0)  # steps of the averages' size
    for _ in train(net, data, optimizer, 2):
        pass
    torch.manual_seed(1)
    mix = torch.randn(6, 6, dtype=torch.float64)
    scale = (mix @ mix.T).diagonal()
    found, errors = [], []
    for _ in range(400):
        for n, p in net.named_parameters():
            state = optimizer.state[p]
            z = torch.randn(p.shape, dtype=torch.float64)
            state["exp_avg"] = z @ mix.T if n == A else z
            state["exp_avg_sq"] = scale.expand_as(p).clone() if n == A else torch.ones_like(p)
        flow = state_flow(net, syms, optimizer).details[0].from_momentum
        found.append(flow.noise)
        errors.append(flow.error.square())
    spread = torch.stack(found).std(0)
    claimed = torch.stack(errors).mean(0).sqrt()
    assert float((claimed / spread).min()) > 0.7
    assert float((claimed / spread).max()) < 1.6


def test_a_saved_state_says_the_same_as_the_living_optimizer() -> None:
    net, syms, data = leaky_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in train(net, data, optimizer, 20):
        pass
    living, saved = state_flow(net, syms, optimizer), state_flow(net, syms, optimizer.state_dict())
    assert living.to_dict() == saved.to_dict()
    assert "correlated" in str(living)
    assert "0 -> 2" not in living.excluded
    assert isinstance(living, StateFlow)
    assert living.rows()[0]["persistence"] > 0


class Sophia(torch.optim.Optimizer):
    """An optimiser that the theory does not know."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"exp_avg": p.grad.clone(), "hessian": p.grad.square()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Sophia, "Sophia"),
        (lambda p: torch.optim.Muon(p), "whole matrices"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "no averages"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), "dampening"),
        (lambda p: torch.optim.RMSprop(p, centered=True), "centered"),
        (lambda p: torch.optim.NAdam(p), "NAdam"),
        (lambda p: torch.optim.RAdam(p), "RAdam"),
        (lambda p: torch.optim.Adagrad(p), "Adagrad"),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.0)), "schedule"),
    ],
)
def test_what_has_no_theory_is_refused(make: Any, message: str) -> None:
    net, syms, data = leaky_net()
    optimizer = make(net.parameters())
    for _ in train(net, data, optimizer, 2):
        pass
    with pytest.raises(DataError, match=message):
        state_flow(net, syms, optimizer)


def test_an_ended_schedule_needs_a_learning_rate() -> None:
    net, syms, data = leaky_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in train(net, data, optimizer, 20):
        pass
    expected = state_flow(net, syms, optimizer).details[0]
    optimizer.param_groups[0] |= {"lr": 0.0, "initial_lr": 0.01}
    with pytest.raises(DataError, match=r"began at 0\.01"):
        state_flow(net, syms, optimizer)
    again = state_flow(net, syms, optimizer, lr=0.01).details[0]
    torch.testing.assert_close(again.from_momentum.noise, expected.from_momentum.noise)


def test_old_states_must_say_whether_decay_is_decoupled() -> None:
    net, syms, data = leaky_net()
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in train(net, data, optimizer, 2):
        pass
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["decoupled_weight_decay"]
    with pytest.raises(DataError, match="Adam or AdamW"):
        state_flow(net, syms, saved)
    with pytest.raises(CheckpointError):
        state_flow(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), syms, saved)
    with pytest.raises(DataError, match="state_dict"):
        read_averages(net, {"lr": 3})


def test_rmsprop_with_momentum_is_adam_with_that_memory() -> None:
    """RMSprop's momentum of preconditioned gradients, against Adam's average at a `v` that stands still."""
    net, syms, _ = leaky_net()
    torch.manual_seed(0)
    adam = torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.9, 0.99), eps=0.01)
    rms = torch.optim.RMSprop(net.parameters(), lr=0.001, momentum=0.9, alpha=0.99, eps=0.01)
    for p in net.parameters():
        square, mean = torch.rand_like(p), torch.randn_like(p)
        adam.state[p] = {"step": torch.tensor(5000.0), "exp_avg": mean, "exp_avg_sq": square}
        rms.state[p] = {
            "step": torch.tensor(5000.0), "square_avg": square, "momentum_buffer": 10 * mean / (square.sqrt() + 0.01),
        }  # fmt: skip
    one, two = (state_flow(net, syms, o).details[0] for o in (adam, rms))
    torch.testing.assert_close(one.from_momentum.noise, two.from_momentum.noise)
    torch.testing.assert_close(one.from_squares.noise, two.from_squares.noise)
    plain = torch.optim.RMSprop(net.parameters(), lr=0.01, alpha=0.99, eps=0.01)
    for p in net.parameters():
        plain.state[p] = {k: v for k, v in rms.state[p].items() if k != "momentum_buffer"}
    assert state_flow(net, syms, plain).details[0].from_momentum is None


def test_dead_and_undecayed_directions_are_named() -> None:
    """A scale that a normalisation ignores, without decay, and a unit whose gradients are all 0."""
    net, syms, data = leaky_net()
    normalised = nn.Sequential(net[0], nn.LayerNorm(4, eps=1e-12, elementwise_affine=False), nn.Linear(4, 3).double())
    one_sided = nf.declare(normalised, "scalar", [(A, 0)], [])
    optimizer = torch.optim.AdamW(normalised.parameters(), weight_decay=0.0)
    for _ in train(normalised, data, optimizer, 5):
        pass
    (scale,) = state_flow(normalised, one_sided, optimizer).details
    assert not bool(scale.best.finite.any())
    assert float(scale.best.element) == 1
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0)
    for _ in train(net, data, optimizer, 5):
        pass
    with torch.no_grad():
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[net[0].weight][key][1] = 0
            optimizer.state[net[2].weight][key][:, 1] = 0
    (unit,) = state_flow(net, syms, optimizer).details
    assert unit.best.finite.tolist() == [True, False, True, True]
    assert all(bool(torch.isfinite(t).all()) for t in (unit.best.element, unit.best.error, unit.persistence))


def test_a_gain_stored_as_a_distance_from_one() -> None:
    """`(1 + g) x` in front of a linear layer has the flow of the same layer with the gain stored whole."""

    class Gain(nn.Module):
        def __init__(self, offset: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.g = nn.Parameter(torch.rand(6, dtype=torch.float64) + 0.5 - offset)
            self.out = nn.Linear(6, 3, bias=False).double()
            self.offset = offset

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.offset + self.g) * x)

    flows = []
    for offset in (0.0, 1.0):
        net = Gain(offset)
        syms = nf.declare(net, "diagonal", [("g", 0)], [("out.weight", 1)], offsets={"g": offset})
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
        torch.manual_seed(1)
        data = torch.randn(64, 6, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
        for _ in train(net, data, optimizer, 50):
            pass
        flows.append(state_flow(net, syms, optimizer).details[0])
        optimizer.param_groups[0]["weight_decay"] = 0.1
        assert (offset == 1.0) == ("pulls" in str(state_flow(net, syms, optimizer)))
    torch.testing.assert_close(flows[0].charge, flows[1].charge)
    torch.testing.assert_close(flows[0].best.element, flows[1].best.element)


def test_the_flow_of_a_digits_training_is_its_charge_s_change() -> None:
    """64-32-10 ReLU net, 30 % random labels, AdamW: slope of measured on predicted change of `C_P` over 300 steps."""
    torch.manual_seed(0)
    x, y = digits()
    x, y = x.float(), torch.where(torch.rand(len(y)) < 0.3, torch.randint(0, 10, y.shape), y)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    syms = nf.declare(net, "diagonal", [(A, 0), ("0.bias", 0)], [(B, 1)])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)

    def charge(roots: dict[str, Tensor]) -> Tensor:
        t = {n: p.detach().double() ** 2 * roots.get(n, 1.0) for n, p in net.named_parameters()}
        return t[A].sum(1) + t["0.bias"] - t[B].sum(0)

    def step() -> None:
        chosen = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()

    for _ in range(1000):
        step()
    measured, momentum, squares, plain = (torch.zeros(32, dtype=torch.float64) for _ in range(4))
    for k in range(300):
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        start = charge({})
        step()
        states = {n: optimizer.state[p] for n, p in net.named_parameters()}
        roots = {n: (s["exp_avg_sq"].double() / (1 - 0.999 ** int(s["step"]))).sqrt() + 1e-8 for n, s in states.items()}
        plain += charge({}) - start
        measured += charge(roots)
        after = {n: p.detach().clone() for n, p in net.named_parameters()}
        with torch.no_grad():
            for n, p in net.named_parameters():
                p.copy_(before[n])
            measured -= charge(roots)
            for n, p in net.named_parameters():
                p.copy_(after[n])
        if k % 3 == 0:
            flow = state_flow(net, syms, optimizer).details[0]
            momentum += 3 * flow.from_momentum.drift
            squares += 3 * flow.from_squares.drift

    def slope(predicted: Tensor) -> tuple[float, float]:
        best = float(predicted @ measured / (predicted @ predicted))
        rest = measured - best * predicted
        return best, float((rest @ rest / 31 / (predicted @ predicted)).sqrt())

    found, error = slope(momentum)
    assert abs(found - 1) < 3 * error + 0.005
    assert error < 0.015
    found, error = slope(squares)
    assert error > 0.02, "uncorrelated gradients are an assumption: persistence differs from 1 by unit"
    assert float((plain - measured).norm() / measured.norm()) > 0.5, "the plain charge moves otherwise"


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_joint_equilibrium_of_a_run(kind: str) -> None:
    """One torus: what the state flow says of it alone. Two that share a layer: moved there, both flows stop at once."""
    net, syms, data = leaky_net()
    optimizer: Any = (
        torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        if kind == "adam"
        else torch.optim.SGD(net.parameters(), lr=0.004, momentum=0.9, weight_decay=0.1)
    )
    for _ in train(net, data, optimizer, 200):
        pass
    alone = state_flow(net, syms, optimizer).details[0]
    (settled,) = nf.noise_equilibrium(net, syms, optimizer=optimizer)
    best = alone.from_squares or alone.from_momentum
    torch.testing.assert_close(settled.element, best.element, rtol=1e-3, atol=0.0)  # decay to order lr w

    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    two = nf.SymmetrySet(
        (
            *nf.declare(deep, "diagonal", [(A, 0), ("0.bias", 0)], [(B, 1)]),
            *nf.declare(deep, "diagonal", [(B, 0), ("2.bias", 0)], [("4.weight", 1)]),
        ),
        shapes={n: tuple(p.shape) for n, p in deep.named_parameters()},
    )
    other = type(optimizer)(deep.parameters(), **{k: optimizer.defaults[k] for k in ("lr", "weight_decay")}
                            | ({"momentum": 0.9} if kind == "sgd" else {}))  # fmt: skip
    for _ in train(deep, data, other, 200):
        pass
    eq = nf.noise_equilibrium(deep, two, optimizer=other)
    assert eq.converged
    assert "read off" in str(eq)
    move_with_state(deep, two, other, eq.elements)
    for detail in state_flow(deep, two, other).details:
        flow = detail.from_squares or detail.from_momentum
        assert float(flow.imbalance[flow.finite].max()) < 1e-3
    with pytest.raises(DataError, match="in place of"):
        nf.noise_equilibrium(deep, two, sgd=nf.SGDConfig(0.1, 8), optimizer=other)


@pytest.mark.parametrize("make", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adagrad, torch.optim.Muon, Sophia])
def test_their_saved_states_are_not_taken_for_adams_or_sgds(make: Any) -> None:
    net, syms, data = leaky_net()
    optimizer = make(net.parameters())
    for _ in train(net, data, optimizer, 2):
        pass
    with pytest.raises(DataError, match="not that of"):
        state_flow(net, syms, optimizer.state_dict())


def test_one_scale_per_tensor_is_not_adams_average() -> None:
    net, syms, data = leaky_net()
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in train(net, data, optimizer, 2):
        pass
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].mean()
    with pytest.raises(DataError, match="shape"):
        state_flow(net, syms, optimizer)


def test_muon_for_matrices_and_adamw_for_the_rest() -> None:
    """What Muon steps is left out with the reason; what AdamW steps alone is answered."""
    torch.manual_seed(0)
    last = nn.LayerNorm(3, eps=1e-12, elementwise_affine=False)
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False), last).double()
    gain = nf.declare(net, "scalar", [("1.weight", 0), ("1.bias", 0)], [])
    both = nf.declare(net, "diagonal", [("1.weight", 0), ("1.bias", 0)], [("2.weight", 1)])
    muon = torch.optim.Muon([net[0].weight, net[2].weight])
    adamw = torch.optim.AdamW([p for p in net.parameters() if p.ndim == 1])
    data = (torch.randn(64, 6, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64))
    for _ in train(net, data, adamw, 3):
        muon.step()
    assert "whole matrices" in state_flow(net, both, [muon, adamw]).excluded[both[0].name]
    assert len(state_flow(net, gain, [muon, adamw]).details) == 1
    with pytest.raises(DataError, match="whole matrices"):
        state_flow(net, gain, [muon])
    half = [torch.optim.AdamW([p]) for p in (net[1].weight, net[1].bias)]
    for _ in train(net, data, half[0], 3):
        half[1].step()
    assert len(state_flow(net, gain, half).details) == 1
    slower = torch.optim.AdamW([net[1].bias], betas=(0.9, 0.9))
    slower.step()
    with pytest.raises(DataError, match="different laws"):
        state_flow(net, gain, [half[0], slower])
