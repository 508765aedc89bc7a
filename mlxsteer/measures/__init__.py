"""Measures: what steering does and what it costs, how sure that is, and what chance would have done."""

from mlxsteer.measures.effect import Steerability, steerability
from mlxsteer.measures.nulls import (
    max_statistic_p_values,
    null_p_value,
    orthogonal_complement,
    random_like,
    shuffled_labels,
)
from mlxsteer.measures.text import TextStatistics, text_statistics
from mlxsteer.measures.uncertainty import Interval, bootstrap, paired_difference

__all__ = [
    "Interval",
    "Steerability",
    "TextStatistics",
    "bootstrap",
    "max_statistic_p_values",
    "null_p_value",
    "orthogonal_complement",
    "paired_difference",
    "random_like",
    "shuffled_labels",
    "steerability",
    "text_statistics",
]
