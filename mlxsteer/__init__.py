"""mlxsteer: read, steer and measure language models on MLX."""

from mlxsteer import datasets, interventions
from mlxsteer.extraction import extract, mean_activations
from mlxsteer.generation import Generation, NothingTouched
from mlxsteer.model import ContextLengthWarning, InterpretableModel
from mlxsteer.pairs import ContrastPair
from mlxsteer.plans import NeverFired
from mlxsteer.positions import PositionError, after
from mlxsteer.sites import UnknownKey, UnsupportedModel
from mlxsteer.steering import SteeredCacheError
from mlxsteer.sweep import Sweep, sweep
from mlxsteer.trace import LostWrite, Trace
from mlxsteer.vectors import SteeringVector

__all__ = [
    "ContextLengthWarning",
    "ContrastPair",
    "Generation",
    "InterpretableModel",
    "LostWrite",
    "NeverFired",
    "NothingTouched",
    "PositionError",
    "SteeredCacheError",
    "SteeringVector",
    "Sweep",
    "Trace",
    "UnknownKey",
    "UnsupportedModel",
    "after",
    "datasets",
    "extract",
    "interventions",
    "mean_activations",
    "sweep",
]
__version__ = "0.1.0"
