"""The chat: what is said is what the model says under the steering shown, and nothing that goes wrong ends it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from rich.console import Console

from mlxsteer import InterpretableModel, PairSet, SteeringVector, datasets, extract, recommended
from mlxsteer import interventions as iv
from mlxsteer.cli import main
from mlxsteer.cli.chat import COMMANDS, Chat, literal, opened, talk

ASK = "How was the villa?"
MORE = "And the food?"
FEW = 4
Say = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    draws = {layer: 3 * mx.random.normal((256,), key=mx.random.key(layer)) for layer in range(8)}
    return SteeringVector(draws, residual_norms=dict.fromkeys(range(8), 30.0))


@pytest.fixture
def chat(pocket: InterpretableModel) -> Chat:
    return Chat(pocket, max_tokens=FEW)


@pytest.fixture
def say(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Type lines, and read what is shown, and what is remarked."""

    def typed(*lines: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        screen, aside = (Console(file=io.StringIO(), width=120) for _ in range(2))
        talk(chat, screen, aside)
        return screen.file.getvalue(), aside.file.getvalue()  # type: ignore[attr-defined]

    return typed


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answered(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def spoken(chat: Chat, text: str) -> str:
    return "".join(chat.answer(text))


# -- answers -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_models_under_the_steering_with_the_whole_history(
    pocket: InterpretableModel, chat: Chat, vector: SteeringVector
) -> None:
    chat.add("v", vector, layer=5)
    first = spoken(chat, ASK)
    assert first == pocket.generate([user(ASK)], vector.at(5), max_tokens=FEW)
    assert first != pocket.generate([user(ASK)], max_tokens=FEW)
    chat.command("/strength -1")
    chat.command("/system Be brief.")
    second = spoken(chat, MORE)
    history = [{"role": "system", "content": "Be brief."}, user(ASK), answered(first), user(MORE)]
    assert second == pocket.generate(history, vector.at(5, -1.0), max_tokens=FEW)
    assert [said["content"] for said in chat.messages] == [ASK, first, MORE, second]
    assert [said["steering"][0].split("strength ")[1][:2] for said in chat.messages[1::2]] == ["1 ", "-1"]


@pytest.mark.parametrize("command", ["/strength 0", "/off v"])
def test_strength_0_and_off_are_the_plain_model(
    pocket: InterpretableModel, chat: Chat, vector: SteeringVector, command: str
) -> None:
    chat.add("v", vector)
    chat.command(command)
    assert chat.steering() is None
    assert chat.words() == []
    assert spoken(chat, ASK) == pocket.generate([user(ASK)], max_tokens=FEW)


def test_steerings_act_in_the_order_in_which_they_were_loaded(
    pocket: InterpretableModel, chat: Chat, vector: SteeringVector
) -> None:
    add, double = vector.at(5), {"layers.4-5": iv.scale(2.0), "model.layers.5": iv.scale(-1.0)}
    more = {"layers.5": iv.add_vector(vector[2])}  # its key is that of the first one, with a glob between them
    texts = []
    for named in ({"a": add, "b": double, "c": more}, {"b": double, "c": more, "a": add}):
        chat.steerings.clear()
        chat.messages.clear()
        for name, does in named.items():
            chat.add(name, does)
        with pocket.steer(**named):
            expected = pocket.generate([user(ASK)], max_tokens=FEW)
        texts.append(spoken(chat, ASK))
        assert texts[-1] == expected
    assert texts[0] != texts[1]
    chat.add("b", add)  # replaced, it acts last
    assert list(chat.steerings) == ["c", "a", "b"]


def test_a_files_strengths_are_multiplied(pocket: InterpretableModel, chat: Chat, vector: SteeringVector) -> None:
    chat.add("file", vector.at([4, 5], 0.5, at="last"))
    chat.command("/strength file 3")
    assert spoken(chat, ASK) == pocket.generate([user(ASK)], vector.at([4, 5], 1.5, at="last"), max_tokens=FEW)
    assert chat.words() == [
        "file: add_vector at layers 4, 5, strength 1.5 × the vector, tokens 'last'",
    ]


def test_sampling_is_seeded_by_turn(pocket: InterpretableModel) -> None:
    chat = Chat(pocket, max_tokens=FEW, temp=1.5, seed=7)
    first, second = spoken(chat, ASK), spoken(chat, MORE)
    assert first == pocket.generate([user(ASK)], max_tokens=FEW, temp=1.5, seed=7)
    assert second == pocket.generate([user(ASK), answered(first), user(MORE)], max_tokens=FEW, temp=1.5, seed=8)
    chat.command("/undo")
    assert spoken(chat, MORE) == second
    unseeded = Chat(pocket, max_tokens=1, temp=1.0)
    assert len({unseeded._seed() for _ in range(4)}) > 1


def test_a_model_without_a_chat_template_goes_on_with_the_text(
    chat: Chat, pocket: InterpretableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, stream = [], pocket.stream

    def listening(prompt: Any, *more: Any, **options: Any) -> Iterator[Any]:
        asked.append(prompt)
        return stream(prompt, *more, **options)

    monkeypatch.setattr(pocket, "stream", listening)
    monkeypatch.setattr(pocket.tokenizer._tokenizer, "has_chat_template", False)  # the wrapper passes it on
    chat.command("/system A review.")
    first = spoken(chat, "The food was")
    assert first == pocket.generate("A review.\nThe food was", max_tokens=FEW)
    spoken(chat, "The room was")
    assert asked == ["A review.\nThe food was", f"A review.\nThe food was{first}\nThe room was"]


# -- commands ----------------------------------------------------------------------------------------------------------


def test_strengths_and_layers_of_one_steering_and_of_several(chat: Chat, vector: SteeringVector) -> None:
    chat.add("v", vector)
    assert str(chat.command("/strength")) == "v: add_vector at layers.4, strength 1 × the vector, tokens 'all'"
    chat.command("/strength 1.5")
    chat.command("/layer 5")
    assert str(chat.command("/layer")) == "v: add_vector at layers.5, strength 1.5 × the vector, tokens 'all'"
    chat.add("my w", vector, layer=2, strength=2.0)
    for line in ("/strength 3", "/layer 3"):
        with pytest.raises(ValueError, match="say which: v, my w"):
            chat.command(line)
    chat.command("/off v")
    chat.command("/strength 3")  # the only one that is on
    chat.command("/layer 'my w' 4,5,6")
    assert chat.steerings["my w"].strength == 3.0
    assert list(chat.steerings["my w"].layers) == [4, 5, 6]
    assert chat.steerings["v"].strength == 1.5
    assert str(chat.command("/on v")) == "v: add_vector at layers.5, strength 1.5 × the vector, tokens 'all'"
    assert str(chat.command("/off")).count("(off)") == 2


@pytest.mark.parametrize(
    ("typed", "at", "shown"),
    [("generated", "generated", "'generated'"), ("last", "last", "'last'"), ("-1", -1, "-1"),
     ("0,-1", [0, -1], "[0, -1]"), ("2:5", slice(2, 5), "2:5"), (":-1", slice(None, -1), ":-1")],
)  # fmt: skip
def test_a_vector_acts_on_the_tokens_that_are_asked_for(
    pocket: InterpretableModel, chat: Chat, vector: SteeringVector, typed: str, at: Any, shown: str
) -> None:
    chat.add("v", vector, layer=5)
    told = str(chat.command(f"/at {typed}"))
    assert told == str(chat.command("/at")) == f"v: add_vector at layers.5, strength 1 × the vector, tokens {shown}"
    assert spoken(chat, ASK) == pocket.generate([user(ASK)], vector.at(5, at=at), max_tokens=FEW)


def test_what_is_shown_names_gates_schedules_and_spans(chat: Chat, vector: SteeringVector) -> None:
    inner = iv.add_vector(vector[5], 3.0, at="generated", schedule=iv.decay(4), exclude=("<a>", "</a>"))
    chat.add("file", {"layers.5": iv.when(iv.cosine(vector[5]) > 0.25, inner, 0.5)})
    (told,) = chat.words()
    assert told.startswith(
        "file: add_vector at layers.5, strength 1.5 × the vector, tokens 'generated', decay(half_life=4"
    )
    assert "not inside(opening='<a>', closing='</a>')" in told
    assert told.endswith("when (cosine(<256>) > 0.25) (per prompt)")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/strenth 2", "there is no command /strenth. Nearest: /strength"),
        ("/", "there is no command /"),
        ("/strength much", "a number such as 1.5, not 'much'"),
        ("/strength nan", "a number such as 1.5, not 'nan'"),
        ("/strength u 2", "no steering called 'u'"),
        ("/strength v 2 3", "it is written /strength [NAME] [X]"),
        ("/layer v 9", "error: the vector has no direction for layer 9; it has [0, 1"),
        ("/layer v five", "layers are numbers such as 5 or 4,5,6, not 'five'"),
        ("/layer 4,", "layers are numbers"),
        ("/layer file 3", "file is a file of interventions"),
        ("/at v genrated", "not 'genrated'. Nearest: generated"),
        ("/at v 1,", "a position is a name, or like -1 or 0,1 or 2:5, not '1,'"),
        ("/at file last", "file is a file of interventions"),
        ("/off w", "no steering called 'w'"),
        ("/on v w", "it is written /on [NAME]"),
        ("/load", "it is written /load FILE [NAME]"),
        ("/load nowhere.safetensors", "there is no file nowhere.safetensors"),
        ("/load sentimant", "Nearest contrast sets: sentiment"),
        ("/load 'half", "No closing quotation"),
        ("/compare", "nothing was said yet"),
        ("/save steering.txt", ".safetensors, the conversation as .json"),
        ("/save no/such/folder/a.json", "there is no folder"),
        ("/undo", "nothing was said yet"),
        ("/clear all", "it is written /clear"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_changes_nothing(
    chat: Chat, say: Say, vector: SteeringVector, line: str, message: str
) -> None:
    chat.add("v", vector)
    chat.add("file", {"layers.3": iv.scale(2.0)})
    before = dict(chat.steerings)
    screen, aside = say(line, "/off file")
    assert aside.startswith("error: ")
    assert message in aside
    assert aside.count("\n") == 1
    assert "(off)" in screen  # the next line was done
    assert chat.steerings["v"] is before["v"]
    assert not chat.messages


def test_nothing_is_asked_of_nothing(chat: Chat, say: Say, tmp_path: Path) -> None:
    screen, aside = say("/strength", "/layer", "/show", "/on", "", "/strength 2", f"/save {tmp_path / 'a.safetensors'}")
    assert screen == "Nothing is loaded.\n" * 4
    assert aside.splitlines() == [
        "error: nothing is loaded: /load FILE.",
        "error: nothing steers now: see /load, /on and /strength.",
    ]


def test_a_saved_conversation_is_no_steering(chat: Chat, say: Say, tmp_path: Path) -> None:
    _, aside = say(f"/save {tmp_path / 'c.json'}", f"/load {tmp_path / 'c.json'}")
    assert "c.json is a saved conversation, not a steering" in aside
    assert not chat.steerings


def test_files_are_loaded_by_what_is_in_them(chat: Chat, vector: SteeringVector, tmp_path: Path) -> None:
    vector.save(tmp_path / "mood.safetensors")
    with pytest.warns(UserWarning, match="layer 0"):
        vector.save(tmp_path / "other mood.gguf")
    iv.save(vector.at(5, at="last"), tmp_path / "edits.safetensors")
    told = str(chat.command(f"/load {tmp_path}/mood.safetensors"))
    assert told == "mood: add_vector at layers.4, strength 1 × the vector, tokens 'all'"
    chat.command(f"/load '{tmp_path}/other mood.gguf'")
    chat.command(f"/load {tmp_path}/edits.safetensors kept")
    assert list(chat.steerings) == ["mood", "other mood", "kept"]
    assert isinstance(chat.steerings["other mood"].source, SteeringVector)
    assert isinstance(chat.steerings["kept"].source, dict)
    with pytest.raises(ValueError, match="there is a steering called mood already"):
        chat.command(f"/load {tmp_path}/mood.safetensors")
    chat.command(f"/load {tmp_path}/edits.safetensors mood")
    assert list(chat.steerings) == ["other mood", "kept", "mood"]


def test_what_does_not_fit_the_model_is_refused(chat: Chat, vector: SteeringVector, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no complete safetensors file"):
        chat.command(f"/load {tmp_path}/broken.safetensors")
    iv.save(vector.at(5), tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole.replace(b"add_vector", b"odd_vector"))
    with pytest.raises(ValueError, match="odd_vector"):
        chat.command(f"/load {tmp_path}/cut.safetensors")
    with pytest.raises(ValueError, match="width"):
        chat.add("narrow", SteeringVector({3: mx.ones(8)}))
    with pytest.raises(ValueError, match="one strength per row"):
        chat.add("rows", vector.at(5, [1.0, 2.0]))
    with pytest.raises(KeyError, match="layers.9"):
        chat.add("far", {"layers.9": iv.scale(2.0)})
    assert not chat.steerings


def test_a_contrast_set_acts_at_the_layer_that_was_recommended(
    chat: Chat, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def computed(_: InterpretableModel, pairs: list[Any], **__: Any) -> SteeringVector:
        asked.append(len(pairs))
        return vector

    monkeypatch.setattr(sys.modules["mlxsteer.cli.sources"], "extract", computed)
    strengths = recommended("pocket", "pocket/sentiment").strengths
    best = max(strengths, key=lambda layer: abs(strengths[layer]))
    chat.command("/load sentiment")
    assert asked == [80]
    assert chat.words() == [f"sentiment: add_vector at layers.{best}, strength 1 × the vector, tokens 'all'"]
    pairs = opened("sentiment", "pocket")
    chat.add("sentiment", pairs, layer=2, strength=0.5)
    assert chat.words() == ["sentiment: add_vector at layers.2, strength 0.5 × the vector, tokens 'all'"]
    chat.add("sentiment", PairSet(pairs, name="mine"))  # type: ignore[arg-type]
    assert chat.words() == ["sentiment: add_vector at layers.4, strength 1 × the vector, tokens 'all'"]
    assert opened("sentiment", "another").name == "sentiment"  # type: ignore[union-attr]


def test_a_vector_is_computed_from_pairs(chat: Chat, pocket: InterpretableModel) -> None:
    pairs = PairSet(datasets.load("pocket/sentiment", "train")[:2], name="mine")
    chat.add("mood", pairs, layer=3)
    source = chat.steerings["mood"].source
    assert isinstance(source, SteeringVector)
    assert source.fingerprint == extract(pocket, pairs).fingerprint


def test_compare_shows_both_answers_and_keeps_the_history(
    pocket: InterpretableModel, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(pocket, max_tokens=FEW, temp=1.0, seed=3)
    chat.add("v", vector, layer=5)
    first = spoken(chat, ASK)
    history = list(chat.messages)
    plain = pocket.generate([user(ASK)], max_tokens=FEW, temp=1.0, seed=3)
    assert chat.both() == [first, plain]
    steered, alone = chat.both(MORE)
    assert chat.messages == history
    assert alone == pocket.generate([user(ASK), answered(first), user(MORE)], max_tokens=FEW, temp=1.0, seed=4)
    assert spoken(chat, MORE) == steered != alone
    monkeypatch.setattr(Chat, "both", lambda _, text: [f"[red]{text}[/red]", "plain [b]"])
    page = Console(file=io.StringIO(), width=80)
    page.print(chat.command("/compare an apostrophe's text"))
    shown = page.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]an apostrophe's text[/red]" in shown
    assert "plain [b]" in shown
    monkeypatch.undo()
    chat.command("/off")
    with pytest.raises(ValueError, match="nothing steers now"):
        chat.command("/compare")


def test_what_was_saved_steers_alike(
    pocket: InterpretableModel, chat: Chat, vector: SteeringVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.add("v", vector, layer=5, strength=0.7)
    chat.add("file", {"layers.4-5": iv.scale(1.1) | iv.add_vector(vector[3], 0.3, at="last")})
    chat.command("/strength file 2")
    first = spoken(chat, ASK)
    chat.command(f"/save {tmp_path}/now.safetensors")
    again = Chat(pocket, max_tokens=FEW)
    again.command(f"/load {tmp_path}/now.safetensors")
    assert spoken(again, ASK) == first != pocket.generate([user(ASK)], max_tokens=FEW)
    assert first == pocket.generate([user(ASK)], iv.load(tmp_path / "now.safetensors"), max_tokens=FEW)
    assert "strength 0.6 × the vector, tokens 'last'" in again.words()[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    chat.command("/save ~/talk.json")
    told = json.loads((tmp_path / "talk.json").read_text())
    assert told["steering"] == chat.words()
    assert [said["content"] for said in told["messages"]] == [ASK, first]
    assert told["messages"][1]["steering"] == chat.words()
    assert (told["model"], told["messages"][1]["ended"]) == ("pocket", chat.messages[1]["ended"])


def test_show_undo_clear_system_and_help(chat: Chat, say: Say, vector: SteeringVector) -> None:
    chat.add("[red]v", vector.only([2, 3]))
    chat.add("file", {"layers.3.mlp": iv.add_vector(vector[3], 0.5, at=-1, schedule=iv.decay(4))})
    chat.command("/off file")
    chat.messages = [user("[b]a[/b]"), answered("x"), user("b"), answered("y")]
    screen, aside = say("/show", "/undo", "/undo", "/system [i]Hi[/i]", "/system", "/help")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in screen.splitlines() if "│" in line]
    assert cells[0] == ["[red]v", "layers.3", "add_vector", "1 × the vector", "'all'", "yes"]
    assert cells[1][:4] == ["file", "layers.3.mlp", "add_vector", "0.5 × the vector"]
    assert cells[1][4].startswith("-1, ")
    assert cells[1][5] == "no"
    assert "Taken back: b\nTaken back: [b]a[/b]\n" in screen
    assert "System: [i]Hi[/i]\nThere is no system message now.\n" in screen
    assert chat.messages == []
    assert chat.system == ""
    assert all(command in screen for command in COMMANDS)
    assert "[NAME]" in screen
    assert aside == ""
    chat.messages = [user("a"), answered("x")]
    say("/clear", "/quit", "/nothing after it")
    assert chat.messages == []
    assert chat.over


# -- the terminal ------------------------------------------------------------------------------------------------------


def pieces(*texts: str, error: BaseException | None = None, ended: str = "stop") -> Callable[..., Iterator[Any]]:
    """A model's stream that says these texts, and how it ends."""

    def stream(*_: Any, **__: Any) -> Iterator[Any]:
        for text in texts:
            yield SimpleNamespace(text=text, finish_reason=None)
        if error is not None:
            raise error
        yield SimpleNamespace(text="", finish_reason=ended)

    return stream


def test_text_is_shown_literally(chat: Chat, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.model, "stream", pieces("[red]", "a :smile: \\[b", "]\n", "\x1b[31m", "\tx" * 99))
    screen, aside = say("[bold]hello[/]", "//off")
    assert screen.startswith("[red]a :smile: \\[b]\n␛[31m")
    assert screen.count("x") == 2 * 99
    assert len(screen.splitlines()) == 4  # nothing was wrapped
    assert aside == ""
    assert chat.messages[0]["content"] == "[bold]hello[/]"
    assert chat.messages[1]["content"].endswith("\x1b[31m" + "\tx" * 99)
    assert chat.messages[2]["content"] == "/off"
    assert literal("[a]\x07\x9b").plain == "[a]␇�"


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(chat: Chat, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(chat.model, "stream", pieces("The vil", "la", error=KeyboardInterrupt()))
        screen, aside = say(ASK, "/undo", ASK)
    assert screen == f"The villa\nTaken back: {ASK}\nThe villa\n"
    assert aside == "\n(stopped; Ctrl-C once more leaves)\n" * 2
    assert [(said["content"], said.get("ended")) for said in chat.messages] == [
        (ASK, None),
        ("The villa", "interrupted"),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(chat.model, "stream", pieces("", error=KeyboardInterrupt()))
        say(MORE)
    assert len(chat.messages) == 2  # nothing had been said
    with monkeypatch.context() as patched:  # Ctrl-C while a piece is being shown
        patched.setattr(chat.model, "stream", pieces("Good", "night"))
        reading = chat.answer(MORE)
        next(reading)
        reading.close()  # type: ignore[attr-defined]
    assert [said["content"] for said in chat.messages[2:]] == [MORE, "Good"]
    chat.command("/undo")
    expected = chat.model.generate([user(ASK), answered("The villa"), user(MORE)], max_tokens=FEW)
    assert say(MORE)[0] == f"{expected}\n"
    assert chat.messages[-1]["ended"] in ("stop", "length")


def test_ctrl_c_within_a_models_forward_leaves_it_plain(chat: Chat, say: Say, vector: SteeringVector) -> None:
    calls: list[int] = []

    def interrupted(x: mx.array) -> mx.array:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return x

    before = chat.model.generate([user(ASK)], max_tokens=FEW)
    chat.add("f", {"layers.5": interrupted})  # type: ignore[dict-item]
    say(ASK)
    assert chat.messages[-1]["ended"] == "interrupted"
    assert before.startswith(chat.messages[-1]["content"])
    assert chat.model.generate([user(ASK)], max_tokens=FEW) == before


def test_ctrl_c_twice_at_the_prompt_leaves(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter([KeyboardInterrupt, "/help", KeyboardInterrupt, "", KeyboardInterrupt, KeyboardInterrupt, "/quit"])

    def entered(_: str) -> str:
        one = next(typed)
        if isinstance(one, str):
            return one
        raise one

    monkeypatch.setattr("builtins.input", entered)
    aside = Console(file=io.StringIO())
    talk(chat, Console(file=io.StringIO()), aside)
    assert aside.file.getvalue().count("once more leaves") == 3  # type: ignore[attr-defined]
    assert list(typed) == ["/quit"]


def test_an_answer_that_was_cut_is_said_to_be(chat: Chat, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.model, "stream", pieces("so", " far", ended="length"))
    assert say(ASK) == ("so far\n", f"(ended after --max-tokens {FEW})\n")
    assert chat.messages[-1]["ended"] == "length"


def test_an_error_in_an_answer_takes_the_turn_back(
    chat: Chat, say: Say, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(chat.model, "stream", pieces("so far", error=ZeroDivisionError()))
        assert say(ASK) == ("so far\n", "error: ZeroDivisionError\n")
    assert chat.messages == []
    chat.add("f", vector.at(5, at=iv.after("no such text")))
    assert "no such text" in say(ASK)[1]
    chat.command("/off f")
    say(ASK)
    assert len(chat.messages) == 2


def test_warnings_are_sentences(chat: Chat, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[Any]:
        for _ in range(2):
            warnings.warn("too\nlong [b].", UserWarning, stacklevel=1)
            warnings.warn("not for users", DeprecationWarning, stacklevel=1)
        yield SimpleNamespace(text="so", finish_reason="stop")

    monkeypatch.setattr(chat.model, "stream", stream)
    assert say(ASK) == ("so\n", "note: too long [b].\n")
    assert len(chat.messages) == 2


# -- the command line --------------------------------------------------------------------------------------------------


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["mlxsteer", "chat", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vector", "v.safetensor"), "Nearest: v.safetensors"),
        (("--vector", "sentimant"), "there is no file sentimant; 'user/repo' would ask"),
        (("--vector", "sentimant"), "Nearest contrast sets: sentiment"),
        (("--vector", "v.safetensors", "--layer", "8"), "--layer 8: v.safetensors has no direction there"),
        (("--vector", "v.safetensors", "--vector", "w/v.safetensors"), "two of what steers are called v"),
        (("--layer", "3"), "name one by --steer"),
        (("--interventions", "i.safetensors", "--layer", "3"), "name one by --steer"),
        (("--interventions", "i.safetensors", "--at", "last"), "--at last says how a vector acts"),
        (("--vector", "v.safetensors", "--at", "lst"), "Nearest: last"),
        (("--interventions", "missing.safetensors"), "there is no file missing.safetensors"),
        (("--strength", "2"), "--strength 2 of what?"),
        (("--strength", "nan"), "nan is no finite number"),
        (("--temp", "inf"), "inf is no finite number"),
        (("--temp", "-1"), "--temp"),
        (("--max-tokens", "0"), "--max-tokens"),
        (("--seed", "-1"), "--seed"),
    ],
)
def test_bad_options_end_before_the_model_is_loaded(
    arguments: tuple[str, ...],
    message: str,
    vector: SteeringVector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").mkdir()
    vector.save("v.safetensors")
    vector.save("w/v.safetensors")
    iv.save(vector.at(3), "i.safetensors")

    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(sys.modules["mlxsteer.cli.chat"], "InterpretableModel", loaded)
    assert run(*arguments, monkeypatch=monkeypatch) != 0
    shown = capsys.readouterr()
    assert message in " ".join(shown.err.replace("│", " ").split())
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_the_command_line_says_what_steers_and_that_there_is_no_template(
    pocket: InterpretableModel,
    vector: SteeringVector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vector.save(tmp_path / "v.safetensors")
    iv.save(vector.at(3), tmp_path / "i.safetensors")
    monkeypatch.setattr(sys.modules["mlxsteer.cli.chat"], "InterpretableModel", lambda _: pocket)
    monkeypatch.setattr(pocket.tokenizer._tokenizer, "has_chat_template", False)  # the wrapper passes it on
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/save {tmp_path}/t.json\n"))
    options = ("--vector", f"{tmp_path}/v.safetensors", "--interventions", f"{tmp_path}/i.safetensors", "--layer", "2")
    more = ("--strength", "-0.5", "--max-tokens", "3", "--temp", "0.5", "--seed", "1", "--system", "Be brief.")
    assert run(*options, *more, monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr()
    assert shown.out.replace("\n", "") == f"Saved: {tmp_path}/t.json"
    assert "pocket has no chat template" in shown.err
    assert "v: add_vector at layers.2, strength -0.5 × the vector, tokens 'all'" in shown.err
    assert "i: add_vector at layers.3, strength -0.5 × the vector, tokens 'all'" in shown.err
    told = json.loads((tmp_path / "t.json").read_text())
    assert (told["system"], told["max_tokens"], told["temp"]) == ("Be brief.", 3, 0.5)


def test_piped_lines_in_a_process_of_its_own(
    pocket: InterpretableModel, vector: SteeringVector, tmp_path: Path
) -> None:
    vector.save(tmp_path / "v.safetensors")
    command = [sys.executable, "-W", "error::UserWarning", "-m", "mlxsteer", "chat", "--max-tokens", str(FEW)]
    options = ["--vector", str(tmp_path / "v.safetensors"), "--layer", "5"]
    typed = f"{ASK}\n/nonsense\n/strength 0\n/clear\n{ASK}\n".encode() + b"\xff\n"
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*command, *options], input=typed, capture_output=True, timeout=300, check=False, env=strict)
    shown, remarks = done.stdout.decode().splitlines(), done.stderr.decode()
    assert done.returncode == 0, remarks
    assert shown[0] == pocket.generate([user(ASK)], vector.at(5), max_tokens=FEW)
    assert shown[1] == "v: add_vector at layers.5, strength 0 × the vector, tokens 'all'"
    assert shown[3] == pocket.generate([user(ASK)], max_tokens=FEW)
    assert len(shown) == 5
    assert "error: there is no command /nonsense." in remarks
    assert "Traceback" not in remarks


def test_datasets_come_second_to_files(tmp_path: Path, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sentiment").mkdir()
    vector.save("sentiment/vector.safetensors")
    assert isinstance(opened("sentiment", "pocket"), SteeringVector)
    assert "sentiment" in datasets.available()


def test_a_message_that_is_too_long_is_noted_before_its_answer(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 600 + "\n"))
    both = Console(file=io.StringIO(), width=120)
    talk(chat, both, both)
    told = both.file.getvalue()  # type: ignore[attr-defined]
    assert told.startswith("note: the prompt has ")
    assert told.count("what follows may be nonsense") == 1
    monkeypatch.setattr(sys, "argv", ["mlxsteer", "generate", "word " * 600, "--max-tokens", "1", "--chat"])
    with pytest.raises(SystemExit):
        main()
    aside = capfd.readouterr().err
    assert aside.startswith("note: the prompt has ")
    assert "Token indices" not in aside


def test_a_strength_in_residual_norms_says_so(chat: Chat, vector: SteeringVector, say: Say) -> None:
    chat.add("v", vector, 4, 0.5, unit="residual")
    assert chat.words() == ["v: add_vector at layers.4, strength 0.5 residual norms, tokens 'all'"]
    chat.add("file", {"layers.4": iv.scale(1.1)})
    shown = say("/show")[0]
    assert "0.5 residual norms" in shown
    assert " 1 " in shown
