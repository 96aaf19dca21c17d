"""`align` against known truths (a moved and permuted copy) and brute force on a small network."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.balance.motion import Motion
from noetherflow.balance.units import permutable_units, write
from noetherflow.errors import CertificateError, CheckpointError, DataError
from test_move import gemma
from zoo import ZOO, output_of
from zoo import call as run

D = torch.float64
PERMUTABLE = {
    "mlp": ["0 -> 2", "2 -> 4"],
    "cnn_batchnorm": ["1 -> 3", "4 -> 8"],
    "llama": ["model.layers.0.mlp.up_proj -> model.layers.0.mlp.down_proj"],
    "layernorm_mlp": [],
    "gpt2": [],
    "gemma": [f"model.layers.{i}.mlp.up_proj -> model.layers.{i}.mlp.down_proj" for i in range(2)],
}
"""By hand: hidden units behind relu, normalised channels with the convolution before them, gated units with their
gates; not the channels of a norm in front of which is something else, not units behind gelu, which have no symmetry.
"""


def net(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def data(width: int, count: int = 32) -> Tensor:
    return torch.randn(count, width, dtype=D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PERMUTABLE)
def test_a_moved_and_permuted_copy_comes_back(name: str) -> None:
    case = {**ZOO, "gemma": gemma}[name]().double()
    rounding = 1e-5 if name == "gemma" else 1e-9  # its norms compute in float32
    syms = nf.find_symmetries(case.model, case.inputs)
    units = permutable_units(case.model, syms, case.inputs)
    assert [u.name for u in units] == PERMUTABLE[name]
    other, rng = copy.deepcopy(case.model), torch.Generator().manual_seed(2)
    orders = [torch.randperm(u.count, generator=rng) for u in units]
    write(nf.tensors_of(other), Motion((), {}, tuple(u.reordering(o) for u, o in zip(units, orders, strict=True))))
    for s in syms:
        if s.eps is None:
            s.act_(nf.tensors_of(other), s.random_element(0.4, rng))
    with torch.no_grad():
        before = output_of(run(case.model, case.inputs))
        torch.testing.assert_close(output_of(run(other, case.inputs)), before, rtol=rounding, atol=rounding)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-4, momentum=0.9)
    case.loss_fn(other, case.batch).mean().backward()
    found = nf.align(case.model, other, syms)
    assert found.distance_before > 0.1 * found.norm
    assert found.distance < 1e-9 * found.norm
    assert nf.orbit_distance(other, case.model, syms) < 1e-9 * found.norm
    report = found.move_(other, optimizer, tolerance=rounding)
    assert report.output_change is not None
    for n, t in nf.tensors_of(case.model).items():
        torch.testing.assert_close(nf.tensors_of(other)[n].detach(), t.detach(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_state_and_gradients_move_along(kind: type[torch.optim.Optimizer]) -> None:
    """After the move a twin that lived there has the same momentum, squares and gradient."""
    options = {"lr": 0.0} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    averages = ("momentum_buffer",) if kind is torch.optim.SGD else ("exp_avg", "exp_avg_sq")
    model, x = net(4, 6, 3), data(4)
    syms = nf.find_symmetries(model, x)
    (units,) = permutable_units(model, syms, x)
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(2)
    write(nf.tensors_of(other), Motion((), {}, (units.reordering(torch.randperm(6, generator=rng)),)))
    syms[0].act_(nf.tensors_of(other), syms[0].random_element(0.4, rng))
    optimizers = []
    for m in (model, other):
        optimizers.append(kind(m.parameters(), **options))
        for _ in range(2):
            optimizers[-1].zero_grad()
            m(x).square().sum(1).mean().backward()
            optimizers[-1].step()
    report = nf.align(model, other, syms).move_(other, optimizers[1])
    assert report.gradients == 4 - 1  # the last bias has no leg
    assert report.state_entries == 3 * len(averages)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-11)
        for key in averages:
            kept = (o.state[t][key] for o, t in zip(optimizers, (p, q), strict=True))
            torch.testing.assert_close(*kept, rtol=1e-9, atol=1e-14)


def brute_force(a: nn.Sequential, b: nn.Sequential) -> float:
    """Every permutation of one hidden layer; for each the best scales by a general minimiser from several starts."""
    w, c, v = (t.detach().numpy() for t in (a[0].weight, a[0].bias, a[2].weight))
    rest = float((a[2].bias - b[2].bias).detach().square().sum())
    best = float("inf")
    for order in itertools.permutations(range(len(c))):
        x, y, z = (t.detach().numpy() for t in (b[0].weight, b[0].bias, b[2].weight))
        x, y, z = x[list(order)], y[list(order)], z[:, list(order)]

        def squared(logs, x=x, y=y, z=z):
            import numpy as np

            p = np.exp(logs)
            return ((w - p[:, None] * x) ** 2).sum() + ((c - p * y) ** 2).sum() + ((v - z / p) ** 2).sum()

        ends = [minimize(squared, [start] * len(c), method="BFGS").fun for start in (0.0, -0.7, 0.7)]
        best = min(best, *ends)
    return (best + rest) ** 0.5


@pytest.mark.parametrize("seed", range(4))
def test_unrelated_networks_get_as_close_as_brute_force_finds(seed: int) -> None:
    a, b, x = net(3, 4, 2, seed=seed), net(3, 4, 2, seed=100 + seed), data(3)
    found = nf.align(a, b, nf.find_symmetries(a, x))
    want = brute_force(a, b)
    assert found.distance < found.distance_before
    assert found.distance <= 1.1 * want
    assert found.distance >= want * (1 - 1e-6)


def test_scales_alone_are_the_best_scales() -> None:
    a, b, x = net(3, 5, 2, seed=1), net(3, 5, 2, seed=2), data(3)
    syms = nf.find_symmetries(a, x)
    found = nf.align(a, b, syms, permutations=False)
    assert not found.reorderings

    def squared(logs: Tensor) -> float:
        moved = syms[0].act(nf.tensors_of(b), torch.as_tensor(logs).exp())
        moved["2.bias"] = b[2].bias
        return float(sum((nf.tensors_of(a)[n] - t).square().sum() for n, t in moved.items()).detach())

    ends = [minimize(squared, [start] * 5, method="BFGS", options={"gtol": 1e-8}).fun for start in (0.0, -0.5, 0.5)]
    assert found.distance == pytest.approx(min(ends) ** 0.5, rel=1e-5)


def test_matrices_of_a_linear_bottleneck_meet() -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5)).double()
    b, x = copy.deepcopy(a), data(6)
    syms = nf.find_symmetries(a, x)
    nf.move_(b, syms, {syms[0].name: torch.randn(1, 3, 3, dtype=D, generator=torch.Generator().manual_seed(5))})
    found = nf.align(a, b, syms)
    assert found.distance < 1e-9 < found.distance_before
    assert found.move_(b).output_change < 1e-10


def test_equal_models_stay() -> None:
    model, x = net(3, 4, 2), data(3)
    found = nf.align(model, copy.deepcopy(model), nf.find_symmetries(model, x))
    assert found.distance == found.distance_before == 0
    assert not found.elements
    assert not found.reorderings
    assert "0 units change places" in str(found)
    assert found.to_dict()["distance"] == 0


def test_what_cannot_be_aligned_is_refused() -> None:
    model, x = net(3, 4, 2), data(3)
    syms = nf.find_symmetries(model, x)
    with pytest.raises(ValueError, match="another model"):
        nf.align(model, net(3, 5, 2), syms)
    with pytest.raises(DataError, match="differ in"):
        nf.align(model, nn.Sequential(*copy.deepcopy(model), nn.Linear(2, 2)).double(), syms)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        nf.align(model, broken, syms)
    with pytest.raises(DataError, match="example_inputs"):
        nf.align(model, net(3, 4, 2, seed=1), type(syms).from_json(syms.to_json()))


def test_an_alignment_of_other_models_is_refused() -> None:
    """Behind tanh units have no positive scale: the move changes the outputs, and all is put back."""
    a, b, x = net(3, 4, 2), net(3, 4, 2, seed=1), data(3)
    found = nf.align(a, b, nf.find_symmetries(a, x))
    wrong = nn.Sequential(copy.deepcopy(b[0]), nn.Tanh(), copy.deepcopy(b[2]))
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(CertificateError, match="more than the tolerance"):
        found.move_(wrong)
    assert all(torch.equal(before[n], t) for n, t in wrong.state_dict().items())


def test_files_come_together_as_models_do(tmp_path: Path) -> None:
    """A permuted and scaled copy in a file, its optimiser's state with it: what is written is the model moved."""
    model, x = net(4, 6, 5, 3), data(4)
    syms = nf.find_symmetries(model, x)
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(3)
    units = permutable_units(model, syms, x)
    orders = [torch.randperm(u.count, generator=rng) for u in units]
    write(nf.tensors_of(other), Motion((), {}, tuple(u.reordering(o) for u, o in zip(units, orders, strict=True))))
    nf.move_(other, syms, {s.name: s.random_element(0.4, rng) for s in syms})
    optimizer = torch.optim.AdamW(other.named_parameters(), lr=1e-4)
    other(x).square().mean().backward()
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    torch.save({"net": other.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "b.pt")
    outline = net(4, 6, 5, 3, seed=9)
    dry = nf.align_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt", outline, syms, dry_run=True)
    assert not (tmp_path / "c.pt").exists()
    found = nf.align_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt", outline, syms)
    assert dry.alignment.distance == found.alignment.distance < 0.01 * found.alignment.distance_before
    assert found.report.state_entries == 10
    nf.align(model, other, syms).move_(other, optimizer)
    stored = torch.load(tmp_path / "c.pt")
    for name, t in other.state_dict().items():
        torch.testing.assert_close(stored["net"][name], t, rtol=1e-14, atol=0)
    for number, entries in optimizer.state_dict()["state"].items():
        for entry, t in entries.items():
            torch.testing.assert_close(stored["optimizer"]["state"][number][entry], t, rtol=1e-14, atol=0)
    scaled = nf.align_checkpoint(
        tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "d.pt", outline, syms, permutations=False, dry_run=True
    )
    assert scaled.alignment.distance > 10 * found.alignment.distance
    torch.save(net(4, 6, 5, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="other"):
        nf.align_checkpoint(tmp_path / "other.pt", tmp_path / "b.pt", tmp_path / "d.pt", outline, syms)
    with pytest.raises(CheckpointError, match="could not write"):
        nf.align_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "a.pt" / "d.pt", outline, syms)
    assert not (tmp_path / "d.pt").exists()


def test_the_command_brings_a_moved_llama_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from typer.testing import CliRunner

    from noetherflow.cli.app import app

    case = ZOO["llama"]().double()
    case.model.save_pretrained(tmp_path / "a", max_shard_size="3KB")
    kept = {n: t.clone() for n, t in case.model.state_dict().items()}
    syms = nf.find_symmetries(case.model, case.inputs)
    rng = torch.Generator().manual_seed(0)
    nf.move_(case.model, syms, {s.name: s.random_element(0.3, rng) for s in syms if s.eps is None})
    case.model.save_pretrained(tmp_path / "b", max_shard_size="3KB")
    words = ["align", str(tmp_path / "a"), str(tmp_path / "b")]
    assert CliRunner().invoke(app, words).exit_code == 2
    shown = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "c")])
    assert shown.exit_code == 0, shown.output
    assert "distance" in shown.output
    assert f"written to {tmp_path / 'c'}" in shown.output.replace("\n", "")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=D)
    far = max(float((case.model.state_dict()[n] - t).abs().max()) for n, t in kept.items())
    assert far > 0.1
    for n, t in again.state_dict().items():
        torch.testing.assert_close(t, kept[n], rtol=1e-8, atol=1e-9)
