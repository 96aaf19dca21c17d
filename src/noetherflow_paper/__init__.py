"""The paper's experiments, each with a figure and a verdict for every claim."""

from noetherflow_paper.experiment import (
    REGISTRY,
    Experiment,
    Results,
    Setting,
    experiment_ids,
    find_experiment,
    generator,
    plain,
    register,
)
from noetherflow_paper.gallery import check_report, write_markdown
from noetherflow_paper.outcome import Finished, Summary
from noetherflow_paper.records import Config, ExperimentPoint
from noetherflow_paper.runner import run
from noetherflow_paper.verdict import Verdict, from_counts, from_difference, from_ratio, from_resampling, from_seeds

__all__ = [
    "REGISTRY",
    "Config",
    "Experiment",
    "ExperimentPoint",
    "Finished",
    "Results",
    "Setting",
    "Summary",
    "Verdict",
    "check_report",
    "experiment_ids",
    "find_experiment",
    "from_counts",
    "from_difference",
    "from_ratio",
    "from_resampling",
    "from_seeds",
    "generator",
    "plain",
    "register",
    "run",
    "write_markdown",
]
