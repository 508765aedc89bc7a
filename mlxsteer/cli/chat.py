"""`mlxsteer chat`: talk with a model in a terminal, and change what steers it between two messages."""

from __future__ import annotations

import io
import math
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from mlx_lm.generate import GenerationResponse
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mlxsteer import interventions as iv
from mlxsteer.cli.options import (
    Layer,
    MaxTokens,
    Model,
    Places,
    Steer,
    Strength,
    Temperature,
    Unit,
    some_layers,
    unit_of,
)
from mlxsteer.cli.screen import literal, remarks, sentence
from mlxsteer.cli.sources import Named, Source, opened, position, sources_of, together
from mlxsteer.interventions.base import Intervention
from mlxsteer.interventions.files import as_json
from mlxsteer.model import InterpretableModel
from mlxsteer.pairs import nearest
from mlxsteer.positions import At
from mlxsteer.vectors import SteeringVector


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
        self,
        name: str,
        source: Source,
        layer: int | Sequence[int] | None = None,
        strength: float | None = None,
        at: At = "all",
        unit: Literal["raw", "residual"] = "raw",
    ) -> None:
        """A further steering, which acts after those there are; one of the same name is replaced.

        Args:
            name: what it is called.
            source: a vector; the pairs to compute one from; or interventions by key.
            layer: where a vector acts: unless told, where its pairs were measured to steer best, or in its middle.
            strength: 1, unless told.
            at: the tokens that a vector acts on.
            unit: of a vector's strength.

        Raises:
            ValueError: it is another model's, or has strengths for several rows.
            KeyError: the vector lacks the layer, or the model a place.
        """
        layers = () if layer is None else (layer,) if isinstance(layer, int) else tuple(layer)
        one = Named.made(self.model, source, layers, strength, at, unit)
        self.steerings.pop(name, None)
        self.steerings[name] = one

    def steering(self) -> dict[str, Intervention] | None:
        """All that acts, as one key dict; None where nothing does, so that the model is plain."""
        return together(self.model, self.steerings.values()) or None

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
        self.steerings[name] = replace(self.steerings[name], **changes).checked(self.model)
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
        at = position(last)
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
            for key, kind, strength, where in one.acts():
                cells = (name, key, kind, one.amount(kind, strength), where, "yes" if one.on else "no")
                table.add_row(*map(literal, cells))
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
        talks = not line.startswith("/") or line.startswith("//")
        with remarks(aside, at_once=talks):
            if talks:
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


def chat(
    model: Model = "pocket",
    vector: Steer = None,
    interventions: Annotated[str | None, typer.Option(help="A file of interventions.")] = None,
    layer: Layer = None,
    strength: Strength = None,
    unit: Unit = "raw",
    at: Places = None,
    max_tokens: MaxTokens = 256,
    temp: Temperature = 0.0,
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
    measure, layers = unit_of(unit), some_layers(layer)
    place = "all" if at is None else position(at)
    sources = sources_of([*(vector or ()), *([interventions] if interventions else [])], layers, at, unit, model)
    if strength is not None and not sources:
        raise ValueError(f"--strength {strength:g} of what? Name something by --vector or --interventions.")
    talking = Chat(InterpretableModel(model), system, max_tokens, temp, seed)
    aside.print(literal(repr(talking.model), "bold"))
    if not talking.templated:
        aside.print(literal(f"{model} has no chat template: it goes on with your text as it stands."), soft_wrap=True)
    with remarks(aside):
        for name, source in sources.items():
            talking.add(name, source, layers, strength, place, measure)
    aside.print(literal("\n".join([*talking.words(), "/help lists the commands."])), soft_wrap=True)
    talk(talking, screen, aside)
