"""The findings of a diagnosis as the verdicts that a page opens with."""

from __future__ import annotations

from collections.abc import Mapping

from noetherflow.core.members import spelled_out
from noetherflow.core.printing import brief, count
from noetherflow.diagnosis.finding import QUESTIONS, Diagnosis, Evidence, Finding
from noetherflow.report.page import Notice, Section


def verdicts(diagnosis: Diagnosis, pictures: Mapping[str, str], facts: tuple[tuple[str, object], ...] = ()) -> Section:
    """The first card of a page: question by question what to act on, what to watch, what is good, and which modules
    the names with a `(+2)` in it stand for.

    Args:
        diagnosis: the findings.
        pictures: by topic of a finding, the name of the figure that shows it.
        facts: pairs `(label, value)` below the verdicts, the loss first.
    """
    notices = [_notice(f, pictures.get(f.topic, "")) for topic in QUESTIONS for f in diagnosis.about(topic)]
    text = " ".join(f"{f.title} {f.means} {f.advice}" for f in diagnosis.findings)
    names = [" ".join(line.split()) for line in spelled_out(text, diagnosis.members)]
    prose = "\n\n".join(["What the names stand for:", *names]) if names else ""
    return Section("Verdicts", prose, notices=notices, facts=facts)


def _notice(finding: Finding, picture: str) -> Notice:
    if finding.severity == "good":
        advised = (f"What to do: {finding.advice}",) if finding.is_note else ()
        return Notice("good", finding.title, advised, _numbers(finding), picture, finding.question)
    details = tuple(text for text in (finding.means, f"What to do: {finding.advice}" if finding.advice else "") if text)
    sure = (f"How sure: {finding.sure}.",) if finding.sure else ()
    return Notice(finding.severity, finding.title, details, (*sure, *_numbers(finding)), picture, finding.question)


def _numbers(finding: Finding) -> tuple[str, ...]:
    return tuple(_number(e) for e in finding.evidence)


def _number(evidence: Evidence) -> str:
    error = "" if evidence.error is None else f" ± {brief(float(evidence.error))}"
    return f"{evidence.what}: {brief(float(evidence.value))}{error} {evidence.unit}".strip()


def headline(diagnosis: Diagnosis) -> str:
    """`2 things to act on, 1 to watch, 1 open`, or that all is well where nothing is left open."""
    act, watch = len(diagnosis.severity("act")), len(diagnosis.severity("watch"))
    words = [count(act, "thing", "things") + " to act on"] if act else []
    words += [f"{watch} to watch"] if watch else []
    unknown = len(diagnosis.severity("open"))
    return ", ".join([*(words or ["nothing to do"]), *([f"{unknown} open"] if unknown else [])])
