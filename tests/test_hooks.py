"""Nothing is left behind in a model, whatever happens; parameters, copies and other threads see the plain model."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest
import tiny
from mlx.utils import tree_flatten

from mlxsteer import InterpretableModel, NeverFired, UnsupportedModel
from mlxsteer import interventions as iv

PROMPT = [7, 31, 52, 18, 77]
TOKENS = mx.array([PROMPT])


@pytest.fixture
def model() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"))


@pytest.fixture
def untouched(model: InterpretableModel) -> Iterator[None]:
    """Whatever the test does: afterwards every class is its own and the logits are the bare model's."""
    before, logits = tiny.classes(model.model), model.model(TOKENS)
    mx.eval(logits)
    yield
    assert tiny.classes(model.model) == before
    assert mx.array_equal(model.model(TOKENS), logits)


def steer(strength: float = 2.0) -> dict[str, Any]:
    mx.random.seed(3)
    return {"layers.1": iv.add_vector(mx.random.normal((64,)), strength), "layers.2.mlp": iv.scale(0.5)}


def interrupted(x: mx.array) -> mx.array:
    raise KeyboardInterrupt


def failing(x: mx.array) -> mx.array:
    raise ZeroDivisionError


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("function", "error"), [(interrupted, KeyboardInterrupt), (failing, ZeroDivisionError)])
def test_an_error_in_an_intervention_leaves_nothing(
    model: InterpretableModel, function: Callable[[mx.array], mx.array], error: type[BaseException]
) -> None:
    with pytest.raises(error), model.trace(PROMPT, interventions={"layers.2.mlp": function}):
        pass
    with pytest.raises(error), model.steer({"layers.2.mlp": function}):
        model.model(TOKENS)
    with pytest.raises(error), model.steer(steer()), model.record("layers.*"):
        model.model(TOKENS)
        model.model(TOKENS)
        function(TOKENS)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_models_own_code_leaves_nothing(
    model: InterpretableModel, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = type(model.model.layers[2].self_attn)

    def raises(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(base, "__call__", raises)
        with pytest.raises(error), model.trace(PROMPT, interventions=steer()):
            pass
        with pytest.raises(error), model.steer(steer()):
            model.model(TOKENS)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_body_leaves_nothing(model: InterpretableModel, error: type[BaseException]) -> None:
    with pytest.raises(error), model.trace(PROMPT, interventions=steer()):
        model.layers[1].output[:] = 0.0
        raise error
    with pytest.raises(error), model.steer(steer()):
        raise error
    with pytest.raises(error), model.edit() as edited:
        edited.layers[1].output[:] = 0.0
        raise error


@pytest.mark.usefixtures("untouched")
def test_an_interrupt_while_hooks_are_put_on_leaves_nothing(
    model: InterpretableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxsteer import hooks

    original, count = hooks._hooked_class, 0

    def third_time_interrupted(cls: type) -> type:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return original(cls)

    with monkeypatch.context() as patch:
        patch.setattr(hooks, "_hooked_class", third_time_interrupted)
        with pytest.raises(KeyboardInterrupt), model.steer(steer()):
            pass
    assert count == 3


@pytest.mark.usefixtures("untouched")
def test_contexts_nest_and_their_effects_add_up(model: InterpretableModel) -> None:
    v, w = mx.ones((64,)), -2 * mx.ones((64,))
    with model.steer({"layers.1": iv.add_vector(v)}):
        one = model.model(TOKENS)
        with model.steer({"layers.1": iv.add_vector(w)}):
            both = model.model(TOKENS)
        again = model.model(TOKENS)
    assert mx.array_equal(one, again)
    with model.trace(PROMPT, interventions={"layers.1": [iv.add_vector(v), iv.add_vector(w)]}):
        assert mx.array_equal(model.output, both)


@pytest.mark.usefixtures("untouched")
def test_contexts_may_end_out_of_order(model: InterpretableModel) -> None:
    bare = model.model(TOKENS)
    outer, inner = model.steer(steer(1.0)), model.steer(steer(-3.0))
    outer.__enter__()
    first = model.model(TOKENS)
    inner.__enter__()
    model.model(TOKENS)
    outer.__exit__(None, None, None)
    second = model.model(TOKENS)
    inner.__exit__(None, None, None)
    assert mx.array_equal(model.model(TOKENS), bare)
    with model.trace(PROMPT, interventions=steer(1.0)):
        assert mx.array_equal(model.output, first)
    with model.trace(PROMPT, interventions=steer(-3.0)):
        assert mx.array_equal(model.output, second)


@pytest.mark.usefixtures("untouched")
def test_a_trace_inside_a_steering_sees_it_also_after_both_are_over(model: InterpretableModel) -> None:
    with model.steer({"layers.1": iv.add_vector(mx.ones((64,)))}), model.trace(PROMPT) as inside:
        pass
    with model.trace(PROMPT, interventions={"layers.1": iv.add_vector(mx.ones((64,)))}) as alone:
        pass
    for key in ("layers.1", "layers.1.mlp", "layers.3.attn", "logits"):
        assert mx.array_equal(inside.activations[key], alone.activations[key])


@pytest.mark.usefixtures("untouched")
def test_enable_and_disable(model: InterpretableModel) -> None:
    bare = model.model(TOKENS)
    steering = model.steer(mood=steer()).enable()
    steered = model.model(TOKENS)
    assert "in force" in repr(steering)
    assert not mx.array_equal(steered, bare)
    with pytest.raises(RuntimeError, match="in force already"), steering:
        pass
    steering["mood"].strength = 0.0
    assert mx.array_equal(model.model(TOKENS), bare)
    with pytest.raises(KeyError, match="no steering called 'moo'; there is mood"):
        steering["moo"]
    steering.strength = 1.0
    assert mx.array_equal(model.model(TOKENS), steered)
    steering.disable()
    steering.disable()
    assert "not in force" in repr(steering)


def test_named_steerings_act_in_the_order_given(model: InterpretableModel) -> None:
    add, scale = {"layers.1": iv.add_vector(mx.ones((64,)))}, {"layers.1": iv.scale(3.0)}
    results = []
    for named in ({"a": add, "b": scale}, {"b": scale, "a": add}):
        with model.steer(**named) as steering:
            results.append(model.model(TOKENS))
            assert steering.strength == 1.0
            steering["a"].strength = 0.5
            assert steering.strength == {"a": 0.5, "b": 1.0}
    with model.trace(PROMPT, interventions={"layers.1": [add["layers.1"], scale["layers.1"]]}):
        assert mx.array_equal(model.output, results[0])
    assert not mx.array_equal(*results)


@pytest.mark.usefixtures("untouched")
def test_another_thread_sees_the_plain_model(model: InterpretableModel) -> None:
    bare = model.model(TOKENS)
    mx.eval(bare)
    seen: dict[str, bool] = {}
    go, done = threading.Event(), threading.Event()

    def other() -> None:
        go.wait()
        tokens = mx.array([PROMPT])
        seen["plain"] = bool(mx.array_equal(model.model(tokens), mx.array(expected)).item())
        with model.steer(steer(-1.0)):
            seen["own steering"] = not bool(mx.array_equal(model.model(tokens), mx.array(expected)).item())
        done.set()
        mx.clear_streams()

    expected = bare.tolist()
    thread = threading.Thread(target=other)
    thread.start()
    with model.steer(steer()):
        steered = model.model(TOKENS)
        go.set()
        done.wait()
        assert mx.array_equal(model.model(TOKENS), steered)
    thread.join()
    assert seen == {"plain": True, "own steering": True}


def test_two_models_in_two_threads_don_t_disturb_each_other() -> None:
    models = [InterpretableModel(tiny.build("llama", seed=seed)) for seed in (1, 2)]
    alone = []
    for model in models:
        with model.trace(PROMPT, interventions=steer()):
            alone.append(model.output.tolist())
    results: dict[int, list[bool]] = {0: [], 1: []}

    def work(number: int) -> None:
        constants = steer()  # made by the thread that uses them, or evaluated: both work
        for _ in range(5):
            with models[number].trace(PROMPT, interventions=constants):
                same = mx.array_equal(models[number].output, mx.array(alone[number]))
                results[number].append(bool(same.item()))
        mx.clear_streams()

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: [True] * 5, 1: [True] * 5}


def test_constants_made_in_one_thread_serve_in_another(model: InterpretableModel) -> None:
    made = steer()
    with model.trace(PROMPT, interventions=made):
        expected = model.output.tolist()
    seen: list[bool] = []

    def work() -> None:
        with model.trace(PROMPT, interventions=made):
            seen.append(bool(mx.array_equal(model.output, mx.array(expected)).item()))
        mx.clear_streams()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


@pytest.mark.usefixtures("untouched")
def test_parameters_and_saving_see_the_whole_model_in_an_open_context(model: InterpretableModel, tmp_path: Any) -> None:
    whole = dict(tree_flatten(model.model.parameters()))
    with model.steer(steer()), model.record("layers.*"), model.trace(PROMPT, interventions={"embed": iv.scale(2.0)}):
        assert tiny.same_parameters(model.model, whole)
        model.model.save_weights(str(tmp_path / "weights.safetensors"))
        assert isinstance(model.model.layers[1], type(tiny.build("llama").layers[0]))
        assert [name for name, _ in model.model.named_modules()] == [
            name for name, _ in tiny.build("llama").named_modules()
        ]
        model.model(TOKENS)
    saved = mx.load(str(tmp_path / "weights.safetensors"))
    assert saved.keys() == whole.keys()
    assert all(mx.array_equal(saved[k], whole[k]) for k in whole)


@pytest.mark.usefixtures("untouched")
def test_a_copy_made_in_an_open_context_is_clean(model: InterpretableModel) -> None:
    bare = model.model(TOKENS)
    plain = tiny.classes(model.model)
    with model.steer(steer()):
        copies = [copy.deepcopy(model.model), pickle.loads(pickle.dumps(model.model))]
        shallow = copy.copy(model.model)
        model.model(TOKENS)
        for twin in copies:
            assert tiny.classes(twin) == plain
            assert mx.array_equal(twin(TOKENS), bare)
        assert type(shallow) is plain[""]


def test_a_model_compiled_beforehand_is_noticed(model: InterpretableModel) -> None:
    compiled = mx.compile(lambda tokens: 1.0 * model.model(tokens))
    mx.eval(compiled(TOKENS))
    with pytest.raises(NeverFired, match="compiled"), model.steer(steer()):
        compiled(TOKENS)
    with pytest.raises(NeverFired, match="compiled"), model.record("layers.1"):
        compiled(TOKENS)


def test_a_steering_under_which_nothing_ran_is_an_error(model: InterpretableModel) -> None:
    with pytest.raises(NeverFired, match="no forward"), model.steer(steer()):
        pass


# -- persistent edits ------------------------------------------------------------------------------------------------


def test_an_edited_model_shares_all_weights_and_leaves_the_original_alone(model: InterpretableModel) -> None:
    bare = model.model(TOKENS)
    before = tiny.classes(model.model)
    edited = model.edit(steer())
    mine, shared = (dict(tree_flatten(m.model.parameters())) for m in (model, edited))
    assert mine.keys() == shared.keys()
    assert all(mine[k] is shared[k] for k in mine)
    assert tiny.classes(model.model) == before
    assert mx.array_equal(model.model(TOKENS), bare)
    with model.trace(PROMPT, interventions=steer()):
        assert mx.array_equal(edited.model(TOKENS), model.output)
    with edited.trace(PROMPT) as trace, model.trace(PROMPT, interventions=steer()):
        assert mx.array_equal(trace.output, model.output)
        assert mx.array_equal(trace.activations["layers.2.mlp"], _read(model, "layers.2.mlp"))


def _read(model: InterpretableModel, key: str) -> mx.array:
    with model.trace(PROMPT, interventions=steer()) as trace:
        return trace.activations[key].save()


def test_a_part_of_an_edited_model_is_not_run_by_itself(model: InterpretableModel) -> None:
    """Its edit would be lost: nobody would know which tokens it sees."""
    edited = model.edit({"layers.1": iv.scale(2.0)})
    with pytest.raises(RuntimeError, match="layers.1 is steered and was called by itself"):
        edited.model.model(mx.array([[5, 6]]))
    with pytest.raises(UnsupportedModel, match="is a part of an edited model"):
        InterpretableModel(edited.model.model)
    InterpretableModel(model.model.model)
    model.model.model(mx.array([[5, 6]]))
    edited.model(mx.array([[5, 6]]))


def test_edits_nest(model: InterpretableModel) -> None:
    first = {"layers.1": iv.add_vector(mx.ones((64,)))}
    second = {"layers.1": iv.scale(2.0), "layers.3": iv.scale(0.5)}
    twice = model.edit(first).edit(second)
    with model.trace(PROMPT, interventions={"layers.1": [first["layers.1"], second["layers.1"]],
                                            "layers.3": second["layers.3"]}):  # fmt: skip
        assert mx.array_equal(twice.model(TOKENS), model.output)
    with twice.steer({"layers.3": iv.scale(2.0)}), model.trace(PROMPT, interventions={
        "layers.1": [first["layers.1"], second["layers.1"]]}):  # fmt: skip
        assert mx.allclose(twice.model(TOKENS), model.output, atol=1e-6)


def test_inline_edits_written_once_hold_for_every_forward(model: InterpretableModel) -> None:
    v = mx.ones((64,))
    with model.edit() as edited:
        edited.layers[1].output[:, -1] += 2.0 * v
        edited.layers[2].mlp.output *= 0.5
        edited.layers[3].output[:, :, :8] = 0.0

    def zero(h: mx.array) -> mx.array:
        return mx.where(mx.arange(64) < 8, 0.0, h)

    same = {"layers.1": iv.add_vector(v, 2.0, at="last"), "layers.2.mlp": iv.scale(0.5), "layers.3": zero}
    with model.trace(PROMPT, interventions=same):
        assert mx.array_equal(edited.model(TOKENS), model.output)
    assert not mx.array_equal(edited.model(TOKENS), model.model(TOKENS))


def test_an_edit_block_refuses_what_it_can_t_record(model: InterpretableModel) -> None:
    with pytest.raises(TypeError, match="give a function"), model.edit() as edited:
        edited.layers[1].output[:] = edited.layers[1].output * 2
    with pytest.raises(ValueError, match="wrote nothing"), model.edit():
        pass
    with pytest.raises(Exception, match="never put back"), model.edit() as edited:
        part = edited.layers[1].output[:, -1]
        part += 1.0
    with pytest.raises(IndexError, match="every row of every batch"), model.edit() as edited:
        edited.layers[1].output[0, -1] += 1.0


def test_an_edited_model_is_freed(model: InterpretableModel) -> None:
    edited = model.edit(steer())
    mx.eval(edited.model(TOKENS))
    ghost = weakref.ref(edited.model)
    del edited
    gc.collect()
    assert ghost() is None


def test_an_edited_model_is_steered_in_every_thread(model: InterpretableModel) -> None:
    edited = model.edit(steer())
    expected = edited.model(TOKENS).tolist()
    seen: list[bool] = []

    def work() -> None:
        seen.append(bool(mx.array_equal(edited.model(mx.array([PROMPT])), mx.array(expected)).item()))
        mx.clear_streams()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
