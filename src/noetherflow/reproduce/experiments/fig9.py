"""Figure 9: figure 6 with other activations."""

from noetherflow.reproduce import alignment
from noetherflow.reproduce.experiment import Experiment

COMMON = {
    "d": 40,
    "width": 80,
    "first_variance": 5.0,
    "lr": 0.02,
    "batch": 50,
    "activations": ["relu", "leaky_relu", "swish"],
}
SCALES = {
    "quick": {**COMMON, "steps": 7000, "gd_steps": 1000, "population": 300, "seeds": 5},
    "paper": {**COMMON, "steps": 10_000, "gd_steps": 10_000, "population": 2000, "seeds": 16},
}

EXPERIMENT = Experiment(
    id="fig9",
    title="ReLU, leaky ReLU, swish: representations align under SGD",
    setup=(
        "As fig6 with other activations; 7,000 SGD steps in quick, 10,000 in paper. ReLU and leaky ReLU have the exact "
        "diagonal symmetry only, swish none."
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
