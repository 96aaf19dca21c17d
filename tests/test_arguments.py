"""What a user gets who passes the wrong thing: an error that names it and the way out, and objects that print."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import noetherflow as nf
from noetherflow.cli.app import app
from noetherflow.errors import NoetherflowError

torch.manual_seed(0)
X, Y = torch.randn(64, 20).double(), torch.randn(64, 5).double()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def network(width: int = 30) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 5)).double()


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.linear(x)
        return -self.linear(x)


NET = network()
SYMS = nf.find_symmetries(NET, X[:2])
MOMENTS = nf.gradient_moments(NET, loss, [(X, Y)], SYMS, entries=True)
SGD = nf.SGDConfig(lr=0.1, batch_size=8)

FLOW = nf.noether_flow(NET, SYMS, MOMENTS, SGD)
EQ = nf.noise_equilibrium(NET, SYMS, MOMENTS, SGD)
ADAM = torch.optim.Adam(NET.parameters())


def broken() -> nn.Sequential:
    net = copy.deepcopy(NET)
    with torch.no_grad():
        net[0].weight[3, 4] = torch.nan
    return net


OTHER = r"another model \(0.weight: \(31, 20\) instead of \(30, 20\)"
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "input width": (
        lambda: nf.find_symmetries(NET, torch.randn(2, 21)),
        r"itself fails .*2x21 and 20x30(.|\n)*\(2, 21\)",
    ),
    "keyword": (lambda: nf.find_symmetries(NET, {"inp": X}), "unexpected keyword argument 'inp'"),
    "name": (lambda: nf.find_symmetries("gpt2", X), "expected a torch.nn.Module, got 'gpt2'"),  # type: ignore[arg-type]
    "rate": (lambda: nf.noether_flow(NET, SYMS, MOMENTS, 0.1), r"sgd must be nf.SGDConfig\(.*got 0.1"),  # type: ignore[arg-type]
    "order": (lambda: nf.gradient_moments(NET, [(X, Y)], loss, SYMS), "got a list"),  # type: ignore[arg-type]
    "criterion": (lambda: nf.gradient_moments(NET, nn.MSELoss(), [(X, Y)], SYMS), "wrap a criterion"),
    "one batch": (lambda: nf.gradient_moments(NET, loss, (X, Y), SYMS), r"for a single batch: \[\(x, y\)\]"),
    "another model": (lambda: nf.noise_equilibrium(network(31), SYMS, MOMENTS, SGD), OTHER),
    "another model, moments": (lambda: nf.gradient_moments(network(31), loss, [(X, Y)], SYMS), OTHER),
    "another model, replicates": (lambda: nf.minibatch_moments(network(31), loss, [], SYMS, batch_size=8), OTHER),
    "another model, certificate": (lambda: nf.certify(network(31), SYMS, X[:2]), OTHER),
    "objective": (
        lambda: nf.noise_equilibrium(NET, SYMS, MOMENTS, SGD, objective="nois"),  # type: ignore[arg-type]
        r"'nois' is not one of noise\+decay, noise, norm, fisher, hessian, range; did you mean 'noise'\?",
    ),
    "statistic": (
        lambda: nf.standard_error(MOMENTS, lambda m: list(m.mean.values())),  # type: ignore[arg-type,return-value]
        "must return a tensor or a number, got a list",
    ),
    "no values": (
        lambda: nf.gradient_moments(copy.deepcopy(NET).to("meta"), loss, [(X, Y)], SYMS),
        r"'0.weight' \(30, 20\) is on 'meta'.*to_empty",
    ),
    "analysis": (lambda: nf.analyze(NET, loss, [(X, Y)], X[:2], SGD), r"sgd must be nf.SGDConfig\(.*got tensor"),  # type: ignore[arg-type]
    "swapped, flow": (lambda: nf.noether_flow(NET, MOMENTS, SYMS, SGD), "syms must be .*got GradientMoments"),  # type: ignore[call-overload]
    "swapped, settings": (lambda: nf.noise_equilibrium(NET, SYMS, SGD, MOMENTS), "mom must be .*got SGDConfig"),  # type: ignore[arg-type]
    "rate, equilibrium": (lambda: nf.noise_equilibrium(NET, SYMS, MOMENTS, 0.1), "sgd must be .*got 0.1"),  # type: ignore[arg-type]
    "no model": (lambda: nf.noether_flow(None, SYMS, MOMENTS, SGD), "model must be .*got NoneType"),  # type: ignore[call-overload]
    "no symmetries": (lambda: nf.gradient_moments(NET, loss, [(X, Y)], None), "syms must be .*got NoneType"),  # type: ignore[arg-type]
    "no symmetries, replicates": (
        lambda: nf.minibatch_moments(NET, loss, [(X, Y)], None, batch_size=64),  # type: ignore[arg-type]
        "syms must be .*got NoneType",
    ),
    "no batches": (lambda: nf.gradient_moments(NET, loss, None, SYMS), "batches must be .*got NoneType"),  # type: ignore[arg-type]
    "a tensor of batches": (lambda: nf.gradient_moments(NET, loss, X, SYMS), "batches must be .*got one Tensor"),
    "loose tensors": (
        lambda: nf.gradient_moments(NET, loss, [X, Y], SYMS),
        r"shapes \[\(64, 20\), \(64, 5\)\], each taken for a batch.*\[\(x, y\)\]",
    ),
    "loose tensors, replicates": (
        lambda: nf.minibatch_moments(NET, loss, [X, Y], SYMS, batch_size=64),
        r"each taken for a batch.*\[\(x, y\)\]",
    ),
    "a step": (lambda: FLOW.forecast(100), r"steps must be a sequence.*forecast\(\[0, 100\]\), got 100"),  # type: ignore[arg-type]
    "swapped, certificate": (lambda: nf.certify(NET, X[:2], SYMS), "syms must be .*got Tensor"),  # type: ignore[arg-type]
    "swapped, balance": (lambda: nf.balance_(EQ, NET), "model must be .*got Equilibrium"),  # type: ignore[arg-type]
    "no equilibrium": (lambda: nf.balance_(NET, None), "eq must be .*got NoneType"),  # type: ignore[arg-type]
    "inputs for an optimiser": (lambda: nf.balance_(NET, EQ, X), "optimizer must be .*got Tensor"),  # type: ignore[arg-type]
    "NaN, flow": (lambda: nf.noether_flow(broken(), SYMS, MOMENTS, SGD), "'0.weight' holds NaN; noether_flow"),
    "NaN, norm": (
        lambda: nf.noise_equilibrium(broken(), SYMS, None, objective="norm"),
        "'0.weight' holds NaN; noise_equilibrium",
    ),
    "NaN, balance": (lambda: nf.balance_(broken(), EQ, example_inputs=X), "'0.weight' holds NaN; balance_"),
    "NaN, state": (lambda: nf.noether_flow(broken(), SYMS, optimizer=ADAM), "'0.weight' holds NaN; noether_flow"),
    "branch": (lambda: nf.find_symmetries(Branch(), X[:2]), r"test_arguments.py:\d+: if x.sum\(\) > 0:\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_error_names_what_is_wrong(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    call, text = WRONG[what]
    with pytest.raises(NoetherflowError, match=text):
        call()
    assert capfd.readouterr().err == "", "torch's own log of the failure is not shown"


def verbs() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every verb with right arguments by name; each must refuse None in place of any of them."""
    data = [(X, Y)]
    found = {"model": NET, "syms": SYMS}
    measuring = {**found, "loss_fn": loss, "batches": data}
    theory = {**found, "mom": MOMENTS, "sgd": SGD}
    curved = {"model": NET, "loss_fn": loss, "batches": data}
    return {
        "find": (nf.find_symmetries, {"model": NET, "example_inputs": X}),
        "count": (nf.count_symmetries, {"model": NET, "example_inputs": X}),
        "certify": (nf.certify, {**found, "example_inputs": X}),
        "declare": (nf.declare, {"model": NET, "kind": "diagonal", "plus": [("0.weight", 0)], "minus": []}),
        "moments": (nf.gradient_moments, measuring),
        "factors": (nf.gradient_factors, measuring),
        "minibatches": (lambda **given: nf.minibatch_moments(**given, batch_size=8), measuring),
        "activations": (nf.activation_moments, {**found, "batches": [X]}),
        "curvature": (nf.curvature_moments, measuring),
        "eigenvalue": (nf.top_eigenvalue, curved),
        "flow": (nf.noether_flow, theory),
        "equilibrium": (nf.noise_equilibrium, theory),
        "sharpness": (nf.sharpness_forecast, {**curved, "eq": EQ, "flow": FLOW}),
        "balance": (nf.balance_, {"model": NET, "eq": EQ}),
        "move": (nf.move_, {**found, "elements": {}}),
        "gains": (nf.gains_to_one, found),
        "align": (nf.align, {"model_a": NET, "model_b": NET, "syms": SYMS}),
        "distance": (nf.orbit_distance, {"model_a": NET, "model_b": NET, "syms": SYMS}),
        "ledger": (nf.Ledger, {**found, "optimizer": ADAM}),
        "error": (nf.standard_error, {"moments": MOMENTS, "statistic": lambda m: 0.0}),
        "save": (lambda moments: nf.save_moments(moments, "unwritten"), {"moments": MOMENTS}),
        "smoothing": (nf.smoothing, {"activations": nf.activation_moments(NET, [X], SYMS)}),
        "settings": (nf.optimizer_config, {"optimizer": ADAM, "batch_size": 8}),
        "criterion": (nf.per_sample, {"criterion": nn.MSELoss()}),
        "run": (nf.diagnose_run, {"run": "nowhere"}),
    }


VERBS = verbs()
OPTIONAL = ("declare/minus", "declare/kind", "declare/plus")
MISSING = [f"{verb}/{name}" for verb, (_, given) in VERBS.items() for name in given if f"{verb}/{name}" not in OPTIONAL]


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_argument_is_refused_by_name(what: str) -> None:
    verb, name = what.split("/")
    call, given = VERBS[verb]
    with pytest.raises(NoetherflowError) as caught:
        call(**{**given, name: None})
    assert "None" in str(caught.value) or name in str(caught.value) or "moments" in str(caught.value), caught.value


@pytest.mark.parametrize("optimizer", ["adam", NET, X, {"lr": 0.1}])
def test_what_is_no_optimiser_is_refused(optimizer: Any) -> None:
    with pytest.raises(NoetherflowError, match="optimizer must be a torch optimiser"):
        nf.balance_(copy.deepcopy(NET), EQ, optimizer)
    with pytest.raises(NoetherflowError, match="expected a torch optimiser"):
        nf.optimizer_config(optimizer, 8)


def test_results_show_as_tables_in_a_notebook() -> None:
    flow = nf.noether_flow(NET, SYMS, MOMENTS, SGD)
    for result in (SYMS, SYMS[0], MOMENTS, flow, nf.noise_equilibrium(NET, SYMS, MOMENTS, SGD), flow.forecast([0, 1])):
        assert repr(result) == str(result)
        assert len(repr(result)) < 1200
    lines = str(flow.forecast([0, 1])).splitlines()[1:]
    assert lines[0].endswith("+-: standard error of the measurement")
    assert lines[1].split() == ["symmetry", "0", "1"]
    charge = SYMS[0].charge({n: p.detach() for n, p in NET.named_parameters()})
    assert float(lines[2].split()[-2]) == pytest.approx(float(charge.norm()), 1e-3)


def test_models_and_batches_made_under_inference_mode_are_named() -> None:
    with torch.inference_mode():
        made, inputs = network(), X.clone()
    own = "made under torch.inference_mode.*copy.deepcopy"
    for call in (
        lambda: nf.gradient_moments(made, loss, [(X, Y)], SYMS),
        lambda: nf.minibatch_moments(made, loss, [(X, Y)], SYMS, batch_size=64),
        lambda: nf.gradient_moments(NET, loss, [(inputs, Y)], SYMS),
        lambda: nf.minibatch_moments(NET, loss, [(inputs, Y)], SYMS, batch_size=64),
        lambda: nf.balance_(made, nf.noise_equilibrium(made, SYMS, None, objective="norm"), example_inputs=X),
    ):
        with pytest.raises(NoetherflowError, match=own):
            call()
    copied = copy.deepcopy(made)
    assert nf.gradient_moments(copied, loss, [(X, Y)], SYMS).samples == 64
    assert nf.balance_(copied, nf.noise_equilibrium(copied, SYMS, None, objective="norm"), example_inputs=X).moved


def test_a_checkpoint_file_without_a_model_is_named(tmp_path: Path) -> None:
    torch.save({"model": NET.state_dict(), "optimizer": ADAM.state_dict()}, tmp_path / "run.pt")
    result = CliRunner().invoke(app, ["flow", str(tmp_path / "run.pt")])
    assert result.exit_code == 2
    assert "does not say what the model is" in " ".join(result.output.replace("│", " ").split())


def test_a_criterion_is_refused_by_every_measurement_with_the_way_to_wrap_it() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    data, criterion = [(torch.randn(8, 3), torch.randint(2, (8,)))], nn.CrossEntropyLoss()
    syms = nf.find_symmetries(net, data[0][0])
    for measure in (
        lambda: nf.minibatch_moments(net, criterion, data, syms, batch_size=8),
        lambda: nf.gradient_moments(net, criterion, data, syms),
        lambda: nf.curvature_moments(net, criterion, data, syms),
    ):
        with pytest.raises(NoetherflowError, match="wrap a criterion with reduction='none'"):
            measure()


def test_arrays_in_place_of_tensors_are_named_and_not_printed() -> None:
    net = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(NoetherflowError, match=r"ndarray of shape \(4, 64\) \(no tensor: torch.as_tensor") as caught:
        nf.find_symmetries(net, np.zeros((4, 64)))
    assert len(str(caught.value)) < 400
