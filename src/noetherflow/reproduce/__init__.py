"""The paper's experiments, each with a figure and a verdict for every claim."""

from noetherflow.reproduce.experiment import REGISTRY, Experiment, Results, Verdict, find_experiment
from noetherflow.reproduce.gallery import check_report, write_markdown
from noetherflow.reproduce.outcome import Finished, Summary
from noetherflow.reproduce.runner import run

__all__ = [
    "REGISTRY",
    "Experiment",
    "Finished",
    "Results",
    "Summary",
    "Verdict",
    "check_report",
    "find_experiment",
    "run",
    "write_markdown",
]
