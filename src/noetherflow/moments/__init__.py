"""Measuring gradient noise on the legs of symmetries."""

from noetherflow.moments.capture import Captured
from noetherflow.moments.engine import Meter, gradient_moments
from noetherflow.moments.factors import gradient_factors
from noetherflow.moments.minibatch import MinibatchMeter, minibatch_moments
from noetherflow.moments.products import Factors
from noetherflow.moments.result import GradientMoments, merge_moments
from noetherflow.moments.statistics import Estimate, standard_error
from noetherflow.moments.storage import load_moments, save_moments

__all__ = [
    "Captured",
    "Estimate",
    "Factors",
    "GradientMoments",
    "Meter",
    "MinibatchMeter",
    "gradient_factors",
    "gradient_moments",
    "load_moments",
    "merge_moments",
    "minibatch_moments",
    "save_moments",
    "standard_error",
]
