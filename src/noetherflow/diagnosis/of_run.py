"""The facts that rules need, from the log of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np

from noetherflow.core.arguments import expect
from noetherflow.core.members import modules_of
from noetherflow.core.printing import count
from noetherflow.core.schedule import Schedule
from noetherflow.diagnosis import balance, breaking, norms, sampling, squares, stability
from noetherflow.diagnosis import heads as head_rules
from noetherflow.diagnosis.decay import decay_bites, decay_rules, decays_of
from noetherflow.diagnosis.facts import (
    FELL,
    LayerBalance,
    LossCourse,
    RunBalance,
)
from noetherflow.diagnosis.finding import Diagnosis, Finding, of_little_meaning
from noetherflow.diagnosis.heads import RunHeads
from noetherflow.diagnosis.histories import layers_of, logits_of, norms_of, present, recent, turns_of
from noetherflow.diagnosis.logits import logit_growth
from noetherflow.diagnosis.losses import ToldLosses, lapse
from noetherflow.diagnosis.penalty import norm_pulls
from noetherflow.diagnosis.rates import GIVE, GUESSED, RunRates, decay_ahead, run_rates
from noetherflow.errors import DataError
from noetherflow.monitor.rundata import RunData
from noetherflow.symmetry.heads import HEADS


def diagnose_run(
    run: RunData | str | os.PathLike[str], steps: int | None = None, schedule: Schedule | None = None
) -> Diagnosis:
    """What the ledger of a run says in plain words; `ledger.diagnose()` and `noetherflow diagnose RUN_DIR` are this.

    Args:
        run: the folder given to the ledger as `run_dir`, or a RunData.
        steps: of the whole run where it is still going on, for what decay and noise reach until its end; not less than
            it has made.
        schedule: of the learning rate, for the steps still to come: a torch scheduler that stands where the run does,
            which is copied, a function from the number of the step to the rate, or the rates of all steps of the run.

    Returns:
        A Diagnosis of the steps recorded so far.

    Raises:
        DataError: there is no log, or no step in it; `steps` is less than those made; or the schedule is none.
    """
    expect("diagnose_run(run, steps)", "run", run, RunData | str | os.PathLike, "a run's folder or a RunData")
    data = run if isinstance(run, RunData) else RunData.load(run)
    whole = _whole_run(data, steps)
    rates = run_rates(data, whole, schedule)
    decays, left = decays_of(data, rates.mean), _left(data, rates, whole)
    course = _course(data, max((d for d in decays if d > 0), default=0.0), rates.warmup)
    along = [breaking.nothing_watched()]
    if data.symmetries:
        along = [
            *norms.norms_so_far(list(norms_of(data)), course, int(data.one_sided.sum())),
            *balance.far_during_run(list(_balances(data)), left),
        ]
    found: list[Finding] = [
        *along,
        *_on_decay(data, rates, whole, steps is not None or _whole(data), course),
        *decay_rules(decays, course.steps),
        *logit_growth(list(logits_of(data)), course.stalled),
        *(head_rules.heads_in_run(list(_heads(data)), left) or head_rules.heads_not_logged(_attention(data))),
        *stability.loss_course(course),
        *lapse(course),
        *stability.turning(list(turns_of(data)), course),
        *norms.grown_layers(list(layers_of(data))),
        *sampling.noise_share(_batch_ratio(data), "all layers"),
        *breaking.violated_in_training(
            [(n, recent(data, "check", i)) for i, n in enumerate(data.symmetries)],
            {n for n, alone in zip(data.symmetries, data.one_sided, strict=True) if alone},
            norm_pulls(data),
        ),
        *_memories(data),
        *breaking.moved_by_preconditioner(list(_preconditioned(data))),
        *breaking.touched_from_outside(list(_outside(data)), data.events, len(data.steps), data.steps_made),
    ]
    optimizer = data.header.get("optimizer", "an optimiser")
    members = {s["name"]: modules_of(s.get("parameters", ())) for s in data.header["symmetries"]}
    cautions = [*_covered(data), *_not_told(rates, whole - data.steps_made)]
    if course.diverged is not None:
        why = f"the run diverged at step {course.diverged:,}"
        found = of_little_meaning(found, ("loss-course", "outside"), why)
        cautions = [f"{why}", *cautions]
    elif course.dead:
        found = of_little_meaning(found, ("loss-course", "outside"), "no gradient reaches the watched weights any more")
    return Diagnosis.of(f"Run under {optimizer}, {data.span}", found, members, cautions)


def _whole_run(data: RunData, steps: int | None) -> int:
    """The steps of the whole run; those made where nobody says."""
    if steps is None:
        return data.steps_made
    if steps < data.steps_made:
        raise DataError(
            f"steps={steps:,} is less than the {data.steps_made:,} that this run has made: give the steps of the whole "
            "run, or leave it out for those made"
        )
    return steps


def _whole(data: RunData) -> bool:
    """Whether the run has made all the steps that its header says it has."""
    total = data.header.get("total_steps")
    return isinstance(total, int) and 0 < total <= data.steps_made


def _memories(data: RunData) -> list[Finding]:
    """What is said of the shortest memory of Adam's squares among the groups of the run."""
    groups = [g["betas"][1] for g in data.header.get("groups", ()) if "betas" in g]
    return squares.memory_of(min(groups)) if groups and data.header.get("rule") in ADAPTIVE else []


def _on_decay(data: RunData, rates: RunRates, whole: int, asked: bool, course: LossCourse) -> list[Finding]:
    """Whether weight decay bites over the whole run; open where the rates of much of it are not known."""
    if rates.unknown > GUESSED * whole:
        found = decay_ahead(decays_of(data, rates.mean), rates, data.steps_made, whole)
        if found:
            return found
    return decay_bites(decays_of(data, rates.over_all(data.steps_made)), whole, asked, course)


def _left(data: RunData, rates: RunRates, whole: int) -> float:
    """The steps still to come, as many as would let noise do the same at the last learning rate; as they are where the
    rates to come are not known.
    """
    known = data.lr[np.isfinite(data.lr)]
    acting = rates.acting(float(known[-1])) if known.size and rates.ahead is not None else math.nan
    return acting if math.isfinite(acting) else float(whole - data.steps_made)


def _not_told(rates: RunRates, left: int) -> list[str]:
    """What to know where the learning rates to come are not known."""
    if rates.ahead is not None:
        return []
    return [f"the learning rates of the {count(left, 'step', 'steps')} to come are not known: {GIVE}"]


def _covered(data: RunData) -> list[str]:
    """What to know where the log holds a part of the run only."""
    first, last = int(data.steps[0]), int(data.steps[-1])
    if data.dropped:
        text = f"{count(data.dropped, 'recorded step', 'recorded steps')} before step {first:,} were dropped, so that "
        text += f"beginnings and sums are those of steps {first:,} to {last:,}: nf.Ledger(..., run_dir=...) keeps all"
        return [text]
    if first:
        return [f"recording began at step {first:,}: what is said of beginnings is said of that step"]
    return []


def _balances(data: RunData) -> Iterator[RunBalance]:
    for i in np.flatnonzero(~data.one_sided):
        values = (recent(data, column, int(i)) for column in ("distance", "distance_max", "steps"))
        yield RunBalance(data.symmetries[i], *values)


def _attention(data: RunData) -> list[str]:
    """The symmetries of attention heads that the log tells of."""
    return [s["name"] for s in data.header["symmetries"] if s.get("family") in HEADS]


def _heads(data: RunData) -> Iterator[RunHeads]:
    """The heads of each attention layer: distance to equilibrium from the last estimates, drift of the charge over all.

    The error of a distance is the scatter of the last estimates, which follow each other and share their averages.
    """
    if not data.head:
        return
    owner = np.array([name for name, _ in data.heads])
    for symmetry in data.header["symmetries"]:
        mine = owner == symmetry["name"]
        if not mine.any():
            continue
        charge, norm = data.head["charge"][:, mine], data.head["norm"][:, mine]
        whole = np.flatnonzero(np.isfinite(charge).all(1) & (norm > 0).all(1))
        if whole.size < 2:
            continue
        first, last = whole[0], whole[-1]
        lately = data.head.get("distance", np.full((len(norm), len(owner)), np.nan))[:, mine]
        lately = lately[present(lately.sum(1), data.estimate_steps)]
        unknown = np.full(charge.shape[1], np.nan)
        errors = lately.std(0, ddof=1) if len(lately) > 1 else unknown
        factors = np.median(lately, 0) if len(lately) else unknown
        steps = recent(data, "steps", data.symmetries.index(symmetry["name"]))
        yield RunHeads(
            LayerBalance(symmetry["name"], symmetry["family"], "head", factors, errors, steps),
            (charge[last] - charge[first]) / norm[last],
            np.sqrt(np.maximum(norm[last] ** 2 - charge[last] ** 2, 0.0)) / 2,
            float(data.estimate_steps[last] - data.estimate_steps[first]),
        )


def _batch_ratio(data: RunData) -> float:
    """Batch size over noise scale: with the share `s` of the mean gradient in a minibatch's square, `s / (1 - s)`.

    The shares are the last of all layers; in logs of earlier versions the median over the symmetries.
    """
    known = data.mean_share[present(data.mean_share, data.estimate_steps)] if data.mean_share.size else data.mean_share
    if not known.size:
        shares = np.array([recent(data, "mean_share", i) for i in range(len(data.symmetries))])
        shares = shares[np.isfinite(shares)]
        known = np.array([np.median(shares)]) if shares.size else shares
    return batch_ratio(known)


def batch_ratio(shares: np.ndarray) -> float:
    """Batch size over noise scale from the last shares of the mean gradient; 0 where they scatter around 0.

    Example:
        >>> batch_ratio(np.array([0.1, 0.2, 0.3])), batch_ratio(np.array([0.02, -0.01, 0.03]))
        (0.25, 0.0)
    """
    if not np.isfinite(shares).all() or not shares.size:
        return float("nan")
    if shares.min() <= 0:
        return 0.0
    share = float(np.median(shares))
    return share / (1 - share) if share < 1 else float("inf")


def _course(data: RunData, decay: float, warmup: int) -> LossCourse:
    spikes = tuple(e["step"] for e in data.spikes() if e["where"] == "loss")
    broken = [e["step"] for e in data.events if e["event"] == "non-finite"]
    broken += [int(s) for s in data.steps[np.isnan(data.family["charge"]).any(axis=1)][:1]]
    told = ToldLosses.by(data)
    began, middle, ended = told.levels()
    nan = told.broken_at
    ends = _ends_broken(data) or (nan is not None and not told.healed)
    if nan is not None and (ends or broken):
        broken.append(nan)
    first = min(broken, default=None)
    lost = _lost(data, began, ended)
    lost = first if lost is None and first is not None and ends else lost
    dead = lost is None and _dead(data) and not ended <= FELL * began
    return LossCourse(
        warmup,
        spikes,
        first,
        data.steps_made,
        began,
        ended,
        middle=middle,
        highest=told.highest,
        up_at=told.up_at,
        diverged=lost,
        rise=told.rise(data),
        decay=decay,
        dead=dead,
        seen=None if told.most else len(told.rows),
        ended_over=told.ends_over(0.1),
        finite_until=told.finite_until,
        lapse=nan if first is None else None,
    )


def _dead(data: RunData) -> bool:
    """Whether no gradient reached any watched weight in its last estimate: rounding alone leaves more than 0."""
    checks = [c[np.isfinite(c)] for c in data.estimates.get("check", np.zeros((0, 0))).T]
    last = [c[-1] for c in checks if c.size]
    return bool(last) and not any(last) and data.steps_made > 1


def _lost(data: RunData, began: float, ended: float) -> int | None:
    """The step from which the run was lost to its end: the first of the last stretch that is; None where it was not.

    Lost are losses above twice the first one where the last ones are and, where no loss was noted, squared weights a
    million times as large as at first.
    """
    weights = data.family["norm"]
    if math.isfinite(ended):
        if not (began > 0 and ended >= stability.ROSE * began):
            return None
        low = np.isfinite(data.loss) & (data.loss < stability.ROSE * began)
    else:
        with np.errstate(invalid="ignore"):
            low = ~(weights > BEYOND * weights[0]).any(axis=1)
        if low[-1]:
            return None
    last = np.flatnonzero(low)
    at = int(last[-1]) + 1 if last.size else 0
    return int(data.steps[min(at, len(data.steps) - 1)])


def _ends_broken(data: RunData) -> bool:
    """Whether the last recorded step has numbers that are not finite."""
    return not bool(np.isfinite(data.family["charge"][-1]).all())


BEYOND = 1e6
"""Growth of squared weights beyond which a run without losses is lost: a thousand times the norm."""


def _preconditioned(data: RunData) -> Iterator[tuple[str, float, float]]:
    if data.header.get("rule") not in ADAPTIVE:
        return
    two_sided = {s.get("family") for s in data.header["symmetries"] if not s["one_sided"]}
    for i, family in enumerate(data.families):
        if family not in two_sided:
            continue
        moved, norm = np.nansum(data.family["preconditioner"][:, i]), np.nanmean(data.family["norm"][:, i])
        yield family, float(moved), float(norm)


ADAPTIVE = ("AdamRule",)
"""Ledger rules with an entry `preconditioner`."""


def _outside(data: RunData) -> Iterator[tuple[str, float]]:
    for i, family in enumerate(data.families):
        outside, norm = np.nansum(np.abs(data.family["outside"][:, i])), np.nanmean(data.family["norm"][:, i])
        yield family, float(outside / norm) if norm > 0 else float("nan")
