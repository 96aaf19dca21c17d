"""The page of a run and the live view: what they say, and that the page works in a browser without a network."""

from __future__ import annotations

import base64
import dataclasses
import io
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.errors import DataError
from noetherflow.monitor import spikes
from noetherflow.monitor.books import FIELDS
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import FORMAT, LOG_NAME, RunLog, read_log
from noetherflow.monitor.rundata import RunData, RunReader
from noetherflow.monitor.spikes import WINDOW, quantile_before
from noetherflow.report.labels import labels_of
from noetherflow.report.run import _ends, _layers, _spacing, _training, summary, write_run_report
from noetherflow.report.run_figures import COLUMNS, POINTS, charges_figure, training_figure
from noetherflow.report.verdicts import headline
from noetherflow.report.watch import sparkline, view, watch
from test_ledger import backward, batches, mlp, mlp_symmetries

pytest.importorskip("plotly")


class Normed(nn.Module):
    """A scale-invariant layer, then a ReLU pair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(64, 24, bias=False)
        self.first, self.second = nn.Linear(24, 16), nn.Linear(16, 10)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.normalize(self.inner(x), dim=-1) * 5
        return self.second(self.first(h).relu())


def normed_symmetries(model: nn.Module) -> nf.SymmetrySet:
    norm = nf.declare(model, "scalar", [("inner.weight", 0)], family="one-sided")
    relu = nf.declare(
        model, "diagonal", [("first.weight", 0), ("first.bias", 0)], [("second.weight", 1)], family="rescaling"
    )
    return nf.SymmetrySet((*norm, *relu), shapes=norm.shapes)


def record(run_dir: Path, kind: Any = torch.optim.SGD, steps: int = 80, **options: Any) -> RunData:
    model = Normed()
    optimizer = kind(model.parameters(), **{"lr": 0.1, **options})
    ledger = Ledger(
        model, optimizer, normed_symmetries(model), run_dir=run_dir, estimate_every=5, resume=True, every=1
    ).attach()
    for k, batch in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = backward(model, batch)
        if k == 60:
            for p in model.parameters():
                assert p.grad is not None
                p.grad *= 50
        ledger.note(loss)
        optimizer.step()
    ledger.close()
    return RunData.load(run_dir)


def test_run_data_and_words(tmp_path: Path) -> None:
    data = record(tmp_path)
    assert data.steps.tolist() == list(range(80))
    assert data.families == ["one-sided", "rescaling"]
    total = data.family["charge"][0] + data.family["change"].sum(axis=0)
    np.testing.assert_allclose(total, data.family["charge"][-1] + data.family["change"][-1], rtol=1e-8)
    assert data.causes(0)["second_order"] > 0
    assert [e["step"] for e in data.spikes() if e["where"].startswith("charge")] == [60, 60]
    words = " ".join(summary(data, data.spikes()))
    for expected in ("`one-sided`", "step size and noise", "noise equilibrium", "norm of `", "spike"):
        assert expected in words
    adam = record(tmp_path / "adam", torch.optim.AdamW, lr=1e-3)
    assert "preconditioner" in " ".join(summary(adam, []))
    assert "not predicted for this optimiser" not in " ".join(summary(adam, []))
    other = record(tmp_path / "other", torch.optim.Adagrad, lr=1e-3, steps=6)
    assert "not predicted for this optimiser" in " ".join(summary(other, []))


def test_conserved_charges_are_called_conserved(tmp_path: Path) -> None:
    data = record(tmp_path, lr=1e-9, steps=5)
    assert "conserved" in summary(data, [])[0]


def test_page_of_a_run(tmp_path: Path) -> None:
    record(tmp_path)
    path = write_run_report(tmp_path)
    html = path.read_text()
    assert path == tmp_path / "report.html"
    assert html.count("* plotly.js (cartesian") == 1
    for heading in ("Summary", "Distance to the noise equilibrium", "Layers over time", "Scale-invariant", "Events"):
        assert heading in html
    assert "http" not in html.split("<body>")[1].split("<script")[0]
    with pytest.raises(DataError, match="does not exist"):
        write_run_report(tmp_path / "nothing")
    RunLog(tmp_path / "empty").append([{"kind": "run", "format": FORMAT, "step": 0, "time": "", "symmetries": []}])
    with pytest.raises(DataError, match="no recorded step"):
        write_run_report(tmp_path / "empty")


def test_a_page_is_small_and_its_loss_is_drawn_in_logarithms_where_it_fell_far(tmp_path: Path) -> None:
    data = record(tmp_path)
    assert write_run_report(tmp_path).stat().st_size < 2_000_000
    for end, kind in ((0.05, "log"), (0.5, None), (-1.0, None)):
        falling = dataclasses.replace(data, loss=np.linspace(1.0, end, len(data.steps)))
        assert training_figure(falling, []).layout.yaxis.type == kind


def test_page_of_a_diverged_run(tmp_path: Path) -> None:
    data = record(tmp_path, lr=1e200, steps=12)
    assert any(e["event"] == "non-finite" for e in data.events)
    words = " ".join(summary(data, list(data.events)))
    for family in ("`one-sided`", "`rescaling`"):
        assert f"{family}: the charge began at" in words
    assert words.count("is not finite at the end") == 2
    html = write_run_report(tmp_path).read_text()
    assert "1 × non-finite" in html
    assert "Charges and what moves them" in html
    assert ":NaN" not in html.split("<body>")[1]


def test_words_about_the_effective_learning_rate(tmp_path: Path) -> None:
    """lr / |W|^2 for a step in proportion to the gradient (itself as 1/|W|), lr / |W| for Adam's."""
    assert "goes as one over the squared norm." in " ".join(summary(record(tmp_path / "sgd", steps=6), []))
    adam = record(tmp_path / "adam", torch.optim.AdamW, steps=6, lr=1e-3)
    assert "goes as one over the norm: Adam" in " ".join(summary(adam, []))


def test_a_switched_optimiser_and_the_start_of_the_run(tmp_path: Path) -> None:
    record(tmp_path, steps=20)
    first = next(read_log(tmp_path))["time"]
    time.sleep(1.1)
    data = record(tmp_path, torch.optim.Adagrad, steps=20, lr=1e-3)
    assert data.started == first != data.header["time"]
    assert data.estimate_steps.tolist() == list(range(0, 41, 5)), "20 once: the end of one, the start of the other"
    known = np.isfinite(data.estimates["distance"]).any(axis=1)
    assert known.tolist() == [True] * 5 + [False] * 4
    assert "not predicted for this optimiser" in " ".join(summary(data, []))
    assert f"started {first.replace('T', ' ')}" in write_run_report(tmp_path).read_text()


def test_replaced_symmetries_show_from_their_first_step_on(tmp_path: Path) -> None:
    model, reader = mlp(), RunReader(tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    syms = mlp_symmetries(model)
    with Ledger(model, optimizer, syms, run_dir=tmp_path, estimate_every=1, every=1) as ledger:
        for chosen in (syms, syms.filter(family="linear")):
            if ledger.step:
                ledger.replace_symmetries(chosen)
                ledger.flush()
                before = reader.poll()
                assert before is not None
                assert before.families == RunData.load(tmp_path).families == ["rescaling", "linear"]
                assert before.steps.tolist() == [0, 1]
            for batch in batches(2):
                optimizer.zero_grad()
                backward(model, batch)
                optimizer.step()
            ledger.flush()
    after = reader.poll()
    assert after is not None
    assert after.families == ["linear"]
    assert after.steps.tolist() == after.estimate_steps.tolist() == [2, 3]
    assert after.estimates["norm"].shape == (2, 1)


def test_nothing_watched(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Ledger(model, optimizer, nf.SymmetrySet(()), run_dir=tmp_path, estimate_every=1, every=1):
        backward(model, batches(1)[0])
        optimizer.step()
    assert "No symmetry is watched." in write_run_report(tmp_path).read_text()
    assert "step 0" in shown(view(RunReader(tmp_path).poll(), tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\0\0\0", "line 2 is corrupt"),
        (b'{"\xff": 1}', "line 2 is corrupt"),
        (b'{"format": 99}', "line 2 has format 99"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    record(tmp_path, steps=2)
    lines = (tmp_path / LOG_NAME).read_bytes().splitlines()
    (tmp_path / LOG_NAME).write_bytes(b"\n".join([lines[0], line, *lines[1:], b""]))
    for read in (lambda: RunReader(tmp_path).poll(), lambda: write_run_report(tmp_path)):
        with pytest.raises(DataError, match=message):
            read()


@pytest.mark.parametrize("count", [0, 5, 11, 60, 700])
@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_running_quantiles(count: int, quantile: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spikes, "CHUNK", 256)
    rng = np.random.default_rng(count)
    values = rng.normal(size=count)
    values[rng.random(count) < 0.1] = np.inf
    values[100:200] = np.nan
    expected = np.full(count, np.nan)
    for t in range(10, count):
        known = values[max(0, t - WINDOW) : t]
        if np.isfinite(known).any():
            expected[t] = np.quantile(known[np.isfinite(known)], quantile)
    np.testing.assert_allclose(quantile_before(values, quantile), expected, rtol=0, atol=1e-12)


def long_run(steps: int, names: list[str]) -> RunData:
    """A synthetic log with a step and estimates for every step."""
    symmetries = [{"name": n, "one_sided": False, "family": "f"} for n in names]
    header = {
        "kind": "run",
        "time": "",
        "optimizer": "SGD",
        "rule": "SGDRule",
        "families": ["f"],
        "symmetries": symmetries,
    }
    family = dict.fromkeys(FIELDS, (1.0,))
    values = {"norm": [1.0] * len(names), "distance": [0.5] * len(names), "growth": [0.0] * len(names)}
    rows: list[dict[str, Any]] = [header]
    for k in range(steps):
        rows.append(
            {"kind": "step", "step": k, "lr": 0.1, "family": family} | ({"loss": float(k)} if k % 7 == 6 else {})
        )
        rows.append({"kind": "estimates", "step": k, "symmetry": values})
    return RunData.of(rows)


def test_rows_of_the_heat_map() -> None:
    """One row per symmetry however alike the names are; long runs are thinned to what a screen shows."""
    lora = "base_model.model.layers.{}.self_attn.{}_proj.lora_{}.default"
    names = [" -> ".join(lora.format(i, q, side) for side in "AB") for i in range(3) for q in "qv"]
    data = long_run(9000, names)
    figure = _layers(data)[0].figures[0].content
    axis = figure.layout.yaxis
    assert list(axis.tickvals) == list(range(6)) == list(figure.data[0].y)
    assert len(set(axis.ticktext)) == 6
    assert all(text.startswith(f"{i // 2}.self_attn.{'qv'[i % 2]}_proj") for i, text in enumerate(axis.ticktext))
    for trace in figure.data:
        assert trace.z.shape == (6, len(trace.x))
        assert (trace.x[0], trace.x[-1]) == (0, 8999)
    many = _layers(long_run(400, [f"layer{i}.weight" for i in range(3000)]))[0].figures[0].content
    assert many.data[0].z.shape == (3000, COLUMNS)
    loss = _training(data, [])[0].content.data[0]
    assert (loss.name, len(loss.x)) == ("loss", 9000 // 7)
    assert len(_training(long_run(4000, ["a"]), [])[0].content.data[1].x) == POINTS


def test_spacing_of_the_estimates() -> None:
    assert _spacing(np.array([0])).startswith("One estimate (`Ledger(..., estimate_every=...)`): few for")
    assert _spacing(np.arange(0, 90_000, 50)) == "1,800 estimates, 50 steps apart (`Ledger(..., estimate_every=...)`)."


def test_labels_drop_the_shared_prefix() -> None:
    assert labels_of(["m.layers.0.q -> m.layers.0.k (+2)", "m.layers.1.v [scale]"]) == ["0.q → 0.k (+2)", "1.v [scale]"]
    assert labels_of(["model.norm -> lm_head"]) == ["model.norm → lm_head"]
    assert labels_of(["0 -> 2"]) == ["0 → 2"]


def shown(renderable: Any) -> str:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=140)
    console.print(renderable)
    return console.file.getvalue()


def test_live_view_takes_names_as_they_are_and_sorts_events(tmp_path: Path) -> None:
    data = long_run(80, ["model.embed (+2) [scale]", "x[/red]y"])
    data.loss[:] = np.sin(np.arange(80)) * 0.01
    data.loss[40] = 9.0
    events = [{"kind": "event", "step": k, "event": "edited"} for k in (3, 70)]
    text = shown(view(dataclasses.replace(data, events=tuple(events)), tmp_path))
    assert "model.embed (+2) [scale]" in text
    assert "x[/red]y" in text
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("step ") and ":" in line] == [
        "step 3",
        "step 40",
        "step 70",
    ]


def test_reader_follows_a_growing_and_a_rewound_log(tmp_path: Path) -> None:
    reader = RunReader(tmp_path / "run")
    assert reader.poll() is None
    record(tmp_path / "whole", steps=40)
    lines = list(read_log(tmp_path / "whole"))
    log = RunLog(tmp_path / "run")
    log.append(lines[:1])
    assert reader.poll() is None
    log.append(lines[1:19])
    mark = log.mark(99)
    log.append(lines[19:20])
    seen = reader.poll()
    assert seen is not None
    count = len(seen.steps)
    with open(log.path, "ab") as file:
        file.write(b'{"kind": "st')
    again = reader.poll()
    assert again is not None
    assert len(again.steps) == count
    assert again is seen
    log.close()
    log = RunLog(tmp_path / "run")
    log.rewind(mark)
    log.append([line for line in lines[19:] if line["kind"] != "run"])
    final = reader.poll()
    assert final is not None
    assert final.steps.tolist() == list(range(40))
    recent = RunReader(tmp_path / "run", keep=7).poll()
    assert recent is not None
    assert recent.steps.tolist() == list(range(33, 40))
    np.testing.assert_array_equal(recent.family["charge"], final.family["charge"][-7:])
    assert recent.estimate_steps.tolist() == final.estimate_steps.tolist()[-7:]


def test_live_view(tmp_path: Path) -> None:
    console_module = pytest.importorskip("rich.console")
    assert "does not exist yet" in shown(view(None, tmp_path)).replace("\n", "")
    (tmp_path / LOG_NAME).touch()
    assert "holds no recorded step yet" in shown(view(None, tmp_path)).replace("\n", "")
    data = record(tmp_path / "run")
    text = shown(view(data, tmp_path))
    for expected in ("step 79", "SGD", "loss", "one-sided", "step size and noise", "steps to go", "step 60: spike"):
        assert expected in text
    assert sparkline(np.array([0.0, 1.0])) == "▁█"
    assert sparkline(np.array([np.nan])) == ""

    console = console_module.Console(file=io.StringIO(), width=140, force_terminal=True)
    with pytest.raises(DataError, match="live is not a folder"):
        watch(tmp_path / "live", console=console)
    (tmp_path / "live").mkdir()
    worker = threading.Thread(target=record, args=(tmp_path / "live",), kwargs={"steps": 60})
    worker.start()
    deadline = time.monotonic() + 60
    watch(
        tmp_path / "live",
        refresh=0.02,
        console=console,
        until=lambda: not worker.is_alive() or time.monotonic() > deadline,
    )
    worker.join()
    assert "step 59" in console.file.getvalue()


def test_waiting_without_a_terminal_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch(tmp_path, refresh=0.01, until=iter([False, False, True]).__next__)
    assert capsys.readouterr().err == f"{tmp_path / LOG_NAME} does not exist yet; waiting for it (Ctrl-C stops) ...\n"


def test_without_a_terminal_a_line_comes_for_every_change(tmp_path: Path) -> None:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=300)
    looks = iter([False, False, True])

    def until() -> bool:
        record(tmp_path, steps=4)
        return next(looks)

    record(tmp_path, steps=4)
    watch(tmp_path, refresh=0, console=console, until=until)
    lines = [line for line in console.file.getvalue().splitlines() if "SGD" in line]
    assert [line.split("  ")[0] for line in lines] == ["step 3", "step 7", "step 11", "step 15"]
    assert all("loss" in line for line in lines)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver")
    binary, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (binary and driver):
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    profile = tempfile.mkdtemp()
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1366,900",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield session
    session.quit()
    shutil.rmtree(profile, ignore_errors=True)


def wait_for(session: Any, script: str) -> Any:
    deadline = time.monotonic() + 30
    while not (value := session.execute_script(f"return {script}")):
        assert time.monotonic() < deadline, script
        time.sleep(0.05)
    return value


def test_a_short_run_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """Columns of the heat map are as wide as they are apart, yet its axis does not begin below 0."""
    record(tmp_path, steps=8)
    browser.get(write_run_report(tmp_path).as_uri())
    low, high = wait_for(browser, "document.querySelector('.plot:has(.heatmaplayer image)')?._fullLayout.xaxis.range")
    assert low == 0
    assert high == 9.5
    text = browser.execute_script("return document.body.innerText")
    assert (
        "3 estimates, 5 steps apart, the last at the end (Ledger(..., estimate_every=...)): few for a course in time"
        in text
    )


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_page_in_a_browser(kind: Any, browser: Any, tmp_path: Path) -> None:
    record(tmp_path, kind, lr=0.1 if kind is torch.optim.SGD else 1e-3)
    browser.get(write_run_report(tmp_path).as_uri())
    plots = browser.execute_script("return document.querySelectorAll('.plot').length")
    assert plots >= 4
    wait_for(browser, f"document.querySelectorAll('.plot .main-svg').length >= {plots}")
    charges = "document.querySelector('#fig-charges .plot')"
    visible = f"{charges}.data.map(t => t.visible)"
    before = browser.execute_script(f"return {visible}")
    assert any(before)
    assert not all(before)
    browser.execute_script(
        f"{charges}.querySelectorAll('.updatemenu-button')[1].dispatchEvent(new MouseEvent('click', {{bubbles: true}}))"
    )
    wait_for(browser, f"JSON.stringify({visible}) !== {str(before).lower().replace(' ', '')!r}")
    after = browser.execute_script(f"return {visible}")
    assert [bool(a) for a in after] == [not b for b in before]
    drawn = browser.execute_script(f"return {charges}.querySelectorAll('.bars .point').length")
    assert drawn > 50
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [r for r in requests if not r.startswith(("data:", "blob:"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    pdf = base64.b64decode(
        browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"]
    )
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") + pdf.count(b"/Type /Page/") <= 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_on_a_phone(scheme: str, browser: Any, tmp_path: Path) -> None:
    """420 pixels wide: nothing sticks out sideways, text is in the scheme's colour, and nothing is fetched or fails."""
    record(tmp_path)
    browser.get_log("browser")
    size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        browser.get(write_run_report(tmp_path).as_uri())
        plots = browser.execute_script("return document.querySelectorAll('.plot').length")
        wait_for(browser, f"document.querySelectorAll('.plot .main-svg').length >= {plots}")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
        font = browser.execute_script("return document.querySelector('.plot')._fullLayout.font.color")
        assert font == {"light": "#1c2430", "dark": "#e4e8ee"}[scheme]
        links = browser.execute_script(
            "return [...document.querySelectorAll('.notices a')].map(a => !!document.querySelector(a.hash))"
        )
        assert links
        assert all(links)
        assert browser.get_log("browser") == []
        fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert [name for name in fetched if not name.startswith("data:")] == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


INSIDE = """[...document.querySelectorAll("%s")].every(e => { const r = e.getBoundingClientRect();
  return r.width > 0 && r.left >= 0 && r.right <= window.innerWidth; })"""
"""Whether everything that a selector finds lies within the window, from left to right."""


def test_menus_and_names_of_layers_are_whole_on_a_phone_and_menus_are_words_in_print(
    browser: Any, tmp_path: Path
) -> None:
    """Buttons of the families become a menu on a narrow screen; on paper the chosen one stands above its picture."""
    record(tmp_path)
    wide = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    try:
        for size, kind in ((wide, "buttons"), (wide | {"width": 420, "mobile": True}, "dropdown")):
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(write_run_report(tmp_path).as_uri())
            charges = "document.querySelector('#fig-charges .plot')"
            wait_for(browser, f"{charges}?._fullLayout?.updatemenus?.length")
            assert browser.execute_script(f"return {charges}._fullLayout.updatemenus[0].type") == kind
            wait_for(browser, "document.querySelectorAll('.updatemenu-header, .updatemenu-button').length > 0")
            for what in (".updatemenu-container", "#fig-layers .ytick text", ".legend"):
                assert browser.execute_script("return " + INSIDE % what), (size, what)
        family = browser.execute_script(f"return {charges}._fullLayout.updatemenus[0].buttons[0].label")
        browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        wait_for(browser, f"{charges}._fullLayout.updatemenus.length === 0")
        assert browser.execute_script(f"return {charges}._fullLayout.title.text") == family
        browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
        wait_for(browser, f"{charges}._fullLayout.updatemenus.length")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_numbers_on_the_axis_of_norms_are_those_at_their_ticks(browser: Any, tmp_path: Path) -> None:
    """Norms that hardly change have ticks such as 1.0005, which must not be rounded to 1."""
    record(tmp_path, lr=1e-3)
    browser.get(write_run_report(tmp_path).as_uri())
    ticks = wait_for(
        browser, "document.querySelector('#fig-norms .plot')?._fullLayout?.yaxis?._vals?.map(v => [v.x, v.text])"
    )
    assert len(ticks) >= 3
    assert len({text for _, text in ticks}) == len(ticks)
    span = ticks[-1][0] - ticks[0][0]
    for value, text in ticks:
        assert abs(float(text.replace("−", "-")) - value) < 0.02 * span


def test_a_title_says_what_could_not_be_answered(tmp_path: Path) -> None:
    """Open questions are counted beside what is to be done; where none is open nothing is said."""
    diagnosis = nf.diagnose_run(record(tmp_path))
    without = dataclasses.replace(diagnosis, findings=tuple(f for f in diagnosis.findings if f.severity == "good"))
    assert headline(without) == "nothing to do"
    unknown = dataclasses.replace(without.findings[0], severity="open")
    assert headline(dataclasses.replace(without, findings=(*without.findings, unknown))) == "nothing to do, 1 open"


def test_without_losses_the_picture_says_that_none_were_noted(tmp_path: Path) -> None:
    record(tmp_path)
    data = RunData.load(tmp_path)
    told = _training(data, [])[0].caption
    assert told.startswith("Loss and learning rate")
    silent = _training(dataclasses.replace(data, loss=np.full_like(data.loss, np.nan)), [])[0]
    assert silent.caption.startswith("Learning rate (no losses were noted")
    assert silent.content.layout.yaxis.visible is False


def test_a_closed_ledger_still_reads_its_whole_log_and_one_without_says_what_it_lacks(tmp_path: Path) -> None:
    runs = []
    for where in (tmp_path / "run", None):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Ledger(model, optimizer, mlp_symmetries(model), every=1, capacity=10, run_dir=where) as ledger:
            for batch in batches(30):
                optimizer.zero_grad()
                backward(model, batch)
                optimizer.step()
        runs.append(ledger.run_data())
    logged, kept = runs
    assert (len(logged.steps), logged.dropped, logged.span) == (30, 0, "30 steps")
    assert (len(kept.steps), kept.dropped) == (10, 20)
    assert kept.span == "the last 10 of 30 recorded steps (20 to 29)"


def test_a_page_tells_steps_made_from_recorded_and_bars_are_as_wide_as_their_steps(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Ledger(model, optimizer, mlp_symmetries(model), every=5, run_dir=tmp_path):
        for batch in batches(80):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
    data = RunData.load(tmp_path)
    assert data.span == "80 steps, 16 of them recorded"
    assert data.span in write_run_report(tmp_path).read_text()
    bars = [t for t in charges_figure(data).data if t.type == "bar"]
    assert bars
    for bar in bars:
        assert list(bar.width) == [5.0] * 16
        assert list(bar.x) == [5 * i + 2.5 for i in range(16)]


def test_a_printed_page_keeps_headings_with_their_pictures_and_names_its_tables(browser: Any, tmp_path: Path) -> None:
    """On paper figures are blocks, since a grid ignores breaks, and whatever leads up to one stays with it."""
    record(tmp_path)
    browser.get(write_run_report(tmp_path).as_uri())
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        style = "[...document.querySelectorAll('%s')].map(e => getComputedStyle(e).%s)"
        for where, what, expected in (
            (".figures", "display", "block"),
            ("figure", "breakInside", "avoid"),
            ("h2", "breakAfter", "avoid"),
            ("section > p:has(+ .figures)", "breakAfter", "avoid"),
            ("section > details > summary", "display", "block"),
            ("nav", "display", "none"),
            (".notices > li:not(.question)", "display", "block"),
            (".notices > .question", "breakAfter", "avoid"),
        ):
            found = browser.execute_script("return " + style % (where, what))
            assert found, where
            assert set(found) == {expected}, (where, what)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_final_estimates_tell_norms_from_balances(tmp_path: Path) -> None:
    """Of a weight without a counterweight there is a norm alone: such rows say so and come after the balances."""
    model = Normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    x, y = torch.randn(32, 64).double(), torch.randint(10, (32,))
    syms = nf.find_symmetries(model, x[:2])
    with Ledger(model, optimizer, syms, run_dir=tmp_path, every=1, estimate_every=5):
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    data = RunData.load(tmp_path)
    told = [row["is of"] for row in _ends(data)]
    balances, norms = int((~data.one_sided).sum()), int(data.one_sided.sum())
    assert min(balances, norms) > 0
    assert told == ["balance of two sides"] * balances + ["a norm, no counterweight"] * norms
