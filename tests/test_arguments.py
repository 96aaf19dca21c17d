"""What a user gets who passes the wrong thing: an error that names it and the way out, and objects that print."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.errors import NoetherflowError

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
        r"'nois' is not one of noise\+decay, noise, norm, fisher, hessian; did you mean 'noise'\?",
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
    "branch": (lambda: nf.find_symmetries(Branch(), X[:2]), r"test_arguments.py:\d+: if x.sum\(\) > 0:\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_error_names_what_is_wrong(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    call, text = WRONG[what]
    with pytest.raises(NoetherflowError, match=text):
        call()
    assert capfd.readouterr().err == "", "torch's own log of the failure is not shown"


def test_results_show_as_tables_in_a_notebook() -> None:
    flow = nf.noether_flow(NET, SYMS, MOMENTS, SGD)
    for result in (SYMS, SYMS[0], MOMENTS, flow, nf.noise_equilibrium(NET, SYMS, MOMENTS, SGD), flow.forecast([0, 10])):
        assert repr(result) == str(result)
        assert len(repr(result)) < 1000
    lines = str(flow.forecast([0, 10])).splitlines()
    assert lines[0].endswith("+-: standard error of the measurement")
    assert lines[1].split() == ["symmetry", "0", "10"]
    charge = SYMS[0].charge({n: p.detach() for n, p in NET.named_parameters()})
    assert float(lines[2].split()[-2]) == pytest.approx(float(charge.norm()), 1e-3)
