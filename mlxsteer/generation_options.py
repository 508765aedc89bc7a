"""Options of generation, checked before anything runs, as mlx-lm's generators take them."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step, stream_generate
from mlx_lm.sample_utils import make_sampler

from mlxsteer.caches import check_cache
from mlxsteer.interventions.base import number, whole


def sampler_of(
    sampler: Callable[[mx.array], mx.array] | None, seed: int | None, options: Mapping[str, Any]
) -> Callable[[mx.array], mx.array] | None:
    """mlx-lm's sampler for the usual knobs, or the one given.

    Raises:
        TypeError: the sampler is no function, or a number is none.
        ValueError: a sampler and knobs for one were given; a number lies outside its range.
    """
    knobs = {name: value for name, value in options.items() if value is not None}
    if sampler is not None and knobs:
        raise ValueError(f"give a sampler or {', '.join(knobs)}, not both.")
    if sampler is not None and not callable(sampler):
        raise TypeError(f"a sampler is a function from log-probabilities to tokens, not {sampler!r}.")
    temp, shape = sampling_of(knobs)
    if seed is not None:
        seed = whole(seed, "seed", 0)
        if seed >= 2**64:
            raise ValueError(f"seed is a whole number below 2**64, not {seed}.")
        mx.random.seed(seed)
    return make_sampler(temp, **shape) if knobs else sampler


def sampling_of(options: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The temperature, and ``top_p``, ``top_k``, ``min_p`` where they are given, checked.

    Raises:
        TypeError: one of them is no number.
        ValueError: one lies outside its range, or shapes what isn't drawn.
    """
    shape = {name: value for name, value in options.items() if value is not None}
    temp = number(shape.pop("temp", 0.0), "temp")
    if temp < 0:
        raise ValueError(f"temp={temp}: a temperature is 0 (greedy) or more.")
    for name, value in shape.items():
        shape[name] = whole(value, name, 1) if name == "top_k" else number(value, name)
        if name == "min_p" and not 0 <= shape[name] <= 1:
            raise ValueError(f"min_p is a probability, from 0 to 1, not {value!r}.")
        if name == "top_p" and not 0 < shape[name] <= 1:  # mlx-lm takes 0 for 1, which is its opposite
            raise ValueError(f"top_p is a probability above 0, up to 1, not {value!r}.")
    if shape and not temp:
        raise ValueError(
            f"{', '.join(shape)} shapes what is drawn, and temp=0 draws nothing: give temp= above 0, such as 1."
        )
    return temp, shape


NO_LIMIT = 2**62
"""More tokens than any text has: in place of -1, which mlx-lm's batches and draft models don't take for no limit."""


def limits_of(max_tokens: Any, prompts: int | None = None) -> int | list[int]:
    """`max_tokens` as mlx-lm's generators take it: one number, or one for each of several prompts.

    Args:
        max_tokens: what was given.
        prompts: how many prompts there are in a list of them; None for a prompt by itself.

    Raises:
        ValueError: it is no number of tokens, or there isn't one for each prompt.
    """
    given = max_tokens.tolist() if isinstance(max_tokens, (np.ndarray, mx.array)) else max_tokens
    if prompts is None or not isinstance(given, (list, tuple)):
        return _limit(given, "max_tokens")
    if len(given) != prompts:
        raise ValueError(f"max_tokens has {len(given)} numbers for {prompts} prompts: give one for all, or one each.")
    return [_limit(value, f"max_tokens of prompt {row}") for row, value in enumerate(given)]


def _limit(value: Any, what: str) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool) or (count < 1 and count != -1):
        raise ValueError(f"{what} is a whole number from 1 on, or -1 for no limit, not {value!r}.")
    return NO_LIMIT if count == -1 else count


def processors_of(given: Any) -> list[Callable[..., mx.array]]:
    """``logits_processors=``, checked.

    Raises:
        TypeError: it is no list of functions.
    """
    if callable(given):
        raise TypeError(f"logits_processors is a list of functions of tokens and logits; one is [f], not {given!r}.")
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Mapping)) else [given]
    if bad := [one for one in several if not callable(one)]:
        raise TypeError(f"logits_processors are functions of tokens and logits, not {bad[0]!r}.")
    return several


_NOT_HERE = {
    "stop": "a text ends with the model's end token, or after max_tokens; to end it at a word, leave a loop over "
    "model.stream(...)",
    "logprobs": "each piece of a stream has its logprobs",
}
"""What to do in place of options that people look for."""


def checked_options(options: Mapping[str, Any], *, batch: bool) -> dict[str, Any]:
    """Options as mlx-lm takes them; what it doesn't have, or couldn't use, is refused before anything runs.

    Raises:
        TypeError: there is no such option, with the nearest there is; or it is of a wrong kind.
        ValueError: a number lies outside its range, or a prompt cache is empty.
    """
    known = _known_options(batch)
    ours = {"max_tokens", "temp", "top_p", "top_k", "min_p", "seed", "sampler", "logprobs", "interventions"}
    for name in options:
        if name not in known and (said := _NOT_HERE.get("stop" if name.startswith("stop") else name)):
            raise TypeError(f"no generation option {name!r}: {said}.")
        if name not in known:
            near = "temp" if name == "temperature" else ", ".join(difflib.get_close_matches(name, known | ours, n=2))
            where = " for a list of prompts" if batch else ""
            raise TypeError(f"no generation option {name!r}{where}." + (f" Nearest: {near}." if near else ""))
    made = {name: value for name, value in options.items() if value is not None}
    if "prompt_cache" in made:
        check_cache(made["prompt_cache"], "prompt_cache=")
    if "prefill_step_size" in made:
        made["prefill_step_size"] = whole(made["prefill_step_size"], "prefill_step_size", 1)
    if "logits_processors" in made:
        made["logits_processors"] = processors_of(made["logits_processors"])
    if "draft_model" in made:
        made["draft_model"] = _draft(made["draft_model"])
    return made


@functools.cache
def _known_options(batch: bool) -> frozenset[str]:
    """The names of the options that the installed mlx-lm has."""
    sources = (BatchGenerator.__init__,) if batch else (generate_step, speculative_generate_step, stream_generate)
    known = {name for source in sources for name in inspect.signature(source).parameters}
    known -= {"self", "model", "prompt", "tokenizer", "stream", "kwargs", "stop_tokens"}
    return frozenset(known if batch else known | {"cached_tokens"})


def _draft(given: Any) -> nn.Module:
    """The module of a draft model, which may come wrapped as an `InterpretableModel`."""
    found = given if isinstance(given, nn.Module) else getattr(given, "model", None)
    if not isinstance(found, nn.Module):
        raise TypeError(f"draft_model is a model, not {given!r:.60}: load one by name, mlx_lm.load(name)[0].")
    return found
