"""Rules on minibatches: noise or mean gradient, and how large a batch is worth its samples."""

from __future__ import annotations

import math

from noetherflow.core.printing import show
from noetherflow.diagnosis.facts import BatchRegime
from noetherflow.diagnosis.finding import Evidence, Finding, calm, plain

WASTED, WASTED_AT_FIRST, NOISY = 10.0, 100.0, 0.1
LAYERS_SHOWN = 4


def batch_size(fact: BatchRegime) -> list[Finding]:
    """Batch size against the gradient noise scale.

    With `r = batch size / noise scale` a step makes `r / (1 + r)` of the progress of a full-batch step (McCandlish et
    al. 2018). Threshold: above `r = 10` it makes over 91 % of it, so nine tenths of the samples buy nothing: the mean
    gradient's regime, to watch. The upper end of the noise scale's 95 % interval decides, where there is one. Below `r
    = 0.1` steps are nearly all noise: normal, and a batch twice as large would take about half the steps. In a fresh
    run the gradients of all samples agree at first (a language model learns how frequent tokens are) and the noise
    scale rises ten to a hundred times within hundreds of steps, so there `r` may be 100.
    """
    scale, size = fact.scales.total, fact.batch_size
    low, high = scale.interval()
    most = scale.value if math.isnan(high) else high
    numbers = _numbers(fact, low, high)
    sure = f"noise scale in {_interval(low, high)}; it grows as the loss falls"
    size_or_all = size / fact.noise_share if fact.noise_share > 0 else math.inf
    ratio = size_or_all / most if most > 0 else math.inf
    if ratio > (WASTED if fact.started else WASTED_AT_FIRST):
        title = f"Mean-gradient regime: batches of {size:,} are far above the noise scale, {show(scale.value)} samples."
        if math.isinf(ratio):
            title = f"Mean-gradient regime: batches of {size:,} hold all samples, so there is no gradient noise."
        means = (
            "Nearly all of a step is the mean gradient: smaller batches would make nearly the same progress a step, "
        )
        means += "and noise does not drive the symmetries, so noise equilibria are not where this run goes."
        least = max(1, math.ceil(WASTED * most))
        advice = f"if samples or time are short, batches of about {least:,} samples: a step of them still makes "
        advice += "nine tenths of this progress; ask again as the noise scale grows"
        return [Finding("batch-size", "batch", "watch", title, means, advice, sure, numbers, weight=math.log(ratio))]
    found = f"too large to measure{_at_least(low)}"
    if math.isfinite(scale.value):
        found = f"of {scale}"
    if fact.dataset_size and scale.value > fact.dataset_size and math.isfinite(scale.value):
        found += f", more than the {fact.dataset_size:,} of the training set, so that any batch is below it,"
    title = f"Batches of {size:,} against a noise scale {found} at these weights; it grows in training: "
    if ratio > WASTED:
        title += "mean-gradient regime for now, as fresh runs are."
    elif size < NOISY * (scale.value if math.isnan(low) else low):
        title += "noise regime; larger batches would save steps almost in proportion."
    elif size < NOISY * scale.value:
        title += "most likely the noise regime, in which larger batches would save steps; more samples would tell."
    else:
        title += "near the best trade between samples and steps."
    return [calm("batch-size", "batch", title, sure, numbers)]


def _at_least(low: float) -> str:
    return f" (above {show(low)} samples)" if low > 0 and math.isfinite(low) else ""


def _numbers(fact: BatchRegime, low: float, high: float) -> tuple[Evidence, ...]:
    """The noise scale of all, and of the layers with the smallest and the largest, where they are finite."""
    layers = sorted(
        ((name, s) for name, s in fact.scales.layers.items() if math.isfinite(s.value)), key=lambda item: item[1].value
    )
    total = [fact.scales.value] if math.isfinite(fact.scales.value) else []
    shown = layers if len(layers) <= LAYERS_SHOWN else [*layers[: LAYERS_SHOWN // 2], *layers[-LAYERS_SHOWN // 2 :]]
    return (
        *(Evidence("gradient noise scale", value, unit=_interval(low, high)) for value in total),
        *(Evidence("mean gradient's share of the drift", share) for share in [fact.mean_share] if share == share),
        *(Evidence(f"noise scale of {name}", s.value, unit="samples") for name, s in shown),
    )


def _interval(low: float, high: float) -> str:
    if math.isnan(low):
        return "samples"
    if math.isinf(low):
        return "samples, too many to be told"
    return f"samples, 95 % {f'above {show(low)}' if math.isinf(high) else f'between {show(low)} and {show(high)}'}"


def noise_share(ratio: float, layer: str) -> list[Finding]:
    """The same from a run's momentum buffer, which bounds it from below: `ratio` is the batch size over the noise scale
    of the layer.

    The buffer keeps what successive gradients have in common. A mean gradient that turns from step to step, as at the
    edge of stability, is lost in it, so that the ratio comes out too low: 7 to 18 times where that was measured. So a
    ratio of 10 is to watch as in `batch_size`, one above 1 is near the best trade or beyond it, and a smaller one
    decides nothing. Not positive where the share scatters around 0: then it is not measured.
    """
    if not math.isfinite(ratio):
        return []
    measures = "nf.diagnose(model, loss_fn, loader, optimizer) at these weights measures it"
    if ratio < ENOUGH_TO_TELL:
        why = "the share of the mean gradient in steps scatters around 0"
        if ratio > 0:
            why = (
                f"batches are at least {plain(ratio)} times the gradient noise scale, by the momentum buffer, and how "
            )
            why += "much more is not in it"
        title = f"Not told by the log ({layer}): {why}."
        return [Finding("batch-size", "batch", "open", title, "", measures, "open")]
    number = (Evidence(f"batch size over noise scale, {layer}, at least", ratio),)
    sure = f"a lower bound by the momentum buffer; {measures}"
    if ratio > WASTED:
        title = f"Mean-gradient regime: batches are at least {plain(ratio, 3)} times the noise scale."
        means = "Nearly all of a step is the mean gradient; smaller batches would make nearly the same progress a step."
        advice = f"if samples or time are short, batches up to {plain(ratio / WASTED)} times smaller: a step of them "
        advice += "still makes nine tenths of this progress"
        return [Finding("batch-size", "batch", "watch", title, means, advice, sure, number, weight=math.log(ratio))]
    title = f"Batches are at least {plain(ratio)} times the gradient noise scale: near the best trade, or above it."
    return [calm("batch-size", "batch", title, sure, number)]


ENOUGH_TO_TELL = 1.0
"""Batch size over noise scale from which on its lower bound tells something."""
