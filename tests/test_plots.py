"""Results draw themselves, become data frames and notebook tables, and print quietly."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.core.printing import grouped
from noetherflow.core.shown import ROWS, Shown
from noetherflow.equilibrium.regime import Regime
from noetherflow.errors import DataError, MissingExtraError
from noetherflow.report import curves, drawings, plots
from noetherflow.report.curves import courses_of
from noetherflow.report.drawings import fastest, sides_of
from noetherflow.report.labels import chart_labels, labels_of, short
from noetherflow.report.network_map import network_map

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return (model(x) - y).square().sum(1)


@pytest.fixture(scope="module")
def world() -> types.SimpleNamespace:
    """A net with a torus and a scale, its analysis, and a training that a ledger has watched."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, y = torch.randn(64, 4).double(), torch.randn(64, 2).double()
    sgd = nf.SGDConfig(0.01, 4)
    analysis = nf.analyze(net, loss, [(x, y)], sgd, x[:4])
    forecast = analysis.flow.forecast([0, 10, 20])
    optimizer = torch.optim.SGD(net.parameters(), lr=sgd.lr)
    ledger = nf.Ledger(net, optimizer, analysis.symmetries, detail="symmetry", every=1).attach()
    for _ in range(25):
        chosen = torch.randint(64, (4,))
        optimizer.zero_grad()
        loss(net, (x[chosen], y[chosen])).mean().backward()
        optimizer.step()
    ledger.close()
    return types.SimpleNamespace(analysis=analysis, forecast=forecast, ledger=ledger)


def results(world: types.SimpleNamespace) -> list[Shown]:
    a = world.analysis
    compared = world.forecast.compare(world.ledger)
    return [a.symmetries, a.certificate, a.moments, a.flow, world.forecast, compared, a.equilibrium, world.ledger, a]


def test_every_kind_draws_itself_with_labelled_axes(world: types.SimpleNamespace) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = {type(r) for r in results(world)} - {nf.Certificate}
    assert drawn == set(plots.DRAWINGS)
    for result in results(world):
        if isinstance(result, nf.Certificate):
            with pytest.raises(DataError, match=r"nf\.plot draws SymmetrySet, .*to_frame"):
                result.plot()
            continue
        figure, axes = result.plot()
        for ax in np.ravel(axes):
            assert ax.get_xlabel()
            assert ax.get_title(loc="left")
            assert ax.lines or ax.containers
        figure.canvas.draw()
        same, _ = nf.plot(result)
        assert len(same.axes) == len(figure.axes)
    pyplot.close("all")


def covered(ax: Any) -> list[Any]:
    """The curves of which a point lies under the legend."""
    box = ax.get_legend().get_window_extent()
    points = [(line, ax.transData.transform(np.column_stack(line.get_data()))) for line in ax.lines]
    return [line for line, at in points if any(box.contains(*p) for p in at)]


def test_no_curve_runs_under_a_legend(world: types.SimpleNamespace) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for result in (world.forecast, world.forecast.compare(world.ledger), world.ledger):
        figure, axes = result.plot()
        figure.canvas.draw()
        for ax in np.atleast_1d(axes):
            assert covered(ax) == []
            assert len(ax.get_legend().get_texts()) > 1
    ax.set_ylim(ax.dataLim.y0, ax.dataLim.y1 - 0.3 * ax.dataLim.height)
    figure.canvas.draw()
    assert covered(ax) != []
    pyplot.close("all")


def test_the_map_of_a_network_with_long_names_has_room_for_its_columns() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    path = "model.layers.self_attention.projection"
    for size in (1, 2):
        net = nn.Sequential()
        net.add_module((path * size).replace(".", "_"), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        figure, ax = nf.find_symmetries(net, torch.randn(2, 3)).plot()
        figure.canvas.draw()
        assert ax.get_window_extent().width > 0.3 * figure.bbox.width
        assert "\n" not in ax.get_title(loc="left")
    pyplot.close("all")


def test_what_has_no_equilibrium_is_named_below_the_picture_of_those_that_have_one(
    world: types.SimpleNamespace,
) -> None:
    """A scale without weight decay never settles; where all settle nothing is said."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = world.analysis.equilibrium
    finite = [s.name for s in found if bool(s.finite.any())]
    missing = [s.name for s in found if s.name not in finite]
    assert finite
    assert missing
    _, axes = found.plot()
    below = " ".join(axes[0].get_xlabel().split())
    assert f"without equilibrium, not shown: {labels_of(missing)[0]}" in below
    settled = replace(found, settled=tuple(s for s in found if s.name in finite))
    _, axes = settled.plot()
    assert "not shown" not in axes[0].get_xlabel()
    pyplot.close("all")


def test_what_is_drawn_is_what_was_measured(world: types.SimpleNamespace) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = world.forecast.compare(world.ledger)
    _, ax = found.plot()
    charge = {(r["symmetry"], r["step"]): r["charge"] for r in world.ledger.records(by="symmetry")}
    foretold = {(c.name, c.step): c.forecast for c in found.charges}
    dots = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    lines = {line.get_color(): line for line in ax.lines if line.get_marker() != "o"}
    names = {line.get_label(): line.get_color() for line in lines.values()}
    for name in found.names:
        (seen,) = (line for line in dots if line.get_color() == names[labels_of([name])[0]])
        start = charge[name, 0]
        np.testing.assert_allclose(seen.get_ydata(), [charge[name, k] - start for k in (0, 10, 20)], rtol=1e-12)
        ahead = lines[seen.get_color()].get_ydata()[[0, -1]]
        np.testing.assert_allclose(ahead, [foretold[name, k] - start for k in (0, 20)], rtol=1e-9, atol=1e-12)
    assert len(dots) == len(world.analysis.symmetries)
    _, ax = world.forecast.plot()
    curves = {line.get_label(): line.get_ydata() for line in ax.lines}
    for name, charge in world.forecast.charges.items():
        np.testing.assert_allclose(curves[labels_of([name])[0]], charge.flatten(1).norm(dim=1), rtol=1e-12)
    pyplot.close("all")


def test_a_forecast_is_compared_by_family_where_the_ledger_keeps_no_more(world: types.SimpleNamespace) -> None:
    coarse = types.SimpleNamespace(detail="family", records=world.ledger.records)
    by_family, by_symmetry = world.forecast.compare(coarse), world.forecast.compare(world.ledger)
    for family in by_family.names:
        own = [s.name for s in world.analysis.symmetries if s.family == family]
        expected = sum(by_symmetry.of(name)[-1].forecast for name in own)
        assert by_family.of(family)[-1].forecast == pytest.approx(expected, rel=1e-12)
    late = world.forecast.compare(world.ledger, start=10)
    assert late.charges[1].measured == by_symmetry.charges[2].measured
    with pytest.raises(DataError, match="nothing to compare: the ledger holds steps 0 to 24"):
        world.forecast.compare(world.ledger, start=1000)


def trained(steps: int, **options: Any) -> tuple[nf.Forecast, nf.Ledger]:
    """A forecast at steps 0, 10 and 20, and a longer training from the measured weights that a ledger watched."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, y = torch.randn(32, 3).double(), torch.randn(32, 2).double()
    analysis = nf.analyze(net, loss, [(x, y)], nf.SGDConfig(0.01, 4), x[:4])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    ledger = nf.Ledger(net, optimizer, analysis.symmetries, detail="symmetry", **options)
    with ledger:
        for _ in range(steps):
            chosen = torch.randint(32, (4,))
            optimizer.zero_grad()
            loss(net, (x[chosen], y[chosen])).mean().backward()
            optimizer.step()
    return analysis.flow.forecast([0, 10, 20]), ledger


def test_a_long_training_is_compared_from_its_log_and_never_with_other_steps(tmp_path: Any) -> None:
    forecast, whole = trained(60, every=1)
    expected = forecast.compare(whole)
    _, short = trained(60, every=1, capacity=15, run_dir=tmp_path)
    for wanted, found in zip(expected.charges, forecast.compare(short).charges, strict=True):
        assert (found.name, found.step) == (wanted.name, wanted.step)
        assert found.measured == pytest.approx(wanted.measured, rel=1e-8)
    assert short.dropped == 45
    assert [r["step"] for r in short.records(since=55)] == list(range(55, 60))
    _, forgetful = trained(60, every=1, capacity=15)
    with pytest.raises(DataError, match=r"rows before step 45 are no longer in memory; give Ledger run_dir="):
        forecast.compare(forgetful)
    assert [c.step for c in forecast.compare(forgetful, start=45).charges] == [0, 10]


def test_a_comparison_says_which_sums_it_prints_and_which_steps_it_leaves_out() -> None:
    forecast, ledger = trained(40, every=4)
    found = forecast.compare(ledger)
    assert found.left_out == (10,)
    assert {c.step for c in found.charges} == {0, 20}
    assert "not compared, as the ledger did not record them: 1 step (10)" in str(found)
    assert "signed sums of the charge" in str(found)
    assert trained(40, every=1)[0].compare(trained(40, every=1)[1]).left_out == ()


@pytest.mark.parametrize("every", [1, 19])
def test_the_charge_after_the_last_recorded_step_is_compared(every: int) -> None:
    """Twenty steps from 0 to 19: the forecast of step 20 meets the weights at the end, whose charge is summed here."""
    forecast, ledger = trained(20, every=every)
    found = forecast.compare(ledger)
    assert found.left_out == (() if every == 1 else (10,))
    (s,) = [s for s in found.charges if s.step == 20]
    net = ledger.model
    squares = [net[0].weight.square().sum(), net[0].bias.square().sum(), -net[2].weight.square().sum()]
    assert abs(s.measured) == pytest.approx(abs(float(sum(squares).detach())), rel=1e-8)


def test_a_forecast_of_adam_is_compared_with_the_preconditioned_charge() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, y = torch.randn(256, 3).double(), torch.randn(256, 2).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.98))

    def step() -> None:
        chosen = torch.randint(256, (4,))
        optimizer.zero_grad()
        loss(net, (x[chosen], y[chosen])).mean().backward()
        optimizer.step()

    for _ in range(200):
        step()
    analysis = nf.analyze(net, loss, [(x, y)], optimizer, x[:4], batch_size=4)
    ledger = nf.Ledger(net, optimizer, analysis.symmetries, detail="symmetry", every=1)
    with ledger:
        for _ in range(12):
            step()
    found = analysis.flow.forecast([0, 10]).compare(ledger)
    rows = ledger.preconditioned("symmetry")
    assert [c.measured for c in found.charges] == [rows[0]["charge"], rows[10]["charge"]]
    assert rows[0]["charge"] == pytest.approx(found.charges[0].forecast, rel=0.3)
    assert ledger.records("symmetry")[0]["charge"] != pytest.approx(found.charges[0].forecast, rel=0.3)
    _, plain = trained(12, every=1)
    with pytest.raises(DataError, match="forecast is of preconditioned charges"):
        analysis.flow.forecast([0, 10]).compare(plain)


def test_charts_show_the_extreme_ones_first(world: types.SimpleNamespace) -> None:
    a = world.analysis
    speeds = [float(r.drift.norm() / r.charge.norm()) for r in fastest(a.flow.details, 9)]
    assert speeds == sorted(speeds, reverse=True)
    (one,) = [s for s in sides_of(a.moments, 9) if "[scale]" in s.name]
    assert one.minus == 0
    assert one.plus == pytest.approx(sum(float(leg.sum()) for leg in a.moments.second[one.name]))
    course = courses_of(world.ledger.records(), 1)[0]
    last = len(course.steps) - 1
    explained = sum(v[last - 1] for v in course.causes.values())
    assert explained == pytest.approx(course.charge[-1] - course.charge[0], abs=1e-9)


def test_the_map_has_a_row_per_module_and_joins_repeated_blocks() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh())

    net = nn.Sequential(*(block() for _ in range(5)))
    syms = nf.find_symmetries(net, torch.randn(2, 3))
    whole, joined = network_map(syms, False), network_map(syms, True)
    assert whole.modules == tuple(f"{i}.{j}" for i in range(5) for j in (0, 2))
    assert [c.marks for c in whole.columns] == [((2 * i, 1), (2 * i + 1, -1)) for i in range(5)]
    assert [(c.marks, c.repeats) for c in joined.columns] == [(((0, -1), (0, 1)), 5)]


def test_printing_opens_with_a_sentence_and_explains_a_column_once(world: types.SimpleNamespace) -> None:
    for result in results(world):
        first = str(result).splitlines()[0]
        assert re.match(r"(noise|[\w,]+ )", first), first
        assert "  " not in first
    assert str(world.analysis).count("charges: independent Noether charges") == 1
    assert "independent Noether charges;" not in world.analysis.describe(legend=False)


def test_left_out_things_are_grouped_unless_asked_for() -> None:
    reasons = {f"{i} -> out": f"frozen parameter {i}.weight" for i in range(5)} | {"other": "certificate: broken"}
    assert grouped("excluded", reasons) == [
        "excluded: 5 (0 -> out, 1 -> out, 2 -> out and 2 more): frozen parameter …",
        "excluded: other: certificate: broken",
    ]
    assert grouped("excluded", reasons, verbose=True) == [f"excluded: {n}: {why}" for n, why in reasons.items()]
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for p in net.parameters():
        p.requires_grad_(False)
    syms = nf.find_symmetries(net, torch.randn(2, 3)).trainable(net)
    assert str(syms).count("excluded:") == 1
    assert syms.describe(verbose=True).count("excluded:") == 2


def test_notebooks_show_a_table_and_fold_the_text(world: types.SimpleNamespace) -> None:
    for result in results(world):
        html = result._repr_html_()
        assert html.count("<table>") == 1
        assert html.count("<details>") == 1
    many = types.SimpleNamespace(rows=[{"a<b": k} for k in range(ROWS + 3)])

    class Long(Shown):
        def table_rows(self) -> list[dict[str, Any]]:
            return many.rows

        def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
            return "x < y"

    html = Long()._repr_html_()
    assert "x &lt; y" in html
    assert "a&lt;b" in html
    assert "3 more rows" in html


def test_rows_become_a_data_frame(world: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    for result in results(world):
        assert result.to_frame() == result.table_rows()
        assert len(result.table_rows()) > 0
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"noetherflow\[frame\]"):
        world.analysis.to_frame()


def test_labels_keep_layer_and_role() -> None:
    names = [f"m.layers.{i}.self_attn.very_long_inner_name.q_proj -> m.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert labels_of(names) == ["0…q_proj → 0…o_proj", "1…q_proj → 1…o_proj"]
    alike = [f"m.0.{'x' * 40}{c}.{'y' * 40}" for c in "ab"]
    assert len(set(labels_of(alike))) == 2
    assert short("0 -> 2") == "0 -> 2"


def test_chart_labels_keep_the_arrow_and_say_the_block_once() -> None:
    block = [f"model.layers.{i}.mlp.up_proj -> model.layers.{i}.mlp.down_proj (+2)" for i in range(2)]
    assert chart_labels(block) == ["L0 up_proj → down_proj (+2)", "L1 up_proj → down_proj (+2)"]
    assert chart_labels(["0 -> 2", "2 -> 4"]) == ["0 → 2", "2 → 4"]
    assert chart_labels(["h.0.fc -> h.1.fc", "h.1.fc -> h.1.out"]) == ["0.fc → 1.fc", "L1 fc → out"]
    twins = chart_labels([f"{side}.layers.0.q -> {side}.layers.0.k" for side in ("encoder", "decoder")])
    assert len(set(twins)) == 2
    assert all(side in label for side, label in zip(("encoder", "decoder"), twins, strict=True))


class Renamed(nn.Module):
    """Blocks with long names, whose norms are listed after the layers that they feed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(2))
        for layer in self.layers:
            layer["gate_and_up_projection"] = nn.Linear(4, 6)
            layer["value_projection"] = nn.Linear(4, 6)
            layer["multilayer_down_projection"] = nn.Linear(6, 4)
            layer["input_normalisation"] = nn.LayerNorm(4)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = layer["input_normalisation"](x)
            gated = layer["gate_and_up_projection"](h).sigmoid() * layer["value_projection"](h)
            x = x + layer["multilayer_down_projection"](gated)
        return x


def test_no_title_or_label_is_cut_and_no_legend_lies_over_a_bar() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    torch.manual_seed(0)
    net = Renamed()
    x, y = torch.randn(64, 4).double(), torch.randn(64, 4).double()
    analysis = nf.analyze(net, loss, [(x, y)], nf.SGDConfig(0.01, 4, weight_decay=0.1), x[:4])
    for result in (analysis.flow, analysis.moments, analysis.equilibrium, analysis.symmetries):
        figure, axes = result.plot()
        figure.set_dpi(80)
        figure.canvas.draw()
        page = figure.bbox
        for ax in np.ravel(axes):
            for text in (ax.xaxis.label, ax._left_title):
                box = text.get_window_extent()
                assert page.x0 <= box.x0, text.get_text()
                assert box.x1 <= page.x1 + 1, text.get_text()
            legend = ax.get_legend()
            bars = [b for b in ax.patches if b.get_width() and type(result) is nf.Flow]
            if legend is not None:
                assert not any(legend.get_window_extent().overlaps(b.get_window_extent()) for b in bars)
    _, axes = analysis.flow.plot()
    assert "(+n): with n more weights of that side" in " ".join(axes[0].get_xlabel().split())
    pyplot.close("all")


def test_the_map_puts_what_feeds_before_what_it_feeds_and_explains_what_it_shows() -> None:
    net = Renamed()
    syms = nf.find_symmetries(net, torch.randn(2, 4).double())
    order = network_map(syms, False).modules
    for i in range(2):
        roles = ("input_normalisation", "gate_and_up_projection", "value_projection", "multilayer_down_projection")
        own = [next(m for m in order if m.endswith(f"{i}.{role}")) for role in roles]
        assert sorted(own, key=order.index) == own
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    _, ax = nf.find_symmetries(plain, torch.randn(2, 3)).without({}).plot()
    words = {t.get_text() for t in ax.get_legend().get_texts()}
    assert "scaled against" in words
    assert "shifted" not in words


def test_the_entries_of_a_strided_ledger_add_up_to_the_change_and_say_their_steps(tmp_path: Any) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, ledger = trained(300, every=5, estimate_every=0)
    course = courses_of(ledger.records(), 1)[0]
    rows = ledger.records()
    moved = rows[-1]["charge"] - rows[0]["charge"]
    explained = sum(v[-2] for v in course.causes.values())
    assert abs(explained - moved) < 0.5 * abs(moved)
    assert abs(sum(r["change"] for r in rows)) < 0.5 * abs(moved)
    _, axes = ledger.plot()
    assert "steps 0 to 295" in axes[0].get_title(loc="left")
    assert "count for all up to the next" in " ".join(axes[0].get_title(loc="left").split())
    _, logged = trained(40, every=1, capacity=10, run_dir=tmp_path)
    assert "steps 0 to 39" in logged.plot()[1][0].get_title(loc="left")
    _, forgetful = trained(40, every=1, capacity=10)
    assert "steps 30 to 39" in forgetful.plot()[1][0].get_title(loc="left")
    pyplot.close("all")


def test_pictures_of_large_models_forecast_without_standard_errors(
    world: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = world.analysis.flow
    small = curves.drawn_forecast(flow)
    assert small.errors
    assert len(small.steps) == curves.POINTS
    monkeypatch.setattr(curves, "SURE", 1)
    large = curves.drawn_forecast(flow)
    assert not large.errors
    assert len(large.steps) == curves.FEW_POINTS
    _, ax = large.plot()
    assert ax.get_title(loc="left") == "Forecast charges (without standard errors)"


def test_a_drift_beyond_all_bounds_is_cut_and_one_that_is_not_valid_is_greyed() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16, bias=False), nn.Linear(16, 3, bias=False)).double()
    x, y = torch.randn(500, 10).double(), torch.randn(500, 3).double()
    syms = nf.find_symmetries(net, x[:2])
    moments = nf.gradient_moments(net, loss, [(x, y)], syms)
    sgd = nf.SGDConfig(0.02, 10, momentum=0.9)
    flow = nf.noether_flow(net, syms, moments, sgd)
    assert not flow.regime.constant
    _, axes = flow.plot()
    assert max(map(abs, axes[0].get_xlim())) < 2 * drawings.MOST_PERCENT
    assert any(t.get_text().endswith(" %") for t in axes[0].texts)
    written = [t for t in axes[0].texts if t.get_text().startswith("sum ")]
    assert {abs(t.xy[0]) for t in written} == {drawings.MOST_PERCENT}
    assert f"(bars end at {drawings.MOST_PERCENT:g})" in " ".join(axes[0].get_xlabel().split())
    assert "not valid" in {t.get_text() for t in axes[0].get_legend().get_texts()}
    assert [t.get_text() for t in axes[1].texts] == ["not in every direction"]
    pyplot.close("all")


def test_a_pair_without_equilibrium_shows_how_unequal_its_layers_are_and_why_it_does_not_settle() -> None:
    """Dots at the eigenvalues of `W0 W0^T - W1^T W1`, and at those of the moved layers."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16, bias=False), nn.Linear(16, 3, bias=False)).double()
    x, y = torch.randn(500, 10).double(), torch.randn(500, 3).double()
    syms = nf.find_symmetries(net, x[:2])
    found = nf.noise_equilibrium(net, syms, nf.gradient_moments(net, loss, [(x, y)], syms), nf.SGDConfig(0.02, 10))
    _, axes = found.plot()
    assert "No symmetry has a finite equilibrium" in axes[1].texts[0].get_text()
    first, second = (net[k].weight.detach() for k in (0, 1))
    element = found["0 -> 1"].element[0]
    moved = element @ first, second @ torch.linalg.inv(element)
    for line, (a, b) in zip(axes[0].lines, [(first, second), moved], strict=False):
        expected = torch.linalg.eigvalsh(a @ a.mT - b.mT @ b)
        assert sorted(line.get_xdata()) == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["now", "moved as far as it settles"]
    pyplot.close("all")


def test_the_panels_of_an_analysis_list_symmetries_in_one_order(world: types.SimpleNamespace) -> None:
    """The one that drifts most on top in both, also where others are farther from equilibrium."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, axes = world.analysis.plot()
    above, below = ([t.get_text() for t in ax.get_yticklabels()] for ax in (axes[0, 0], axes[1, 0]))
    assert len(below) > 1
    assert below == [name for name in above if name in below]
    assert all(ax.yaxis_inverted() for ax in (axes[0, 0], axes[1, 0])), "the first on top"
    turned = drawings.in_order(list(world.analysis.equilibrium), [s.name for s in world.analysis.equilibrium][::-1])
    assert turned == list(world.analysis.equilibrium)[::-1]
    pyplot.close("all")


@pytest.mark.parametrize(("horizon", "steps", "said"), [(15.0, (20,), "from step 20 on"), (5.0, (10, 20), "for all")])
def test_a_comparison_says_where_its_forecast_was_not_valid_and_why(
    world: types.SimpleNamespace, horizon: float, steps: tuple[int, ...], said: str
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    lasting = replace(world.forecast, regime=Regime(0.6, float("inf"))).compare(world.ledger)
    assert (lasting.not_valid, lasting.why) == ((), ())
    assert "NOT VALID" not in str(lasting)
    found = replace(world.forecast, regime=Regime(0.6, horizon)).compare(world.ledger)
    assert found.not_valid == steps
    assert f"the forecast was marked NOT VALID {said}" in str(found)
    assert "the measured mean gradient would have used up the loss" in str(found)
    for one, shaded in ((lasting, False), (found, True)):
        figure, ax = one.plot()
        figure.canvas.draw()
        assert ("forecast not valid" in [t.get_text() for t in ax.get_legend().get_texts()]) == shaded
        assert any("NOT VALID" in text.get_text() for text in ax.texts) == shaded
        for text in (ax.xaxis.label, *ax.texts):
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0
            assert figure.bbox.y0 <= box.y0
            assert box.x1 <= figure.bbox.x1
        assert not any(text.get_window_extent().overlaps(ax.xaxis.label.get_window_extent()) for text in ax.texts)
    pyplot.close("all")
