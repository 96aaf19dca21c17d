"""Figure 9: figure 6 with other activations."""

from noetherflow_paper import alignment
from noetherflow_paper.experiment import Experiment

ACTIVATIONS = ("relu", "leaky_relu", "swish")
STEPS = 1750
EXPERIMENT = Experiment(
    id="fig9",
    title="ReLU, leaky ReLU, swish: representations align under SGD",
    statement="representations",
    setup=(
        "As fig6 with other activations; 1,750 steps in quick. ReLU and leaky ReLU have the exact diagonal symmetry "
        "only, swish none."
    ),
    scales=alignment.scales(ACTIVATIONS, STEPS),
    points=alignment.points,
    compute=alignment.compute,
    plot=alignment.plot,
    verdicts=alignment.verdicts,
    settings=alignment.SETTINGS,
    exploratory=alignment.EXPLORATORY,
    variations=alignment.variations(STEPS),
)
