"""The page of a run and the live view: what they say, and that the page works in a browser without a network."""

from __future__ import annotations

import base64
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
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import RunLog, read_log
from noetherflow.monitor.rundata import RunData, RunReader
from noetherflow.report.run import summary, write_run_report
from noetherflow.report.watch import sparkline, view, watch
from test_ledger import backward, batches

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
    ledger = Ledger(model, optimizer, normed_symmetries(model), run_dir=run_dir, estimate_every=5).attach()
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
    assert "not predicted for this optimiser" in " ".join(summary(adam, []))


def test_conserved_charges_are_called_conserved(tmp_path: Path) -> None:
    data = record(tmp_path, lr=1e-9, steps=5)
    assert "conserved" in summary(data, [])[0]


def test_page_of_a_run(tmp_path: Path) -> None:
    record(tmp_path)
    path = write_run_report(tmp_path)
    html = path.read_text()
    assert path == tmp_path / "report.html"
    assert html.count("plotly.js v") == 1
    for heading in ("Summary", "Distance to the noise equilibrium", "Layers over time", "Scale-invariant", "Events"):
        assert heading in html
    assert "http" not in html.split("<body>")[1].split("<script")[0]
    with pytest.raises(DataError, match="does not exist"):
        write_run_report(tmp_path / "nothing")
    RunLog(tmp_path / "empty").append([{"kind": "run", "format": 1, "step": 0, "symmetries": []}])
    with pytest.raises(DataError, match="no recorded step"):
        write_run_report(tmp_path / "empty")


def test_page_of_a_diverged_run(tmp_path: Path) -> None:
    data = record(tmp_path, lr=1e200, steps=12)
    assert any(e["event"] == "non-finite" for e in data.events)
    assert write_run_report(tmp_path).exists()


def test_reader_follows_a_growing_and_a_rewound_log(tmp_path: Path) -> None:
    reader = RunReader(tmp_path / "run")
    assert reader.poll() is None
    record(tmp_path / "whole", steps=40)
    lines = list(read_log(tmp_path / "whole"))
    log = RunLog(tmp_path / "run")
    log.append(lines[:1])
    assert reader.poll() is None
    log.append(lines[1:20])
    seen = reader.poll()
    assert seen is not None
    count = len(seen.steps)
    with open(log.path, "ab") as file:
        file.write(b'{"kind": "st')
    again = reader.poll()
    assert again is not None
    assert len(again.steps) == count
    log.close()
    log = RunLog(tmp_path / "run")
    log.rewind(5)
    log.append([line for line in lines if line["kind"] != "run" and line["step"] >= 5])
    final = reader.poll()
    assert final is not None
    assert final.steps.tolist() == list(range(40))


def test_live_view(tmp_path: Path) -> None:
    console_module = pytest.importorskip("rich.console")

    def shown(renderable: Any) -> str:
        console = console_module.Console(file=io.StringIO(), width=140)
        console.print(renderable)
        return console.file.getvalue()

    assert "waiting for the first recorded step" in shown(view(None, tmp_path))
    data = record(tmp_path / "run")
    text = shown(view(data, tmp_path))
    for expected in ("step 79", "SGD", "loss", "one-sided", "step size and noise", "steps to go", "step 60: spike"):
        assert expected in text
    assert sparkline(np.array([0.0, 1.0])) == "▁█"
    assert sparkline(np.array([np.nan])) == ""

    console = console_module.Console(file=io.StringIO(), width=140, force_terminal=True)
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


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_page_in_a_browser(kind: Any, browser: Any, tmp_path: Path) -> None:
    record(tmp_path, kind, lr=0.1 if kind is torch.optim.SGD else 1e-3)
    browser.get(write_run_report(tmp_path).as_uri())
    plots = browser.execute_script("return document.querySelectorAll('.plot').length")
    assert plots >= 4
    wait_for(browser, f"document.querySelectorAll('.plot .main-svg').length >= {plots}")
    charges = "document.querySelectorAll('.plot')[0]"
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
