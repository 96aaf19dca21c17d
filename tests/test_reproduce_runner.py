"""Verdicts, resumption, atomicity and the gallery."""

import inspect
import itertools
import json
import math
import re
import sys
import types

import numpy as np
import pytest
import torch

from noetherflow.errors import DataError
from noetherflow.reproduce import experiment as registry
from noetherflow.reproduce import run, write_markdown
from noetherflow.reproduce.differences import DIFFERENCES
from noetherflow.reproduce.experiment import (
    REGISTRY,
    Experiment,
    Results,
    Setting,
    Verdict,
    _reached,
    find_experiment,
    from_difference,
    from_ratio,
    from_resampling,
    from_seeds,
    plain,
)

CALLS: list[str] = []


def toy_compute(config, point):
    CALLS.append(point["name"])
    rng = torch.Generator().manual_seed(point["offset"])
    shift = config.get("shift", 0)
    return plain({"values": point["offset"] + shift + 0.01 * torch.randn(config["seeds"], generator=rng)})


def toy_plot(results):
    from noetherflow.reproduce import style

    fig, (ax,) = style.figure(1)
    for point, data in results.points:
        style.dots(ax, [0.0], [data["values"]], style.SGD, point["name"])
    style.band(ax, [0, 1], [results["a"]["values"]] * 2, style.SGD)
    return fig


def toy_verdicts(results):
    return [
        from_seeds("a is one", 1.0, results["a"]["values"], 0.05, difference=4),
        from_seeds("b is <three>", 3.0, results["b"]["values"], 0.05, analysis="it is two & not three"),
    ]


TOY = Experiment(
    id="toy",
    title="A toy",
    setup="Numbers.",
    scales={"quick": {"seeds": 4}, "paper": {"seeds": 8}},
    points=lambda config: [{"name": "a", "offset": 1}, {"name": "b", "offset": 2}],
    compute=toy_compute,
    plot=toy_plot,
    verdicts=toy_verdicts,
    settings=(Setting("offset | start", "one and two", "none"),),
    exploratory="Five per cent, after a look.",
    variations={"shifted by one": {"shift": 1}, "more seeds": {"seeds": 6}},
)


@pytest.fixture
def toy(monkeypatch):
    module = types.ModuleType("noetherflow.reproduce.experiments.toy")
    module.EXPERIMENT = TOY
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "REGISTRY", (*REGISTRY, "toy"))
    CALLS.clear()
    return TOY


def test_verdicts_need_the_whole_interval_inside():
    assert Verdict("", 1.0, 1.02, 0.01, 0.05).holds
    assert not Verdict("", 1.0, 1.04, 0.01, 0.05).holds
    assert not Verdict("", 1.0, 1.0, 0.03, 0.05).holds
    assert Verdict("", 10, 12, 0.5, relation="above").holds
    assert not Verdict("", 10, 10.9, 0.5, relation="above").holds
    assert Verdict("", 10, 8, 0.5, relation="below").holds
    assert not Verdict("", 10, 9.5, 0.5, relation="below").holds
    assert Verdict("", 0.0, 0.01, 0.0, 0.05, relative=False).holds
    assert not Verdict("", 0.0, math.nan, 0.0, 0.05, relative=False).holds
    assert not from_seeds("", 1.0, [1.0], 0.5).holds, "one seed has no error bar"
    assert "FAILS" in str(Verdict("x", 1.0, 2.0))


def test_errors_of_ratios_and_differences_are_their_spread_over_repeated_experiments():
    rng = np.random.default_rng(5)
    over, under = 5 + rng.normal(size=(4000, 8)), 2 + 0.5 * rng.normal(size=(4000, 20))
    for make, combine in ((from_ratio, np.divide), (from_difference, np.subtract)):
        verdicts = [make("", 1.0, a, b) for a, b in zip(over, under, strict=True)]
        means = combine(over.mean(1), under.mean(1))
        assert [v.measured for v in verdicts] == pytest.approx(list(means), rel=1e-12)
        assert np.median([v.error for v in verdicts]) == pytest.approx(means.std(), rel=0.05)
        assert make("", 1.0, 3.0, over[0]).error > 0, "a number is exact, the other side is not"
        assert not make("", 1.0, over[0], [2.0], relation="above").holds, "one seed has no error bar"
    assert not from_ratio("", 1.0, [1.0, 1.0], 0.0, 1.0).holds
    assert from_difference("", 1.0, 3.0, 2.0, relative=False).holds
    spread = from_resampling("", 1.0, rng.normal(size=200), lambda v: float(v.std()), 0.3)
    assert spread.error == pytest.approx(1 / np.sqrt(2 * 200), rel=0.25)
    assert from_resampling("", 1.0, rng.normal(size=50), np.mean).error == pytest.approx(1 / np.sqrt(50), rel=0.25)


def test_run_writes_everything_and_resumes(toy, tmp_path):
    said = []
    first = run(["toy"], out=tmp_path, progress=said.append)
    assert CALLS == ["a", "b"]
    assert [v.holds for _, v in first.verdicts] == [True, False]
    assert first.failing[0][0] == "toy"
    assert any("FAILS" in text and "it is two" in text for text in said)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"toy.png", "toy.svg", "toy.json", "index.html", "points"}
    stored = json.loads((tmp_path / "toy.json").read_text())
    assert stored["config"] == {"seeds": 4}
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["verdicts"][1]["holds"] is False
    page = (tmp_path / "index.html").read_text()
    assert "b is &lt;three&gt;" in page
    assert "it is two &amp; not three" in page
    assert "http" not in page.replace("data:image", "")
    again = run(["toy"], out=tmp_path, progress=None)
    assert (again.computed, again.skipped, CALLS) == (0, 2, ["a", "b"])
    assert again.verdicts == first.verdicts


def test_killed_run_continues_and_changed_settings_recompute(toy, tmp_path):
    run(["toy"], out=tmp_path, progress=None)
    written = sorted((tmp_path / "points").iterdir())
    written[0].unlink()
    written[1].write_text('{"point": {"na')
    CALLS.clear()
    run(["toy"], out=tmp_path, progress=None)
    assert CALLS == ["a", "b"], "a missing and a torn point are both computed again"
    CALLS.clear()
    more = run(["toy"], out=tmp_path, seeds=5, progress=None)
    assert CALLS == ["a", "b"]
    assert len(more.finished[0].results["a"]["values"]) == 5
    CALLS.clear()
    assert run(["toy"], out=tmp_path, progress=None).computed == 0, "the earlier points are still there"


def test_fingerprint_depends_on_config_point_and_code(toy):
    a, b = toy.points({})
    assert toy.fingerprint({"seeds": 4}, a) == toy.fingerprint({"seeds": 4}, dict(a))
    assert toy.fingerprint({"seeds": 4}, a) != toy.fingerprint({"seeds": 5}, a)
    assert toy.fingerprint({"seeds": 4}, a) != toy.fingerprint({"seeds": 4}, b)
    assert toy.fingerprint({"seeds": 4}, a) != find_experiment("fig2").fingerprint({"seeds": 4}, a)


def test_only_what_compute_reaches_counts_as_code():
    source = "K = 1\nL = 2\ndef f(x): return x + K\ndef compute(x):\n    'Doc.'\n    return f(x)  # note\n"
    same = "import a\nK = 1\nL = 3\ndef f(x):\n    return (x + K)\ndef compute(x): return f(x)\ndef plot(r): return L\n"
    assert _reached(source, "compute") == _reached(same, "compute")
    for change in (("K = 1", "K = 2"), ("x + K", "x - K"), ("return f(x)", "return f(f(x))")):
        assert _reached(source, "compute") != _reached(source.replace(*change), "compute")


def test_variations_are_judged_beside_the_unchanged_configuration(toy, tmp_path):
    summary = run(["toy"], out=tmp_path, vary=True, progress=None)
    assert CALLS == ["a", "b"] * 3
    shifted, more = summary.finished[0].varied
    assert [v.claim for v in shifted.turned] == ["a is one", "b is <three>"]
    assert (shifted.held, more.held, more.turned) == (1, 1, [])
    assert len(summary.verdicts) == 2, "variations are not counted as claims"
    assert run(["toy"], out=tmp_path, vary=True, progress=None).computed == 0
    assert run(["toy"], out=tmp_path, progress=None).finished[0].varied == ()


def test_report_holds_everything(toy, tmp_path):
    summary = run(["toy"], out=tmp_path / "quick", vary=True, progress=None)
    run(["toy"], out=tmp_path / "paper", scale="paper", progress=None)
    (tmp_path / "paper" / "estimates.json").write_text('{"fig2": 7200}')
    text = write_markdown(summary, tmp_path / "report.md", tmp_path / "paper").read_text()
    lines = text.splitlines()
    assert "**1 of 2 claims hold.**" in text
    assert "| [toy](#toy) A toy | 2 | 1 | 0 | 1 of 2 hold, 0 s |" in lines
    assert any(line.startswith("- [toy](#toy), b is <three>:") and line.endswith("not three") for line in lines)
    at_paper = lines[lines.index("At the sizes of the paper:") :]
    assert any(line.startswith("- [toy](#toy), b is <three>:") and line.endswith("not three") for line in at_paper)
    assert any(line.startswith("| 4 | t_equi") and "[toy](#toy), a is one" in line for line in lines)
    assert "- [toy](#toy): Five per cent, after a look." in lines
    assert any(line.startswith("| [toy](#toy) | shifted by one | 1 of 2 | a is one:") for line in lines)
    assert "| [toy](#toy) | more seeds | 1 of 2 | none |" in lines
    assert "| offset \\| start | one and two | none |" in lines
    assert not any(line.startswith("| 1 |") for line in lines), "a difference nobody demonstrates is left out"
    for before, line in itertools.pairwise(lines):
        if line.startswith("|---"):
            assert before.count("|") == line.count("|"), "header and rule of a table belong together"


def test_command_writes_the_report_and_exits_3_when_a_claim_fails(toy, tmp_path):
    from typer.testing import CliRunner

    from noetherflow.cli.app import app

    page = tmp_path / "report.md"
    done = CliRunner().invoke(
        app, ["reproduce", "toy", "--out", str(tmp_path / "out"), "--vary", "--markdown", str(page)]
    )
    assert done.exit_code == 3, done.output
    assert "1 of 2 claims hold" in done.output
    assert "with shifted by one: [FAILS] a is one" in done.output
    assert "| [toy](#toy) | shifted by one | 1 of 2 |" in page.read_text()


def test_every_difference_from_the_print_is_demonstrated():
    sources = [inspect.getsource(sys.modules[find_experiment(e).compute.__module__]) for e in REGISTRY]
    named = {int(n) for text in sources for n in re.findall(r"difference=(\d)", text)}
    assert named == {d.number for d in DIFFERENCES}


def test_variations_change_known_settings():
    for name in REGISTRY:
        e = find_experiment(name)
        for label, change in e.variations.items():
            assert set(change) <= set(e.config("quick")), (name, label)
            assert {**e.config("quick"), **change} != e.config("quick"), (name, label)


def test_bad_input_is_named(toy, tmp_path):
    with pytest.raises(DataError, match="unknown experiment 'fig99'"):
        run(["fig99"], out=tmp_path)
    with pytest.raises(DataError, match="scale 'huge'"):
        run(["toy"], scale="huge", out=tmp_path)
    with pytest.raises(DataError, match="at least 2 seeds"):
        run(["toy"], out=tmp_path, seeds=1)
    with pytest.raises(KeyError, match="no point 'c'"):
        Results({}, (({"name": "a"}, {}),))["c"]


def test_plain_is_json():
    data = plain({"t": torch.tensor([1.0, math.nan]), 3: [1.23456789012, None, True]})
    assert data == {"t": [1.0, None], "3": [1.234568, None, True]}
    json.dumps(data, allow_nan=False)
