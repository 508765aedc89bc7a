"""mlxsteer: read, steer and measure language models on MLX."""

from mlxsteer import datasets, directions, heads, interventions, measures
from mlxsteer.adapters import Adapter, EmbeddingStays, export_adapter
from mlxsteer.baked import Baked, BakedDiffers
from mlxsteer.baking import bake
from mlxsteer.caches import cache_history, fill_prompt_cache, load_prompt_cache, save_prompt_cache
from mlxsteer.control_vectors import CannotExport, ControlVector, export_control_vector
from mlxsteer.evaluation import Evaluation, evaluate
from mlxsteer.extraction import estimate, extract, separation
from mlxsteer.folding import CannotBake
from mlxsteer.function_vectors import FunctionVector, function_vector, task_states
from mlxsteer.gating import GateFit, fit_gate
from mlxsteer.generation import Generation, NotFinite, NothingTouched
from mlxsteer.generation_sweep import GenerationSweep, generation_sweep
from mlxsteer.head_effects import IndirectEffects, indirect_effects, mean_head_values, task_accuracy
from mlxsteer.inference_time import HeadShift, shift_heads
from mlxsteer.latent_contrast import LatentContrast, latents_that_differ
from mlxsteer.model import ContextLengthWarning, InterpretableModel
from mlxsteer.pair_checks import Check
from mlxsteer.pair_components import PairComponents, pair_components
from mlxsteer.pairs import ContrastPair, PairSet
from mlxsteer.patched import Patching
from mlxsteer.patching import patch
from mlxsteer.plans import NeverFired
from mlxsteer.positions import PositionError, after
from mlxsteer.probe_fitting import probe
from mlxsteer.probes import LayerProbe, Probe
from mlxsteer.publishing import push_to_hub
from mlxsteer.reading import activations, mean_activations
from mlxsteer.recommended import Recommendation, recommended
from mlxsteer.reft import Reft
from mlxsteer.reft_training import train_reft
from mlxsteer.refusal import RefusalDirection, select_refusal_direction
from mlxsteer.sae import SaeFigures, SparseAutoencoder
from mlxsteer.sae_training import fit_sae, train_sae
from mlxsteer.selection import Choice, select
from mlxsteer.sites import UnknownKey, UnsupportedModel
from mlxsteer.slider import slider
from mlxsteer.steering import PartlySteered, SteeredCacheError
from mlxsteer.strength import Strength, strength_for
from mlxsteer.sweep import Sweep, sweep
from mlxsteer.token_readings import TokenReadings, Watching, projections
from mlxsteer.trace import LostWrite, Trace
from mlxsteer.vectors import SteeringVector, VectorMismatchWarning, to_mean_norm
from mlxsteer.word_pairs import InContextPrompt, Template, in_context

__all__ = [
    "Adapter",
    "Baked",
    "BakedDiffers",
    "CannotBake",
    "CannotExport",
    "Check",
    "Choice",
    "ContextLengthWarning",
    "ContrastPair",
    "ControlVector",
    "EmbeddingStays",
    "Evaluation",
    "FunctionVector",
    "GateFit",
    "Generation",
    "GenerationSweep",
    "HeadShift",
    "InContextPrompt",
    "IndirectEffects",
    "InterpretableModel",
    "LatentContrast",
    "LayerProbe",
    "LostWrite",
    "NeverFired",
    "NotFinite",
    "NothingTouched",
    "PairComponents",
    "PairSet",
    "PartlySteered",
    "Patching",
    "PositionError",
    "Probe",
    "Recommendation",
    "Reft",
    "RefusalDirection",
    "SaeFigures",
    "SparseAutoencoder",
    "SteeredCacheError",
    "SteeringVector",
    "Strength",
    "Sweep",
    "Template",
    "TokenReadings",
    "Trace",
    "UnknownKey",
    "UnsupportedModel",
    "VectorMismatchWarning",
    "Watching",
    "activations",
    "after",
    "bake",
    "cache_history",
    "datasets",
    "directions",
    "estimate",
    "evaluate",
    "export_adapter",
    "export_control_vector",
    "extract",
    "fill_prompt_cache",
    "fit_gate",
    "fit_sae",
    "function_vector",
    "generation_sweep",
    "heads",
    "in_context",
    "indirect_effects",
    "interventions",
    "latents_that_differ",
    "load_prompt_cache",
    "mean_activations",
    "mean_head_values",
    "measures",
    "pair_components",
    "patch",
    "probe",
    "projections",
    "push_to_hub",
    "recommended",
    "save_prompt_cache",
    "select",
    "select_refusal_direction",
    "separation",
    "shift_heads",
    "slider",
    "strength_for",
    "sweep",
    "task_accuracy",
    "task_states",
    "to_mean_norm",
    "train_reft",
    "train_sae",
]
__version__ = "0.1.0"
