"""The bar of long computations: shown on a terminal after a while, nowhere else, and gone at the end."""

from __future__ import annotations

import io
import sys
import time

import pytest

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


@pytest.mark.parametrize(("stream", "patience"), [(Terminal(), 60.0), (io.StringIO(), -1.0)])
def test_nothing_is_shown_early_or_in_a_file(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, patience: float
) -> None:
    assert shown(monkeypatch, stream, patience) == ""


def test_a_bar_goes_away_when_the_work_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    for item in (work := progress.watched([1, 2], "squares", 2)):
        assert item == 1
        break
    work.close()  # type: ignore[attr-defined]
    assert stream.getvalue().endswith("0/2\r\x1b[K")


@pytest.mark.parametrize(("stream", "said"), [(Terminal(), "drawing ..."), (io.StringIO(), "")])
def test_long_work_without_parts_is_named_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, said: str
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.telling("drawing"):
        time.sleep(0.2)
    assert stream.getvalue().strip() == said
