"""Figure 9: figure 6 with other activations."""

from noetherflow_paper import alignment
from noetherflow_paper.alignment import AlignmentConfig
from noetherflow_paper.experiment import Experiment

ACTIVATIONS = ("relu", "leaky_relu", "swish")
SCALES = {
    "quick": AlignmentConfig(activations=ACTIVATIONS, lr=0.08, batch=200, steps=1750, seeds=4),
    "paper": AlignmentConfig(activations=ACTIVATIONS, lr=0.02, batch=50, steps=10_000, seeds=16),
}

EXPERIMENT = Experiment(
    id="fig9",
    title="ReLU, leaky ReLU, swish: representations align under SGD",
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
    variations=alignment.VARIATIONS,
)
