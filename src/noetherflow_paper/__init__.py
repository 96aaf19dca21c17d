"""The paper's experiments, each with a figure and a verdict for every claim."""

from noetherflow_paper.experiment import REGISTRY, Experiment, Results, Verdict, find_experiment
from noetherflow_paper.gallery import check_report, write_markdown
from noetherflow_paper.outcome import Finished, Summary
from noetherflow_paper.runner import run

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
