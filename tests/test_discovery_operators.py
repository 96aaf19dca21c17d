"""One operator at a time: the symmetries of small models around it, against the number by hand and the oracle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from noetherflow import SymmetrySet
from noetherflow.discovery import certify, count_symmetries, find_symmetries
from noetherflow.discovery.expand import expanded
from noetherflow.discovery.export import export, operator_name
from operator_zoo import OPERATORS, Around, Net

COVERAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
ROWS = {
    cells[0]: cells[1:]
    for line in COVERAGE.read_text().partition("### One operator at a time")[2].partition("\n## ")[0].splitlines()
    if len(cells := [c.strip() for c in line.strip("|").split("|")]) == 6
}
"""Rows of the table in docs/coverage.md by model."""
FAST = [n for n in OPERATORS if n in ROWS or n.startswith("control")]
SLOW = [n for n in OPERATORS if n not in FAST]


def dimension(syms: SymmetrySet) -> int:
    """`d^2` per GL(d), 1 per scale."""
    return sum(s.blocks if s.is_torus else s.blocks * s.dim**2 for s in syms)


def row(syms: SymmetrySet) -> list[str]:
    """Families with their blocks, symmetric generators and axis shifts, as the table has them."""
    blocks: Counter[str] = Counter()
    for s in syms:
        blocks[f"{s.family} {s.kind if s.is_torus else f'GL({s.dim})'}"] += s.blocks
    generators = sum(s.blocks if s.is_torus else s.blocks * s.dim * (s.dim + 1) // 2 for s in syms)
    families = ", ".join(f"{name} x{count}" for name, count in blocks.items())
    return [families, str(generators), str(sum(t.leg.dim > 1 for t in syms.translations))]


@pytest.mark.parametrize("name", FAST + [pytest.param(n, marks=pytest.mark.slow) for n in SLOW])
def test_the_group_has_the_dimension_counted_by_hand(name: str) -> None:
    case = OPERATORS[name]()
    syms = find_symmetries(case.model, case.inputs)
    assert dimension(syms) == case.dimension, syms
    assert syms.unknown == ()
    if name in ROWS:
        assert row(syms) == ROWS[name][:3]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_no_certificate_is_broken(name: str) -> None:
    case = OPERATORS[name]()
    syms = find_symmetries(case.model, case.inputs)
    assert certify(case.model, syms, case.inputs).broken == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in OPERATORS if n in ROWS])
def test_the_oracle_counts_what_the_table_says(name: str) -> None:
    case = OPERATORS[name]()
    oracle = count_symmetries(case.model, case.inputs).symmetries
    generators, shifts, counted, unexplained = ROWS[name][1:]
    assert oracle == int(counted) == int(generators) + int(shifts) + int(unexplained or 0)


def test_the_table_names_models_that_exist() -> None:
    assert len(ROWS.keys() - {"model", "---"}) > 40
    assert ROWS.keys() - {"model", "---"} <= OPERATORS.keys()


def _operators(case: Around) -> set[str]:
    names = [operator_name(n) for n in export(case.model, case.inputs).nodes if n.op == "call_function"]
    return {name.split(".")[1] for name in names if name.startswith("aten.")}


def test_operators_without_a_rule_are_written_out_and_others_stay() -> None:
    cell = _operators(OPERATORS["GRUCell"]())
    assert "gru_cell" not in cell
    assert {"linear", "sigmoid", "tanh"} <= cell
    assert "gru" in _operators(OPERATORS["GRU"]())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own export copies an outdated tree
def test_a_program_of_known_operators_is_returned_as_it_is() -> None:
    net = Net(lambda s, x: s.a(x).relu(), {"a": torch.nn.Linear(3, 4)})
    program = torch.export.export(net, (torch.randn(2, 3),)).run_decompositions({})
    assert expanded(program) is program


class Reduced(torch.nn.Module):
    def __init__(self, last):
        super().__init__()
        self.a, self.o, self.last = torch.nn.Linear(3, 4), torch.nn.Linear(1, 2), last

    def forward(self, x):
        return self.o(self.last(self.a(x)))


@pytest.mark.parametrize(
    "last",
    [
        lambda h: h.sum().reshape(1, 1),
        lambda h: h.mean()[None],
        lambda h: h.norm().view(1),
        lambda h: h.sum().expand(1),
        lambda h: torch.stack([h.sum()]),
        lambda h: torch.trace(h[:, :3].mT @ h[:, :3])[None],
    ],
    ids=["reshape", "index", "view", "expand", "stack", "trace"],
)
def test_numbers_are_put_back_into_tensors(last):
    model, x = Reduced(last).double(), torch.randn(5, 3, dtype=torch.float64)
    syms = find_symmetries(model, x)
    assert syms.n_charges() >= 1
    assert {row.verdict for row in certify(model, syms, x)} <= {"exact"}
