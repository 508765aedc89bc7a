"""Names of places in a model: from a key that a person writes to the module it means, without running anything.

A *key* is the MLX path of a module, with the container of the blocks called ``layers`` on every family:
``layers.5``, ``layers.5.self_attn``, ``layers.5.mlp.down_proj``. It means the module's output; a last segment
``input`` means its input. Fixed names are ``embed``, ``norm`` and ``logits``; role names are ``layers.5.attn``,
``layers.5.mlp`` and ``layers.5.attn.heads``. The raw MLX path, a leading ``model.``, negative layers, globs
(``layers.*.mlp``) and inclusive ranges (``layers.8-12``) are accepted too.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.nn as nn

from mlxsteer import families


class UnknownKey(KeyError):
    """A key that names no place in the model; the message lists the nearest ones that do."""

    def __str__(self) -> str:  # a KeyError shows its message quoted, which is hard to read
        return str(self.args[0])


class UnsupportedModel(ValueError):
    """A model whose structure mlxsteer can't hook, with the reason."""


@dataclass(frozen=True)
class Site:
    """One place in one model.

    Attributes:
        key: the canonical key.
        module: the module whose output or input it is.
        port: ``"output"`` or ``"input"``.
        call: which of the module's calls within one forward is meant, or None for "its only one".
        layer: the block it lies in, None outside the blocks.
        heads: number of heads where the site is seen as (batch, tokens, heads, head_dim), else None.
        stream: position of the activation among the module's arguments (for ``port="input"``).
    """

    key: str
    module: nn.Module
    port: str = "output"
    call: int | None = None
    layer: int | None = None
    heads: int | None = None
    stream: int = 0

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and self.key == other.key and self.module is other.module


def _first(parent: nn.Module, names: Iterable[str]) -> str | None:
    """The first of `names` (paths) that is a sub-module of `parent`."""
    return next((name for name in names if isinstance(_inside(parent, name), nn.Module)), None)


def _inside(parent: nn.Module, path: str) -> Any:
    """What lies at a path below a module, or None."""
    found: Any = parent
    for part in path.split("."):
        found = found.get(part) if isinstance(found, nn.Module) else None
    return found


def _file(module: nn.Module) -> str:
    """The file that a module's class is written in, without its package."""
    return type(module).__module__.rsplit(".", 1)[-1]


def _roles(block: nn.Module) -> dict[str, tuple[str, ...]]:
    """Role name → paths that it may mean inside a block."""
    if "mixer" in block and getattr(block, "block_type", None) in families.MIXER_IS_FEED_FORWARD:
        return {"mlp": ("mixer",)}
    return {"attn": families.ATTENTION, "mlp": families.FEED_FORWARD}


def _width_of_input(projection: nn.Module) -> int:
    """Number of input features of a linear layer, quantized or not, plain or wrapped in LoRA."""
    linear = projection.get("linear", projection)
    if bits := getattr(linear, "bits", None):
        return int(linear.weight.shape[-1] * 32 // bits)
    return int(linear.weight.shape[-1])


class SiteMap:
    """Every name in one model.

    Args:
        model: the top module, as mlx-lm builds it (it has `layers`).
        encode: text to token ids without special ones, where there is a tokenizer.

    Raises:
        UnsupportedModel: the model has no list of blocks, or its family can't be hooked.
    """

    def __init__(self, model: nn.Module, encode: Callable[[str], list[int]] | None = None) -> None:
        self.model, self.encode = model, encode
        self.model_type: str | None = getattr(model, "model_type", None)
        blocks = [b for b in _blocks(model) or () if isinstance(b, nn.Module)]
        self.family = families.family(self.model_type, _file(model), *dict.fromkeys(map(_file, blocks)))
        own = all(type(part).__module__.startswith("mlx_lm.models.") for part in (model, *blocks))
        self.checked = own and _file(model) in families.CHECKED
        """Whether the model's file is among those that the tests check, tiny, and its blocks are mlx-lm's too."""
        self.uneven = False
        """Whether a check found that the blocks differ in width, which then can't be told without running them."""
        if self.family.refusal:
            name = self.model_type or type(model).__name__
            raise UnsupportedModel(f"{name} models can't be steered: {self.family.refusal}.")
        self.regular = True
        """Whether every block runs once in a forward, for all that is known: a check may have found that not so."""
        self.read()

    def read(self) -> None:
        """Take in the model's structure, as it is now."""
        model = self.model
        paths: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            paths.setdefault(id(module), []).append(path)
        blocks = _blocks(model)
        if blocks is None and (shown := getattr(model, "layers", None)) is not None:
            raise UnsupportedModel(
                f"{type(model).__name__}.layers is a {type(shown).__name__}, and no list of blocks: give the class a "
                "property `layers` that returns them as a list, in the order in which they run."
            )
        if not blocks or not all(id(b) in paths for b in blocks):
            raise UnsupportedModel(
                f"{type(model).__name__} has no list of blocks: mlxsteer needs a text decoder as mlx-lm builds it, "
                "with `model.layers`."
            )
        self._listed = tuple(blocks)
        # a block that is listed twice is one that runs twice
        self.blocks: list[nn.Module] = list({id(block): block for block in blocks}.values())
        held = Counter(path.rpartition(".")[0] for b in self.blocks for path in paths[id(b)])
        ways = [
            sorted(paths[id(b)], key=lambda p: (-held[p.rpartition(".")[0]], -p.count("."), _natural(p)))
            for b in self.blocks
        ]
        self._block_paths = [way[0] for way in ways]
        self._aliases = frozenset(path for way in ways for path in way[1:])
        """Further paths of the blocks, where another list holds them too: names go by the fullest, then the deepest."""
        parent_path = self._block_paths[0].rsplit(".", 2)[0] if self._block_paths[0].count(".") > 1 else ""
        self.trunk = self._module_at(parent_path)
        """The module that holds the blocks, the embedding and the final norm."""
        self._trunk_path = parent_path
        self.segments: dict[str, int] = {}
        """How many blocks run before a place outside them, by key; filled in as traces find out."""
        for name in ("_fixed", "modules"):
            self.__dict__.pop(name, None)

    @property
    def container(self) -> str:
        """The raw path of the list that holds the blocks."""
        return self._block_paths[0].rsplit(".", 1)[0]

    # -- structure -----------------------------------------------------------------------------------------------

    @property
    def rivals(self) -> list[str]:
        """Where other lists lie that are as long as the blocks', in a model that doesn't say which one is meant."""
        if getattr(self.model, "layers", None) is not None:
            return []
        lists = [one for one in _lists(_text(self.model)) if len(one) == len(self._listed) > 1]
        firsts = {id(one[0]) for one in lists if one[0] is not self.blocks[0]}
        return [path.rpartition(".")[0] for path, module in self.model.named_modules() if id(module) in firsts]

    def _moved(self, canonical: str) -> bool:
        """Whether another module has taken a place since the structure was read: an adapter's, or a quantized one."""
        match = re.fullmatch(r"layers\.(\d+)((?:\..+)?)", canonical)
        path = self._block_paths[int(match[1])] + match[2] if match else self._fixed.get(canonical, canonical)
        path = path.removesuffix(".output")  # of a module that is itself called so, see `modules`
        try:
            return self._module_at(path) is not self.modules[canonical]
        except (KeyError, IndexError):
            return True

    def _follow(self) -> None:
        """Take the structure in anew where blocks were added, removed or exchanged."""
        now = _shown(self.model)
        if now is None:
            with suppress(KeyError, IndexError, TypeError):
                now = self._module_at(self.container)  # type: ignore[assignment]
        if not isinstance(now, (list, tuple)):
            return
        if len(now) != len(self._listed) or any(a is not b for a, b in zip(now, self._listed, strict=True)):
            self.read()

    def _module_at(self, path: str) -> nn.Module:
        module = self.model
        for part in filter(None, path.split(".")):
            module = module[int(part)] if isinstance(module, (list, tuple)) else module[part]
        return module

    @cached_property
    def _fixed(self) -> dict[str, str]:
        """Fixed name → raw path, where the model has such a module."""
        names = {"embed": families.EMBEDDING, "norm": families.FINAL_NORM}
        found: dict[str, str] = {}
        path = self._trunk_path
        while True:  # beside the blocks, or further out (plamo)
            for fixed, known in names.items():
                if fixed not in found and (name := _first(self._module_at(path), known)):
                    found[fixed] = f"{path}.{name}" if path else name
            if not path:
                return found
            path = path.rpartition(".")[0]

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Canonical key → module, for every module with an output of its own, in the order of the tree.

        Left out are the root (its output is called ``logits``), containers that can't be called, and a module that
        several parents share (an activation function made once for all layers): it names no one place. A module that
        is itself called ``input``, ``output`` or ``heads`` goes by ``layers.5.output.output``, what it gives.
        """
        to_fixed = {path: fixed for fixed, path in self._fixed.items()}
        named = sorted(self._named(), key=lambda item: _natural(item[0]))
        paths = Counter(id(module) for _, module in named)
        return {
            to_fixed.get(path) or _unlike_a_port(self._canonical(path)): module
            for path, module in named
            if path and not _is_head(path) and callable(module) and paths[id(module)] == 1
        }

    def _named(self) -> list[tuple[str, nn.Module]]:
        """Every module with its path; those in blocks by the one path that their block goes by."""
        named = self.model.named_modules()
        if not self._aliases:
            return named
        return [(path, m) for path, m in named if not any(way in self._aliases for way in _ways(path))]

    def _canonical(self, path: str) -> str:
        """A raw MLX path with the blocks' container called ``layers``."""
        for i, block in enumerate(self._block_paths):
            if path == block or path.startswith(block + "."):
                return f"layers.{i}{path[len(block) :]}"
        return path

    @property
    def keys(self) -> list[str]:
        """The canonical keys of all outputs, ``logits`` last."""
        self._follow()
        return [*self.modules, "logits"]

    # -- from a key to a site --------------------------------------------------------------------------------------

    def resolve(self, key: str) -> Site:
        """The one place that `key` means.

        Raises:
            UnknownKey: it means none; the message names the nearest keys.
        """
        if not isinstance(key, str):
            raise TypeError(f"a key is a string such as 'layers.5.mlp', not {type(key).__name__}")
        if "*" in key or re.search(r"(^|\.)layers\.\d+-\d", key):
            raise UnknownKey(
                f"{key!r} names several places, and one is asked for here; model.sites({key!r}) lists them."
            )
        self._follow()
        path, call = self._split_call(key)
        port, heads = "output", path.endswith(".heads")
        if path.endswith(".output") and self._canonical(path) + ".output" in self.modules:
            raise UnknownKey(
                f"{key!r} may mean two places here, where a module is called 'output': {path}.output is what that one "
                f"gives, and {path.removesuffix('.output')} what the module around it gives."
            )
        if heads:
            path = path[: -len(".heads")]
        elif path.endswith((".input", ".output")):
            path, port = path.rsplit(".", 1)
        path = self._canonical_of(path, key)
        if path == "logits":
            if port == "input" or heads or call:
                raise UnknownKey(f"{key!r}: 'logits' is the model's output; 'norm' is what its head reads.")
            return Site("logits", self.model)
        if self._moved(path):
            self.read()
            return self.resolve(key)
        module = self.modules[path]
        layer = int(path.split(".")[1]) if path.startswith("layers.") else None
        suffix = f"#{call}" if call is not None else ""
        if heads:
            return self._heads_site(key, path, module, layer, call)
        stream = self.family.stream if layer is not None and path == f"layers.{layer}" else 0
        name = path if port == "output" else f"{path}.input"
        return Site(name + suffix, module, port, call, layer, stream=stream)

    def _split_call(self, key: str) -> tuple[str, int | None]:
        path, mark, number = key.partition("#")
        if mark and not number.isdecimal():
            raise UnknownKey(f"{key!r}: after '#' comes the number of the call within one forward, such as '#0'.")
        return path, int(number) if mark else None

    def _canonical_of(self, path: str, key: str) -> str:
        """The canonical path of a module, from any accepted spelling."""
        for candidate in dict.fromkeys((path, path.removeprefix("model."), path.removeprefix("model.model."))):
            if candidate in ("logits", "output") or _is_head(candidate):
                return "logits"
            if candidate in self.modules:
                return candidate
            canonical = self._canonical(candidate)
            if canonical in self.modules:
                return canonical
            if f"{canonical}.output" in self.modules:
                return f"{canonical}.output"
            fixed = {raw: name for name, raw in self._fixed.items()}.get(candidate)
            if fixed:
                return fixed
            if match := re.fullmatch(r"layers\.(-?\d+)((?:\..+)?)", canonical):
                found = self._in_block(int(match[1]), match[2], key)
                if found:
                    return found
        raise UnknownKey(self._unknown(key))

    def _in_block(self, number: int, rest: str, key: str) -> str | None:
        """Resolve inside block `number`: negative numbers and role names."""
        count = len(self.blocks)
        if not -count <= number < count:
            raise UnknownKey(f"{key!r}: this model has {count} layers, layers.0 to layers.{count - 1}.")
        number %= count
        path = f"layers.{number}{rest}"
        if path in self.modules:
            return path
        role, _, tail = rest[1:].partition(".")
        names = _roles(self.blocks[number]).get(role, ())
        if several := next((n for n in names if isinstance(self.blocks[number].get(n), list)), None):
            those = " and ".join(f"layers.{number}.{several}.{i}" for i in range(len(self.blocks[number][several])))
            raise UnknownKey(f"{key!r}: this block has several: {those}.")
        actual = _first(self.blocks[number], names)
        path = f"layers.{number}.{actual}" + (f".{tail}" if tail else "")
        if actual and callable(_inside(self.blocks[number], actual)) and path not in self.modules and not tail:
            raise UnknownKey(f"{key!r} names no one place: several parts of the model share this module, {path}.")
        return path if actual and path in self.modules else None

    def _heads_site(self, key: str, path: str, module: nn.Module, layer: int | None, call: int | None) -> Site:
        name = path.rsplit(".", 1)[-1]
        projection = _first(module, families.OUTPUT_PROJECTION)
        count = next((getattr(module, a) for a in families.HEAD_COUNT if isinstance(getattr(module, a, None), int)), 0)
        mixes = name in families.SOFTMAX_ATTENTION and "conv1d" not in module  # a state-space mixer has no attention
        if layer is None or not mixes or not projection or not count:
            raise UnknownKey(
                f"{key!r}: {path} ({type(module).__name__}) has no attention heads before an output projection."
            )
        width = _width_of_input(module[projection])
        if width % count:
            raise UnknownKey(f"{key!r}: {path}.{projection} reads {width} features, not a multiple of {count} heads.")
        suffix = f"#{call}" if call is not None else ""
        return Site(f"{path}.heads{suffix}", module[projection], "input", call, layer, heads=int(count))

    def expand(self, pattern: str | Iterable[str]) -> list[Site]:
        """Every place that a key, a glob (``layers.*.mlp``) or a range (``layers.8-12``) means, in the model's order.

        Raises:
            UnknownKey: it means none.
        """
        if not isinstance(pattern, str):
            return list(dict.fromkeys(site for one in pattern for site in self.expand(one)))
        self._follow()
        path = self._in_canonical_words(pattern)
        if match := re.fullmatch(r"layers\.(\*|\d+-\d+)((?:[.#].+)?)", path):
            return self._each_layer(self._span(match[1], pattern), match[2], pattern)
        return self._matching(path, pattern) if "*" in path else [self.resolve(pattern)]

    def _in_canonical_words(self, pattern: str) -> str:
        """A glob or range with the blocks' container called ``layers``."""
        container = self.container
        for path in dict.fromkeys((pattern, pattern.removeprefix("model."), pattern.removeprefix("model.model."))):
            if path.startswith(container + "."):
                return "layers" + path[len(container) :]
            if path.startswith("layers."):
                return path
        return pattern

    def _matching(self, path: str, pattern: str) -> list[Site]:
        """The places whose key matches a glob, within one block or outside them."""
        path, call = path.split("#", maxsplit=1)[0], path.partition("#")[1:]
        port = next((p for p in (".input", ".output", ".heads") if path.endswith(p)), "")
        path = path.removesuffix(port)
        if match := re.fullmatch(r"layers\.(\d+)\.(attn|mlp)((?:\..+)?)", path):
            path = (self._in_block(int(match[1]), f".{match[2]}", pattern) or f"layers.{match[1]}.{match[2]}") + match[
                3
            ]
        regex = re.compile(re.escape(path).replace(r"\*", "[^.]+"))
        keys = [key for key in self.keys if regex.fullmatch(key)]
        if not keys:
            raise UnknownKey(self._unknown(pattern))
        return [self.resolve(key + port + "".join(call)) for key in keys]

    def _span(self, text: str, pattern: str) -> range:
        count = len(self.blocks)
        if text == "*":
            return range(count)
        first, last = map(int, text.split("-"))
        if first > last:
            raise UnknownKey(f"{pattern!r}: a range goes up: layers.{last}-{first}.")
        if last >= count:
            raise UnknownKey(f"{pattern!r}: this model has {count} layers, layers.0 to layers.{count - 1}.")
        return range(first, last + 1)

    def _each_layer(self, span: range, rest: str, pattern: str) -> list[Site]:
        """The same place in several blocks; hybrid models have it in some of them only."""
        found: list[Site] = []
        for layer in span:
            try:
                found += self.expand(f"layers.{layer}{rest}")
            except UnknownKey:
                continue
        if not found:
            raise UnknownKey(self._unknown(pattern))
        return found

    def width(self, site: Site) -> int | None:
        """Number of features of the activation at `site`, where it can be told without running anything."""
        module = site.module
        if site.heads:
            return _width_of_input(module) // site.heads
        linear = module.get("linear", module)  # LoRA and DoRA wrap the layer they adapt
        if isinstance(linear, (nn.Linear, nn.QuantizedLinear)):
            return _width_of_input(linear) if site.port == "input" else int(linear.weight.shape[0])
        norm = self.modules.get("norm")
        on_stream = site.key in ("embed", "norm", "norm.input") or any(module is b for b in self.blocks)
        if self.uneven and on_stream:
            return None
        weight = norm.get("weight") if norm is not None and on_stream else None
        return int(weight.shape[-1]) if weight is not None else None

    def roles(self, layer: int) -> list[str]:
        """The role names that mean something in a block: of ``attn``, ``mlp`` and ``attn.heads``."""
        found = []
        for role in ("attn", "mlp"):
            with suppress(UnknownKey):
                if path := self._in_block(layer, f".{role}", role):
                    found.append(role)
                    self._heads_site(role, path, self.modules[path], layer, None)
                    found.append(f"{role}.heads")
        return found

    def _unknown(self, key: str) -> str:
        """The sentence for a key that means nothing here."""
        if key in ("embed", "norm", "embed.input", "norm.input"):
            what = "embedding" if key.startswith("embed") else "final norm"
            if not self.checked:
                return f"{key!r}: no {what} is found here by a name that mlxsteer knows; model.sites() lists all names."
            return f"{key!r}: the {what} of {self.model_type or 'these'} models is no module of its own."
        middle = len(self.blocks) // 2
        roles = [f"layers.{middle}.{role}" for role in (*self.roles(middle), "input")]
        pool = [*self.keys, *roles]
        if key.startswith("layers.") and (match := re.match(r"layers\.(\d+)", key)):
            pool = [k for k in pool if re.match(rf"layers\.{match[1]}(\.|$)", k)] or pool
        near = difflib.get_close_matches(key, dict.fromkeys(pool), n=4, cutoff=0.3) or pool[:4]
        count = len(self.blocks)
        return (
            f"no place called {key!r} in this {self.model_type or type(self.model).__name__} model of {count} layers. "
            f"Nearest: {', '.join(near)}. All of them: model.sites()."
        )


def _blocks(model: nn.Module) -> list[Any] | tuple[Any, ...] | None:
    """The list of blocks, as mlx-lm's models show it; in others the longest list of modules of the text model."""
    if getattr(model, "layers", None) is not None:
        return _shown(model)
    return max(_lists(_text(model)), key=len, default=None)


def _shown(model: nn.Module) -> list[Any] | tuple[Any, ...] | None:
    """The list of blocks that a model shows as `layers`; None where it shows none."""
    blocks = getattr(model, "layers", None)
    return blocks if isinstance(blocks, (list, tuple)) else None


def _text(model: nn.Module) -> nn.Module | None:
    """The text model inside a model that doesn't show its blocks, however deep it lies."""
    text = next((model[name] for name in families.TEXT_MODEL if isinstance(model.get(name), nn.Module)), None)
    while text is not None and (name := _first(text, families.TEXT_MODEL[:2])):  # beside a vision tower of its own
        text = text[name]
    return text


def _lists(part: Any) -> list[list[nn.Module]]:
    """The lists of modules in a module, without those inside another's members: a block's experts are no blocks."""
    if isinstance(part, list) and part and all(isinstance(one, nn.Module) and callable(one) for one in part):
        return [part]
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [found for one in parts for found in _lists(one)]


def _ways(path: str) -> list[str]:
    """A path and all that it goes through."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _unlike_a_port(canonical: str) -> str:
    """A key whose last word doesn't read as a module's input, output or heads."""
    return f"{canonical}.output" if canonical.endswith((".input", ".output", ".heads")) else canonical


def _is_head(path: str) -> bool:
    """Whether a raw path is the unembedding's, whose output is called ``logits``."""
    return path.rsplit(".", 1)[-1] == "lm_head" and "layers." not in path


def _natural(path: str) -> tuple[tuple[int, int, str], ...]:
    """Sort ``layers.10`` after ``layers.9``."""
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in path.split("."))
