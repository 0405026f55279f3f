"""Weight estimators: one contract (`base.Estimator`), one file each."""

from .alignment import AlignmentEstimator
from .base import Estimator, EstimatorHost
from .lookahead import LookaheadEstimator
from .loss import LossEstimator
from .value_function import ValueFunctionEstimator

ESTIMATORS: dict[str, type[Estimator]] = {
    estimator.name: estimator
    for estimator in (ValueFunctionEstimator, LookaheadEstimator, AlignmentEstimator, LossEstimator)
}

__all__ = [
    "ESTIMATORS",
    "AlignmentEstimator",
    "Estimator",
    "EstimatorHost",
    "LookaheadEstimator",
    "LossEstimator",
    "ValueFunctionEstimator",
]
