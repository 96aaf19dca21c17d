"""The five questions of an engineer with a small Llama and AdamW: the lines of the README answer each in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import noetherflow as nf

transformers = pytest.importorskip("transformers")
README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def diagnosis() -> nf.Diagnosis:
    """That of the README's first block, which is run as it stands there."""
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert first is not None
    torch.manual_seed(0)
    names: dict[str, nf.Diagnosis] = {}
    exec(compile(first[1], "<README>", "exec"), names)  # type: ignore[arg-type]
    return names["diagnosis"]


def test_the_answer_that_the_readme_leads_with_is_printed(diagnosis: nf.Diagnosis) -> None:
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    assert str(diagnosis["decay-bites"]) == shown[1].rstrip()


def test_the_norms_that_grow_are_named(diagnosis: nf.Diagnosis) -> None:
    text = " ".join(f.title for f in diagnosis.about("norms"))
    assert re.search(r"take norms up: \d+ norms, to \S+ times in the median, most `model\.layers\.\d\S*`", text), text
    assert "effective learning rate" in text


def test_the_warmup_is_judged_by_its_number(diagnosis: nf.Diagnosis) -> None:
    assert any("warmup of 100 steps" in f.title for f in diagnosis.about("warmup"))


def test_a_head_is_named_with_its_layer(diagnosis: nf.Diagnosis) -> None:
    text = " ".join(f.title for f in diagnosis.about("balance"))
    assert re.search(r"head \d of `model\.layers\.\d\.self_attn", text)


def test_decay_that_does_not_bite_is_said_to(diagnosis: nf.Diagnosis) -> None:
    assert "too small to matter in this run" in diagnosis["decay-bites"].title
    assert diagnosis["decay-bites"].is_note


def test_what_to_change_says_so_and_nothing_more(diagnosis: nf.Diagnosis) -> None:
    """Advice that begins with `nothing to do` is none: a decay too small to matter does a run no harm."""
    urgent = [*diagnosis.severity("act"), *diagnosis.severity("watch")]
    assert diagnosis["decay-bites"].advice.startswith("nothing to do")
    assert set(diagnosis.changes) == {f.advice for f in urgent if not f.advice.startswith("nothing to do")}
