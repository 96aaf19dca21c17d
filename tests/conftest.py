"""`pytest --device cuda`: tensors of the tests live on a GPU unless a test says otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors are made by default: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


CONCRETE = re.compile(
    r"`|\d|nf\.|torch|ledger|noetherflow |=|learning rate|peak rate|weight.decay|warm up|warmup|clip|checkpoint|steps|"
    r"samples?|batch|data of|loss depend"
)
"""What an advice that can be followed has: a name, a number, a command, or a setting."""


@pytest.fixture
def every_finding_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All findings made by rules in a test that are to act on, to watch or open name one concrete thing to do."""
    from noetherflow.diagnosis.finding import Finding

    made: list[Finding] = []
    as_made = Finding.__init__

    def noted(self: Finding, *values: object, **named: object) -> None:
        as_made(self, *values, **named)
        made.append(self)

    monkeypatch.setattr(Finding, "__init__", noted)
    yield
    of_rules = [f for f in made if f.severity != "good" and len(f.rule) > 1]
    vague = {(f.rule, f.severity, f.advice) for f in of_rules if not CONCRETE.search(f.advice)}
    assert not vague
