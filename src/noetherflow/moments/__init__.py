"""Measuring gradient noise on the legs of symmetries."""

from noetherflow.moments.engine import Meter, gradient_moments
from noetherflow.moments.result import GradientMoments, merge_moments

__all__ = ["GradientMoments", "Meter", "gradient_moments", "merge_moments"]
