"""Findings in plain words, and the diagnosis that collects them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from noetherflow.core.members import spelled_out
from noetherflow.core.printing import WIDTH, count, show
from noetherflow.errors import DataError

Severity = Literal["act", "watch", "good", "open"]
"""`act`: change something; `watch`: look again later; `good`: nothing to do; `open`: this measurement cannot tell."""
Topic = Literal["norms", "warmup", "balance", "decay", "batch", "optimiser", "invariance"]
QUESTIONS: dict[Topic, str] = {
    "norms": "Which norms grow?",
    "warmup": "Is the learning rate stable, the warmup long enough?",
    "balance": "Which layers and heads are imbalanced?",
    "decay": "Does weight decay bite?",
    "batch": "Is the batch size right?",
    "optimiser": "Does the optimiser do what it should?",
    "invariance": "Do the symmetries hold?",
}
"""What each topic answers, in the order in which answers are printed."""
WORDS: dict[str, Topic] = {
    "learning rate": "warmup",
    "layers": "balance",
    "heads": "balance",
    "weight decay": "decay",
    "batch size": "batch",
    "symmetries": "invariance",
}
"""Words of the printed questions that `Diagnosis.about` takes for their topics."""
NOTHING = "nothing to do"


@dataclass(frozen=True)
class Evidence:
    """One number behind a finding.

    Attributes:
        what: in words, with the layer or head by name.
        value: the number.
        error: its standard error, None where it is not known.
        unit: what it counts.

    Example:
        >>> print(Evidence("noise scale", 812.0, 31.0, "samples"))
        noise scale: 812 samples, +- 31
    """

    what: str
    value: float
    error: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        sure = "" if self.error is None else f", +- {plain(self.error)}"
        return f"{self.what}: {show(float(self.value))}{' ' + self.unit if self.unit else ''}{sure}"


@dataclass(frozen=True)
class Finding:
    """One answer in plain words.

    Attributes:
        rule: the rule that made it, a short name for programs.
        topic: which question it answers.
        severity: how urgent it is.
        title: one sentence with the number that matters.
        means: what follows from it for the training.
        advice: what to do; `nothing to do` where that is so.
        sure: how sure that is, and what would change it.
        evidence: the numbers.
        where: names of the symmetries, layers or heads concerned.
        weight: how far beyond its threshold; within one severity larger ones are printed first.

    Example:
        >>> calm("decay-bites", "decay", "Weight decay acts over 500 steps.").question
        'Does weight decay bite?'
    """

    rule: str
    topic: Topic
    severity: Severity
    title: str
    means: str
    advice: str
    sure: str
    evidence: tuple[Evidence, ...] = ()
    where: tuple[str, ...] = ()
    weight: float = 0.0

    @property
    def question(self) -> str:
        """The question that it answers."""
        return QUESTIONS[self.topic]

    def __str__(self) -> str:
        return self.printed(self.advice)

    def printed(self, advice: str) -> str:
        """The finding as it is printed, with these words for what to do."""
        lines = [_wrapped(f"{self.severity.upper():<6}{self.title}", 6)]
        if self.severity == "good":
            return "\n".join([*lines, *([_wrapped(f"      do: {advice}", 8)] if self.is_note else [])])
        rows = [("means", self.means), ("do", advice), ("sure", self.sure)]
        rows += [("numbers", "; ".join(str(e) for e in self.evidence))] if self.evidence else []
        return "\n".join([*lines, *(_wrapped(f"      {name}: {text}", 8) for name, text in rows if text)])

    @property
    def is_note(self) -> bool:
        """A good answer with something to try if training should not go well."""
        return self.severity == "good" and self.advice not in ("", NOTHING)

    @property
    def as_asked(self) -> Finding:
        """The same, but good in place of to watch where it asks for nothing: then there is nothing to come back for.

        Example:
            >>> found = Finding("turning", "warmup", "watch", "Steps turn it much.", "", unless("lower lr"), "measured")
            >>> found.as_asked.severity
            'good'
        """
        asks_nothing = self.severity == "watch" and self.advice.startswith(NOTHING)
        return replace(self, severity="good") if asks_nothing else self

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {**asdict(self), "question": self.question}


def plain(value: float, digits: int = 2) -> str:
    """A number for a sentence: so many significant digits, no powers of ten from a millionth to a thousand million.

    Example:
        >>> plain(493.2), plain(0.00123), plain(-51_234.0), plain(1.0)
        ('490', '0.0012', '-51,000', '1')
    """
    rounded = float(f"{value:.{digits}g}")
    if not 1e-6 <= abs(rounded) < 1e9:
        return f"{rounded:.{digits}g}"
    return f"{rounded:,.10f}".rstrip("0").rstrip(".")


def unless(otherwise: str, when: str = "if it does not") -> str:
    """Advice for what is no fault as long as training goes well: nothing to do, and what to try otherwise.

    It does not count among the `changes` of a diagnosis.

    Example:
        >>> unless("lower the learning rate")
        'nothing to do while the loss falls; if it does not, lower the learning rate'
    """
    return f"{NOTHING} while the loss falls; {when}, {otherwise}"


def in_steps(steps: float) -> str:
    """A number of steps in words: whole, and at least one.

    Example:
        >>> in_steps(0.53), in_steps(37.4183), in_steps(1000.0)
        ('1 step', '37 steps', '1,000 steps')
    """
    return count(max(1, round(steps)), "step", "steps")


def calm(rule: str, topic: Topic, title: str, sure: str = "sure", evidence: tuple[Evidence, ...] = ()) -> Finding:
    """A good answer: nothing to do."""
    return Finding(rule, topic, "good", title, "", NOTHING, sure, evidence)


def doubted(findings: Sequence[Finding], topics: Sequence[Topic], why: str, advice: str = "") -> list[Finding]:
    """The same with the good answers on these topics left open, as they were measured under other conditions.

    `advice`: how they are measured under those that count.
    """
    under = f"Not sure: {why}. Under these conditions: "
    return [
        replace(f, severity="open", title=under + f.title, advice=advice, sure="open")
        if f.severity == "good" and f.topic in topics
        else f
        for f in findings
    ]


def of_little_meaning(findings: Sequence[Finding], kept: Sequence[str], why: str) -> list[Finding]:
    """The findings of the rules `kept`, and one open answer to each question that none of them answers: the numbers
    behind all others are those of a run that is lost.

    What to do about them is to mend that run first, and to ask again.
    """
    again = "mend that first, and ask the new run again: ledger.diagnose(), or noetherflow diagnose RUN_DIR"
    left = [f for f in findings if f.rule in kept]
    answered = {f.topic for f in left}
    for f in findings:
        if f.topic not in answered:
            answered.add(f.topic)
            left.append(Finding(f.rule, f.topic, "open", f"Means little, for {why}.", "", again, "open"))
    return left


def unsure(findings: Sequence[Finding], rules: Sequence[str], why: str) -> list[Finding]:
    """The same with findings of these rules to watch at most, and as sure as `why` leaves them.

    Example:
        >>> found = Finding("balance", "balance", "act", "Unit 3 is 20 times off.", "", "move it", "known to 3 %")
        >>> [(f.severity, f.sure) for f in unsure([found], ("balance",), "equilibria are off by factors")]
        [('watch', 'not sure: equilibria are off by factors')]
    """
    sure = f"not sure: {why}"
    return [
        replace(f, severity="watch", sure=sure) if f.rule in rules and f.severity in ("act", "watch") else f
        for f in findings
    ]


SURE_BY_SYMMETRY = "sure, as far as the symmetries were found"
"""How sure an answer is that rests on no gradient."""


def not_judged(
    findings: Sequence[Finding],
    rules: Sequence[str],
    why: str,
    advice: str = "",
    forecasts: Mapping[str, str] = MappingProxyType({}),
) -> list[Finding]:
    """Findings of these rules rest on an answer that is not valid: those that ask for nothing are open, others say so.

    Args:
        findings: all of a diagnosis.
        rules: whose findings are concerned; but for those that are sure by the symmetries alone.
        why: the answer is not valid.
        advice: what answers these questions.
        forecasts: rules among them whose sentences are nothing but such an answer, which is not repeated, and the
            question in words.

    Returns:
        The findings in their order.
    """
    out = []
    for f in findings:
        if f.rule not in rules or f.severity == "open" or f.sure == SURE_BY_SYMMETRY:
            out.append(f)
        elif f.as_asked.severity == "good":
            title = f"Could not be judged, because {why}."
            if f.rule in forecasts:
                title = f"{forecasts[f.rule]} could not be forecast, because {why}."
            else:
                title += f" By present gradients alone: {f.title}"
            numbers = () if f.rule in forecasts else f.evidence
            out.append(replace(f, severity="open", title=title, means="", advice=advice, sure="open", evidence=numbers))
        else:
            out.append(replace(f, sure=f"{f.sure}; but {why}, so how it goes on is open"))
    return out


@dataclass(frozen=True)
class Diagnosis:
    """All findings on one model or run, the most urgent first; printing it answers each question in words.

    Attributes:
        subject: what was looked at, for the first line.
        findings: ranked: act, watch, open, good, and within these by weight.
        members: by the name of each symmetry, all modules that it acts on; names such as `embed (+4)` stand for some.
        cautions: what to know before reading any of it.
    """

    subject: str
    findings: tuple[Finding, ...]
    members: Mapping[str, Sequence[str]] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        subject: str,
        findings: Sequence[Finding],
        members: Mapping[str, Sequence[str]] | None = None,
        cautions: Sequence[str] = (),
    ) -> Diagnosis:
        """The findings, ranked; what asks for nothing is not to watch (`Finding.as_asked`)."""
        rank: tuple[Severity, ...] = ("act", "watch", "open", "good")
        ranked = tuple(sorted((f.as_asked for f in findings), key=lambda f: (rank.index(f.severity), -f.weight)))
        return cls(subject, ranked, members or {}, tuple(cautions))

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, rule: str) -> Finding:
        for finding in self.findings:
            if finding.rule == rule:
                return finding
        raise KeyError(f"no finding by rule {rule!r}; found: {[f.rule for f in self.findings]}")

    def about(self, topic: str) -> tuple[Finding, ...]:
        """The findings that answer one question, the most urgent first.

        Args:
            topic: one of `QUESTIONS`, the question itself as it is printed, or a word of it (`WORDS`).

        Raises:
            DataError: an unknown topic.

        Example:
            >>> found = Diagnosis.of("a run", [calm("checks", "invariance", "Gradients obey all symmetries.")])
            >>> found.about("symmetries") == found.about("Do the symmetries hold?") == found.about("invariance")
            True
        """
        asked = WORDS.get(topic) or next((t for t, question in QUESTIONS.items() if topic in (t, question)), None)
        if asked is None:
            raise DataError(f"no topic {topic!r}; topics: {', '.join(QUESTIONS)}")
        return tuple(f for f in self.findings if f.topic == asked)

    def severity(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity."""
        return tuple(f for f in self.findings if f.severity == severity)

    @property
    def verdict(self) -> Severity:
        """The most urgent severity; `good` where nothing was found."""
        return self.findings[0].severity if self.findings else "good"

    @property
    def changes(self) -> tuple[str, ...]:
        """What to change, the most urgent first; empty where there is nothing to do, at least while the loss falls."""
        asked = (f.advice for f in self.findings if f.severity in ("act", "watch") and f.advice)
        return tuple(dict.fromkeys(advice for advice in asked if not advice.startswith(NOTHING)))

    def __str__(self) -> str:
        counts = [
            count(len(self.severity(s)), *words)
            for s, words in zip(get_args(Severity), SEVERITY_WORDS, strict=True)
            if self.severity(s)
        ]
        lines = [_wrapped(f"{self.subject}: {', '.join(counts) or 'nothing found'}.", 2)]
        lines += [_wrapped(f"CAUTION: {text}", 2) for text in self.cautions]
        told: set[str] = set()
        for topic, question in QUESTIONS.items():
            if found := self.about(topic):
                lines += ["", question, *_advised_once(found, told)]
        lines += ["", "What should I change?"]
        lines += [_wrapped(f"  {i}. {text}", 5) for i, text in enumerate(self.changes, 1)] or [f"  {self._no_change}"]
        names = spelled_out(" ".join(f.title + f.advice for f in self.findings), self.members)
        return "\n".join([*lines, *(["", "What the names stand for", *names] if names else [])])

    @property
    def _no_change(self) -> str:
        """What stands in place of changes: open questions clear nothing."""
        number = len(self.severity("open"))
        asked = f"; {count(number, 'question is', 'questions are')} open" if number else ""
        return f"Nothing to do by what was found{asked}." if asked else "Nothing to do."

    __repr__ = __str__

    def rows(self) -> list[dict[str, Any]]:
        """One row per finding."""
        names = ("severity", "topic", "rule", "title", "advice", "sure")
        return [{n: getattr(f, n) for n in names} for f in self.findings]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "subject": self.subject,
            "verdict": self.verdict,
            "cautions": list(self.cautions),
            "changes": list(self.changes),
            "findings": [f.to_dict() for f in self.findings],
        }


SEVERITY_WORDS = (
    ("thing to act on", "things to act on"),
    ("to watch", "to watch"),
    ("good answer", "good answers"),
    ("open question", "open questions"),
)
"""How many of each severity there are, in words, in the order of `Severity`."""


def _advised_once(findings: Sequence[Finding], told: set[str]) -> Iterator[str]:
    """The findings as they are printed: what to do stands with the first of them alone. `told` is what stood before."""
    for finding in findings:
        yield finding.printed("as above" if finding.advice in told else finding.advice)
        told.add(finding.advice)


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
