"""Figure 6: a tanh net aligns its two layers under SGD though it has no exact rotation symmetry."""

from noetherflow.reproduce import alignment
from noetherflow.reproduce.experiment import Experiment

COMMON = {"d": 40, "width": 80, "first_variance": 5.0, "lr": 0.02, "batch": 50, "activations": ["tanh"]}
SCALES = {
    "quick": {**COMMON, "steps": 10_000, "gd_steps": 1500, "population": 400, "seeds": 5},
    "paper": {**COMMON, "steps": 10_000, "gd_steps": 10_000, "population": 2000, "seeds": 16},
}

EXPERIMENT = Experiment(
    id="fig6",
    title="tanh: representations align under SGD",
    setup=(
        "Two-layer tanh net, x in R^40 isotropic, y = x + eps, Var eps_1 = 5, others 1, 10,000 SGD steps (given); "
        "hidden width 80, learning rate 0.02, batch 50. GD: mean gradient over 400 inputs (quick)."
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
