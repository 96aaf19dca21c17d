"""One measurement for the equilibrium: what it collects, and its answer against two calls and dense gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.products import Factors
from reference import per_sample_gradients

SGD = nf.SGDConfig(0.05, 2, weight_decay=1e-3)


def squared(model: nn.Module, x: Tensor) -> Tensor:
    """A loss per sample, of samples with any number of tokens."""
    return model(x).square().flatten(1).mean(1)


def deep_linear() -> nn.Module:
    """Matrix symmetries of two sizes that meet in the middle weight."""
    torch.manual_seed(0)
    sizes = (5, 3, 3, 4)
    return nn.Sequential(*(nn.Linear(m, n, bias=False) for m, n in itertools.pairwise(sizes))).double()


def mlp() -> nn.Module:
    """Two tori that meet in the middle weight."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double()


def batches(*tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, t, 5, dtype=torch.float64, generator=generator) for t in tokens]


def assert_same_equilibrium(a: nf.Equilibrium, b: nf.Equilibrium) -> None:
    assert a.converged
    assert b.converged
    for s in a:
        torch.testing.assert_close(s.element, b[s.name].element, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(s.charge, b[s.name].charge, rtol=1e-9, atol=1e-11)


def test_one_measurement_is_worth_moments_and_factors() -> None:
    """Against two calls, and against dense gradients of single samples by autograd; batches of unequal length."""
    model, data = deep_linear(), batches(2, 3, 2)
    syms = nf.find_symmetries(model, data[0])
    plain = nf.gradient_moments(model, squared, data, syms)
    one = nf.gradient_moments(model, squared, data, syms, for_="equilibrium")
    assert set(one.factors) == {"1.weight"}
    assert not one.squares
    dense = [torch.stack([g["1.weight"] for g in per_sample_gradients(model, squared, x)]) for x in data]
    torch.testing.assert_close(one.factors["1.weight"].dense(), torch.cat(dense), rtol=1e-12, atol=1e-14)
    for name, legs in plain.second.items():
        for mine, leg in zip(one.second[name], legs, strict=True):
            torch.testing.assert_close(mine, leg, rtol=0, atol=0)
    eq = nf.noise_equilibrium(model, syms, one, SGD)
    factors = nf.gradient_factors(model, squared, data, syms)
    assert_same_equilibrium(eq, nf.noise_equilibrium(model, syms, plain, SGD, samples=factors))
    assert_same_equilibrium(eq, nf.noise_equilibrium(model, syms, plain, SGD, samples={"1.weight": torch.cat(dense)}))
    flow = nf.noether_flow(model, syms, one, SGD)
    two = nf.noether_flow(model, syms, plain, SGD, samples=factors)
    assert flow.joint
    assert two.joint
    for s in syms:
        ours, theirs = (f.forecast([0, 50]).charges[s.name] for f in (flow, two))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_without_it_the_equilibrium_says_what_to_measure() -> None:
    model, data = deep_linear(), batches(2)
    syms = nf.find_symmetries(model, data[0])
    moments = nf.gradient_moments(model, squared, data, syms)
    assert not moments.factors
    with pytest.raises(MomentError, match=r"1\.weight.*for_='equilibrium'"):
        nf.noise_equilibrium(model, syms, moments, SGD)


def test_entries_are_measured_where_tori_meet_and_only_there() -> None:
    model, x = mlp(), torch.randn(12, 4, dtype=torch.float64)
    syms = nf.find_symmetries(model, x)
    moments = nf.gradient_moments(model, squared, [x], syms, for_="equilibrium")
    entries = nf.gradient_moments(model, squared, [x], syms, entries=True)
    assert set(moments.squares) == set(syms.parameters)
    assert not moments.factors
    assert_same_equilibrium(
        nf.noise_equilibrium(model, syms, moments, SGD), nf.noise_equilibrium(model, syms, entries, SGD)
    )
    with pytest.raises(MomentError, match="for_='equilibrium'"):
        nf.noise_equilibrium(model, syms, nf.gradient_moments(model, squared, [x], syms), SGD)
    first = nf.SymmetrySet(tuple(syms)[:1])
    alone = nf.gradient_moments(model, squared, [x], first, for_="equilibrium")
    assert not alone.squares
    assert nf.noise_equilibrium(model, first, alone, SGD).converged


def test_factors_outlive_files_merging_and_resuming_but_not_the_next_measurement(tmp_path: Path) -> None:
    model, data = deep_linear(), batches(2, 3, 2, 2)
    syms = nf.find_symmetries(model, data[0])
    meter = nf.Meter(model, squared, syms, for_="equilibrium")
    whole = meter.measure(data).factors["1.weight"]
    first, second = meter.measure(data[:2]), meter.measure(data[2:])
    assert len(second.factors["1.weight"].left) == 8
    nf.save_moments(first, tmp_path / "first")
    loaded = nf.load_moments(tmp_path / "first")
    merged = nf.merge_moments([loaded, second])
    resumed = nf.gradient_moments(model, squared, data[2:], syms, for_="equilibrium", resume=loaded)
    for found in (merged, resumed):
        torch.testing.assert_close(found.factors["1.weight"].dense(), whole.dense(), rtol=1e-12, atol=1e-14)
        assert nf.noise_equilibrium(model, syms, found, SGD).converged
    plain = nf.gradient_moments(model, squared, data[2:], syms)
    with pytest.raises(MomentError, match="factors"):
        nf.merge_moments([first, plain])
    with pytest.raises(MomentError, match="cannot resume"):
        nf.gradient_moments(model, squared, data[2:], syms, for_="equilibrium", resume=plain)


def test_stale_factors_are_refused() -> None:
    """The factors in moments are checked against them, as those given are."""
    model, data = deep_linear(), batches(2)
    syms = nf.find_symmetries(model, data[0])
    moments = nf.gradient_moments(model, squared, data, syms, for_="equilibrium")
    held = moments.factors["1.weight"]
    other = replace(moments, factors={"1.weight": Factors(held.left.roll(1, 0), held.right)})
    with pytest.raises(DataError, match="not the gradients that the moments were measured on"):
        nf.noise_equilibrium(model, syms, other, SGD)


def test_what_cannot_be_collected_is_refused() -> None:
    model, data = deep_linear(), batches(2)
    syms = nf.find_symmetries(model, data[0])
    with pytest.raises(DataError, match=r"for_ must be one of \['flow', 'equilibrium'\], got 'both'"):
        nf.gradient_moments(model, squared, data, syms, for_="both")  # type: ignore[arg-type]
    meter = nf.Meter(model, squared, syms, for_="equilibrium")
    meter.update(data[0])
    with pytest.raises(MomentError, match="not gathered over ranks"):
        meter.result(ranks=object())

    def penalised(m: nn.Module, x: Tensor) -> Tensor:
        """A loss that reads the weight beside its use by each sample."""
        return squared(m, x) + m[1].weight.square().sum()

    with pytest.raises(MomentError, match=r"1\.weight"):
        nf.gradient_moments(model, penalised, data, syms, for_="equilibrium")


def test_packed_query_key_value_weights_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 40,
        "n_positions": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(use_cache=False, **shape, **rates)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(40, (4, 8))

    def loss(m: nn.Module, tokens: Tensor) -> Tensor:
        logits = m(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        return each.view(len(tokens), -1).mean(1)

    syms = nf.find_symmetries(model, {"input_ids": ids[:1]}).trainable(model)
    one = nf.gradient_moments(model, loss, list(ids.split(2)), syms, for_="equilibrium")
    two = nf.gradient_factors(model, loss, list(ids.split(2)), syms)
    assert set(one.factors) == set(two)
    assert {f"transformer.h.{k}.attn.c_attn.weight" for k in range(2)} <= set(two)
    for name, factors in two.items():
        torch.testing.assert_close(one.factors[name].dense(), factors.dense(), rtol=1e-12, atol=1e-15)
    found = [nf.noise_equilibrium(model, syms, one, SGD, samples=given, max_iterations=3) for given in (None, two)]
    for s in found[0]:
        torch.testing.assert_close(s.element, found[1][s.name].element, rtol=1e-9, atol=1e-11)
