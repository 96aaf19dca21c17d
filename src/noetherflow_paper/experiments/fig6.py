"""Figure 6: a tanh net aligns its two layers under SGD though it has no exact rotation symmetry."""

from noetherflow_paper import alignment
from noetherflow_paper.experiment import Experiment

ACTIVATIONS = ("tanh",)
STEPS = 1000
EXPERIMENT = Experiment(
    id="fig6",
    title="tanh: representations align under SGD",
    statement="representations",
    setup=(
        "Two-layer tanh net, x in R^40 isotropic, y = x + eps, Var eps_1 = 5, others 1 (given); hidden width 80. "
        "SGD and GD (mean gradient over 2,000 inputs) for 1,000 steps at rate 0.08, batch 200 (quick), or the given "
        "10,000 steps at 0.02, batch 50 (paper)."
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
