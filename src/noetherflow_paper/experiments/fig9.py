"""Figure 9: figure 6 with other activations."""

from dataclasses import replace

from noetherflow_paper import alignment
from noetherflow_paper.alignment import DECISIVE_DESIGN, PRINTED_DESIGN, AlignmentConfig
from noetherflow_paper.experiment import Experiment

ACTIVATIONS = ("relu", "leaky_relu", "swish")
STEPS = 1750
SCALES = {
    "quick": AlignmentConfig(
        activations=ACTIVATIONS,
        printed=replace(PRINTED_DESIGN, steps=STEPS),
        decisive=replace(DECISIVE_DESIGN, steps=3000),
        lr=0.08,
        batch=200,
        seeds=4,
    ),
    "paper": AlignmentConfig(
        activations=ACTIVATIONS,
        printed=PRINTED_DESIGN,
        decisive=DECISIVE_DESIGN,
        lr=0.02,
        batch=50,
        seeds=16,
    ),
}

EXPERIMENT = Experiment(
    id="fig9",
    title="ReLU, leaky ReLU, swish: representations align under SGD",
    statement="representations",
    setup=(
        "As fig6 with other activations; 1,750 steps in quick. ReLU and leaky ReLU have the exact diagonal symmetry "
        "only, swish none."
    ),
    scales=SCALES,
    points=alignment.points,
    compute=alignment.compute,
    plot=alignment.plot,
    verdicts=alignment.verdicts,
    settings=alignment.SETTINGS,
    exploratory=alignment.EXPLORATORY,
    variations=alignment.variations(STEPS),
)
