"""Measures: what steering does and what it costs, how sure that is, and what chance would have done."""

from mlxsteer.measures.divergence import Divergence, Reference, kl, perplexity
from mlxsteer.measures.effect import Steerability, steerability
from mlxsteer.measures.nulls import (
    max_statistic_p_values,
    null_p_value,
    orthogonal_complement,
    random_like,
    shuffled_labels,
)
from mlxsteer.measures.preference import Preferences, preference_shift
from mlxsteer.measures.text import TextStatistics, text_statistics
from mlxsteer.measures.uncertainty import Interval, bootstrap, paired_difference

__all__ = [
    "Divergence",
    "Interval",
    "Preferences",
    "Reference",
    "Steerability",
    "TextStatistics",
    "bootstrap",
    "kl",
    "max_statistic_p_values",
    "null_p_value",
    "orthogonal_complement",
    "paired_difference",
    "perplexity",
    "preference_shift",
    "random_like",
    "shuffled_labels",
    "steerability",
    "text_statistics",
]
