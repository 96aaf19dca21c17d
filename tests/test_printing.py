"""Printed results: aligned tables, one vocabulary, and a legend under each that explains its columns."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.core.printing import MEANING, Table, count, legend, show, table, transposed
from noetherflow.core.terminal import rich_table
from noetherflow.equilibrium.state_result import StateFlow
from noetherflow.report.analysis import analysis_sections


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


@pytest.fixture(scope="module")
def analysis() -> nf.Analysis:
    """A scale in front of a LayerNorm, which grows for ever, and a torus behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, y = torch.randn(32, 4).double(), torch.randn(32, 2).double()
    return nf.analyze(model, loss, [(x, y)], nf.SGDConfig(0.1, 4), x[:4])


def of_a_run() -> StateFlow:
    """The flow of a net from the state of its optimiser after one step."""
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(8, 4).double()).square().sum().backward()
    optimizer.step()
    syms = nf.declare(net, "diagonal", [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])
    return nf.noether_flow(net, syms, optimizer=optimizer)


def columns(text: str) -> set[str]:
    """Everything in a printed table or legend, between runs of two spaces."""
    return {cell for line in text.splitlines() for cell in re.split(r"\s{2,}", line.strip())}


def test_tables_are_aligned_and_explained() -> None:
    rows = [{"family": "rescaling", "charge": 1234.5}, {"family": "gated", "charge": None}]
    head, first, second, *below = table(rows, "charge", "–").splitlines()
    assert (head, first, second) == ("family     charge", "rescaling   1,234", "gated           –")
    assert " ".join(line.strip() for line in below) == legend("charge", "–")
    assert all(line.startswith("  ") for line in below)
    assert transposed(rows) == [{"family": "charge", "rescaling": 1234.5, "gated": None}]
    assert [count(n, "symmetry", "symmetries") for n in (0, 1, 2000)] == [
        "0 symmetries",
        "1 symmetry",
        "2,000 symmetries",
    ]


def test_one_quantity_has_one_name_in_every_table(analysis: nf.Analysis) -> None:
    flow = {row["family"]: row for row in transposed(analysis.flow.families())}
    page = {section.heading: section for section in analysis_sections(analysis)}
    assert set(flow) < {row["family"] for row in page["Noether flow"].table}
    assert set(flow) <= columns(str(analysis.flow))
    on_page = {key for section in page.values() for row in section.table for key in row} | set(flow)
    printed = columns(f"{analysis.certificate}\n{analysis.equilibrium}\n{analysis.symmetries}\n{analysis.moments}")
    for name in ("outputs changed by", "gradients off by", "largest factor", "family", "blocks", "charges"):
        assert name in printed & on_page
    curvature = dataclasses.replace(analysis.moments, kind="hessian")
    scales = analysis.moments.noise_scale()
    everything = f"{analysis}\n{analysis.moments}\n{curvature}\n{of_a_run()}\n{scales}" + "".join(
        s.prose for s in page.values()
    )
    for name, meaning in MEANING.items():
        assert f"{name}: {meaning}" in " ".join(everything.split()), f"no table explains {name}"


def test_what_never_settles_has_no_equilibrium_charge_and_no_flow_of_zero(analysis: nf.Analysis) -> None:
    rows = {row["family"]: row for row in analysis.rows()}
    grows, settles = rows["one-sided"], rows["norm-gain"]
    for name in ("equilibrium charge, others held", "equilibrium charge, joint", "imbalance", "relaxation (steps)"):
        assert grows[name] is None
        assert settles[name] is not None
    assert grows["coordinates without equilibrium"] == 1
    (row,) = [r for r in analysis.flow.rows() if r["family"] == "one-sided"]
    assert row["equilibrium_charge"] is row["imbalance"] is None


def test_legs_are_named_in_the_moments(analysis: nf.Analysis) -> None:
    (symmetry,) = [s for s in analysis.symmetries if s.family == "norm-gain"]
    (line,) = [t for t in str(analysis.moments).splitlines() if t.startswith(symmetry.name)]
    traces = analysis.moments.to_dict()["traces"][symmetry.name]
    expected = [f"{leg.label} {show(t)}" for leg, t in zip(symmetry.weight_legs, traces, strict=True)]
    assert line.split("  ", 1)[1].strip() == "  ".join(expected)
    assert {leg.label for leg in symmetry.weight_legs} == {"+1.weight", "+1.bias", "-3.weight"}


def test_a_decay_of_zero_is_not_named(analysis: nf.Analysis) -> None:
    first, *_ = str(analysis.equilibrium).splitlines()
    assert first.startswith("noise equilibrium of 2 symmetries: converged in ")


def test_no_symmetry_prints_how_to_ask_why() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2))
    syms = nf.find_symmetries(model, torch.randn(2, 3))
    assert str(syms).startswith("no continuous symmetry found; nf.explain(model, example_inputs, '0.weight')")
    assert "passes softplus" in nf.explain(model, torch.randn(2, 3), "0.weight")


ROWS = [{"family": "rescaling", "max_change": 1234.5, "note": None}, {"family": "a<b", "max_change": None, "new": 2}]


def test_one_table_is_drawn_as_text_html_and_in_the_terminal() -> None:
    """Columns of every row, a dash for what is missing, numbers to the right wherever the table is drawn."""
    drawn = Table.of(ROWS)
    assert drawn.names == ("family", "max_change", "note", "new")
    assert drawn.numeric == (False, True, True, True)
    assert drawn.rows == (("rescaling", "1,234", "–", "–"), ("a<b", "–", "–", "2"))
    head, first, second = drawn.text().splitlines()
    assert head == "family     max_change  note  new"
    assert (first, second) == ("rescaling       1,234     –    –", "a<b                 –     –    2")
    html = drawn.html()
    assert "<th>family</th>" in html
    assert '<th class="number">max_change</th>' in html
    assert '<td>a&lt;b</td><td class="number">–</td>' in html
    assert html.count("<tr>") == 3
    in_terminal = rich_table(drawn, "1 more")
    assert [column.header for column in in_terminal.columns] == ["family", "max change", "note", "new"]
    assert [column.justify for column in in_terminal.columns] == ["left", "right", "right", "right"]
    assert [str(cell) for cell in in_terminal.columns[0].cells] == ["rescaling", "a<b"]
    assert in_terminal.caption == "1 more"


def test_a_table_without_rows_is_empty() -> None:
    assert Table.of([]).text() == ""
    assert table([]).strip() == ""
