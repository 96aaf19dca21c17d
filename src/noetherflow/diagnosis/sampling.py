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
    if 0 < low == high:
        return "samples, exact for this training set, all of which was measured"
    return f"samples, 95 % {f'above {show(low)}' if math.isinf(high) else f'between {show(low)} and {show(high)}'}"


def noise_share(ratio: float, layer: str) -> list[Finding]:
    """The same from a run's momentum buffer: `ratio` is the batch size over the noise scale of the layer.

    The buffer keeps what successive gradients have in common. A mean gradient that turns from step to step, as at the
    edge of stability, is lost in it, so that the ratio comes out too low: 7 to 18 times where that was measured. Where
    gradients are clipped it came out twice too high. So all between 0.4 and 20 times the ratio is taken to be possible,
    and most logs leave the question open; thresholds as in `batch_size`.
    """
    low, high = ratio * TOO_HIGH, ratio * TOO_LOW
    sure = f"by the momentum buffer, which was {1 / TOO_HIGH:g} times too high to {TOO_LOW:g} times too low elsewhere"
    number = (Evidence(f"batch size over noise scale by the momentum buffer, {layer}", ratio),)
    if not math.isfinite(ratio) or ratio <= 0:
        return [_untold("the share of the mean gradient was not estimated, or scatters around 0 or 1")]
    if low >= WORTH * WASTED:
        title = f"Mean-gradient regime: batches are {plain(low)} times the gradient noise scale or more."
        means = "Nearly all of a step is the mean gradient; smaller batches would make nearly the same progress a step."
        advice = f"if samples or time are short, batches {plain(low / WASTED)} times smaller: a step of them still "
        advice += "makes nine tenths of this progress"
        return [Finding("batch-size", "batch", "watch", title, means, advice, sure, number, weight=math.log(low))]
    if high <= NOISY:
        title = f"Batches are {plain(high)} times the gradient noise scale or less: noise regime; larger ones would "
        return [calm("batch-size", "batch", f"{title}save steps.", sure, number)]
    return [_untold(f"batches are somewhere between {plain(low)} and {plain(high)} times the gradient noise scale")]


def _untold(why: str) -> Finding:
    """What a log does not tell of the batch size."""
    measures = "nf.diagnose(model, loss_fn, loader, optimizer) at these weights measures it"
    return Finding("batch-size", "batch", "open", f"Not told by the log: {why}.", "", measures, "open")


TOO_HIGH, TOO_LOW, WORTH = 0.4, 20.0, 2.0
"""Times a log's ratio that the true one may be, at least and at most; how much smaller batches are worth advising."""
