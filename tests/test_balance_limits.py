"""How much a move may change outputs: what rounding and a normalisation's eps explain, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.balance.check import SAME_MODEL, OutputCheck, condition_of, rounding_limit
from noetherflow.balance.motion import Motion
from noetherflow.core.tensors import tensors_of
from noetherflow.errors import CertificateError
from noetherflow.symmetry.symmetry import Symmetry


def small_before_a_norm(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor, Symmetry]:
    """A layer whose outputs have a variance of about 0.01 before a LayerNorm, and its scale."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 16, bias=False), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 2)
    model, x = nn.Sequential(*layers).to(dtype), nn.functional.normalize(torch.randn(64, 4, dtype=dtype))
    with torch.no_grad():
        model[0].weight *= 0.1 / model[0](x).std()
    (scale,) = (s for s in nf.find_symmetries(model, x[:2]) if s.eps is not None)
    return model, x, scale


def moved(model: nn.Sequential, motion: Motion) -> nn.Sequential:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in motion.by_parameter:
            tensor = tensors_of(other)[name]
            tensor.copy_(motion.weight(name, tensor).to(tensor.dtype))
    return other


def kept(model: nn.Sequential, x: Tensor, motion: Motion, **options: float) -> float:
    """What the check of a move says, from outputs of the model before it and after it."""
    check = OutputCheck(example_inputs=x, **options)
    before = check.before(model, motion, None)
    assert before is not None
    return check.kept(before, moved(model, motion), [p.dtype for p in model.parameters()], motion)


def shrunk(scale: Symmetry, factor: float) -> Motion:
    return Motion([scale], {scale.name: torch.full(scale.shape, factor, dtype=torch.float64)})


def wrong(model: nn.Sequential, change: float) -> tuple[Symmetry, Tensor]:
    """The last layer, scaled as if that were a symmetry: outputs change by exactly so much."""
    (one,) = nf.declare(model, "scalar", [("3.weight", 0), ("3.bias", 0)], family="one-sided")
    return one, torch.full(one.shape, 1 + change, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_eps_explains_is_let_pass_where_the_move_is_large(dtype: torch.dtype) -> None:
    """Beyond the 1e-3 of before, and the same in both precisions: the model at an eps four times as large, exactly."""
    model, x, scale = small_before_a_norm(dtype)
    change = kept(model, x, shrunk(scale, 0.5))
    assert 1e-3 < change < SAME_MODEL
    other = copy.deepcopy(model)
    other[1].eps *= 4
    same = (other(x) - model(x)).abs().max() / model(x).abs().max()
    assert change == pytest.approx(float(same.detach()), rel=1e-3)


def test_what_eps_explains_is_refused_beyond_the_rounding_of_bfloat16() -> None:
    model, x, scale = small_before_a_norm()
    with pytest.raises(
        CertificateError, match=r"more than the tolerance 3\.91e-03.*hold only up to a normalisation's eps"
    ):
        kept(model, x, shrunk(scale, 0.2))


@pytest.mark.parametrize("change", [3e-4, 1e-3, -1e-3, 3e-3])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_broken_symmetry_is_refused_beside_one_that_eps_makes_approximate(change: float, factor: float) -> None:
    """1e-3 and less used to pass as eps."""
    model, x, scale = small_before_a_norm()
    one, element = wrong(model, change)
    both = Motion([scale, one], {**shrunk(scale, factor).elements, one.name: element})
    with pytest.raises(
        CertificateError, match="with a hundredth of every normalisation's eps, which does not explain it"
    ):
        kept(model, x, both)
    assert kept(model, x, both, tolerance=0.1) > 2e-4


def test_a_broken_symmetry_alone_is_refused_in_float32() -> None:
    model, x, _ = small_before_a_norm()
    one, element = wrong(model, 1e-3)
    with pytest.raises(CertificateError, match=r"more than the tolerance 6\.4"):
        kept(model, x, Motion([one], {one.name: element}))


def test_an_eps_out_of_reach_keeps_the_old_limit() -> None:
    """One that no module holds cannot be varied."""

    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    model, x, _ = small_before_a_norm()
    model[1] = Written()
    (scale,) = (s for s in nf.find_symmetries(model, x[:2]) if s.eps is not None)
    with pytest.raises(CertificateError, match=r"more than the tolerance 1\.00e-03"):
        kept(model, x, shrunk(scale, 0.5))


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_rounding_grows_with_the_condition_of_a_matrix(condition: float) -> None:
    """Two linear layers, a matrix between them, rounded to float32: within the limit, and by more than a torus does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False))
    x = torch.randn(64, 6)
    (pair,) = nf.find_symmetries(model, x[:2])
    assert not pair.is_torus
    orthogonal = lambda: torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    stretched = orthogonal() @ torch.diag(torch.logspace(0, 1, 5, condition, dtype=torch.float64)) @ orthogonal()
    motion = Motion([pair], {pair.name: stretched.expand(pair.shape)})
    assert condition_of(motion) == pytest.approx(condition, rel=1e-6)
    before, after = model.double()(x.double()), moved(model.float(), motion).double()(x.double())
    error = float(((after - before).abs().max() / before.abs().max()).detach())
    unit = torch.finfo(torch.float32).eps
    assert 0.01 * condition * unit < error < 10 * condition * unit
    assert rounding_limit([torch.float32], condition) >= error
    stretched_units = Motion([pair], {pair.name: (condition * torch.eye(5, dtype=torch.float64)).expand(pair.shape)})
    assert condition_of(stretched_units) == pytest.approx(1.0)
    evenly = moved(model.float(), stretched_units).double()(x.double())
    assert float(((evenly - before).abs().max() / before.abs().max()).detach()) < 10 * unit


def test_no_condition_lets_more_pass_than_bfloat16_does() -> None:
    assert rounding_limit([torch.float32], 1e12) == SAME_MODEL
    assert rounding_limit([torch.bfloat16], 1e12) == rounding_limit([torch.bfloat16])
