"""The free test of moments in coarse arithmetic, and what answers say of how their moments were measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.core.torch_internals import coarsest_epsilon
from noetherflow.equilibrium.invariance import refuse_other_moments
from noetherflow.errors import MomentError

SGD = nf.SGDConfig(lr=0.1, batch_size=8)
Batch = tuple[Tensor, Tensor]


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = self.norm(x)
        mixed = F.scaled_dot_product_attention(split(self.q(y)), split(self.k(y)), split(self.v(y)), is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(10, 16), Attention(), nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.LeakyReLU(0.3), nn.Linear(32, 10))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 10))


def convolution() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)),
    )


KINDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "linear": linear,
    "convolution": convolution,
    "transformer": Transformer,
}


def data(kind: str, samples: int = 64) -> Batch:
    y = torch.randint(0, 10, (samples,))
    return (torch.randint(0, 10, (samples, 6)) if kind == "transformer" else torch.randn(samples, 12)), y


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")


def under_autocast(model: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return cross_entropy(model, batch)


def penalised(loss: Callable[[nn.Module, Batch], Tensor], c: float) -> Callable[[nn.Module, Batch], Tensor]:
    return lambda model, batch: loss(model, batch) + c * sum(p.square().sum() for p in model.parameters())


@functools.cache
def symmetries(kind: str) -> nf.SymmetrySet:
    """They depend on shapes alone."""
    return nf.find_symmetries(KINDS[kind](), data(kind)[0][:2])


def measured(kind: str, loss: Any, seed: int = 0) -> tuple[nn.Module, nf.SymmetrySet, nf.GradientMoments]:
    torch.manual_seed(seed)
    model, (x, y), syms = KINDS[kind](), data(kind), symmetries(kind)
    return model, syms, nf.gradient_moments(model, loss, list(zip(x.split(16), y.split(16), strict=True)), syms)


@pytest.mark.parametrize("loss", [cross_entropy, under_autocast])
@pytest.mark.parametrize("kind", list(KINDS))
def test_rounding_of_clean_networks_is_let_pass(kind: str, loss: Any) -> None:
    for seed in range(2):
        refuse_other_moments(*measured(kind, loss, seed))


@pytest.mark.parametrize("c", [1e-5, 1e-4])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_small_penalty_inside_the_loss_is_refused_in_float32(kind: str, c: float) -> None:
    for seed in range(2):
        model, syms, moments = measured(kind, penalised(cross_entropy, c), seed)
        with pytest.raises(MomentError, match="penalty inside loss_fn"):
            nf.noise_equilibrium(model, syms, moments, SGD, joint=False)


@pytest.mark.parametrize("loss", [cross_entropy, under_autocast])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_the_least_penalty_noticed_is_the_one_stated(kind: str, loss: Any) -> None:
    model, syms, clean = measured(kind, loss)
    least = refuse_other_moments(model, syms, clean)
    with pytest.raises(MomentError, match="penalty inside loss_fn"):
        refuse_other_moments(*measured(kind, penalised(loss, 2 * least)))
    refuse_other_moments(*measured(kind, penalised(loss, 0.3 * least)))


def test_answers_say_which_penalty_autocast_would_have_hidden() -> None:
    model, syms, moments = measured("mlp", under_autocast)
    least = refuse_other_moments(model, syms, moments)
    flow, eq = nf.noether_flow(model, syms, moments, SGD), nf.noise_equilibrium(model, syms, moments, SGD, joint=False)
    for answer in (flow, eq):
        assert f"less than {least:.1e} |theta|^2 would not have been noticed" in str(answer)
        assert len(answer.to_dict()["cautions"]) == 1
    single = nf.noether_flow(*measured("mlp", cross_entropy), SGD)
    assert "would not have been noticed" not in str(single)


def test_the_coarsest_arithmetic_is_recorded_merged_and_stored(tmp_path: Path) -> None:
    coarse, fine = (torch.finfo(d).eps for d in (torch.bfloat16, torch.float32))
    model, syms, moments = measured("mlp", under_autocast)
    plain = measured("mlp", cross_entropy)[2]
    assert (moments.conditions.rounding, plain.conditions.rounding) == (coarse, fine)
    assert nf.merge_moments([plain, moments]).conditions.rounding == coarse
    nf.save_moments(moments, tmp_path / "m.safetensors")
    assert nf.load_moments(tmp_path / "m.safetensors").conditions == moments.conditions
    x, y = data("mlp")
    more = nf.gradient_moments(model, cross_entropy, [(x, y)], syms, resume=moments)
    assert more.conditions.rounding == coarse
    pairs = list(zip(x.split(16), y.split(16), strict=True))
    assert nf.minibatch_moments(model, under_autocast, pairs, syms, batch_size=16).conditions.rounding == coarse


def test_matrices_multiplied_in_a_shorter_type_count() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    torch.set_float32_matmul_precision("high")
    try:
        assert coarsest_epsilon((x @ x).sum()) == 2.0**-10
        assert coarsest_epsilon((x.double() @ x.double()).sum()) == 2.0**-10
    finally:
        torch.set_float32_matmul_precision("highest")
    wide = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    assert coarsest_epsilon((wide @ wide).sum()) == torch.finfo(torch.float64).eps


def normalised(training: bool) -> tuple[nn.Module, nf.SymmetrySet, Tensor]:
    """A network with two batch norms, and the symmetries that do not move running statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()),
        nn.Linear(6, 3),
    ).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    model(x)
    found = nf.find_symmetries(model.eval(), x)
    left = found.without({s.name: "batch statistics" for s in found if any(leg.buffer for leg in s.legs)})
    return model.train(training), left, x


def square_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


def test_batch_norms_measured_in_evaluation_mode_are_named_in_every_answer() -> None:
    model, syms, x = normalised(training=False)
    moments = nf.gradient_moments(model, square_loss, list(x.split(8)), syms)
    minibatches = nf.minibatch_moments(model, square_loss, list(x.split(8)), syms, batch_size=8)
    assert moments.conditions.running == minibatches.conditions.running == ("1", "4")
    answers = (
        moments,
        nf.noether_flow(model, syms, moments, SGD),
        nf.noise_equilibrium(model, syms, moments, SGD, joint=False),
        nf.noether_flow(model, syms, minibatches, SGD),
    )
    for answer in answers:
        assert "measured in evaluation mode: drift in training differs, where the norms ['1', '4']" in str(answer)
        assert "nf.minibatch_moments" in str(answer)


def test_batch_norms_measured_in_training_mode_give_no_caution() -> None:
    model, syms, x = normalised(training=True)
    moments = nf.minibatch_moments(model, square_loss, list(x.split(8)), syms, batch_size=8)
    assert moments.conditions.running == ()
    for answer in (moments, nf.noether_flow(model, syms, moments, SGD)):
        assert "evaluation mode" not in str(answer)


def test_the_drift_of_a_gain_differs_between_the_modes() -> None:
    """What the caution is about: minibatch gradients in training mode against single samples in evaluation mode."""
    model, syms, x = normalised(training=False)
    frozen = nf.noether_flow(model, syms, nf.gradient_moments(model, square_loss, list(x.split(8)), syms), SGD)
    moments = nf.minibatch_moments(model.train(), square_loss, list(x.split(8)), syms, batch_size=8)
    training = nf.noether_flow(model, syms, moments, SGD)
    name = next(s.name for s in syms if s.family == "norm-gain")
    a, b = frozen[name].noise, training[name].noise
    assert float((a - b).norm() / b.norm()) > 0.3


class Dropped(nn.Module):
    """Dropout that is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(F.relu(self.up(x)), 0.5, training=True))


def test_a_data_set_measured_whole_has_an_error_where_the_forward_draws_random_numbers() -> None:
    """The jackknife error is of the order of the scatter over seeds of dropout; without dropout it is zero."""
    torch.manual_seed(0)
    model, x = Dropped().double(), torch.randn(128, 4, dtype=torch.float64)
    syms = nf.find_symmetries(model, x[:2])
    trace = lambda m: sum(leg.sum() for leg in m.second[syms[0].name])
    found = [nf.gradient_moments(model, square_loss, list(x.split(8)), syms) for _ in range(20)]
    assert all(m.conditions.random for m in found)
    estimates = [nf.standard_error(m, trace, dataset_size=128) for m in found]
    scatter = float(torch.stack([e.value for e in estimates]).std())
    error = float(torch.stack([e.error.square() for e in estimates]).mean().sqrt())
    assert 0.7 * scatter < error < 3 * scatter
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    own = nf.find_symmetries(plain, x[:2])
    moments = nf.gradient_moments(plain, square_loss, list(x.split(8)), own)
    assert not moments.conditions.random
    whole = nf.standard_error(moments, lambda m: m.second[own[0].name][0].sum(), dataset_size=128)
    assert float(whole.error) == 0
