"""Joint balance of real architectures (small configurations, random weights) in float64, with re-measured noise."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import noetherflow as nf
from noetherflow.balance.model import balance_
from noetherflow.discovery import certify, find_symmetries
from noetherflow.equilibrium import Equilibrium, noise_equilibrium
from noetherflow.moments import GradientMoments, gradient_factors, gradient_moments
from reference import without_buffers
from zoo import ZOO, Case, jitter, per_sample_cross_entropy

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def drift_imbalance(
    syms: nf.SymmetrySet, moments: GradientMoments, model: torch.nn.Module, sgd: nf.SGDConfig
) -> dict[str, float]:
    """Largest relative Noether flow of each symmetry by its definition, from a fresh measurement.

    Torus: `|drift_j| / sum_legs |its parts|`; GL: the same with Frobenius norms per block.
    """
    decay = sgd.lr * sgd.weight_decay * (2 - sgd.lr * sgd.weight_decay)
    params = {n: t.detach().double() for n, t in nf.tensors_of(model).items()}
    out = {}
    for s in syms:
        plus = torch.zeros(s.shape, dtype=torch.float64)
        minus = torch.zeros_like(plus)
        for leg, k, m in zip(s.weight_legs, s.grams(params), moments.batch_grams(s, sgd), strict=True):
            c = abs(leg.exponent)
            plus += c * (decay * k if leg.sign > 0 else sgd.lr**2 * m)
            minus += c * (sgd.lr**2 * m if leg.sign > 0 else decay * k)
        if s.is_torus:
            out[s.name] = float(((plus - minus).abs() / (plus + minus)).max())
        else:
            norm = torch.linalg.matrix_norm
            out[s.name] = float((norm(plus - minus) / (norm(plus) + norm(minus))).max())
    return out


def output(model: torch.nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out.logits if hasattr(out, "logits") else out


def two_layers(name: str) -> Case:
    """Two layers of width 32, random weights, six texts of twelve tokens."""
    torch.manual_seed(1)
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16, "vocab_size": 50}
        model = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0))
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        more = {"num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 16, "use_cache": False}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **more))
    jitter(model)
    tokens = {"input_ids": torch.randint(50, (6, 12))}
    return Case(model.eval(), tokens, per_sample_cross_entropy, (tokens, torch.randint(50, (6, 12))))


def balanced(case: Case, sgd: nf.SGDConfig) -> tuple[Equilibrium, float, dict[str, float], dict[str, float]]:
    """The exact symmetries' equilibrium, its effect on the outputs, and the flow measured before and after."""
    syms = find_symmetries(case.model, case.inputs).trainable(case.model)
    exact = syms.without({s.name: "approximate" for s in syms if s.eps is not None})

    def measure(model: torch.nn.Module) -> GradientMoments:
        return gradient_moments(model, case.loss_fn, [case.batch], exact, entries=True)

    eq = noise_equilibrium(case.model, syms, measure(case.model), sgd, approximate=False, remeasure=measure)
    assert all("approximate" in eq.excluded[s.name] for s in syms if s.eps is not None)
    moved = copy.deepcopy(case.model)
    report = balance_(moved, eq, example_inputs=case.inputs, tolerance=1.0)
    assert report.output_change is not None
    flows = [drift_imbalance(exact, measure(model), model, sgd) for model in (case.model, moved)]
    return eq, report.output_change, flows[0], flows[1]


MODELS = [lambda: two_layers("gpt2"), lambda: two_layers("llama"), ZOO["resnet_basic"], ZOO["vit"]]


@pytest.mark.parametrize("build", MODELS, ids=["gpt2", "llama", "resnet", "vit"])
def test_all_exact_symmetries_balance_jointly(build: Callable[[], Case]) -> None:
    case = build().double()
    before = output(case.model, case.inputs)
    sgd = nf.SGDConfig(0.05, 2, weight_decay=1e-2, dataset_size=len(case.batch[1]))
    eq, change, start, end = balanced(case, sgd)
    moved = copy.deepcopy(case.model)
    balance_(moved, eq, example_inputs=case.inputs)
    after = output(moved, case.inputs)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-10
    assert change < 1e-10
    assert {s.classification for s in eq} == {"finite"}
    assert max(start.values()) > 0.3
    assert max(end.values()) < 1e-8, end


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("resnet_basic", "vit", "deep_linear")])
def test_every_architecture_of_the_zoo_balances(name: str) -> None:
    """`deep_linear` is left out: its products have a lower rank than its widths, so that directions recede."""
    case = ZOO[name]().double()
    samples = len(case.loss_fn(case.model, case.batch))
    eq, change, start, end = balanced(case, nf.SGDConfig(0.05, 2, weight_decay=1e-2, dataset_size=samples))
    print(f"{name}: flow {max(start.values()):.2g} -> {max(end.values()):.1e} measured again, outputs {change:.1e}")
    assert {s.classification for s in eq} == {"finite"}
    assert change < 1e-10
    assert max(start.values()) > 0.2
    assert max(end.values()) < 1e-10, end


def test_approximate_scale_symmetries_of_batch_norm_are_balanced_to_their_eps() -> None:
    case = ZOO["cnn_batchnorm"]().double()
    syms = find_symmetries(case.model, case.inputs)
    assert any(s.eps is not None for s in syms)
    sgd = nf.SGDConfig(0.05, 2, weight_decay=1e-2, dataset_size=4)
    moments = gradient_moments(case.model, case.loss_fn, [case.batch], without_buffers(syms), entries=True)
    eq = noise_equilibrium(case.model, syms, moments, sgd)
    before = output(case.model, case.inputs)
    certificate = certify(case.model, syms, case.inputs)
    moved = copy.deepcopy(case.model)
    report = balance_(moved, eq, example_inputs=case.inputs, certificate=certificate)
    change = float((output(moved, case.inputs) - before).abs().max() / before.abs().max())
    assert report.output_change == pytest.approx(change)
    assert 1e-9 < change < 1e-2
    again = gradient_moments(moved, case.loss_fn, [case.batch], without_buffers(syms), entries=True)
    start = drift_imbalance(syms, moments, case.model, sgd)
    end = drift_imbalance(syms, again, moved, sgd)
    assert max(start.values()) > 0.3
    assert max(end.values()) < 0.05


def test_factors_of_one_measurement_give_the_equilibrium_of_a_transformer() -> None:
    """GPT-2's packed query-key-value weights, which GL and gain symmetries move together, without measuring again."""
    case = two_layers("gpt2").double()
    syms = find_symmetries(case.model, case.inputs)
    exact = syms.without({s.name: "approximate" for s in syms if s.eps is not None})
    sgd = nf.SGDConfig(0.05, 2, weight_decay=1e-2, dataset_size=6)
    moments = gradient_moments(case.model, case.loss_fn, [case.batch], exact)
    factors = gradient_factors(case.model, case.loss_fn, [case.batch], exact)
    assert set(factors) == {f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)}
    eq = noise_equilibrium(case.model, exact, moments, sgd, samples=factors)
    assert eq.converged
    moved = copy.deepcopy(case.model)
    balance_(moved, eq, example_inputs=case.inputs)
    again = gradient_moments(moved, case.loss_fn, [case.batch], exact)
    assert max(drift_imbalance(exact, again, moved, sgd).values()) < 1e-8
    apart = noise_equilibrium(case.model, exact, moments, sgd, joint=False)
    balance_(moved := copy.deepcopy(case.model), apart, example_inputs=case.inputs)
    again = gradient_moments(moved, case.loss_fn, [case.batch], exact)
    assert max(drift_imbalance(exact, again, moved, sgd).values()) > 1e-2, "one by one is not the joint equilibrium"


def test_moments_in_single_precision_do_not_stop_the_solver() -> None:
    """Leg Grams of large matrices in float32 are symmetric only to 1e-7; the solve still ends below 1e-11."""
    case = two_layers("gpt2").double()
    syms = find_symmetries(case.model, case.inputs)
    exact = syms.without({s.name: "approximate" for s in syms if s.eps is not None})
    moments = gradient_moments(case.model, case.loss_fn, [case.batch], exact)
    factors = gradient_factors(case.model, case.loss_fn, [case.batch], exact)
    rounded = dataclasses.replace(
        moments, second={n: tuple(_skewed(m, 1e-7) for m in legs) for n, legs in moments.second.items()}
    )
    eq = noise_equilibrium(case.model, exact, rounded, nf.SGDConfig(0.05, 2, weight_decay=1e-2), samples=factors)
    assert eq.converged


def _skewed(gram: torch.Tensor, size: float) -> torch.Tensor:
    if gram.ndim == 1:
        return gram
    noise = torch.randn(gram.shape, dtype=gram.dtype, generator=torch.Generator().manual_seed(0))
    return gram + size * float(gram.abs().max()) * (noise - noise.mT)
