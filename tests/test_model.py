"""Loading, tokens, chat, the tour, familiar code, and one clear sentence for whatever is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
import tiny

import mlxsteer as ms
from mlxsteer import ContextLengthWarning, InterpretableModel, UnsupportedModel
from mlxsteer import interventions as iv
from mlxsteer import pocket as pocket_room
from mlxsteer.model import POCKET


def test_the_pocket_model_loads_in_plain_mlx_lm_too(pocket: InterpretableModel) -> None:
    model, tokenizer, *_ = mlx_lm.load(str(POCKET))
    tokens = mx.array([pocket.encode("The food was")])
    assert mx.array_equal(model(tokens), pocket.model(tokens))
    assert tokenizer.encode("The food was") == pocket.encode("The food was")
    assert "4-bit" in repr(pocket)
    assert "8 layers, hidden size 256" in repr(pocket)


def test_a_local_folder_a_path_and_a_module_are_the_same_model(pocket: InterpretableModel, tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    shutil.copytree(POCKET, folder)
    tokens = mx.array([pocket.encode("The food was")])
    for source in (str(folder), folder):
        assert mx.array_equal(InterpretableModel(source).model(tokens), pocket.model(tokens))
    wrapped = InterpretableModel(pocket.model, tokenizer=pocket.tokenizer._tokenizer)
    assert wrapped.generate("The food was", max_tokens=4).tokens == pocket.generate("The food was", max_tokens=4).tokens


def test_what_can_t_be_loaded_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder ./nowhere"):
        InterpretableModel("./nowhere")
    with pytest.raises(FileNotFoundError, match="'pocket', a local folder, or a Hugging Face name"):
        InterpretableModel("pokcet")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        InterpretableModel(tmp_path)
    with pytest.raises(TypeError, match="not int"):
        InterpretableModel(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="revision= goes to mlx_lm.load"):
        InterpretableModel(tiny.build("llama"), revision="main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="could not be had from the Hugging Face Hub") as caught:
        InterpretableModel("nobody/nothing-4bit")
    assert caught.value.__cause__ is not None


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no list of blocks"):
        InterpretableModel(nn.Linear(2, 2))

    class Odd(nn.Module):
        model_type = "gemma3n"

    with pytest.raises(UnsupportedModel, match="four streams"):
        InterpretableModel(Odd())


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_bos_is_never_added_twice(pocket: InterpretableModel) -> None:
    bos = pocket.tokenizer.bos_token_id
    tokens = pocket.encode("The food was")
    assert tokens[0] == bos
    assert tokens.count(bos) == 1
    assert pocket.encode("<s>The food was") == tokens
    assert pocket.encode(tokens) == tokens
    assert pocket.encode(mx.array(tokens)) == tokens
    assert pocket.decode(tokens) == "<s>The food was"
    assert "".join(pocket.str_tokens("The food was")) == "<s>The food was"
    assert pocket.token_to_str(bos) == "<s>"


def test_chat_messages_are_accepted_wherever_a_prompt_is(pocket: InterpretableModel) -> None:
    chat = [{"role": "user", "content": "How was the villa?"}]
    expected = pocket.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert pocket.encode(chat) == list(expected)
    with pocket.trace(chat) as trace:
        pass
    assert trace.lengths == [len(expected)]
    text = pocket.generate(chat, max_tokens=8)
    assert text == mlx_lm.generate(pocket.model, pocket.tokenizer, expected, max_tokens=8)
    assert "".join(p.text for p in pocket.stream(chat, max_tokens=8)) == text
    assert pocket.generate([chat, chat], max_tokens=8) == [text, text]
    begun = [*chat, {"role": "assistant", "content": "The villa was"}]
    assert pocket.decode(pocket.encode(begun)).endswith("The villa was")
    steer = {"layers.5": iv.add_vector(mx.ones((256,)), at=iv.after("<|assistant|>"))}
    made = pocket.generate(chat, steer, max_tokens=3)
    assert made.touched == [False] * len(expected) + [True] * len(made.tokens)
    with pytest.raises(ValueError, match="'role' and 'content'"):
        pocket.encode([{"role": "user"}])


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], mx.zeros((0,), dtype=mx.int32)])
def test_an_empty_prompt_is_refused(pocket: InterpretableModel, prompt: Any) -> None:
    for verb in (pocket.trace, pocket.generate, pocket.stream):
        with pytest.raises(ValueError, match="empty"):
            verb(prompt)


def test_prompts_that_are_none_are_refused(pocket: InterpretableModel) -> None:
    with pytest.raises(TypeError, match="a string, a list of token ids"):
        pocket.trace([1.5, 2.5])
    with pytest.raises(ValueError, match="negative"):
        pocket.trace([1, -2])
    with pytest.raises(ValueError, match="4096"):
        pocket.trace([1, 5000])
    bare = InterpretableModel(tiny.build("llama"))
    with pytest.raises(ValueError, match="without one; give token ids"):
        bare.trace("text")
    with pytest.raises(ValueError, match="tokenizer"):
        bare.generate([1, 2])


def test_an_edit_without_interventions_is_a_block(pocket: InterpretableModel) -> None:
    with pytest.raises(AttributeError, match=r"a block and has no 'generate': write `with model.edit\(\) as edited:`"):
        pocket.edit().generate("The food was")


def test_a_prompt_longer_than_the_context_is_warned_of(pocket: InterpretableModel) -> None:
    with pytest.warns(ContextLengthWarning, match="513 tokens, the model was made for 512"):
        pocket.trace([7] * 513)
    wrapped = InterpretableModel(tiny.build("gpt2"))
    with pytest.raises(ValueError, match="600 tokens, and the model has 512 learned positions"):
        wrapped.trace([7] * 600)


# -- code that people have -------------------------------------------------------------------------------------------


def test_a_program_written_for_mlxterp_runs(pocket: InterpretableModel) -> None:
    f, g = iv.scale(0.9), iv.add_vector(mx.ones((256,)))
    model = pocket
    middle = len(model.layers) // 2
    vectors = []
    for text in ("The food was delicious.", "The food was awful."):
        with model.trace(text) as trace:
            pass
        key = next(k for k in trace.activations if k.endswith(f"layers.{middle}"))
        vectors.append(trace.activations[key][0, -1])
    v = vectors[0] - vectors[1]
    with model.trace("The food was", interventions={f"layers.{middle}": iv.add_vector(3.0 * v)}):
        output = model.output.save()
    best = int(mx.argmax(output[0, -1]).item())
    assert isinstance(model.token_to_str(best), str)
    with model.trace("The food was") as trace:
        inner = model.layers[middle].mlp.output.save()
    assert mx.array_equal(inner, trace.activations[f"layers.{middle}.mlp"])
    assert mx.array_equal(trace.activations[f"model.model.layers.{middle}"], trace.activations[f"layers.{middle}"])
    assert trace.activations[f"layers.{middle}.self_attn.q_proj"].shape == (1, 4, 256)
    with model.trace("The food was", interventions={"layers.3": iv.compose().add(f).add(g).build()}):
        composed = model.output.save()
    with model.trace("The food was", interventions={"layers.3": [f, g]}):
        assert mx.array_equal(model.output, composed)


def test_the_package_says_its_version_and_what_it_exports() -> None:
    assert set(ms.__all__) <= set(dir(ms))
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{ms.__version__}"' in pyproject
    assert json.loads((POCKET / "config.json").read_text())["model_type"] == "llama"


def test_a_changed_file_of_the_bundled_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "model"
    shutil.copytree(POCKET, copy)
    monkeypatch.setattr(pocket_room, "FOLDER", copy)
    assert pocket_room.verified() == copy
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(OSError, match=r"config\.json is damaged or was changed"):
        ms.InterpretableModel("pocket")
    (copy / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json is missing"):
        ms.InterpretableModel("pocket")
