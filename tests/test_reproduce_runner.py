"""Verdicts, resumption, atomicity and the gallery."""

import ast
import dataclasses
import inspect
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from noetherflow.errors import DataError
from noetherflow_paper import experiment as registry
from noetherflow_paper import provenance, run, verdict, write_markdown
from noetherflow_paper.cli import _parsed
from noetherflow_paper.differences import DIFFERENCES
from noetherflow_paper.experiment import (
    REGISTRY,
    Coarser,
    Experiment,
    Results,
    Setting,
    experiment_ids,
    find_experiment,
    plain,
    register,
)
from noetherflow_paper.experiments import fig5_runs
from noetherflow_paper.gallery import _explained
from noetherflow_paper.outcome import Score, finished_in
from noetherflow_paper.printed import PRINTED
from noetherflow_paper.provenance import library_digest, merged, reached, source_of
from noetherflow_paper.records import Config, ExperimentPoint, as_json, changed, from_json
from noetherflow_paper.runner import compute_point
from noetherflow_paper.statements import statement
from noetherflow_paper.verdict import Verdict, from_counts, from_difference, from_ratio, from_resampling, from_seeds

CALLS: list[str] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    seeds: int = 4
    shift: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyPoint(ExperimentPoint):
    offset: int


def toy_compute(config, point):
    CALLS.append(point.name)
    rng = torch.Generator().manual_seed(point.offset)
    return plain({"values": point.offset + config.shift + 0.01 * torch.randn(config.seeds, generator=rng)})


def seedless(config, point):
    return toy_compute(ToyConfig(), point)


def toy_plot(results):
    from noetherflow.report import style

    fig, (ax,) = style.figure(1)
    for point, data in results.points:
        style.dots(ax, [0.0], [data["values"]], style.SGD, point.name)
    style.band(ax, [0, 1], [results["a"]["values"]] * 2, style.SGD)
    return fig


def toy_verdicts(results):
    return [
        from_seeds("a is one", 1.0, results["a"]["values"], 0.05, difference=4),
        from_seeds("b is <three>", 3.0, results["b"]["values"], 0.05, analysis="it is two & not three"),
    ]


def WORK(config):
    return 1e6 * config.seeds


TOY = Experiment(
    id="toy",
    title="A toy",
    setup="Numbers.",
    scales={"quick": ToyConfig(), "paper": ToyConfig(seeds=8)},
    points=lambda config: [ToyPoint(name="a", offset=1), ToyPoint(name="b", offset=2)],
    compute=toy_compute,
    plot=toy_plot,
    verdicts=toy_verdicts,
    settings=(Setting("offset | start", "one and two", "none"),),
    exploratory="Five per cent, after a look.",
    work=WORK,
    variations={"shifted by one": {"shift": 1}, "more seeds": {"seeds": 6}},
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    register(TOY)
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


def binomial_bound(successes, trials, lower):
    """p at which `successes` or more (or fewer) of `trials` have probability 2.5 %, by bisection."""
    counts = range(successes, trials + 1) if lower else range(successes + 1)
    tail = lambda p: sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in counts)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (tail(middle) < 0.025) == lower else (low, middle)
    return low


@pytest.mark.parametrize(("successes", "trials"), [(16, 16), (3, 3), (10, 16), (1, 7)])
def test_fractions_are_judged_by_the_exact_binomial_bound(successes, trials):
    for k, relation in ((successes, "above"), (trials - successes, "below")):
        bound = binomial_bound(k, trials, relation == "above")
        verdict = from_counts("", bound, k, trials, relation)
        assert verdict.measured == k / trials
        reach = 2 * verdict.error
        assert verdict.measured + (reach if relation == "below" else -reach) == pytest.approx(bound, abs=1e-9)
        inside = 1e-6 if relation == "below" else -1e-6
        assert from_counts("", bound + inside, k, trials, relation).holds
        assert not from_counts("", bound - inside, k, trials, relation).holds
    assert not from_counts("", 0.0, 0, trials).holds
    assert not from_counts("", 1.0, trials, trials, "below").holds
    assert not from_counts("", 0.5, 0, 0, "below").holds


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
    assert stored["config"] == {"seeds": 4, "shift": 0}
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
    four, five = ToyConfig(seeds=4), ToyConfig(seeds=5)
    a, b = toy.points(four)
    assert toy.fingerprint(four, a) == toy.fingerprint(ToyConfig(seeds=4), dataclasses.replace(a))
    assert toy.fingerprint(four, a) != toy.fingerprint(five, a)
    assert toy.fingerprint(four, a) != toy.fingerprint(four, b)
    assert toy.fingerprint(four, a) != find_experiment("fig2").fingerprint(four, a)


def test_only_what_compute_reaches_counts_as_code():
    source = "K = 1\nL = 2\ndef f(x): return x + K\ndef compute(x):\n    'Doc.'\n    return f(x)  # note\n"
    same = "import a\nK = 1\nL = 3\ndef f(x):\n    return (x + K)\ndef compute(x): return f(x)\ndef plot(r): return L\n"
    assert reached(source, "compute") == reached(same, "compute")
    for change in (("K = 1", "K = 2"), ("x + K", "x - K"), ("return f(x)", "return f(f(x))")):
        assert reached(source, "compute") != reached(source.replace(*change), "compute")


def test_every_module_below_the_faces_counts_as_code(tmp_path):
    def digest(name, text):
        library_digest.cache_clear()
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return library_digest(tmp_path)

    first = digest("equilibrium/solve.py", "STEP = 1\n")
    assert digest("equilibrium/solve.py", "STEP = 1  # a note\n") == first
    assert digest("cli/app.py", "NAME = 2\n") == first
    assert digest("equilibrium/solve.py", "STEP = 2\n") != first
    assert digest("equilibrium/solve.py", "STEP = 1\n") == first
    assert digest("spd.py", "") != first
    library_digest.cache_clear()


def test_fingerprint_depends_on_torch_device_and_modules_used_indirectly(toy, monkeypatch):
    config = ToyConfig()
    (a, _) = toy.points(config)
    before = toy.fingerprint(config, a)
    assert toy.fingerprint(config, a, "cuda") != before
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert toy.fingerprint(config, a) != before
    used = provenance._used(sys.modules[find_experiment("fig6").compute.__module__])
    assert {"noetherflow_paper.simulate", "noetherflow_paper.experiment"} <= used
    assert "class LinearNet" in source_of(find_experiment("fig5").compute)


def _of_verdicts(function):
    """Names from the module of verdicts that a function reaches within its own module."""
    own = inspect.getmodule(function)
    tree = ast.parse(reached(inspect.getsource(own), function.__name__))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return {name for name in used if inspect.getmodule(getattr(own, name, None)) is verdict}


@pytest.mark.parametrize("name", experiment_ids())
def test_what_judges_is_no_part_of_what_computes(name):
    experiment = find_experiment(name)
    assert not _of_verdicts(experiment.compute)
    assert _of_verdicts(experiment.verdicts)


def test_points_keep_the_versions_they_were_computed_with(toy, tmp_path):
    run(["toy"], out=tmp_path, progress=None)
    for path in (tmp_path / "points").iterdir():
        stored = json.loads(path.read_text())
        assert stored["versions"]["torch"] == torch.__version__
        stored["versions"]["torch"] = "1.0" if stored["point"]["name"] == "a" else "2.0"
        path.write_text(json.dumps(stored))
    again = run(["toy"], out=tmp_path, progress=None)
    assert again.computed == 0
    assert again.finished[0].versions["torch"] == "1.0 / 2.0"
    assert json.loads((tmp_path / "toy.json").read_text())["versions"]["torch"] == "1.0 / 2.0"
    assert "torch 1.0 / 2.0" in (tmp_path / "index.html").read_text()
    assert "torch 1.0 / 2.0" in write_markdown(again, tmp_path / "report.md").read_text()
    assert merged([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}]) == {"a": "1", "b": "2 / 3"}


@pytest.mark.parametrize(
    "change", [{"seconds": None}, {"seconds": "long"}, {"data": None}, {"data": 3}, {"versions": None}, {}]
)
def test_points_that_are_not_of_this_form_are_computed_again(toy, tmp_path, change):
    run(["toy"], out=tmp_path, progress=None)
    for path in (tmp_path / "points").iterdir():
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({**stored, **change} if change else [stored]))
    assert run(["toy"], out=tmp_path, progress=None).computed == 2


def test_gallery_shows_all_experiments_of_the_folder(toy, monkeypatch, tmp_path):
    other = dataclasses.replace(TOY, id="other", title="Another toy")
    register(other)
    first = run(["toy"], out=tmp_path, vary=True, progress=None)
    second = run(["other"], out=tmp_path, progress=None)
    assert [f.experiment.id for f in second.finished] == ["other"]
    page = (tmp_path / "index.html").read_text()
    assert 'id="toy"' in page
    assert 'id="other"' in page
    assert "2 of 4 claims hold" in page
    (stored, _) = finished_in(tmp_path)
    assert stored.to_dict() == first.finished[0].to_dict()
    assert stored.files == ("toy.png", "toy.svg", "toy.json")


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
    text = write_markdown(summary, tmp_path / "report.md", tmp_path / "paper").read_text()
    page, choices = ((tmp_path / "report" / name).read_text() for name in ("toy.md", "choices.md"))
    printed = (tmp_path / "report" / "print.md").read_text()
    assert "| theorem 5.4, appendix E | " in printed
    assert f"{len(PRINTED)} statements" in printed
    lines = [*text.splitlines(), *page.splitlines(), *choices.splitlines()]
    assert "**1 of 2 claims hold (0 of 0 values within 3 standard errors; 1 of 2 values within a registered" in text
    assert (tmp_path / "report" / "toy.png").read_bytes() == (tmp_path / "quick" / "toy.png").read_bytes()
    assert "| not in the paper | What follows from the same theory" in text
    assert "- theorem 4.3, appendix B.3: On every orbit" in text.split("Not tested by any claim here:")[1]
    assert "| [toy](report/toy.md) A toy | 2 | 1 | 0 | 1 of 2 hold, 0 s |" in lines
    assert "Estimates" not in text, "all were run"
    assert any(
        line.startswith("- [toy](report/toy.md), b is <three>:") and line.endswith("not three") for line in lines
    )
    assert "(at the sizes of the paper it fails too: predicted" in text
    (row,) = [line for line in lines if line.startswith("| a is one | 1 within 5 % |")]
    assert row.count("|") == 7, "the last column is the paper's scale"
    at_paper = lines[lines.index("At the sizes of the paper:") :]
    assert any(
        line.startswith("- [toy](report/toy.md), b is <three>:") and line.endswith("not three") for line in at_paper
    )
    assert any(line.startswith("| 4 | t_equi") and "[toy](report/toy.md), a is one" in line for line in lines)
    assert "- [toy](toy.md): Five per cent, after a look." in lines
    assert any(line.startswith("| [toy](toy.md) | shifted by one | 1 of 2 | a is one:") for line in lines)
    assert "| [toy](toy.md) | more seeds | 1 of 2 | none |" in lines
    assert "| offset \\| start | one and two | none |" in lines
    assert not any(line.startswith("| 1 |") for line in lines), "a difference nobody demonstrates is left out"
    for before, line in itertools.pairwise(lines):
        if line.startswith("|---"):
            assert before.count("|") == line.count("|"), "header and rule of a table belong together"


def test_report_estimates_what_was_not_run_and_says_how_to_write_it_again(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "REGISTRY", ("rates", "toy"))
    summary = run(["toy"], out=tmp_path / "quick", progress=None)
    summary = dataclasses.replace(summary, finished=(dataclasses.replace(summary.finished[0], seconds=200.0),))
    monkeypatch.setitem(TOY.scales, "paper", ToyConfig(seeds=16))
    paper = tmp_path / "paper"
    paper.mkdir()
    twin = dataclasses.replace(TOY, id="rates")
    monkeypatch.setitem(registry._REGISTERED, "rates", twin)
    fixed = {**summary.finished[0].to_dict(), "id": "rates", "scale": "paper"}
    (paper / "rates.json").write_text(json.dumps(fixed))
    (tmp_path / "quick" / "rates.png").write_bytes((tmp_path / "quick" / "toy.png").read_bytes())
    page = write_markdown(summary, tmp_path / "report.md", paper).read_text()
    assert "| not run; about 13 min (estimate) |" in page, "200 s for 4 seeds, 800 s for 16"
    assert "Estimates for experiments not run" in page
    assert "Generated from a `quick` run" in page
    assert "not all experiments" in page
    assert "noetherflow reproduce toy --scale quick --out reproduction --markdown FILE --paper paper\n" in page
    object.__setattr__(TOY, "work", None)
    try:
        assert "| not run |" in write_markdown(summary, tmp_path / "report.md", paper).read_text()
    finally:
        object.__setattr__(TOY, "work", WORK)
    full = write_markdown(dataclasses.replace(summary, finished=finished_in(paper)), tmp_path / "full.md", paper)
    assert "(other settings) |" in full.read_text()
    monkeypatch.setattr(registry, "REGISTRY", ("toy",))
    monkeypatch.delitem(registry._REGISTERED, "rates")
    assert "Generated from a full `quick` run" in write_markdown(summary, tmp_path / "report.md").read_text()
    few = write_markdown(run(["toy"], out=tmp_path / "quick", seeds=3, progress=None), tmp_path / "few.md").read_text()
    assert "Generated from a `quick` run" in few
    assert "noetherflow reproduce all --scale quick --out reproduction --seeds 3 --markdown FILE\n" in few


def test_failing_claims_with_one_analysis_are_told_together():
    a, b = (from_seeds(claim, 1.0, [3.0, 3.1], 0.1, analysis="both moved") for claim in ("a", "b"))
    c = from_seeds("c", 1.0, [3.0, 3.1], 0.1, analysis="another reason")
    grouped = _explained([("x", a), ("x", c), ("x", b), ("y", b)])
    assert grouped == [("x", "both moved", [a, b]), ("x", "another reason", [c]), ("y", "both moved", [b])]


def test_settings_replace_those_of_the_scale_and_the_report_says_so(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "REGISTRY", ("toy",))
    moved = run(["toy"], out=tmp_path, settings={"shift": 1}, progress=None)
    assert moved.finished[0].results.config == ToyConfig(shift=1)
    assert "--out reproduction --set shift=1 --markdown" in write_markdown(moved, tmp_path / "report.md").read_text()
    assert run(["toy"], out=tmp_path, progress=None).computed == 2, "other settings, other points"
    with pytest.raises(DataError, match="no setting 'width' in toy; settings: seeds, shift"):
        run(["toy"], out=tmp_path, settings={"width": 1}, progress=None)
    with pytest.raises(DataError, match="--seeds"):
        run(["toy"], out=tmp_path, settings={"seeds": 1}, progress=None)


def test_images_of_fig5_can_be_another_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (50, 6, 6))
    np.save(tmp_path / "images.npy", images)
    found = fig5_runs.images(dataclasses.replace(fig5_runs.SCALES["quick"], data=str(tmp_path / "images.npy")))
    assert found.shape == (50, 36)
    assert float(found.max()) == 1
    with pytest.raises(DataError, match="no image data at"):
        fig5_runs.images(dataclasses.replace(fig5_runs.SCALES["quick"], data=str(tmp_path / "missing.npy")))


def test_command_takes_settings_as_json_or_text():
    assert [_parsed(text) for text in ("lr=0.1", "data=a=b.npz", "sizes=[1, 2]")] == [
        ("lr", 0.1),
        ("data", "a=b.npz"),
        ("sizes", [1, 2]),
    ]
    with pytest.raises(DataError, match="KEY=VALUE"):
        _parsed("lr")


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
    assert "| [toy](toy.md) | shifted by one | 1 of 2 |" in (tmp_path / "report" / "choices.md").read_text()


def test_every_difference_from_the_print_is_demonstrated():
    sources = [inspect.getsource(sys.modules[find_experiment(e).verdicts.__module__]) for e in REGISTRY]
    named = {int(n) for text in sources for n in re.findall(r"difference ?= ?(\d)", text)}
    assert named == {d.number for d in DIFFERENCES}


def test_variations_change_known_settings():
    for name in REGISTRY:
        e = find_experiment(name)
        for label, change in e.variations.items():
            assert changed(e.config("quick"), change) != e.config("quick"), (name, label)


def test_declared_work_grows_with_the_scale():
    experiments = [e for e in map(find_experiment, REGISTRY) if e.work is not None]
    assert experiments
    for e in experiments:
        assert e.work(e.config("paper")) > e.work(e.config("quick")) > 0, e.id


def test_bad_input_is_named(toy, tmp_path):
    with pytest.raises(DataError, match="unknown experiment 'fig99'"):
        run(["fig99"], out=tmp_path)
    with pytest.raises(DataError, match="scale 'huge'"):
        run(["toy"], scale="huge", out=tmp_path)
    with pytest.raises(DataError, match="at least 2 seeds"):
        run(["toy"], out=tmp_path, seeds=1)
    with pytest.raises(DataError, match="0 jobs compute nothing"):
        run(["toy"], out=tmp_path, jobs=0)
    with pytest.raises(DataError, match="leave out vary, or scale 'paper'"):
        run(["toy"], out=tmp_path, scale="paper", vary=True)
    with pytest.raises(DataError, match="device 'abacus' cannot be used here"):
        run(["toy"], out=tmp_path, device="abacus")
    if not torch.backends.cuda.is_built():
        with pytest.raises(DataError, match="this PyTorch has no CUDA; use --device cpu"):
            run(["toy"], out=tmp_path, device="cuda")
    with pytest.raises(DataError, match="unknown experiment 'install'"):
        run("install", out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"results cannot be written to .*file"):
        run(["toy"], out=tmp_path / "file")
    run(["toy"], out=tmp_path, progress=None)
    with pytest.raises(DataError, match="holds results at quick scale; choose another folder for scale paper"):
        run(["toy"], out=tmp_path, scale="paper")
    (tmp_path / "toy.json").write_text("{}")
    with pytest.raises(DataError, match=r"toy\.json cannot be read as a result of this version"):
        run(["toy"], out=tmp_path)
    assert CALLS == ["a", "b"], "all of it is said before anything is computed"
    with pytest.raises(KeyError, match="no point 'c'"):
        Results(Config(), ((ExperimentPoint(name="a"), {}),))["c"]


def test_bad_input_of_the_report_is_named_before_anything_is_computed(toy, tmp_path, capsys):
    from noetherflow.cli import main

    def complaint(*options):
        with pytest.raises(SystemExit) as stopped:
            main(["reproduce", "toy", "--out", str(tmp_path / "out"), *map(str, options)])
        assert stopped.value.code == 1
        return capsys.readouterr().err

    page, empty = tmp_path / "page.md", tmp_path / "empty"
    assert "add --markdown FILE" in complaint("--paper", empty)
    assert "there is no folder" in complaint("--markdown", tmp_path / "missing" / "page.md")
    assert "holds no results; write some with" in complaint("--markdown", page, "--paper", empty)
    run(["toy"], out=tmp_path / "quick", progress=None)
    CALLS.clear()
    assert "holds results at quick scale" in complaint("--markdown", page, "--paper", tmp_path / "quick")
    assert CALLS == []


def test_seeds_that_do_not_apply_are_told(toy, monkeypatch, tmp_path):
    plain_toy = dataclasses.replace(TOY, compute=seedless, scales={"quick": Config()})
    monkeypatch.setitem(registry._REGISTERED, "toy", plain_toy)
    said = []
    run(["toy"], out=tmp_path, seeds=5, progress=said.append)
    assert said[0] == "the number of seeds does not apply to toy"


def test_tensors_are_made_on_the_device_which_is_kept_with_the_results(toy, monkeypatch, tmp_path):
    here = run(["toy"], out=tmp_path, progress=None).finished[0]
    there = run(["toy"], out=tmp_path, device="cpu:0", progress=None).finished[0]
    assert (here.versions["device"], there.versions["device"]) == ("cpu", "cpu:0")
    assert CALLS == ["a", "b"] * 2, "a point of another device is another point"
    assert there.results.points == here.results.points
    where = lambda config, point: {"device": torch.zeros(1).device.type}
    assert compute_point(where, Config(), ExperimentPoint(name="a"), "meta").data == {"device": "meta"}


def test_plain_is_json():
    data = plain({"t": torch.tensor([1.0, math.nan]), 3: [1.23456789012, None, True]})
    assert data == {"t": [1.0, None], "3": [1.234568, None, True]}
    json.dumps(data, allow_nan=False)


def test_records_go_to_json_and_back():
    for name in REGISTRY:
        e = find_experiment(name)
        for config in e.scales.values():
            assert from_json(type(config), as_json(config)) == config, name
            names = [p.name for p in e.points(config)]
            assert len({*names}) == len(names), name


@pytest.mark.parametrize(
    ("experiment", "setting", "value", "told"),
    [
        ("fig2", "steps", "many", "setting 'steps' takes int, got 'many'"),
        ("fig2", "steps", 1.5, "setting 'steps' takes int, got 1.5"),
        ("fig2", "steps", True, "setting 'steps' takes int, got True"),
        ("fig2", "phis", 0.5, "setting 'phis' takes tuple"),
        ("fig3", "main", [0.1, 10], "setting 'main' takes"),
        ("rates", "settings", [{"lr": 0.1, "size": 3}], "no setting 'size' in RatesSetting"),
        ("fig5", "data", 3, "setting 'data' takes str, got 3"),
    ],
)
def test_settings_of_another_type_are_refused_before_anything_runs(experiment, setting, value, told):
    with pytest.raises(DataError, match=re.escape(told)):
        changed(find_experiment(experiment).config("quick"), {setting: value})


def test_settings_out_of_json_have_the_declared_types():
    fig3 = changed(find_experiment("fig3").config("quick"), {"main": [0.1, 10, 200], "lrs": [[0.1, 1, 2]]})
    assert (fig3.main.batch, fig3.lrs[0].steps) == (10, 2)
    rates = changed(find_experiment("rates").config("quick"), {"settings": [{"lr": 1, "batch": 2, "noise": 0.5}]})
    assert rates.settings[0].noise == 0.5
    assert changed(find_experiment("fig5").config("quick"), {"data": None}).data is None


def test_an_id_belongs_to_one_experiment(toy):
    assert register(toy) is toy
    with pytest.raises(DataError, match="there is an experiment 'toy' already"):
        register(dataclasses.replace(toy, title="Another"))
    with pytest.raises(DataError, match="there is an experiment 'fig2' already"):
        register(dataclasses.replace(toy, id="fig2"))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The example of the docs as an installed package with an entry point."""
    page = (Path(__file__).parent.parent / "docs" / "extend" / "experiment.md").read_text()
    module = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    entry = re.search(r'^walk = "(.*)"$', page, re.MULTILINE)[1]
    site = tmp_path / "site"
    (site / "walk-1.0.dist-info").mkdir(parents=True)
    (site / "walk.py").write_text(module)
    (site / "walk-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: walk\nVersion: 1.0\n")
    entries = f"[noetherflow.experiments]\nwalk = {entry}\nwrong = walk:points\n"
    (site / "walk-1.0.dist-info" / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "walk", raising=False)
    monkeypatch.setattr(registry, "_REGISTERED", {})
    yield tmp_path
    sys.modules.pop("walk", None)


def test_an_installed_package_adds_an_experiment(installed):
    assert registry.experiment_ids()[: len(REGISTRY)] == REGISTRY
    assert "walk" in registry.experiment_ids()
    done = run(["walk"], out=installed / "out", vary=True, settings={"steps": 300}, progress=None)
    (finished,) = done.finished
    assert [v.holds for v in finished.verdicts] == [True, True]
    assert finished.results.array("drift 0.1", "place").shape == (300, 50)
    assert [v.label for v in finished.varied] == ["half as many steps"]
    (stored,) = finished_in(installed / "out")
    assert stored.to_dict() == finished.to_dict()
    with pytest.raises(DataError, match=r"the entry point 'wrong' of noetherflow\.experiments is"):
        find_experiment("wrong")


def test_code_that_cannot_be_read_is_refused(toy):
    namespace = {"__name__": "nowhere"}
    exec("def compute(config, point): return {}", namespace)
    with pytest.raises(DataError, match="put the experiment into a module file"):
        dataclasses.replace(toy, compute=namespace["compute"]).fingerprint(ToyConfig(), ToyPoint(name="a", offset=1))


def test_values_hold_within_three_standard_errors_unless_a_tolerance_is_registered():
    assert Verdict("", 1.0, 1.029, 0.01).holds
    assert not Verdict("", 1.0, 1.031, 0.01).holds
    assert Verdict("", 1.0, 1.029, 0.01).z == pytest.approx(2.9)
    assert math.isnan(Verdict("", 1.0, 2.0, 0.1, relation="above").z)
    assert [Verdict("", 1.0, 1.0, **k).kind for k in ({}, {"relation": "above"}, {"identity": True})] == [
        "two-sided",
        "one-sided",
        "identity",
    ]


@pytest.mark.parametrize("order", [1, 2])
def test_limits_are_extrapolated_from_two_rates_with_the_error_of_repeated_experiments(order):
    rng, factor, rate = np.random.default_rng(3), 1.5, 0.1
    noise = 0.01 * rng.normal(size=(2, 4000))
    theory = {1: 2.0, factor: 3.0}  # predictions may depend on the rate; deviations are relative to them
    fine = theory[1] * (1 + 0.4 * rate**order) + noise[0]
    rough = theory[factor] * (1 + 0.4 * (factor * rate) ** order) + noise[1]
    judged = [
        Verdict("", theory[1], a, 0.01, order=order).extrapolated({factor: Verdict("", theory[factor], b, 0.01)})
        for a, b in zip(fine, rough, strict=True)
    ]
    measured = np.array([v.measured for v in judged])
    assert measured.mean() == pytest.approx(2.0, abs=4 * measured.std() / math.sqrt(len(measured)))
    assert judged[0].error == pytest.approx(measured.std(), rel=0.05)
    wrong = Verdict("", 2.0, 2.1, 0.001, order=order).extrapolated({factor: Verdict("", 2.0, 2.1, 0.001)})
    assert not wrong.holds, "a deviation that does not fall with the rate is one of theory"


def _at_rates(factors, order, off, relative=True):
    """A claim whose deviation is `off(factor)`, relative to predictions that differ between the rates, at all rates."""
    fine, *rough = (
        Verdict("", 1 + f, (1 + f) * (1 + off(f)) if relative else 1 + f + off(f), 1e-3, order=order, relative=relative)
        for f in (1.0, *factors)
    )
    return fine.extrapolated(dict(zip(factors, rough, strict=True)))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("factors", [(1.5,), (2.0, 4.0), (4.0, 2.0), (1.5, 2.0, 3.0)])
def test_as_many_powers_of_the_rate_are_taken_out_as_there_are_larger_rates(factors, order, relative):
    taken = [0.03 * (-1) ** i / (1 + i) for i in range(len(factors))]
    off = lambda f: sum(c * f ** (order + i) for i, c in enumerate(taken))
    assert _at_rates(factors, order, off, relative).measured == pytest.approx(2.0, abs=1e-12)
    constant = _at_rates(factors, order, lambda f: 0.01 + off(f), relative)
    assert constant.measured == pytest.approx(2.02 if relative else 2.01, abs=1e-12), "a wrong theory stays wrong"
    more = _at_rates(factors, order, lambda f: off(f) + 0.01 * f ** (order + len(factors)), relative)
    assert abs(more.measured - 2.0) > 0.008, "the next power is left in"


def test_two_rates_leave_the_curvature_in_and_three_take_it_out():
    """Deviations of 0.0098 eta + 0.0055 eta^2, in units of the rate: those of a right theory that failed."""
    off = lambda f: 0.0098 * f + 0.0055 * f**2
    straight, curved = _at_rates((1.5,), 1, off), _at_rates((1.5, 2.0), 1, off)
    assert straight.measured == pytest.approx(2 * (1 - 1.5 * 0.0055))
    assert not dataclasses.replace(straight, error=0.001).holds
    assert curved.holds
    assert abs(curved.z) < 1e-6
    assert "at 2 times the rate +0.0416, at 1.5 times the rate +0.0271, at the rate +0.0153." in curved.analysis


def test_the_error_of_a_limit_from_three_rates_is_that_of_repeated_experiments():
    rng, factors, scatter = np.random.default_rng(5), (2.0, 4.0), np.array([0.01, 0.02, 0.03])
    theory, off = (2.0, 3.0, 0.5), (0.02, 0.05, 0.14)  # off: 0.0075 f + 0.00625 f^2 and a bit of its cube
    found = np.array(theory) * (1 + np.array(off)) + scatter * rng.normal(size=(4000, 3))
    limits = []
    for measured in found:
        fine, *rough = (Verdict("", t, m, e, order=1) for t, m, e in zip(theory, measured, scatter, strict=True))
        limits.append(fine.extrapolated(dict(zip(factors, rough, strict=True))))
    spread = np.std([v.measured for v in limits])
    assert limits[0].error == pytest.approx(spread, rel=0.05)
    assert np.mean([v.measured for v in limits]) == pytest.approx(
        2 * (1 + 8 / 3 * 0.02 - 2 * 0.05 + 0.14 / 3), abs=1e-3
    )


def test_claims_about_the_limit_are_judged_with_the_results_at_the_larger_rate(toy, tmp_path):
    def claims(results):
        off = 0.1 * (1 + results.config.shift)
        return [Verdict("limit", 1.0, 1.0 + off, 0.001, order=1), Verdict("plain", 1.0, 1.0 + off, 1.0)]

    limit = dataclasses.replace(
        TOY, id="limit", verdicts=claims, coarser=Coarser(2.0, lambda c: changed(c, {"shift": 1})), variations={}
    )
    register(limit)
    (found,) = run(["limit"], out=tmp_path, progress=None).finished
    assert CALLS == ["a", "b"] * 2, "once at the rate and once at twice the rate"
    assert [v.measured for v in found.verdicts] == pytest.approx([1.0, 1.1])
    assert "at 2 times the rate +0.2, at the rate +0.1" in found.verdicts[0].analysis
    assert run(["limit"], out=tmp_path, progress=None).computed == 0


def test_claims_about_the_limit_are_judged_with_the_results_at_every_larger_rate(toy, tmp_path):
    """The deviation is 0.1 f + 0.05 f^2 at f = 1, 2, 4 times the rate; `shift` is f - 1."""

    def claims(results):
        f = 1 + results.config.shift
        return [Verdict("limit", 1.0, 1 + 0.1 * f + 0.05 * f**2, 0.001, order=1)]

    larger = tuple(Coarser(f, lambda c, f=f: changed(c, {"shift": f - 1})) for f in (2, 4))
    register(dataclasses.replace(TOY, id="curved", verdicts=claims, coarser=larger, variations={}))
    said = []
    (found,) = run(["curved"], out=tmp_path, progress=said.append).finished
    assert CALLS == ["a", "b"] * 3
    assert found.verdicts[0].measured == pytest.approx(1.0)
    assert [sum(f"({f} times the rate)" in line for line in said) for f in (2, 4)] == [2, 2]
    assert run(["curved"], out=tmp_path, progress=None).computed == 0


@pytest.mark.parametrize("name", REGISTRY)
def test_every_experiment_names_the_statement_it_tests_and_gives_every_tolerance_a_reason(name):
    found = find_experiment(name)
    assert statement(found.statement)
    source = inspect.getsource(sys.modules[found.verdicts.__module__])
    for reference in re.findall(r'statement="([a-z-]+)"', source):
        assert statement(reference)
    assert bool(re.search(r'order(=|": )', source)) == (found.coarser is not None)


def test_scores_count_identities_apart():
    verdicts = [
        Verdict("exact", 0, 0.0, tolerance=1e-6, relative=False, identity=True),
        Verdict("near", 1.0, 1.01, 0.01),
        Verdict("far", 1.0, 1.1, 0.01),
        Verdict("roughly", 1.0, 1.1, 0.01, tolerance=0.2, reason="no theory of it"),
        Verdict("large", 1.0, 3.0, 0.1, relation="above"),
    ]
    score = Score.of(verdicts)
    assert score.counted == (3, 4)
    assert str(score) == (
        "3 of 4 claims hold (1 of 2 values within 3 standard errors; 1 of 1 values within a registered tolerance; "
        "1 of 1 thresholds; identities, not counted: 1 of 1)"
    )
