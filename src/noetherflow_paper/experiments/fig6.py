"""Figure 6: a tanh net aligns its two layers under SGD though it has no exact rotation symmetry."""

from dataclasses import replace

from noetherflow_paper import alignment
from noetherflow_paper.alignment import DECISIVE_DESIGN, PRINTED_DESIGN, AlignmentConfig
from noetherflow_paper.experiment import Experiment

ACTIVATIONS = ("tanh",)
STEPS = 1000
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
    id="fig6",
    title="tanh: representations align under SGD",
    statement="representations",
    setup=(
        "Two-layer tanh net, x in R^40 isotropic, y = x + eps, Var eps_1 = 5, others 1 (given); hidden width 80. "
        "SGD and GD (mean gradient over 2,000 inputs) for 1,000 steps at rate 0.08, batch 200 (quick), or the given "
        "10,000 steps at 0.02, batch 50 (paper)."
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
