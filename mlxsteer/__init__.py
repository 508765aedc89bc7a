"""mlxsteer: read, steer and measure language models on MLX."""

from mlxsteer import datasets, directions, interventions, measures
from mlxsteer.evaluation import Evaluation, evaluate
from mlxsteer.extraction import estimate, extract, separation
from mlxsteer.generation import Generation, NothingTouched
from mlxsteer.generation_sweep import GenerationSweep, generation_sweep
from mlxsteer.model import ContextLengthWarning, InterpretableModel
from mlxsteer.pair_checks import Check
from mlxsteer.pairs import ContrastPair, PairSet
from mlxsteer.plans import NeverFired
from mlxsteer.positions import PositionError, after
from mlxsteer.reading import activations, mean_activations
from mlxsteer.recommended import Recommendation, recommended
from mlxsteer.refusal import RefusalDirection, select_refusal_direction
from mlxsteer.selection import Choice, select
from mlxsteer.sites import UnknownKey, UnsupportedModel
from mlxsteer.steering import SteeredCacheError
from mlxsteer.strength import Strength, strength_for
from mlxsteer.sweep import Sweep, sweep
from mlxsteer.trace import LostWrite, Trace
from mlxsteer.vectors import SteeringVector, VectorMismatchWarning, to_mean_norm

__all__ = [
    "Check",
    "Choice",
    "ContextLengthWarning",
    "ContrastPair",
    "Evaluation",
    "Generation",
    "GenerationSweep",
    "InterpretableModel",
    "LostWrite",
    "NeverFired",
    "NothingTouched",
    "PairSet",
    "PositionError",
    "Recommendation",
    "RefusalDirection",
    "SteeredCacheError",
    "SteeringVector",
    "Strength",
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
    "evaluate",
    "extract",
    "generation_sweep",
    "interventions",
    "mean_activations",
    "measures",
    "recommended",
    "select",
    "select_refusal_direction",
    "separation",
    "strength_for",
    "sweep",
    "to_mean_norm",
]
__version__ = "0.1.0"
