"""`mlxsteer chat`: talk with a model in a terminal, and change what steers it between two messages."""

from __future__ import annotations

import difflib
import io
import json
import math
import random
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import mlx.core as mx
import typer
from mlx_lm.generate import GenerationResponse
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mlxsteer import datasets
from mlxsteer import interventions as iv
from mlxsteer.extraction import extract
from mlxsteer.interventions.base import Compose, Intervention
from mlxsteer.interventions.files import FORMAT, as_json
from mlxsteer.interventions.gates import When
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import PairSet, in_split, nearest
from mlxsteer.positions import NAMES, At
from mlxsteer.recommended import recommended
from mlxsteer.steering import Steering
from mlxsteer.vectors import SteeringVector

Source: TypeAlias = "SteeringVector | PairSet | dict[str, Intervention]"
"""What a steering is made of: a vector, the pairs to compute one from, or a file of interventions."""

ENOUGH = 80
"""A vector is computed from so many pairs of a contrast set: from here on it is usually reliable."""

_SIGNS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(range(127, 160), "�")


def literal(text: str, style: str = "") -> Text:
    """A text as it stands: no markup, and control characters as signs, so that no model commands the terminal."""
    return Text(text.translate(_SIGNS), style=style)


def sentence(error: Exception) -> str:
    """What an error says, on one line."""
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return " ".join(said.split()) or type(error).__name__


def opened(name: str, model: str) -> Source:
    """What a file holds, or a bundled contrast set, of which the bundled model has some in its own language."""
    path, sets = Path(name).expanduser(), datasets.available()
    own = f"pocket/{name}" if model == "pocket" and f"pocket/{name}" in sets else name
    if not path.exists() and own in sets:
        return datasets.load(own)
    if not path.exists():
        try:
            return SteeringVector.load(name)
        except (FileNotFoundError, ConnectionError) as error:
            near = difflib.get_close_matches(name.casefold(), _sets(model), n=3)
            more = f" Nearest contrast sets: {', '.join(near)}." if near else ""
            raise type(error)(f"{error}{more}") from error
    if path.suffix == ".json" and _conversation(path):
        raise ValueError(f"{path} is a saved conversation, not a steering: what steers is saved as .safetensors.")
    metadata: Any = {}
    with suppress(RuntimeError, ValueError):  # of what is damaged, the vector's own reader says what it is
        metadata = mx.load(str(path), return_metadata=True)[1] if path.suffix == ".safetensors" else {}  # type: ignore[index]
    return iv.load(path) if FORMAT in metadata else SteeringVector.load(path)


def _sets(model: str) -> list[str]:
    """The contrast sets as they are typed: those of the bundled model's own language without their folder, for it."""
    own = [name.removeprefix("pocket/") for name in datasets.available() if name.startswith("pocket/")]
    return list(dict.fromkeys([*own * (model == "pocket"), *datasets.available()]))


def _conversation(path: Path) -> bool:
    """Whether a file is what `/save` writes of a conversation."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(found, dict) and "messages" in found
    return False


def _each(one: Intervention, by: float = 1.0, gate: str = "") -> Iterator[tuple[Intervention, float, str]]:
    """The elementary interventions in one, each with the strength at which it acts, and what has to hold for it."""
    by *= float(one.strength)
    if isinstance(one, When):
        yield from _each(one.then, by, f"{gate}, when {one.condition} (per {one.per})")
    elif isinstance(one, Compose):
        for step in one.steps:
            yield from _each(step, by, gate)
    else:
        yield one, by, gate


def _place(text: str) -> At:
    """A position as it is typed: a name, indices such as ``-1`` or ``0,1``, or a slice such as ``2:5``.

    Raises:
        ValueError: it is none of these.
    """
    if text in NAMES:
        return text
    number = "-?[0-9]{1,9}"
    if re.fullmatch(f"{number}(,{number})*", text):
        indices = [int(index) for index in text.split(",")]
        return indices if len(indices) > 1 else indices[0]
    if re.fullmatch(f"({number})?:({number})?", text):
        return slice(*(int(end) if end else None for end in text.split(":")))
    raise ValueError(f"a position is a name, or like -1 or 0,1 or 2:5, not {text!r}. {nearest(text, NAMES, '/help')}")


def _typed(at: At) -> str:
    """A position as `_place` reads it, where it is a slice."""
    if not isinstance(at, slice):
        return repr(at)
    ends = [at.start, at.stop] if at.step in (None, 1) else [at.start, at.stop, at.step]
    return ":".join("" if end is None else str(end) for end in ends)


@dataclass(frozen=True)
class Named:
    """One steering of a chat: what was loaded, and how it acts.

    Attributes:
        source: a vector, or interventions by key, which say themselves where they act.
        layers: where a vector acts.
        at: on which tokens a vector acts.
        strength: 0 is plain; multiplies the vector, or the strengths in the file.
        on: whether it acts.
    """

    source: SteeringVector | dict[str, Intervention]
    layers: tuple[int, ...] = ()
    strength: float = 1.0
    on: bool = True
    at: At = "all"

    def interventions(self) -> dict[str, Intervention]:
        """The key dict that does it."""
        if isinstance(self.source, SteeringVector):
            return self.source.at(self.layers, self.strength, self.at)
        return {key: Compose((one,), self.strength) for key, one in self.source.items()}

    def acts(self) -> Iterator[tuple[str, str, str, str]]:
        """Key, kind, strength and tokens of everything in it, in words."""
        for key, one in self.interventions().items():
            for part, strength, gate in _each(one):
                when = f", {part.schedule}" if part.schedule is not None else ""
                spans = f", not {part.exclude}" if part.exclude is not None else ""
                yield key, part.name, f"{strength:g}", f"{_typed(part.at.written())}{when}{spans}{gate}"

    def __str__(self) -> str:
        told = "; ".join(f"{kind} at {key}, strength {s}, tokens {where}" for key, kind, s, where in self.acts())
        return told if self.on else f"{told} (off)"


@dataclass(eq=False)
class Chat:
    """A conversation with a model, and what steers it; `answer` and `command` take what the user types.

    Attributes:
        model: the model.
        system: the system message; empty for none.
        max_tokens, temp: of an answer.
        seed: answer n is sampled with seed + n; None for another seed each time.
        messages: what was said, as messages with `role` and `content`. An answer has also the `seed` it was sampled
            with, the `steering` in words, and how it `ended`: ``"stop"``, ``"length"`` or ``"interrupted"``.
        steerings: by name; they act in this order.
        over: the user has left.
    """

    model: InterpretableModel
    system: str = ""
    max_tokens: int = 256
    temp: float = 0.0
    seed: int | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    steerings: dict[str, Named] = field(default_factory=dict)
    over: bool = False

    @property
    def templated(self) -> bool:
        """Whether the model has a chat template; else it goes on with the text."""
        return bool(getattr(self.model.tokenizer, "has_chat_template", False))

    # -- answers -----------------------------------------------------------------------------------------------------

    def answer(self, text: str) -> Iterator[str]:
        """Say something, and read the answer piece by piece.

        The turn enters the history when the answer ends: whole, or as far as it came where Ctrl-C or the reader ended
        it. After an error, or before the first piece, there is no turn.
        """
        asked = {"role": "user", "content": text}
        told: dict[str, Any] = {"role": "assistant", "content": "", "ended": "interrupted"}
        told |= {"seed": self._seed(), "steering": self.words()}
        try:
            for piece in self._stream([*self.messages, asked], self.steering(), told["seed"]):
                told["content"] += piece.text
                told["ended"] = piece.finish_reason or told["ended"]
                yield piece.text
        except Exception:
            told |= {"content": "", "ended": "interrupted"}
            raise
        finally:
            if told["content"] or told["ended"] != "interrupted":
                self.messages += [asked, told]

    def both(self, text: str = "") -> list[str]:
        """The steered and the plain answer to a text, or to the last message, sampled with one seed."""
        if not text and not self.messages:
            raise ValueError("nothing was said yet: /compare TEXT compares the answers to a text.")
        asked = [*self.messages, {"role": "user", "content": text}] if text else self.messages[:-1]
        seed, steering = self._seed() if text else self.messages[-1]["seed"], self._needed()
        return ["".join(piece.text for piece in self._stream(asked, each, seed)) for each in (steering, None)]

    def _stream(
        self, messages: Sequence[Mapping[str, Any]], steering: dict[str, Intervention] | None, seed: int
    ) -> Iterator[GenerationResponse]:
        # The whole history is run anew for every answer: it must be read under today's steering, and a prompt cache
        # that was filled under another one would be refused, as it should be.
        prompt: Any = [{"role": "system", "content": self.system}] if self.system else []
        prompt += [{"role": said["role"], "content": said["content"]} for said in messages]
        if not self.templated:
            prompt = "".join(said["content"] + "\n" * (said["role"] != "user") for said in prompt)
        return self.model.stream(prompt, steering, max_tokens=self.max_tokens, temp=self.temp, seed=seed)

    def _seed(self) -> int:
        return random.randrange(2**31) if self.seed is None else self.seed + len(self.messages) // 2

    # -- steering ----------------------------------------------------------------------------------------------------

    def add(
        self, name: str, source: Source, layer: int | None = None, strength: float | None = None, at: At = "all"
    ) -> None:
        """A further steering, which acts after those there are; one of the same name is replaced.

        Args:
            name: what it is called.
            source: a vector; the pairs to compute one from; or interventions by key.
            layer: where a vector acts: unless told, where its pairs were measured to steer best, or in its middle.
            strength: 1, unless told.
            at: the tokens that a vector acts on.

        Raises:
            ValueError: it is another model's, or has strengths for several rows.
            KeyError: the vector lacks the layer, or the model a place.
        """
        if isinstance(source, PairSet):
            if layer is None:
                layer = self._best_layer(source)
            source = extract(self.model, in_split(source, "train")[:ENOUGH], progress=True)
        if isinstance(source, SteeringVector):
            source.check(self.model)
            layer = source.layers[len(source) // 2] if layer is None else layer
        one = Named(source, () if layer is None else (layer,), 1.0 if strength is None else strength, at=at)
        self._checked(one)
        self.steerings.pop(name, None)
        self.steerings[name] = one

    def _best_layer(self, pairs: PairSet) -> int | None:
        # Only the layer is taken: the strength that is recommended belongs to the tokens that it was measured at, and
        # garbles answers that are steered at all of theirs.
        with suppress(LookupError):
            strengths = recommended(self.model, pairs.name).strengths
            return max(strengths, key=lambda layer: abs(strengths[layer]))
        return None

    def _checked(self, one: Named) -> Named:
        does = one.interventions()
        Steering.of(self.model._sites, does)  # refuses what doesn't fit the model
        if any(part.strengths is not None for each in does.values() for part in each.parts()):
            raise ValueError("it has one strength per row of a batch, and a chat is a single row.")
        return one

    def steering(self) -> dict[str, Intervention] | None:
        """All that acts, as one key dict; None where nothing does, so that the model is plain."""
        made: dict[str, Intervention] = {}
        for one in self.steerings.values():
            for pattern, does in one.interventions().items() if one.on and one.strength else ():
                for key in self.model.sites(pattern):  # one spelling for each place, so that the order is kept there
                    made[key] = made[key] | does if key in made else does
        return made or None

    def _needed(self) -> dict[str, Intervention]:
        steering = self.steering()
        if steering is None:
            raise ValueError("nothing steers now: see /load, /on and /strength.")
        return steering

    def words(self) -> list[str]:
        """What steers now, one line for each steering that acts."""
        return [f"{name}: {one}" for name, one in self.steerings.items() if one.on and one.strength]

    def _called(self, name: str = "") -> str:
        """The name given, if there is such a steering; else the only one there is, or the only one that is on."""
        if not self.steerings:
            raise ValueError("nothing is loaded: /load FILE.")
        if name and name not in self.steerings:
            raise ValueError(f"there is no steering called {name!r}. {nearest(name, self.steerings, '/show')}")
        on = [name for name, one in self.steerings.items() if one.on]
        names = [name] if name else on if len(on) == 1 else list(self.steerings)
        if len(names) > 1:
            raise ValueError(f"say which: {', '.join(names)}.")
        return names[0]

    # -- commands ----------------------------------------------------------------------------------------------------

    def command(self, line: str) -> RenderableType:
        """Do what a line that begins with ``/`` says, and say what was done.

        Raises:
            ValueError: there is no such command, or it doesn't go with what follows it; and what else may go wrong.
        """
        name, rest = (*line.split(maxsplit=1), "")[:2]
        if name not in COMMANDS:
            raise ValueError(f"there is no command {name}. {nearest(name, COMMANDS, '/help')}")
        run, usage, _ = COMMANDS[name]
        given = shlex.split(rest) if "TEXT" not in usage else [rest] if rest else []
        if not usage.count(" ") - usage.count(" [") <= len(given) <= usage.count(" "):
            raise ValueError(f"it is written {usage}.")
        return run(self, *given)

    def _told(self, *names: str) -> Text:
        return literal("\n".join(f"{name}: {self.steerings[name]}" for name in names) or "Nothing is loaded.")

    def _change(self, name: str, **changes: Any) -> Text:
        self.steerings[name] = self._checked(replace(self.steerings[name], **changes))
        return self._told(name)

    def _strength(self, *given: str) -> Text:
        if not given:
            return self._told(*self.steerings)
        *name, last = given
        try:
            strength = float(last)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            raise ValueError(f"a strength is a number such as 1.5, not {last!r}.")
        return self._change(self._called(*name), strength=strength)

    def _layer(self, *given: str) -> Text:
        if not given:
            return self._told(*self.steerings)
        *name, last = given
        if not re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})*", last):
            raise ValueError(f"layers are numbers such as 5 or 4,5,6, not {last!r}.")
        return self._change(self._vector(*name), layers=tuple(dict.fromkeys(map(int, last.split(",")))))

    def _at(self, *given: str) -> Text:
        if not given:
            return self._told(*self.steerings)
        *name, last = given
        at = _place(last)
        return self._change(self._vector(*name), at=at)

    def _vector(self, *name: str) -> str:
        called = self._called(*name)
        if not isinstance(self.steerings[called].source, SteeringVector):
            raise ValueError(f"{called} is a file of interventions, which says itself where it acts.")
        return called

    def _switch(self, on: bool, name: str = "") -> Text:
        names = [self._called(name)] if name else list(self.steerings)
        self.steerings |= {name: replace(self.steerings[name], on=on) for name in names}
        return self._told(*names)

    def _load(self, file: str, name: str = "") -> Text:
        called = name or Path(file).stem
        if not name and called in self.steerings:
            raise ValueError(
                f"there is a steering called {called} already; /load FILE NAME says what to call this one."
            )
        self.add(called, opened(file, self.model.name))
        return self._told(called)

    def _compare(self, text: str = "") -> Table:
        table = Table(expand=True)
        for head in ("steered", "plain"):
            table.add_column(head, ratio=1)
        table.add_row(*(literal(answer.strip()) for answer in self.both(text)))
        return table

    def _save(self, file: str) -> Text:
        path = Path(file).expanduser()
        if path.suffix == ".json":
            options = {"system": self.system, "max_tokens": self.max_tokens, "temp": self.temp}
            as_json({**self.model.identity, **options, "steering": self.words(), "messages": self.messages}, path)
        elif path.suffix == ".safetensors":
            iv.save(self._needed(), path)
        else:
            raise ValueError(f"{path}: what steers is saved as .safetensors, the conversation as .json.")
        return literal(f"Saved: {path}")

    def _show(self) -> RenderableType:
        table = Table("name", "key", "kind", "strength", "tokens", "on")
        for name, one in self.steerings.items():
            for act in one.acts():
                table.add_row(*(literal(cell) for cell in (name, *act, "yes" if one.on else "no")))
        return table if self.steerings else self._told()

    def _set_system(self, text: str = "") -> Text:
        self.system = text
        return literal(f"System: {text}" if text else "There is no system message now.")

    def _undo(self) -> Text:
        if not self.messages:
            raise ValueError("nothing was said yet.")
        taken = self.messages[-2]["content"]
        del self.messages[-2:]
        return literal(f"Taken back: {taken}")

    def _clear(self) -> Text:
        self.messages.clear()
        return literal("The conversation is forgotten; what steers stays.")

    def _help(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for _, usage, meaning in COMMANDS.values():
            table.add_row(literal(usage), literal(meaning))
        return table

    def _quit(self) -> Text:
        self.over = True
        return literal("")


_USAGE: tuple[tuple[Callable[..., RenderableType], str, str], ...] = (
    (Chat._strength, "/strength [NAME] [X]", "show or set how strongly it steers; 0 is plain"),
    (Chat._layer, "/layer [NAME] [N,N,...]", "show or set the layers that a vector acts at"),
    (Chat._at, "/at [NAME] [WHERE]", "show or set the tokens: all, prompt, generated, last, first, -1, 2:5"),
    (lambda chat, *name: chat._switch(False, *name), "/off [NAME]", "stop steering, for now"),
    (lambda chat, *name: chat._switch(True, *name), "/on [NAME]", "steer again"),
    (Chat._load, "/load FILE [NAME]", "a vector, a file of interventions, or a contrast set such as sentiment"),
    (Chat._compare, "/compare [TEXT]", "steered and plain answers, to the last message or to a text"),
    (Chat._save, "/save FILE", "what steers as .safetensors, the conversation as .json"),
    (Chat._show, "/show", "what steers now"),
    (Chat._set_system, "/system [TEXT]", "the system message; without a text there is none"),
    (Chat._undo, "/undo", "take the last message and its answer back"),
    (Chat._clear, "/clear", "forget the conversation"),
    (Chat._help, "/help", "this list; a message that begins with / is written with //"),
    (Chat._quit, "/quit", "leave, as Ctrl-D does"),
)
COMMANDS = {usage.split()[0]: (run, usage, meaning) for run, usage, meaning in _USAGE}


# -- the terminal ----------------------------------------------------------------------------------------------------


@contextmanager
def _remarks(aside: Console) -> Iterator[None]:
    """Say warnings as sentences, once each."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for said in dict.fromkeys(" ".join(str(warning.message).split()) for warning in heard):
                aside.print(literal(f"note: {said}", "yellow"), soft_wrap=True)


def _reply(chat: Chat, text: str, screen: Console, aside: Console) -> None:
    try:
        with closing(chat.answer(text)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                screen.print(literal(piece), end="", soft_wrap=True)
    finally:
        screen.print()
    if chat.messages[-1]["ended"] == "length":
        aside.print(literal(f"(ended after --max-tokens {chat.max_tokens})", "dim"))


def _one_line(chat: Chat, line: str, screen: Console, aside: Console) -> None:
    try:
        with _remarks(aside):
            if not line.startswith("/") or line.startswith("//"):
                return _reply(chat, line.removeprefix("/"), screen, aside)
            with aside.status("answering twice") if line.startswith("/compare") else nullcontext():
                shown = chat.command(line)
            if not chat.over:
                screen.print(shown)
    except Exception as error:  # noqa: BLE001 - whatever a model, its template or a file does, the chat goes on
        aside.print(literal(f"error: {sentence(error)}", "red"), soft_wrap=True)


def talk(chat: Chat, screen: Console, aside: Console) -> None:
    """Read lines and do what they say, until ``/quit``, Ctrl-D, or Ctrl-C twice; errors and remarks go aside."""
    prompt = "› " if screen.is_terminal and sys.stdin.isatty() else ""
    if prompt:
        with suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines and remembers them once it is imported
    stopped = False
    while not chat.over:
        try:
            line = input(prompt).strip()  # the prompt is not rich's, which readline would wipe out
            stopped = False
            if line:
                _one_line(chat, line, screen, aside)
        except KeyboardInterrupt:
            if stopped:
                break
            stopped = True
            aside.print(literal("\n(stopped; Ctrl-C once more leaves)", "dim"))
        except EOFError:
            break
    if prompt and not chat.over:
        screen.print()


def _sources(names: Sequence[str], layer: int | None, at: str | None, model: str) -> dict[str, Source]:
    """What the command line names, by name; read before the model is, so that a wrong name costs no time."""
    made: dict[str, Source] = {}
    for name in names:
        stem = Path(name).stem
        if stem in made:
            raise ValueError(f"two files are called {stem}; in the chat, /load FILE NAME says what to call one.")
        source = made[stem] = opened(name, model)
        if isinstance(source, SteeringVector) and layer is not None and layer not in source.layers:
            raise ValueError(f"--layer {layer}: {name} has no direction there; it has {source.layers}.")
    if all(isinstance(source, dict) for source in made.values()):
        for option, value in (("--layer", layer), ("--at", at)):
            if value is not None:
                raise ValueError(f"{option} {value} says where a vector acts: name one by --vector.")
    return made


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


def chat(
    model: Annotated[str, typer.Option(help="A Hugging Face name, a folder, or 'pocket'.")] = "pocket",
    vector: Annotated[
        list[str] | None, typer.Option(help="A vector's file, or a contrast set; may be repeated.")
    ] = None,
    interventions: Annotated[str | None, typer.Option(help="A file of interventions.")] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Where vectors act; their middle layer, unless told.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(callback=_finite, help="How strongly; 0 is plain, 1 unless told.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(help="The tokens that vectors act on, all unless told: as /at in the chat.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 256,
    temp: Annotated[float, typer.Option(min=0, callback=_finite, help="The temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampling; another for each answer, unless told.")] = None,
    system: Annotated[str, typer.Option(help="The system message.")] = "",
) -> None:
    """Talk with a model, and change what steers it as you go.

    Lines that begin with / are commands; /help lists them. Ctrl-C stops an answer, and twice leaves.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a byte that is no text must not end the chat
    screen, aside = Console(), Console(stderr=True)
    place = "all" if at is None else _place(at)
    sources = _sources([*(vector or ()), *([interventions] if interventions else [])], layer, at, model)
    if strength is not None and not sources:
        raise ValueError(f"--strength {strength:g} of what? Name something by --vector or --interventions.")
    talking = Chat(InterpretableModel(model), system, max_tokens, temp, seed)
    aside.print(literal(repr(talking.model), "bold"))
    if not talking.templated:
        aside.print(literal(f"{model} has no chat template: it goes on with your text as it stands."), soft_wrap=True)
    with _remarks(aside):
        for name, source in sources.items():
            talking.add(name, source, layer, strength, place)
    aside.print(literal("\n".join([*talking.words(), "/help lists the commands."])), soft_wrap=True)
    talk(talking, screen, aside)
