"""The algebra of legs and symmetries against explicit matrices, in float64."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import noetherflow as nf
from noetherflow import Leg, Symmetry, SymmetrySet, Translation
from noetherflow.core import spd

D = torch.float64


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def symmetries(draw: st.DrawFn) -> tuple[Symmetry, dict[str, Tensor]]:
    """A random symmetry whose legs use random axes, views, slices, replicas and row orders, and parameters for it."""
    seed = draw(st.integers(0, 10_000))
    shuffle = np.random.default_rng(seed)
    general = draw(st.booleans())
    blocks = draw(st.integers(1, 3))
    dim = draw(st.integers(1, 3)) if general else 1
    params: dict[str, Tensor] = {}
    legs = []
    for k in range(draw(st.integers(1, 3))):
        replicas, spare = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        rows = blocks * dim * replicas + spare
        index = shuffle.permutation(rows)[: rows - spare] if draw(st.booleans()) else np.arange(rows - spare)
        axis = draw(st.integers(0, 2))
        shape = [2, 3, 2]
        shape[axis] = rows
        view = None
        axes: tuple[int, ...] = (axis,)
        if draw(st.booleans()):
            view = (*shape[:axis], 1, *shape[axis:])
            axes = (axis + 1, axis) if draw(st.booleans()) else (axis + 1,)
        power = 1.0 if general else draw(st.sampled_from([1.0, 2.0, 0.5]))
        sign = draw(st.sampled_from([1, -1]))
        params[f"p{k}"] = torch.randn(shape, dtype=D, generator=rng(seed + k))
        legs.append(Leg(f"p{k}", index.reshape(blocks, dim, replicas), sign, axes, view, power))
    kind = "general_linear" if general else "diagonal"
    return Symmetry("s", "test", kind, tuple(legs)), params


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-11, atol=1e-11) for k in a)


@given(symmetries(), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_acting_with_the_inverse_restores_the_parameters(case, seed):
    sym, params = case
    g = sym.random_element(rng=rng(seed))
    assert close(sym.act(sym.act(params, g), sym.inverse(g)), {n: params[n] for n in sym.act(params, g)})


@given(symmetries(), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_the_action_composes(case, seed):
    sym, params = case
    g, h = sym.random_element(rng=rng(seed)), sym.random_element(rng=rng(seed + 1))
    assert close(sym.act(sym.act(params, g), h), sym.act(params, sym.compose(h, g)))


@given(symmetries(), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_gradients_stay_dual_to_tangents(case, seed):
    """<g, v> is invariant when v moves like a displacement of theta and g like a gradient."""
    sym, params = case
    element = sym.random_element(rng=rng(seed))
    gradients = {n: torch.randn(p.shape, dtype=D, generator=rng(seed + 7)) for n, p in params.items()}
    before = sum((gradients[n] * params[n]).sum() for n in sym.parameters)
    moved_params, moved_gradients = sym.act(params, element), sym.act_on_gradients(gradients, element)
    after = sum((moved_gradients[n] * moved_params[n]).sum() for n in sym.parameters)
    assert torch.allclose(before, after, rtol=1e-10)


@given(symmetries(), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_charge_is_the_quadratic_form_of_the_generator(case, seed):
    """Tr(A C) = theta^T A theta, with A applied by `tangent`, which is itself the derivative of `act`."""
    sym, params = case
    noise = torch.randn(sym.shape, dtype=D, generator=rng(seed))
    generator = noise if sym.is_torus else spd.symmetric(noise)
    tangent = sym.tangent(params, generator)
    step = 1e-6
    forward, back = sym.act(params, sym.exp(step * generator)), sym.act(params, sym.exp(-step * generator))
    for name, value in tangent.items():
        assert torch.allclose(value, (forward[name] - back[name]) / (2 * step), atol=1e-7)
    form = sum((params[n] * tangent[n]).sum() for n in tangent)
    assert torch.allclose((generator * sym.charge(params)).sum(), form, rtol=1e-10, atol=1e-10)


@given(symmetries(), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_charges_are_covariant(case, seed):
    """K_leg -> G K G^T on plus legs and G^-T K G^-1 on minus legs."""
    sym, params = case
    g = sym.random_element(rng=rng(seed))
    moved = sym.grams({**params, **sym.act(params, g)})
    for leg, before, after in zip(sym.weight_legs, sym.grams(params), moved, strict=True):
        if sym.is_torus:
            expected = before * g ** (2 * leg.exponent)
        else:
            m = g if leg.sign > 0 else torch.linalg.inv(g).mT
            expected = m @ before @ m.mT
        assert torch.allclose(after, expected, rtol=1e-9)


@given(symmetries())
@settings(deadline=None, max_examples=60)
def test_serialisation_round_trip(case):
    sym, params = case
    again = Symmetry.from_dict(sym.to_dict())
    assert torch.equal(again.charge(params), sym.charge(params))
    assert str(again) == str(sym)


@given(symmetries())
@settings(deadline=None, max_examples=40)
def test_unfold_follows_the_index_row_by_row(case):
    sym, params = case
    for leg in sym.legs:
        p = params[leg.parameter] if leg.view is None else params[leg.parameter].reshape(leg.view)
        lead = p.permute(*leg.axes, *(a for a in range(p.ndim) if a not in leg.axes))
        rows = lead.reshape(int(np.prod([p.shape[a] for a in leg.axes])), -1)
        x = leg.unfold(params[leg.parameter]).reshape(leg.blocks, leg.dim, leg.replicas, -1)
        for b, i, r in np.ndindex(leg.index.shape):
            assert torch.equal(x[b, i, r], rows[leg.index[b, i, r]])
        if leg.dim == 1:
            sums = leg.row_sums(params[leg.parameter])
            assert torch.allclose(sums, x.sum(dim=(1, 2, 3)))


def test_grouped_heads_share_one_matrix():
    """Two query heads of one key/value head: each head's rows are moved by the same G."""
    index = np.arange(8).reshape(1, 2, 4).transpose(0, 2, 1)
    sym = Symmetry("qk", "attention-qk", "general_linear", (Leg("q", index),))
    q = torch.randn(8, 5, dtype=D, generator=rng(0))
    g = sym.random_element(rng=rng(1))
    moved = sym.act({"q": q}, g)["q"]
    assert torch.allclose(moved, torch.cat([g[0] @ q[:4], g[0] @ q[4:]]))


def test_wrong_leg_combinations_are_refused():
    a, b = Leg("a", np.arange(3).reshape(3, 1, 1)), Leg("b", np.arange(4).reshape(4, 1, 1))
    with pytest.raises(ValueError, match="disagree"):
        Symmetry("s", "f", "diagonal", (a, b))
    with pytest.raises(ValueError, match="dim 1"):
        Symmetry("s", "f", "diagonal", (Leg("a", np.arange(4).reshape(1, 4, 1)),))
    with pytest.raises(ValueError, match="no leg on a parameter"):
        Symmetry("s", "f", "diagonal", (Leg("a", np.arange(3).reshape(3, 1, 1), buffer=True),))


def test_buffers_move_but_carry_no_charge():
    index = np.arange(3).reshape(3, 1, 1)
    sym = Symmetry("bn", "one-sided", "diagonal", (Leg("w", index), Leg("var", index, power=2.0, buffer=True)))
    params = {"w": torch.ones(3, 2, dtype=D), "var": torch.ones(3, dtype=D)}
    g = torch.tensor([1.0, 2.0, 3.0], dtype=D)
    assert torch.equal(sym.act(params, g)["var"], g**2)
    assert torch.equal(sym.charge(params), torch.full((3,), 2.0, dtype=D))
    assert set(sym.act_on_gradients({"w": params["w"]}, g)) == {"w"}


@pytest.mark.parametrize(
    ("widths", "count"),
    [
        ([2, 2, 2], 3),
        ([2, 3, 2], 6),
        ([2, 5, 2], 14),
        ([2, 4, 1], 9),
        ([3, 4, 3, 2], 16),
        ([4, 2, 4, 2, 4], 16),
        ([3, 3, 3, 3], 12),
    ],
)
def test_independent_charges_of_linear_nets(widths, count):
    """theory.md section 11, from Marcotte et al. 2023."""
    shapes = {f"w{i}": (b, a) for i, (a, b) in enumerate(itertools.pairwise(widths))}
    syms = []
    for i, width in enumerate(widths[1:-1]):
        index = np.arange(width).reshape(1, width, 1)
        legs = (Leg(f"w{i}", index), Leg(f"w{i + 1}", index, -1, (1,)))
        syms.append(Symmetry(f"h{i}", "linear-linear", "general_linear", legs))
    assert SymmetrySet(tuple(syms), shapes=shapes).n_charges() == count


def test_translation_moves_along_its_direction_and_has_a_linear_charge():
    leg = Leg("w", np.arange(4).reshape(1, 4, 1))
    t = Translation("logits", "translation", leg)
    w = torch.randn(4, 3, dtype=D, generator=rng(3))
    shift = torch.randn(1, 3, dtype=D, generator=rng(4))
    moved = t.act({"w": w}, shift)["w"]
    assert torch.allclose(moved, w + shift)
    assert torch.allclose(t.charge({"w": moved}) - t.charge({"w": w}), 4 * shift)
    again = Translation.from_dict(t.to_dict())
    assert torch.equal(again.act({"w": w}, shift)["w"], moved)


def test_narrow_dtypes_accumulate_in_float32_and_return_their_own():
    sym = Symmetry("s", "f", "diagonal", (Leg("a", np.arange(3).reshape(3, 1, 1)),))
    a = torch.randn(3, 4096, generator=rng(0)).bfloat16()
    assert sym.charge({"a": a}).dtype == torch.float32
    assert torch.allclose(sym.charge({"a": a}), a.double().square().sum(1).float(), rtol=1e-5)
    assert sym.act({"a": a}, sym.random_element())["a"].dtype == torch.bfloat16


@given(st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_geometric_mean_solves_its_equation(n, seed):
    x, y = (torch.randn(2, n, n + 2, dtype=D, generator=rng(seed + k)) for k in (0, 1))
    x, y = x @ x.mT, y @ y.mT
    p = spd.geometric_mean(x, y)
    assert torch.allclose(p @ x @ p, y, rtol=1e-7, atol=1e-7)
    assert (torch.linalg.eigvalsh(p) > 0).all()


@given(st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_matrix_functions_agree_with_torch(n, seed):
    a = spd.symmetric(torch.randn(n, n, dtype=D, generator=rng(seed)))
    assert torch.allclose(spd.expm(a), torch.linalg.matrix_exp(a))
    assert torch.allclose(spd.logm(spd.expm(a)), a, atol=1e-10)
    assert torch.allclose(spd.sqrtm(spd.expm(a)) @ spd.sqrtm(spd.expm(a)), spd.expm(a))
    assert torch.allclose(spd.inv_sqrtm(spd.expm(a)), spd.expm(-a / 2))


def offset_gain(offset: float = 1.0) -> tuple[Symmetry, dict[str, Tensor]]:
    """`y = W ((offset + g) * x)`: what multiplies `offset + g` divides the columns of `W`."""
    legs = (
        Leg("g", np.arange(4).reshape(4, 1, 1), 1, offset=offset),
        Leg("w", np.arange(4).reshape(4, 1, 1), -1, (1,)),
    )
    params = {"g": torch.randn(4, dtype=D, generator=rng(1)), "w": torch.randn(3, 4, dtype=D, generator=rng(2))}
    return Symmetry("gain", "norm-gain", "diagonal", legs), params


@pytest.mark.parametrize("offset", [1.0, -1.0, 0.25])
def test_an_offset_leg_moves_the_weight_plus_its_offset(offset):
    sym, params = offset_gain(offset)
    element, x = sym.random_element(rng=rng(3)), torch.randn(4, dtype=D, generator=rng(4))
    moved = sym.act(params, element)
    assert torch.allclose(moved["g"], element * (params["g"] + offset) - offset)
    assert torch.allclose(moved["w"] @ ((offset + moved["g"]) * x), params["w"] @ ((offset + params["g"]) * x))
    assert torch.allclose(sym.act(moved, sym.inverse(element))["g"], params["g"])
    assert torch.allclose(sym.move_weight("g", params["g"], element), moved["g"])


def test_the_charge_of_an_offset_leg_and_its_tangent():
    sym, params = offset_gain()
    by_hand = (params["g"] + 1).square() - params["w"].square().sum(0)
    assert torch.allclose(sym.charge(params), by_hand)
    generator, step = torch.randn(4, dtype=D, generator=rng(5)), 1e-6
    ahead, behind = (sym.act(params, sym.exp(h * generator)) for h in (step, -step))
    for name, tangent in sym.tangent(params, generator).items():
        assert torch.allclose(tangent, (ahead[name] - behind[name]) / (2 * step), atol=1e-8)
    gradient = {n: torch.randn_like(p) for n, p in params.items()}
    assert torch.allclose(sym.form(gradient), gradient["g"].square() - gradient["w"].square().sum(0))


def test_an_offset_survives_json_and_low_precision():
    sym, params = offset_gain()
    again = Symmetry.from_dict(json.loads(json.dumps(sym.to_dict())))
    assert again.offsets == {"g": 1.0}
    low = {n: p.bfloat16() for n, p in params.items()}
    element = torch.full((4,), 1 + 2**-9, dtype=D)
    exact = element * (low["g"].double() + 1) - 1
    assert torch.equal(sym.act(low, element)["g"], exact.bfloat16()), "rounded once, at the end"
    with pytest.raises(ValueError, match=r"disagree on its offset: \[\('g', 0.0\), \('g', 1.0\)\]"):
        Symmetry("two", "declared", "diagonal", (sym.legs[0], dataclasses.replace(sym.legs[0], offset=0.0)))


def test_layers_and_parts_have_names():
    model = nn.Module()
    model.a, model.b = nn.Linear(3, 4), nn.Linear(4, 2)
    names = {"attention-qk": "head", "rotary-qk": "pair", "norm-gain": "channel", "rescaling": "unit"}
    for family, part in names.items():
        (s,) = nf.declare(model, "diagonal", [("a.weight", 0)], [("b.weight", 1)], family=family)
        assert (s.layer, s.part) == ("a", part)
    (s,) = nf.declare(model, "general_linear", [("a.weight", 0)], [("b.weight", 1)], family="linear-linear")
    assert s.part == "matrix"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (s,) = syms = nf.declare(model, "diagonal", [("a.weight", 0)], [("b.weight", 1)], family="rescaling")
    with nf.Ledger(model, optimizer, syms, detail="coordinate") as ledger:
        model.b(model.a(torch.ones(2, 3)).relu()).sum().backward()
        optimizer.step()
    assert [(row["layer"], row["part"]) for row in ledger.records("coordinate")] == [
        ("a", f"unit {i}") for i in range(4)
    ]


def test_squares_are_summed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leg Grams of a torus do not depend on how many entries are squared at a time; wide sums of narrow tensors."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    found = nf.declare(model, "diagonal", [("0.weight", 0)], [("1.weight", 1)])
    (s,) = found.symmetries
    for leg in s.weight_legs:
        tensor = model.get_parameter(leg.parameter).detach()
        own = 0 if leg.axes[0] == 0 else 1
        reference = torch.stack(
            [sum((v.double() ** 2 for v in tensor.select(own, k)), torch.zeros(())) for k in range(5)]
        )
        for piece in (1, 7, 1 << 16):
            monkeypatch.setattr("noetherflow.symmetry.leg.PIECE", piece)
            torch.testing.assert_close(s.leg_gram(leg, tensor, torch.float64), reference, rtol=1e-14, atol=0)
            assert s.leg_gram(leg, tensor).dtype == torch.float32


@pytest.mark.parametrize("piece", [1, 7, 40, 1 << 16])
@pytest.mark.parametrize(("shape", "view", "axes"), [
    ((6, 4), None, (0,)),
    ((4, 6), None, (1,)),
    ((6, 2, 3, 3), None, (0,)),
    ((2, 6, 3), None, (1,)),
    ((12, 5), (2, 6, 5), (1,)),
    ((6,), None, (0,)),
])  # fmt: skip
def test_functions_of_several_tensors_are_summed_piece_by_piece(
    shape: tuple[int, ...], view: tuple[int, ...] | None, axes: tuple[int, ...], piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Against a loop over entries, in every layout and with a factor by coordinate that takes no memory of its own."""
    monkeypatch.setattr("noetherflow.symmetry.leg.PIECE", piece)
    rng = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    values = torch.rand(6, generator=rng, dtype=torch.float64) + 0.5
    leg = Leg("w", np.arange(6).reshape(6, 1, 1), sign=-1, axes=axes, view=view)
    factor = leg.moved_by(a, values)
    found = leg.sums_by_piece(lambda x, y, f: (x * y * f, x.square()), [a, b, factor])
    expected = torch.zeros(2, 6, dtype=torch.float64)
    for where, x, y in zip(np.ndindex(view or shape), a.flatten(), b.flatten(), strict=True):
        k = where[axes[0]]
        expected[:, k] += torch.stack([x * y / values[k], x**2])
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-13, atol=1e-13)
