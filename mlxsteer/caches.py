"""Prompt caches to keep: in a file, with what steered them; filled clean, for many steerings to go on from."""

from __future__ import annotations

import functools
import json
import os
import types
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_caches
from mlx_lm.models.cache import make_prompt_cache

from mlxsteer.interventions.base import whole
from mlxsteer.interventions.files import write_whole
from mlxsteer.positions import FOREVER, Position, Prompt, after
from mlxsteer.steering import (
    STEERED,
    Row,
    Said,
    SteeredCacheError,
    Steering,
    SteeringState,
    carrier,
    fresh_rows,
    remember,
    ride,
    state_of,
)

if TYPE_CHECKING:
    from mlxsteer.model import InterpretableModel, Text

KEY = "mlxsteer_prompt_cache"
"""Where our data lies in the metadata of mlx-lm's file; without a dot, at which mlx-lm would take it apart."""
VERSION = 1


def check_cache(cache: Any, what: str = "a prompt cache") -> None:
    """Refuse what is no prompt cache.

    Args:
        cache: what was given.
        what: what to call it in a refusal.

    Raises:
        TypeError: it is something else.
        ValueError: it is a list of no caches.
    """
    if isinstance(cache, (str, os.PathLike)):
        raise TypeError(f"{what} is a list of mlx-lm's caches, not {cache!r}: load_prompt_cache reads one from a file.")
    listed = isinstance(cache, (list, tuple))
    entries = [one for one in cache if one is not None] if listed else []
    if listed and not entries:
        raise ValueError(f"{what} is empty: fill_prompt_cache and mlx-lm's make_prompt_cache make one.")
    # by the class: reading a cache's state is how its rows tell a prompt from what is generated
    if not listed or not all(hasattr(type(one), "state") for one in entries):
        raise TypeError(f"{what} is a list of mlx-lm's caches, as fill_prompt_cache makes one, not {cache!r:.80}.")


def fill_prompt_cache(
    model: InterpretableModel, prompt: Text, *, max_kv_size: int | None = None, prefill_step_size: int = 2048
) -> list[Any]:
    """Run a prompt into a new prompt cache and generate nothing: for many generations to go on from copies of it.

    What runs around this call steers the prompt; without that, the cache is clean, and any steering may go on from a
    copy of it, wherever its positions lie behind it:

    ``model.generate(rest, steering, prompt_cache=copy.deepcopy(cache))``

    Args:
        model: the model.
        prompt: a text, token ids or chat messages. What comes later are tokens of their own, so give a text that ends
            where a token does; a tokenizer that begins texts with a BOS begins the later one with another, unless that
            is given as token ids.
        max_kv_size: as in mlx-lm.
        prefill_step_size: the most tokens in one forward.

    Returns:
        A prompt cache for `model.generate` and every mlx-lm function. It knows its tokens, so that positions that look
        at them (`after`, a callable) are those of the whole prompt.

    Raises:
        ValueError: the prompt is empty, too long, or can't be encoded; or a step is of no tokens.
        PositionError: a steering around this needs the prompt's end, which is still to come.
    """
    step = whole(prefill_step_size, "prefill_step_size", 1)
    tokens = model.encode(prompt)
    cache: list[Any] = make_prompt_cache(model.model, max_kv_size)
    for begin in range(0, len(tokens), step):
        model.model(mx.array([tokens[begin : begin + step]]), cache=cache)
        mx.eval([entry.state for entry in cache if entry is not None])
    state = state_of(cache)
    if state is None:
        remember(carrier(cache), tokens)
    else:
        state.rows[0].tokens = tuple(tokens)
    return cache


# -- what a cache says of itself -----------------------------------------------------------------------------------


def cache_history(cache: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """Under what a prompt cache was filled, as plain data.

    Args:
        cache: a prompt cache, of any number of rows.

    Returns:
        For each row its spans, in order: ``{"start": 5, "stop": 9, "edits": [...]}``, tokens 5 to 8. Each edit has the
        `steering`'s name (``model.steer(mood=...)``), the `key`, the name of the `intervention`, its `fingerprint`
        (equal for edits that do the same, however strongly) and the `strength`, multipliers included. A span without
        edits was filled clean. `stop` is None where a state-space cache, filled by other code, doesn't say how much it
        holds.

    Raises:
        TypeError, ValueError: it is no prompt cache.
    """
    check_cache(cache)
    try:
        rows = _rows(cache)
    except SteeredCacheError:
        return [[{"start": 0, "stop": None, "edits": []}]]
    return [_spans(row) for row in rows]


def _rows(cache: Sequence[Any]) -> list[Row]:
    state = state_of(cache)
    if state is not None:
        return state.rows
    padding = getattr(carrier(cache), "left_padding", None)
    return fresh_rows(cache, len(padding) if padding is not None else 1)


def _spans(row: Row) -> list[dict[str, Any]]:
    first = row.history[0][0] if row.history else row.seen
    spans: list[dict[str, Any]] = [{"start": 0, "stop": first, "edits": []}] if first > 0 else []
    for number, (start, strengths) in enumerate(row.history):
        stop = row.history[number + 1][0] if number + 1 < len(row.history) else row.seen
        edits = [
            edit for steering, own in zip(row.steerings or (), strengths, strict=True) for edit in _edits(steering, own)
        ]
        spans.append({"start": start, "stop": stop, "edits": edits})
    return [span for span in spans if span["stop"] > span["start"]]


def _edits(steering: Steering, strengths: Sequence[Any]) -> list[dict[str, Any]]:
    parts = [(said, part) for said in steering.said for part in said.parts]
    return [
        {
            "steering": steering.name,
            "key": said.key,
            "intervention": part,
            "fingerprint": said.fingerprint,
            "strength": list(strength) if isinstance(strength, tuple) else strength,
        }
        for (said, part), strength in zip(parts, strengths, strict=True)
    ]


# -- files ---------------------------------------------------------------------------------------------------------


def save_prompt_cache(path: str | Path, cache: Sequence[Any], metadata: Mapping[str, str] | None = None) -> Path:
    """Save a prompt cache with what steered it, in mlx-lm's own format and one entry of metadata more.

    mlx-lm's `load_prompt_cache` reads the file of a clean cache, and refuses that of a steered one.

    Args:
        path: a file name ending in ``.safetensors``; the file is written whole or not at all.
        cache: a prompt cache, steered or clean.
        metadata: texts to keep with it.

    Raises:
        ValueError: the name doesn't end in ``.safetensors``; or the cache was steered by what can't be recognised when
            it is loaded (a plain function, a callable position); or mlx-lm can't load a cache of its kind; or its
            rows are padded, in the midst of a prefill.
        TypeError: the path is none, the cache is none, or the metadata isn't all texts.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"save_prompt_cache(path, cache): a path is a text or a Path, not {type(path).__name__}.")
    check_cache(cache)
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: a prompt cache is saved as a .safetensors file.")
    texts = dict(metadata or {})
    if not all(isinstance(text, str) for item in texts.items() for text in item):
        raise TypeError("metadata= is a dict of texts.")
    if KEY in texts:
        raise ValueError(f"metadata= has an entry {KEY!r}, which is ours: save what load_prompt_cache gave you apart.")
    kinds = _loadable()
    for entry in cache:
        if type(entry).__name__ not in kinds:
            raise ValueError(f"mlx-lm can't load a cache of {type(entry).__name__} from a file, so it isn't saved.")
    data = {"version": VERSION, "mlx_lm": version("mlx-lm"), "metadata": texts, **_said(cache)}
    # A copy: reading a cache's state is how its rows tell a prompt from what is generated.
    copied = [entry.__copy__() if hasattr(entry, "steering_state") else entry for entry in cache]

    def write(temporary: str) -> None:
        mlx_lm_caches.save_prompt_cache(temporary, copied, {**texts, KEY: json.dumps(data)})

    return write_whole(path, write)


def load_prompt_cache(path: str | Path, return_metadata: bool = False) -> Any:
    """Load a prompt cache that `save_prompt_cache` wrote; it goes on exactly as the saved one would.

    It is for the model that filled it, under the steering that did: another one, or none, is refused.

    Args:
        path: the file.
        return_metadata: also give the metadata that was saved.

    Returns:
        The prompt cache, or (prompt cache, metadata).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, foreign, or of a later version.
    """
    source = Path(path)
    data = _header(source)
    try:
        rows = [_row(row) for row in data["rows"]]
        cache = _loader()(str(source))
        mx.eval([entry.state for entry in cache])  # the file may be gone when they are needed
        first = carrier(cache)
        if any(row.steerings for row in rows):
            ride(first, SteeringState(rows))
        elif len(rows) == 1 and rows[0].seen and rows[0].known() is not None:
            remember(first, rows[0].tokens)
        texts = {str(name): str(text) for name, text in data["metadata"].items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        other = data.get("mlx_lm")
        reason = f"mlx-lm {other} wrote it, and this is {version('mlx-lm')}" if other != version("mlx-lm") else error
        raise ValueError(f"{source}: its prompt cache is damaged or can't be read here ({reason}).") from error
    return (cache, texts) if return_metadata else cache


def _header(source: Path) -> dict[str, Any]:
    """Our data in a file.

    Raises:
        FileNotFoundError, ValueError: see `load_prompt_cache`.
    """
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}.")
    try:
        loaded: Any = mx.load(str(source), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{source} is no complete safetensors file.") from error
    metadata = loaded[1]
    found = next((text for name, text in metadata.items() if name.split(".")[1:] == [KEY]), None)
    if found is None and any(text.startswith(STEERED) for text in metadata.values()):
        raise ValueError(
            f"{source}: mlx-lm's own save_prompt_cache wrote this steered cache, without what steered it: save it by "
            "mlxsteer.save_prompt_cache."
        )
    if found is None:
        raise ValueError(f"{source} is no prompt cache that mlxsteer saved: load mlx-lm's own by mlx_lm.models.cache.")
    try:
        data = json.loads(found)
        written = int(data["version"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{source}: the metadata of its prompt cache is damaged.") from error
    if written > VERSION:
        raise ValueError(f"{source} is a prompt cache of version {written}; this mlxsteer reads up to {VERSION}.")
    return dict(data)


def _loadable() -> dict[str, Any]:
    """The cache classes that mlx-lm loads, by the names in files: those of steered ones are ours."""
    kinds = {name: kind for name, kind in vars(mlx_lm_caches).items() if hasattr(kind, "from_state")}
    return {**kinds, **{f"{STEERED}{name}": kind for name, kind in kinds.items()}}


def _loader() -> Any:
    """mlx-lm's loader, which looks classes up among the names of its module, with the names of steered ones added."""
    plain = mlx_lm_caches.load_prompt_cache
    return types.FunctionType(
        plain.__code__, {**vars(mlx_lm_caches), **_loadable()}, plain.__name__, plain.__defaults__, plain.__closure__
    )


# -- rows as data --------------------------------------------------------------------------------------------------


def _said(cache: Sequence[Any]) -> dict[str, Any]:
    """What is known of a cache's rows, as data."""
    state = state_of(cache)
    try:
        rows = _rows(cache)
    except SteeredCacheError:
        rows = []
    if state is not None and state.padded:
        raise ValueError("the rows of this prompt cache are padded, in the midst of a prefill: save it after that.")
    return {"rows": [_row_data(row) for row in rows]}


PLAIN = ("seen", "told", "read", "begun", "clean", "broken")
"""What a row's numbers and flags are called."""


def _row_data(row: Row) -> dict[str, Any]:
    return {
        **{name: getattr(row, name) for name in PLAIN},
        "tokens": list(row.tokens),
        "prompt": _prompt_data(row),
        "steerings": [_steering_data(steering) for steering in row.steerings or ()],
        "history": row.history,
        "memory": _memory_data(row.memory),
    }


def _row(data: Mapping[str, Any]) -> Row:
    steerings = tuple(
        Steering.remembered(name, [Said(key, fingerprint, tuple(parts)) for key, fingerprint, parts in said])
        for name, said in data["steerings"]
    )
    history = tuple((int(start), _tuples(strengths)) for start, strengths in data["history"])
    for _, strengths in history:
        if [len(own) for own in strengths] != [sum(len(s.parts) for s in steering.said) for steering in steerings]:
            raise ValueError("its history tells of other steerings")
    row = Row(steerings or None, prompt=_prompt(data["prompt"]), memory=_memory(data["memory"]), history=history)
    for name in PLAIN:
        setattr(row, name, type(getattr(row, name))(data[name]))
    row.tokens = tuple(int(token) for token in data["tokens"])
    return row


def _steering_data(steering: Steering) -> list[Any]:
    for said in steering.said:
        if any(mark in said.fingerprint for mark in ("unsaved-", "function-")):
            raise ValueError(
                f"this cache was steered at {said.key} by what can't be recognised when it is loaded, a plain function "
                "or a callable position: register it as an intervention, give the positions as a list."
            )
    return [steering.name, [[said.key, said.fingerprint, list(said.parts)] for said in steering.said]]


def _prompt_data(row: Row) -> dict[str, Any]:
    """A prompt without what decodes it: where its texts end is found now."""
    prompt = row.prompt
    ends = {
        at.value: spans[0].start
        for at, spans in prompt._ranges.items()
        if at.kind == "after" and isinstance(at.value, str)
    }
    return {"length": prompt.length, "tokens": prompt.tokens, "mixed": prompt.mixed, "after": ends}


def _prompt(data: Mapping[str, Any]) -> Prompt:
    ends = {Position.of(after(text)): (range(start, FOREVER),) for text, start in data["after"].items()}
    return Prompt(data["length"], data["tokens"], mixed=bool(data["mixed"]), _ranges=dict(ends))


_DTYPES: dict[str, mx.Dtype] = {name: kind for name, kind in vars(mx).items() if isinstance(kind, mx.Dtype)}


def _memory_data(memory: Mapping[Any, Any]) -> list[Any]:
    """What gates and spans remember, as pairs of a name and a value, without what takes them back into a forward."""
    return [[name, _kept_data(kept)] for name, kept in memory.items() if not _is_trail(name)]


def _kept_data(kept: Any) -> Any:
    if isinstance(kept, Mapping):
        return {"inner": _memory_data(kept)}
    if isinstance(kept, tuple):  # an array that rows share, and the row's number in it
        value = kept[0][kept[1]]
        return {"dtype": next(name for name, kind in _DTYPES.items() if kind == value.dtype), "value": value.tolist()}
    return kept


def _memory(data: Sequence[Any]) -> dict[Any, Any]:
    memory = {_tuples(name): _kept(kept) for name, kept in data}
    for name, kept in list(memory.items()):
        if isinstance(kept, tuple):  # a trail of no tokens: there is no forward here to be taken back into
            memory["trail", name] = functools.partial(_same, kept[0]), 0, 0
    return memory


def _kept(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    if "inner" in data:
        return {_tuples(name): _kept(kept) for name, kept in data["inner"]}
    value = mx.array(data["value"], _DTYPES[data["dtype"]])[None]
    mx.eval(value)
    return value, 0


def _same(value: mx.array, _: int) -> mx.array:
    return value


def _is_trail(name: Any) -> bool:
    return isinstance(name, tuple) and name[0] == "trail"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
