"""mlxsteer: read, steer and measure language models on MLX."""

from mlxsteer import datasets, directions, interventions
from mlxsteer.extraction import estimate, extract, separation
from mlxsteer.generation import Generation, NothingTouched
from mlxsteer.model import ContextLengthWarning, InterpretableModel
from mlxsteer.pair_checks import Check
from mlxsteer.pairs import ContrastPair, PairSet
from mlxsteer.plans import NeverFired
from mlxsteer.positions import PositionError, after
from mlxsteer.reading import activations, mean_activations
from mlxsteer.sites import UnknownKey, UnsupportedModel
from mlxsteer.steering import SteeredCacheError
from mlxsteer.sweep import Sweep, sweep
from mlxsteer.trace import LostWrite, Trace
from mlxsteer.vectors import SteeringVector, VectorMismatchWarning, to_mean_norm

__all__ = [
    "Check",
    "ContextLengthWarning",
    "ContrastPair",
    "Generation",
    "InterpretableModel",
    "LostWrite",
    "NeverFired",
    "NothingTouched",
    "PairSet",
    "PositionError",
    "SteeredCacheError",
    "SteeringVector",
    "Sweep",
    "Trace",
    "UnknownKey",
    "UnsupportedModel",
    "VectorMismatchWarning",
    "activations",
    "after",
    "datasets",
    "directions",
    "estimate",
    "extract",
    "interventions",
    "mean_activations",
    "separation",
    "sweep",
    "to_mean_norm",
]
__version__ = "0.1.0"
