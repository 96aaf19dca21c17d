"""Rules on Adam's average of squares: whether it is long enough to be a scale, and not swamped by eps."""

from __future__ import annotations

import math

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.optimizers import Settings
from noetherflow.diagnosis.finding import Evidence, Finding, Severity, calm, plain

SHORT_MEMORY, LLM_MEMORY = 0.9, 0.95
SWAMPED, MOSTLY = 0.1, 0.5
"""`b2` below which `v` is tiny, and up to which equilibria are off by factors; shares of entries that eps swamps."""


def memory_of_squares(settings: Settings) -> list[Finding]:
    """`memory_of` of an optimiser's settings; nothing but of Adam's."""
    return memory_of(settings.betas[1]) if isinstance(settings, AdamConfig) else []


def memory_of(b2: float) -> list[Finding]:
    """Whether Adam's average of squares is long enough to be a scale, not noise.

    It averages `n = 1 / (1 - b2)` gradients, so that each entry's step size scatters by `1 / sqrt(2 n)` of itself.
    Threshold: at `b2 < 0.9` that is over 22 % from step to step, the step is close to a sign of the last gradients, and
    `v` follows the very fluctuations it divides by. At 0.95 and below, as large language models use it, training is
    fine, but predictions of the noise equilibrium are off by factors (docs/adaptive.md): good, and said.
    """
    steps = 1 / (1 - b2)
    numbers = (Evidence("b2", b2), Evidence("gradients that v averages", steps))
    if b2 < SHORT_MEMORY:
        title = f"Adam's b2 = {b2:g} is tiny: v averages {plain(steps)} gradients."
        means = (
            f"Step sizes scatter by about {1 / math.sqrt(2 * steps):.0%} from step to step, and rare large gradients "
        )
        means += "are divided by themselves: nearly sign descent, without Adam's scaling."
        advice = "set betas=(0.9, 0.999), or 0.95 for the second with large batches"
        sure = "sure: a matter of the setting alone"
        weight = SHORT_MEMORY - b2
        return [Finding("memory-of-squares", "optimiser", "act", title, means, advice, sure, numbers, weight=weight)]
    caution = (
        "" if b2 > LLM_MEMORY else "; fine for training, too few for predicted equilibria, which are off by factors"
    )
    title = f"Adam's v averages {steps:,.0f} gradients{caution}."
    return [calm("memory-of-squares", "optimiser", title, evidence=numbers)]


def eps_of_adam(share: float, eps: float) -> list[Finding]:
    """Whether Adam's eps swamps the sizes of the gradients: `share` of the entries have a root mean square below it.

    Threshold: an entry whose gradients are smaller than eps is moved by `lr g / eps`, as by SGD. From a tenth of the
    entries on that is to watch, from half of them on to act on, since steps are then shorter than Adam's by more than
    half. (A small Llama under AdamW with eps 0.1 ended at a loss of 3.66 where it reaches 1.96.) Entries that no sample
    reaches do not count.
    """
    if not share >= SWAMPED:
        return []
    title = f"Adam's eps = {eps:g} is larger than the gradients of {share:.0%} of the entries."
    means = "These are moved in proportion to their gradients, as by SGD, and by less than the learning rate."
    advice = "set eps=1e-8, the default"
    numbers = (Evidence("share of entries with gradients below eps", share),)
    severity: Severity = "act" if share >= MOSTLY else "watch"
    return [Finding("eps", "optimiser", severity, title, means, advice, "measured", numbers, weight=share)]
