"""The paper's experiments, each with a figure and a verdict for every claim."""

from noetherflow.reproduce.experiment import REGISTRY, Experiment, Results, Verdict, find_experiment
from noetherflow.reproduce.gallery import write_markdown
from noetherflow.reproduce.runner import Finished, Summary, run

__all__ = [
    "REGISTRY",
    "Experiment",
    "Finished",
    "Results",
    "Summary",
    "Verdict",
    "find_experiment",
    "run",
    "write_markdown",
]
