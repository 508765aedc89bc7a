"""`InterpretableModel`: an mlx-lm model with a name for every place in it, and the verbs to read and write there."""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from jinja2 import TemplateError
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxsteer import checking, generation, pocket
from mlxsteer.checking import Report
from mlxsteer.display import Displayed, Shown
from mlxsteer.generation_options import checked_options, limits_of, sampler_of
from mlxsteer.hooks import attached, copying, disable, enable, new_owner, residents, settle, whole_of
from mlxsteer.interventions.base import whole
from mlxsteer.interventions.routes import route
from mlxsteer.model_facts import model_facts
from mlxsteer.places import Places, Writing
from mlxsteer.plans import NeverFired, Plan
from mlxsteer.positions import is_whole
from mlxsteer.sites import SiteMap, UnsupportedModel
from mlxsteer.steering import Steering
from mlxsteer.told import ToldPrompts
from mlxsteer.trace import Recording, Trace, innermost

if TYPE_CHECKING:
    from mlxsteer.lens import Lens

Text: TypeAlias = "str | Sequence[int] | Sequence[Mapping[str, Any]] | mx.array"
"""One prompt: a text, token ids, or chat messages (dicts with `role` and `content`)."""

POCKET = pocket.FOLDER
"""The folder of the bundled model."""

_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class ContextLengthWarning(UserWarning):
    """A prompt is longer than the context that the model was made for."""


class InterpretableModel(Displayed):
    """An mlx-lm model whose activations can be read and written by name. The model itself stays as it is.

    Args:
        model: a Hugging Face name (``"mlx-community/Llama-3.2-1B-Instruct-4bit"``), a local folder, ``"pocket"`` for
            the bundled model, or an `nn.Module` that mlx-lm built.
        tokenizer: the tokenizer, for a module given as such; without one, prompts are token ids.
        load: further arguments go to `mlx_lm.load` (``adapter_path=``, ``revision=``, ``tokenizer_config=``, …).

    Attributes:
        model: the `nn.Module`, to be given to any mlx-lm function.
        tokenizer: mlx-lm's tokenizer wrapper, or None.
        name: what it was loaded by.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the name is not on the Hub, or the Hub can't be reached.
        UnsupportedModel: the model's structure can't be hooked.

    Warns:
        UncheckedModel: the tests don't know the architecture, and a check on four tokens found a name that doesn't
            hold.

    Example:
        >>> import mlxsteer as ms
        >>> model = ms.InterpretableModel("pocket")
        >>> with model.trace("The food was") as trace:
        ...     pass
        >>> trace.activations["layers.5"].shape
        (1, 4, 256)
    """

    def __init__(self, model: str | os.PathLike[str] | nn.Module, tokenizer: Any = None, **load: Any) -> None:
        self._loaded_with: dict[str, Any] | None = None  # None for a module, which comes without a folder
        if isinstance(model, nn.Module):
            if load:
                raise TypeError(f"{next(iter(load))}= goes to mlx_lm.load, and a module is loaded already.")
            self.name = getattr(model, "model_type", None) or type(model).__name__
            self.model = model
            wrapped = tokenizer if tokenizer is None or isinstance(tokenizer, TokenizerWrapper) else None
            self.tokenizer: TokenizerWrapper | None = (
                wrapped if wrapped is not None or tokenizer is None else TokenizerWrapper(tokenizer)
            )
        elif isinstance(model, (str, os.PathLike)):
            self.name = os.fspath(model)
            self._loaded_with = load
            self.model, loaded = _load(self.name, load)
            self.tokenizer = tokenizer if tokenizer is not None else loaded
        else:
            raise TypeError(
                f"a model is a Hugging Face name, a folder, 'pocket' or an nn.Module, not {type(model).__name__}."
            )
        if whole_of(self.model) is not None:
            raise UnsupportedModel(
                f"this {type(self.model).__name__} is a part of an edited model, and its edits are none of its own: "
                "wrap the part of the original, or steer the edited model."
            )
        encode = self.tokenizer.encode if self.tokenizer is not None else None
        self._sites = SiteMap(self.model, functools.partial(encode, add_special_tokens=False) if encode else None)
        if not self._sites.checked:
            checking.check_unknown(self._sites, generation.outside())

    def __repr__(self) -> str:
        bits: set[Any] = {getattr(m, "bits", None) for m in self.model.modules()} - {None}
        quantized = f", {'/'.join(map(str, sorted(bits)))}-bit" if bits else ""
        width = self._sites.width(self._sites.resolve("layers.0"))
        hidden = f", hidden size {width}" if width else ""
        kind = getattr(self.model, "model_type", None) or type(self.model).__name__
        return f"InterpretableModel({self.name!r}: {kind}, {len(self._sites.blocks)} layers{hidden}{quantized})"

    def _shown(self) -> Shown:
        facts = model_facts(self)
        rows = [
            (
                row.key if row.role in ("", row.key) else f"{row.key}\n or {row.role}",
                row.layers,
                str(row.width or ""),
                row.weight,
            )
            for row in facts.keys
        ]
        foot = "\n".join([f"{facts.parameters:,} parameters", *facts.words()])
        return Shown(repr(self), ("key", "layers", "width", "weight"), rows, texts=(0, 1, 3), foot=foot)

    @property
    def identity(self) -> dict[str, Any]:
        """What a vector's file says of the model it was computed on: name, architecture and quantization."""
        formats = {
            f"{module.bits}-bit{'' if (mode := getattr(module, 'mode', 'affine')) == 'affine' else f' {mode}'}, "
            f"group {module.group_size}"
            for module in self.model.modules()
            if getattr(module, "bits", None) is not None
        }
        name = self.name if not os.path.isdir(self.name) else os.path.basename(os.path.normpath(self.name))
        return {
            "model": name,
            "architecture": getattr(self.model, "model_type", None),
            "quantization": ", ".join(sorted(formats)) or None,
        }

    def __call__(self, *_: Any, **__: Any) -> None:
        """Refused: a forward is run by `trace`, or by the model itself.

        Raises:
            TypeError: always.
        """
        raise TypeError("this is the wrapper; the model itself, for mlx-lm's functions and for a call, is its .model.")

    # -- names and tokens ----------------------------------------------------------------------------------------

    def sites(self, pattern: str | Sequence[str] | None = None) -> list[str]:
        """The keys of the places in this model, without running anything.

        Args:
            pattern: a key, a glob (``"layers.*.mlp"``), a range (``"layers.8-12"``), or a list of them; None for all.

        Raises:
            UnknownKey: it matches nothing.
        """
        if pattern is None:
            self._sites.read()  # an adapter may have been put in since
            return self._sites.keys
        return [site.key for site in self._sites.expand(pattern)]

    @property
    def layers(self) -> Places:
        """The blocks: ``len(model.layers)``; inside a trace ``model.layers[5].mlp.output`` is the activation there."""
        return Places(self._sites)

    def encode(self, prompt: Text) -> list[int]:
        """Token ids of a text, of chat messages (through the chat template), or of token ids.

        BOS is added where the tokenizer adds one, and never twice.

        Raises:
            ValueError: the prompt is empty, holds an id outside the vocabulary, has more tokens than the model has
                learned positions, or needs a tokenizer or a chat template that is missing.
        """
        if isinstance(prompt, str):
            tokens = self._encode_text(prompt)
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            tokens = self._encode_chat(prompt)  # type: ignore[arg-type]
        else:
            if isinstance(prompt, bytes) or not (isinstance(prompt, Sequence) or hasattr(prompt, "tolist")):
                raise TypeError(
                    f"a prompt is a string, a list of token ids, or a list of chat messages, not {prompt!r}."
                )
            values: Any = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
            if any(not isinstance(t, (int, np.integer)) or isinstance(t, bool) for t in values):
                raise TypeError("a prompt is a string, a list of token ids, or a list of chat messages.")
            tokens = [int(t) for t in values]
        if not tokens:
            raise ValueError("the prompt is empty: give at least one token.")
        if min(tokens) < 0:
            raise ValueError(f"token id {min(tokens)} is negative.")
        embedding = self._sites.modules.get("embed")
        weight = embedding.get("weight") if embedding is not None else None
        if weight is not None and max(tokens) >= weight.shape[0]:
            raise ValueError(f"token id {max(tokens)} lies outside the vocabulary of {weight.shape[0]}.")
        self._check_length(len(tokens))
        return tokens

    def _encode_text(self, text: str) -> list[int]:
        tokenizer = self._needed_tokenizer("a text")
        if not text:
            raise ValueError("the prompt is empty: give at least one character.")
        bos = tokenizer.bos_token
        return list(tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos)))

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        tokenizer = self._needed_tokenizer("chat messages")
        if not tokenizer.has_chat_template:
            raise ValueError(f"{self.name} has no chat template: give the prompt as a text.")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise ValueError(f"a chat message is a dict with 'role' and 'content', not {message!r}.")
        answering = messages[-1]["role"] == "assistant"
        try:
            tokens = tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=not answering, continue_final_message=answering
            )
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ValueError(f"{self.name}'s chat template refuses messages by {roles}: {error}") from error
        return [int(t) for t in tokens]

    def _needed_tokenizer(self, what: str) -> TokenizerWrapper:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and this model was given without one; give token ids instead.")
        return self.tokenizer

    def _check_generator(self) -> None:
        if lack := checking.no_generator(self.model):
            raise UnsupportedModel(f"{self.name} can't generate: it has {lack}.")

    def _check_length(self, count: int) -> None:
        args = getattr(self.model, "args", None)
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            limit = getattr(args, name, None) or getattr(getattr(args, "text_config", None), name, None)
            if isinstance(limit, int) and count > limit:
                if self._learns_positions(limit):
                    raise ValueError(
                        f"the prompt has {count} tokens, and the model has {limit} learned positions, behind which "
                        f"there is nothing to read: give at most {limit}."
                    )
                message = (
                    f"the prompt has {count} tokens, the model was made for {limit}: what follows may be nonsense."
                )
                warnings.warn(message, ContextLengthWarning, stacklevel=generation.outside())
                return

    def _learns_positions(self, count: int) -> bool:
        """Whether the model looks its positions up in a table of so many rows, as GPT-2 does: MLX reads on behind it.

        Such a table is an embedding beside the token embedding, as wide, and as long as the context.
        """
        tokens = self._sites.modules.get("embed")
        tables = [m for m in self._sites.trunk.children().values() if isinstance(m, _EMBEDDINGS)]
        return any(
            table is not tokens and isinstance(tokens, _EMBEDDINGS) and _shape(table) == (count, _shape(tokens)[1])
            for table in tables
        )

    def _encode_many(self, prompt: Any) -> tuple[list[list[int]], bool]:
        """Token ids of one prompt or several, and whether they were several."""
        if isinstance(prompt, (mx.array, np.ndarray)) and prompt.ndim == 2:
            return [self.encode(row) for row in prompt], True
        if isinstance(prompt, (list, tuple)):
            if not prompt:
                raise ValueError("the prompt is empty: give a text, token ids, chat messages, or a list of these.")
            if isinstance(prompt[0], (str, list, tuple, mx.array)):
                return [self._encode_row(one, row) for row, one in enumerate(prompt)], True
        return [self.encode(prompt)], False

    def _encode_row(self, prompt: Text, row: int) -> list[int]:
        try:
            return self.encode(prompt)
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompt {row}: {error}") from error

    def decode(self, tokens: Sequence[int] | mx.array) -> str:
        """The text of token ids, special tokens included."""
        ids: Any = tokens.tolist() if isinstance(tokens, mx.array) else list(tokens)
        return str(self._needed_tokenizer("decoding").decode(ids))

    def token_to_str(self, token: int) -> str:
        """The text of one token id."""
        return self.decode([int(token)])

    def str_tokens(self, prompt: Text) -> list[str]:
        """A prompt's tokens as texts, one by one."""
        return [self.token_to_str(token) for token in self.encode(prompt)]

    # -- reading and writing one forward -----------------------------------------------------------------------

    def trace(
        self,
        prompt: Any,
        interventions: Mapping[str, Any] | None = None,
        *,
        prompt_tokens: int | Sequence[int] | None = None,
    ) -> Trace:
        """One forward, staged: nothing is computed that nobody looks at.

        Args:
            prompt: a text, token ids or chat messages; a list of them is run as one padded batch.
            interventions: key → intervention (or a list of them, or a function ``x → x'``).
            prompt_tokens: how many tokens are prompt, for one row or for each; those after them count as generated.
                All of them, unless told.

        Returns:
            A context manager. `trace.activations[key]` reads, also after the block; inside it
            ``model.layers[5].output`` reads and writes, and ``model.output`` is the logits.

        Raises:
            UnknownKey: a key names no place; the nearest ones are listed.
            ValueError: the prompt is empty, a constant doesn't fit or isn't finite, a position means nothing here.
            NeverFired: a place's module doesn't run in this model's forward.
        """
        steering = Steering.of(self._sites, interventions) if interventions is not None else None
        prompts, _ = self._encode_many(prompt)
        decode = self.tokenizer.decode if self.tokenizer is not None else None
        counts = _counts(prompt_tokens, prompts) if prompt_tokens is not None else None
        return Trace(self._sites, prompts, decode, steering, counts)

    @property
    def lens(self) -> Lens:
        """The logit lens: ``model.lens.tokens(vector[5])`` says which tokens a direction boosts and suppresses."""
        from mlxsteer.lens import Lens

        return Lens(self)

    @property
    def output(self) -> Any:
        """The logits of the open trace, (batch, tokens, vocabulary)."""
        return self._open_trace().output

    @output.setter
    def output(self, value: Any) -> None:
        self._open_trace().output = value

    def _open_trace(self) -> Trace:
        trace = innermost(self._sites)
        if trace is None:
            raise RuntimeError("model.output has a value only inside `with model.trace(prompt):`.")
        return trace

    @contextmanager
    def record(self, *keys: str | Sequence[str]) -> Iterator[Recording]:
        """Read around foreign code, step by step: each forward inside the block adds one activation per key.

        Args:
            keys: keys, globs, ranges, or lists of them.

        Raises:
            UnknownKey: a key names no place.
            NeverFired: on leaving: no forward ran, or a place's module never did.
        """
        wanted = [k for key in keys for k in ([key] if isinstance(key, str) else key)]
        if not wanted:
            raise ValueError("record what? Give at least one key, such as 'layers.5'.")
        sites = self._sites.expand(wanted)
        seen = Recording(self._sites, sites)
        plan = Plan(self._sites, capture=sites, keep=seen.keep)
        with attached(plan):
            yield seen
        plan.check_fired()

    def check(self) -> Report:
        """Run the model on four tokens and print whether its names hold: for an architecture that nobody tried yet.

        Prints and returns a `Report`: which names it has, whether every block runs once, their shapes, whether a change
        reaches the logits, whether blocks can be replayed and rows batched. ``report.fine`` is the verdict.
        """
        report = checking.check(self._sites)
        print(report)
        return report

    # -- steering --------------------------------------------------------------------------------------------------

    def steer(
        self,
        interventions: Mapping[str, Any] | None = None,
        /,
        *,
        prompt_tokens: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        **named: Mapping[str, Any],
    ) -> OpenSteering:
        """Steer every forward of this model, whoever runs it: mlx-lm's generators, or a loop of your own.

        Args:
            interventions: a key dict; it is called ``"steering"``.
            named: key dicts by name; they act in the order given.
            prompt_tokens: the prompt that foreign code will run (its token ids, or their number; a list of prompts
                for a batch, in order), for positions that need it: ``"last"``, ``after(...)``, negative indices.

        Returns:
            A context manager, or call `enable()` and `disable()`. ``steering["mood"].strength = 0.5`` changes a
            strength while it is open: with a generator running, from the token after the next, since the next
            forward is staged already.

        A steering belongs to the thread or task that opens it. A generator of your own that holds one open across a
        `yield` steers its caller too: open it anew for each step, or close the generator. A function that mx.compile
        compiles inside stays steered afterwards.

        Raises:
            NeverFired: on leaving the block: no forward of the model ran in it, or a place's module never did.
            ValueError: a constant doesn't fit; there is a strength per row, or no prompt in `prompt_tokens`; or two
                steerings are called ``"steering"``.
        """
        if interventions is not None and "steering" in named:
            raise ValueError("two are called 'steering', which a dict without a name is too: name the other mood=.")
        named = {**({"steering": interventions} if interventions is not None else {}), **named}
        if not named:
            raise ValueError("steer with what? Give a dict such as {'layers.5': add_vector(v)}.")
        steerings = [_for_any_row(Steering.of(self._sites, value, name)) for name, value in named.items()]
        decode = self.tokenizer.decode if self.tokenizer is not None else None
        return OpenSteering(self._sites, steerings, _told(prompt_tokens, decode))

    def edit(self, interventions: Mapping[str, Any] | None = None) -> Any:
        """A model that is steered for as long as it lives and shares all weights with this one, which stays untouched.

        Args:
            interventions: a key dict. Without one, a block in which edits are written in place, once, to hold for
                every forward: ``with model.edit() as edited: edited.layers[5].output[:, -1] += v``.

        Returns:
            The edited `InterpretableModel`, or a context manager that gives it. Its `model` is steered in every
            mlx-lm function too; there, positions that need the prompt (``"last"``, ``after(...)``, negative ones) are
            refused, since other code doesn't say where the prompt ends: use the edited model's own `generate` and
            `stream`. In an inline edit the token index -1 means the newest token, ``"last"``; any other one is
            absolute, as in `at=`. To keep an edit in a file, save its key dict (`interventions.save`).

        Raises:
            ValueError: a constant doesn't fit, or there is a strength per row.
        """
        if interventions is not None:
            _for_any_row(Steering.of(self._sites, interventions))  # refuse what doesn't fit before copying anything
            edited = self._copied()
            edited._settle(Steering.of(edited._sites, interventions))
            return edited
        return EditBlock(self._edit_block())

    @contextmanager
    def _edit_block(self) -> Iterator[InterpretableModel]:
        edited = self._copied()
        with Writing(edited._sites) as writing:
            yield edited
        if not writing.writes:
            raise ValueError(
                "the edit block wrote nothing: write to the edited model, `with model.edit() as edited: "
                "edited.layers[5].output[:, -1] += v`."
            )
        edited._settle(Steering.of(edited._sites, writing.writes))

    def _copied(self) -> InterpretableModel:
        edited = copy.copy(self)
        with copying():
            edited.model = copy.deepcopy(self.model, {id(a): a for a in _arrays(self.model)})
        edited._sites = SiteMap(edited.model, self._sites.encode)
        for plan in residents(self.model):
            for steering in plan.steerings:  # edit by edit: a place may have several
                edits = tuple((edited._sites.resolve(site.key), intervention) for site, intervention in steering.edits)
                edited._settle(Steering(edits))
        return edited

    def _settle(self, steering: Steering) -> None:
        settle(Plan(self._sites, steerings=[steering], adopt=True))

    # -- generating ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Any,
        interventions: Any = None,
        *,
        max_tokens: int | Sequence[int] = 256,
        temp: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        sampler: Callable[[mx.array], mx.array] | None = None,
        logprobs: bool = False,
        **options: Any,
    ) -> Any:
        """Generate, steered, on mlx-lm's own generator.

        Args:
            prompt: a text, token ids or chat messages; a list of them is generated as one batch.
            interventions: a key dict, or a `route` that chooses one by the prompt's text; for a batch also a list with
                one of these (or None) per row. Which tokens each acts on is its ``at=``, of which `mlxsteer.positions`
                says all forms: ``vector.at(5, at="generated")``.
            max_tokens: the most tokens to generate, -1 for no limit; for a list of prompts also a list of one number
                each. A model with learned positions ends with the last of them, as of length.
            temp, top_p, top_k, min_p: the usual knobs; greedy unless `temp` is above 0, which the others need.
            seed: seed of MLX's global generator, for sampling. A row of a batch draws otherwise than alone with the
                same seed: the rows draw together.
            sampler: in place of the knobs.
            logprobs: keep the log-probability of every generated token.
            options: everything that mlx-lm takes (``prompt_cache=``, ``logits_processors=``, ``prefill_step_size=``,
                ``max_kv_size=``, ``kv_bits=``, ``draft_model=``, …). For a list of prompts that is what its batches
                take: not ``prompt_cache=``, ``kv_bits=`` or ``draft_model=``.

        Returns:
            A `Generation` (a `str`), or a list of them for a list of prompts.

        With a ``prompt_cache``, the prompt is what comes after the tokens in it, and positions are those of the whole.
        A cache filled under a steering goes on under the same one, at any strength (see `cache_history`). One filled
        clean may go on under any, and a copy of it (``copy.deepcopy(cache)``) under another: ``"all"`` then means all
        tokens from there on. `fill_prompt_cache` makes one, `save_prompt_cache` keeps it. Where other code filled the
        cache, tell its token ids as ``cached_tokens=`` if a position looks at them (`after`, a callable).

        Raises:
            SteeredCacheError: the prompt cache was filled under another steering.
            PositionError: a position means nothing for the prompt, or lies wholly in what a clean cache holds already.
            ValueError: the prompt is no prompt, or leaves no learned position to generate at; or an option doesn't fit.
            UnsupportedModel: the model takes no cache, or has none that mlx-lm can make.
            TypeError: there is no such option, with the nearest there is; or it is of a wrong kind.
            NeverFired: a place's module never ran.
        """
        tokenizer = self._needed_tokenizer("generation")
        self._check_generator()
        prompts, many = self._encode_many(prompt)
        options = checked_options(options, batch=many)
        options |= {"max_tokens": limits_of(max_tokens, len(prompts) if many else None)}
        steerings = self._row_steerings(interventions, prompts, prompt if many else [prompt])
        options["sampler"] = sampler_of(sampler, seed, {"temp": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p})
        options["logprobs"] = logprobs
        if many:
            return generation.generate_batch(self._sites, tokenizer, prompts, steerings, **options)
        return generation.generate(self._sites, tokenizer, prompts[0], steerings[0], **options)

    def stream(
        self,
        prompt: Text,
        interventions: Mapping[str, Any] | None = None,
        *,
        max_tokens: int = 256,
        temp: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        sampler: Callable[[mx.array], mx.array] | None = None,
        **options: Any,
    ) -> Iterator[GenerationResponse]:
        """Generate piece by piece; arguments as in `generate`, for one prompt.

        Between two pieces the model is plain: a call of it from elsewhere is not steered.

        Returns:
            An iterator over mlx-lm's `GenerationResponse` (`text`, `token`, `logprobs`, …).
        """
        tokenizer = self._needed_tokenizer("generation")
        self._check_generator()
        prompts, many = self._encode_many(prompt)
        if many:
            raise ValueError("stream takes one prompt; generate([...]) runs several as a batch.")
        options = checked_options(options, batch=False)
        options["max_tokens"] = limits_of(max_tokens)
        steering = self._row_steerings(interventions, prompts, [prompt])[0]
        knobs = {"temp": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        options["sampler"] = sampler_of(sampler, seed, knobs)
        return generation.stream(self._sites, tokenizer, prompts[0], steering, **options)

    def _row_steerings(
        self, interventions: Any, prompts: Sequence[list[int]], given: Sequence[Any] | None = None
    ) -> list[Steering | None]:
        """One steering per row, from one key dict for all, a list of them, or a route.

        Args:
            interventions: what was given.
            prompts: token ids.
            given: the prompts as they were given, for routes; the token ids, unless told.
        """
        count, given = len(prompts), prompts if given is None else given
        if interventions is None:
            return [None] * count
        if isinstance(interventions, (list, tuple)):
            if len(interventions) != count:
                raise ValueError(f"{len(interventions)} key dicts for {count} prompts: give one (or None) per prompt.")
            return self._each([*interventions], prompts, given)
        if isinstance(interventions, route):
            for branch in interventions.branches():  # one that no prompt takes today is refused today
                self._row_steerings(branch, prompts[:1], given[:1])
            texts = [self._routed_text(tokens, one) for tokens, one in zip(prompts, given, strict=True)]
            return self._each([interventions.of(text) for text in texts], prompts, given)
        steering = Steering.of(self._sites, interventions)
        for site, intervention in steering.edits:
            for part in intervention.parts():
                rows = part.strengths
                if rows not in (None, count):
                    raise ValueError(f"{part.name} at {site.key}: {rows} strengths for {count} rows.")
        return [steering.row(index) for index in range(count)]

    def _routed_text(self, tokens: list[int], given: Any) -> str:
        """A prompt's text as a route sees it, without the special tokens that a tokenizer or template put in front."""
        if isinstance(given, str):
            return given
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        return self.decode(list(itertools.dropwhile(special.__contains__, tokens)))

    def _each(self, chosen: list[Any], prompts: Sequence[list[int]], given: Sequence[Any]) -> list[Steering | None]:
        """The steerings of rows with a key dict each; rows that were given the same one share its steering."""
        made: dict[int, Steering | None] = {}
        steerings = []
        for one, tokens, prompt in zip(chosen, prompts, given, strict=True):
            name = id(tokens) if isinstance(one, route) else id(one)
            if name not in made:
                made[name] = self._row_steerings(one, [tokens], [prompt])[0]
            steerings.append(made[name])
        return steerings


class EditBlock(AbstractContextManager[InterpretableModel]):
    """``with model.edit() as edited:``, in which edits are written in place."""

    def __init__(self, block: AbstractContextManager[InterpretableModel]) -> None:
        self._block = block

    def __enter__(self) -> InterpretableModel:
        return self._block.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._block.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"model.edit() is a block and has no {name!r}: write `with model.edit() as edited:` and edit in it, or "
            "give the interventions, model.edit({...})."
        )


class OpenSteering:
    """Named steerings of one model, in force inside a `with` block or between `enable()` and `disable()`."""

    def __init__(self, sites: SiteMap, steerings: Sequence[Steering], prompts: ToldPrompts | None) -> None:
        self._steerings = {steering.name: steering for steering in steerings}
        self._plan = Plan(sites, steerings=list(steerings), adopt=True, prompts=prompts)
        self._context: Any = None
        self._owner: int | None = None
        self._opened = False

    def __del__(self) -> None:
        if not getattr(self, "_opened", True):
            message = (
                "model.steer(...) was never opened and steered nothing: use it in a `with` block, or call enable()."
            )
            warnings.warn(message, stacklevel=2)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "strength" and not name.startswith("_"):
            named = f', or ["{name}"].strength' if name in self._steerings else ""
            raise AttributeError(f"{name!r} can't be set: of a steering only the strength changes, .strength{named}.")
        super().__setattr__(name, value)

    def __getitem__(self, name: str) -> Steering:
        if name not in self._steerings:
            near = difflib.get_close_matches(name, self._steerings, n=3) or list(self._steerings)
            raise KeyError(f"no steering called {name!r}; there is {', '.join(near)}")
        return self._steerings[name]

    @property
    def strength(self) -> float | dict[str, float]:
        """The multiplier of every steering, or of each by name where they differ; setting it sets all."""
        values = {name: steering.strength for name, steering in self._steerings.items()}
        return next(iter(values.values())) if len(set(values.values())) == 1 else values

    @strength.setter
    def strength(self, value: float) -> None:
        for steering in self._steerings.values():
            steering.strength = value

    def __enter__(self) -> OpenSteering:
        if self._context is not None or self._owner is not None:
            raise RuntimeError("this steering is in force already; make another one with model.steer(...).")
        self._opened = True
        self._plan.ran.clear()
        self._plan.forwards, self._plan.began = 0, False
        self._watch()
        self._context = attached(self._plan)
        self._context.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        context, self._context = self._context, None
        context.__exit__(kind, error, traceback)
        if error is None:
            self._plan.check_fired()
            self._check_touched()

    def _watch(self) -> None:
        for steering in self._steerings.values():
            steering.watch()

    def _check_touched(self) -> None:
        """Warn of what lay nowhere; in a single step of a sequence, much lies nowhere by rights."""
        if not self._plan.began or self._plan.forwards < 2:
            return
        for steering in self._steerings.values():
            for said in steering.untouched():
                warnings.warn(f"{said}.", generation.NothingTouched, stacklevel=generation.outside())

    def enable(self) -> OpenSteering:
        """Put it in force in this thread, without a block, until `disable()`."""
        if self._context is None and self._owner is None:
            self._opened = True
            self._plan.ran.clear()
            self._plan.forwards, self._plan.began = 0, False
            self._watch()
            self._owner = new_owner()  # known before anything is put on, so that disable() can always undo it
            enable(self._plan, self._owner)
        return self

    def disable(self) -> None:
        """End what `enable()` began; doing it twice does no harm."""
        if self._owner is not None:
            disable(self._plan, self._owner)
            self._owner = None
            try:
                self._plan.check_fired()
            except NeverFired as error:  # nothing was asked to run, perhaps: a word, not an error
                warnings.warn(str(error), stacklevel=generation.outside())
            else:
                self._check_touched()

    def __repr__(self) -> str:
        state = "in force" if self._context is not None or self._owner is not None else "not in force"
        parts = [f"{name} ×{steering.strength:g}" for name, steering in self._steerings.items()]
        return f"<steering {', '.join(parts)}; {state}>"


def _told(prompt_tokens: Any, decode: Callable[[list[int]], str] | None) -> ToldPrompts | None:
    """What to believe of the prompts of rows that foreign code begins."""
    if prompt_tokens is None:
        return None
    told = _plain(prompt_tokens)
    if is_whole(told):
        if told < 1:
            raise ValueError(f"prompt_tokens={told}: a prompt has at least one token.")
        return ToldPrompts([told], decode, repeat=True)
    single = isinstance(told, list) and all(map(is_whole, told))
    prompts = [told] if single else told
    if not isinstance(prompts, list) or not all(isinstance(one, list) and all(map(is_whole, one)) for one in prompts):
        raise TypeError(
            "prompt_tokens= is a number of tokens, a list of token ids (model.encode(text)), or a list of such lists, "
            f"not {prompt_tokens!r:.80}."
        )
    if not all(prompts):
        raise ValueError("prompt_tokens=: a prompt has at least one token, and one of these has none.")
    return ToldPrompts(prompts, decode, repeat=single)


def _plain(value: Any) -> Any:
    """Arrays and tuples as lists, and NumPy's numbers as ints, at any depth; anything else as it stands."""
    value = value.tolist() if isinstance(value, (mx.array, np.ndarray, np.integer)) else value
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _counts(prompt_tokens: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each row are prompt.

    Raises:
        ValueError: there isn't a number for each row, or it is no number of the row's tokens.
    """
    told = _plain(prompt_tokens)
    counts = told if isinstance(told, list) else [told] * len(prompts)
    if len(counts) != len(prompts):
        raise ValueError(f"prompt_tokens= has {len(counts)} numbers for {len(prompts)} prompts.")
    for count, tokens in zip(counts, prompts, strict=True):
        if whole(count, "prompt_tokens", 1) > len(tokens):
            raise ValueError(f"prompt_tokens={count}: the row has {len(tokens)} tokens.")
    return counts


def _for_any_row(steering: Steering) -> Steering:
    """Refuse a strength per row, where the rows are other code's.

    Raises:
        ValueError: with the place.
    """
    for site, intervention in steering.edits:
        for part in intervention.parts():
            if part.strengths is not None:
                raise ValueError(
                    f"{part.name} at {site.key}: it has {part.strengths} strengths, one per row, which work in "
                    "model.generate([...]) and in traces: here other code makes the rows, in any number and order. "
                    "Give one strength."
                )
    return steering


def _shape(embedding: nn.Module) -> tuple[int, int]:
    """Rows and width of an embedding, quantized or not."""
    rows, width = embedding.weight.shape
    return rows, getattr(embedding, "dims", width)


def _arrays(module: Any) -> Iterator[mx.array]:
    """Every array in a module tree."""
    if isinstance(module, mx.array):
        yield module
    elif isinstance(module, dict):
        for value in module.values():
            yield from _arrays(value)
        if isinstance(module, nn.Module):
            for value in module.__dict__.values():
                if isinstance(value, mx.array):
                    yield value
    elif isinstance(module, (list, tuple)):
        for value in module:
            yield from _arrays(value)


def _load(name: str, options: Mapping[str, Any]) -> tuple[nn.Module, TokenizerWrapper]:
    """A model by name, with one clear sentence where there is none."""
    if name == "pocket":
        return mlx_lm.load(str(pocket.verified()), **options)[:2]
    if not name:
        raise FileNotFoundError("a model is 'pocket', a local folder, or a Hugging Face name, and this name is empty.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{name} is no model folder: it has no config.json.")
        return mlx_lm.load(str(folder), **options)[:2]
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"there is no folder {name}. A model is 'pocket', a local folder, or a Hugging Face name such as "
            "'mlx-community/Llama-3.2-1B-Instruct-4bit'."
        )
    try:
        return mlx_lm.load(name, **options)[:2]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise OSError(
            f"can't load {name!r}: there is no such folder here, and it could not be had from the Hugging Face Hub "
            f"({type(error).__name__}). Check the name and the network, or give a local folder."
        ) from error
