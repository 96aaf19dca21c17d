"""Long computations say how far they are: by a bar on a terminal, gone at the end, and by plain lines elsewhere."""

from __future__ import annotations

import io
import sys
import time
from contextlib import redirect_stderr

import pytest
import torch
from rich.console import Console
from rich.file_proxy import FileProxy
from torch import nn

import noetherflow as nf
from noetherflow.core import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, patience: float) -> str:
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress.watched([5, 6, 7, 8], "squares", 4)) == [5, 6, 7, 8]
    return stream.getvalue()


def test_a_bar_is_shown_on_a_terminal_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), patience=-1.0)
    assert [line.split("] ")[-1] for line in text.split("\r\x1b[K")] == ["", "0/4", "1/4", "2/4", "3/4", ""]
    assert "squares [############............] 2/4" in text


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_nothing_is_shown_early(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
    assert shown(monkeypatch, stream, 60.0) == ""


@pytest.mark.parametrize(("every", "lines"), [(60.0, 1), (0.0, 4)])
def test_plain_lines_are_written_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, every: float, lines: int
) -> None:
    monkeypatch.setattr(progress, "EVERY", every)
    text = shown(monkeypatch, io.StringIO(), -1.0)
    assert text.splitlines() == [f"squares {k}/4, 0 s" for k in range(lines)]
    assert "\x1b" not in text


def test_a_live_display_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = io.StringIO()
    shown_by = FileProxy(Console(file=inner), inner)
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(sys, "stderr", shown_by)
    assert list(progress.watched([5], "squares", 1)) == [5]
    assert inner.getvalue() == ""


def failing() -> None:
    """A stage of 50 ms that ends in an error."""
    with progress.Stages("analysis") as say:
        say("tracing")
        time.sleep(0.05)
        raise ValueError("no")


class TestStages:
    def run(self, monkeypatch: pytest.MonkeyPatch, patience: float, every: float = 0.0) -> list[str]:
        """What two stages of 50 ms say."""
        monkeypatch.setattr(progress, "PATIENCE", patience)
        monkeypatch.setattr(progress, "EVERY", every)
        monkeypatch.setattr(progress, "TICK", 0.005)
        monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
        with progress.Stages("analysis") as say:
            for stage in ("tracing", "measuring"):
                say(stage)
                time.sleep(0.05)
        return stream.getvalue().splitlines()

    def test_each_stage_is_told_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.run(monkeypatch, 0.0) == [f"analysis: {s} (0 s)" for s in ("tracing", "measuring", "done")]

    def test_lines_come_through_while_a_stage_silences_standard_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As the export of a graph does."""
        monkeypatch.setattr(progress, "PATIENCE", 0.0)
        monkeypatch.setattr(progress, "TICK", 0.001)
        monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
        with progress.Stages("analysis") as say, redirect_stderr(io.StringIO()):
            say("tracing")
            time.sleep(0.05)
        assert stream.getvalue().startswith("analysis: tracing")

    def test_lines_are_at_least_so_far_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.run(monkeypatch, 0.0, every=60.0) == ["analysis: tracing (0 s)", "analysis: done (0 s)"]

    def test_what_is_quick_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.run(monkeypatch, 60.0) == []

    def test_an_error_is_not_called_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(progress, "PATIENCE", 0.0)
        monkeypatch.setattr(progress, "TICK", 0.001)
        monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
        with pytest.raises(ValueError, match="no"):
            failing()
        assert stream.getvalue() == "analysis: tracing (0 s)\n"


def test_an_analysis_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
    for name, value in (("PATIENCE", 0.0), ("EVERY", 0.0), ("TICK", 0.001)):
        monkeypatch.setattr(progress, name, value)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    heard: list[str] = []
    for hear in (None, heard.append):
        nf.analyze(model, nn.CrossEntropyLoss(), data, nf.SGDConfig(lr=0.1, batch_size=16), progress=hear)
    assert "analysis: measuring curvature" in stream.getvalue()
    assert stream.getvalue().count("done") == 1, "who hears the stages has no lines on standard error"
    assert heard[0] == "tracing the model"
    assert heard[-1] == "measuring curvature"


def test_a_bar_goes_away_when_the_work_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    for item in (work := progress.watched([1, 2], "squares", 2)):
        assert item == 1
        break
    work.close()  # type: ignore[attr-defined]
    assert stream.getvalue().endswith("0/2\r\x1b[K")


@pytest.mark.parametrize(("stream", "said"), [(Terminal(), "drawing ..."), (io.StringIO(), "drawing ...")])
def test_long_work_without_parts_is_named(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, said: str) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.telling("drawing"):
        time.sleep(0.2)
    assert stream.getvalue().strip() == said
