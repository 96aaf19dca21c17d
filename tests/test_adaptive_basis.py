"""Adam's point on a general_linear orbit: Psi against moved models, the Schatten bound, singular modes, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.equilibrium.adaptive_basis import adaptive_basis
from noetherflow.errors import DataError
from noetherflow.moments.products import Factors
from noetherflow.moments.single import single_gradients
from reference import per_sample_gradients

D = torch.float64


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def problem(
    sigma_e: Tensor, samples: int, turned: bool = True
) -> tuple[nn.Sequential, tuple[Tensor, Tensor], nf.Symmetry]:
    """A linear net 5-3-4 at its target with diagonal covariances, its hidden units turned at random."""
    rng = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=D)
    net = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(draw(3, 5))
        net[1].weight.copy_(draw(4, 3) / 2)
    x = draw(samples, 5) * torch.linspace(0.5, 1.5, 5, dtype=D).sqrt()
    y = net(x).detach() + draw(samples, 4) * sigma_e.sqrt()
    (symmetry,) = nf.declare(net, "general_linear", [("0.weight", 0)], [("1.weight", 1)])
    return net, (x, y), symmetry


def gradients(net: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients written out."""
    error = 2 * (net(x) - y).detach()
    hidden, back = (x @ net[0].weight.mT).detach(), (error @ net[1].weight).detach()
    return {"0.weight": back[:, :, None] * x[:, None, :], "1.weight": error[:, :, None] * hidden[:, None, :]}


ANISOTROPIC = torch.linspace(0.5, 1.5, 4, dtype=D)
ADAM = nf.AdamConfig(0.01, 8)


def psi_of(net: nn.Sequential, data: tuple[Tensor, Tensor], config: nf.AdamConfig) -> float:
    """`sum_i (lr s_i + 2 w s_i theta_i^2)` from single gradients of a model, entry by entry."""
    singles = per_sample_gradients(net, loss_fn, data)
    total = 0.0
    for n, p in net.named_parameters():
        g = torch.stack([s[n] for s in singles])
        s = (g.var(0) / config.batch_size + g.mean(0) ** 2).sqrt()
        total += float((config.lr * s + 2 * config.weight_decay * s * p.detach() ** 2).sum())
    return total


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_psi_is_that_of_the_moved_model_and_no_neighbour_is_lower(decay: float) -> None:
    net, data, symmetry = problem(ANISOTROPIC, 60)
    config = nf.AdamConfig(0.01, 8, weight_decay=decay)
    found = adaptive_basis(net, symmetry, loss_fn, [data], config)
    assert found.potential_now == pytest.approx(psi_of(net, data, config), rel=1e-9)
    there = copy.deepcopy(net)
    symmetry.act_(nf.tensors_of(there), found.element)
    lowest = psi_of(there, data, config)
    assert found.potential == pytest.approx(lowest, rel=1e-9)
    assert lowest < 0.97 * found.potential_now
    torch.testing.assert_close(there(data[0]), net(data[0]))
    torch.manual_seed(0)
    for _ in range(20):
        beside = copy.deepcopy(there)
        symmetry.act_(nf.tensors_of(beside), torch.linalg.matrix_exp(0.05 * torch.randn(1, 3, 3, dtype=D)))
        assert psi_of(beside, data, config) > lowest


def test_hidden_units_are_singular_modes_at_the_schatten_bound() -> None:
    """Without decay the least Psi is `2 sqrt(ab) sum sigma^1/2`, up to sampling; the turned start is above."""
    net, data, symmetry = problem(ANISOTROPIC, 20_000)
    found = adaptive_basis(net, symmetry, loss_fn, [data], ADAM, samples=gradients(net, *data))
    sigma_x = torch.linspace(0.5, 1.5, 5, dtype=D)
    white = ANISOTROPIC.sqrt()[:, None] * (net[1].weight @ net[0].weight).detach() * sigma_x.sqrt()
    singular = torch.linalg.svdvals(white)[:3]
    bound = 2 * (sigma_x.sqrt().sum() * ANISOTROPIC.sqrt().sum()).sqrt() * singular.sqrt().sum()
    scale = 2 * 0.01 / 8**0.5  # gradients are twice the error, and minibatches of 8
    assert found.potential == pytest.approx(float(bound) * scale, rel=0.01)
    assert found.potential_now > 1.03 * float(bound) * scale
    there = copy.deepcopy(net)
    symmetry.act_(nf.tensors_of(there), found.element)
    rows = nn.functional.normalize(there[0].weight.detach() * sigma_x.sqrt(), dim=1)
    modes = torch.linalg.svd(white).Vh[:3]
    assert float((rows @ modes.mT).abs().amax(1).min()) > 0.99
    before = nn.functional.normalize(net[0].weight.detach() * sigma_x.sqrt(), dim=1)
    assert float((before @ modes.mT).abs().amax(1).min()) < 0.95, "the start is turned"
    assert "assumes R proportional to H" in str(found)


def test_gradients_measured_here_are_those_written_out() -> None:
    net, data, symmetry = problem(ANISOTROPIC, 50)
    found, expected = single_gradients(net, symmetry.parameters, loss_fn, [data]), gradients(net, *data)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    factors = {
        "0.weight": Factors((2 * (net(data[0]) - data[1]) @ net[1].weight).detach()[:, None], data[0][:, None]),
        "1.weight": Factors((2 * (net(data[0]) - data[1])).detach()[:, None], net[0](data[0]).detach()[:, None]),
    }
    one = adaptive_basis(net, symmetry, loss_fn, [data], ADAM, samples=factors, starts=1)
    two = adaptive_basis(net, symmetry, loss_fn, [data], ADAM, starts=1)
    assert one.potential == pytest.approx(two.potential, rel=1e-9)


def test_proportionality_tells_label_noise_of_one_size_from_other_noise() -> None:
    cosines = []
    for sigma_e in (torch.ones(4, dtype=D), torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=D)):
        net, data, symmetry = problem(sigma_e, 4000)
        samples = gradients(net, *data)
        found = adaptive_basis(net, symmetry, loss_fn, [data], ADAM, samples=samples)
        cosines.append(found.proportionality)
        if len(cosines) == 1:
            flat = torch.cat([samples[n].flatten(1) for n in ("0.weight", "1.weight")], 1)
            noise = torch.cov(flat.mT)
            hessian = dense_hessian(net, data)
            exact = float((noise * hessian).sum() / (noise.norm() * hessian.norm()))
            assert found.proportionality == pytest.approx(exact, abs=0.15)
    assert cosines[0] > 0.85 > cosines[1] + 0.1


def dense_hessian(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> Tensor:
    def loss(flat: Tensor) -> Tensor:
        w, u = flat[:15].reshape(3, 5), flat[15:].reshape(4, 3)
        return (data[0] @ w.mT @ u.mT - data[1]).square().sum(1).mean()

    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    return torch.autograd.functional.hessian(loss, flat)


def test_what_cannot_be_solved_is_refused() -> None:
    net, data, symmetry = problem(ANISOTROPIC, 60)
    samples = gradients(net, *data)
    silent = {**samples, "0.weight": samples["0.weight"] * torch.tensor([0.0, 1.0, 1.0], dtype=D)[:, None]}
    with pytest.raises(DataError, match="no minimum"):
        adaptive_basis(net, symmetry, loss_fn, [data], ADAM, samples=silent, starts=1)
    (torus,) = nf.declare(net, "diagonal", [("0.weight", 0)], [("1.weight", 1)])
    with pytest.raises(DataError, match="no rotation is open"):
        adaptive_basis(net, torus, loss_fn, [data], ADAM)
    with pytest.raises(DataError, match="no batches"):
        adaptive_basis(net, symmetry, loss_fn, [], ADAM)
    with pytest.raises(DataError, match="coupled"):
        adaptive_basis(net, symmetry, loss_fn, [data], nf.AdamConfig(0.01, 8, weight_decay=0.1, decoupled=False))
