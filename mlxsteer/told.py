"""What callers tell of the prompts that other code's generation runs, held against what it feeds to the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from mlxsteer.positions import PositionError, Prompt


class ToldPrompts:
    """The prompts that other code's generation will run, as its caller tells them.

    Args:
        prompts: for each row its token ids, or their number.
        decode: token ids to text.
        repeat: one prompt, for every row that begins; else row i begins with prompt i.
    """

    def __init__(
        self, prompts: Sequence[int | list[int]], decode: Callable[[list[int]], str] | None, *, repeat: bool
    ) -> None:
        self._prompts, self._decode, self._repeat = list(prompts), decode, repeat
        self._waiting = list(range(len(self._prompts)))

    def next(
        self,
        seen: int,
        earlier: Sequence[int] | None,
        fed: Sequence[int] | None,
        stage: str | None = None,
        padded: bool = False,
    ) -> Prompt:
        """The prompt of a row that begins: the first one left that begins with what the row is fed.

        mlx-lm doesn't run the rows of a batch in the order given: of those that it takes on together, prompts of one
        token come first.

        Args:
            seen: how many tokens its cache holds already.
            earlier: which, where they are known.
            fed: the tokens of its first forward, where they are known.
            stage: what mlx-lm is doing, ``"prompt"`` (all of a prompt but its last token) or ``"step"``; None in any
                other loop.
            padded: zeros follow all of its tokens but the last, which comes later.

        Raises:
            ValueError: more rows begin than there are prompts, or one begins as none of them does.
        """
        left = [0] if self._repeat else self._waiting
        if not left:
            raise ValueError(f"prompt_tokens= holds {len(self._prompts)} prompts, and one more row has begun.")
        near = [i for i in left if _begins(self._prompts[i], fed, padded)]
        if stage == "prompt" and fed is not None:
            near = [i for i in near if self._length(i) > (1 if padded else len(fed))]
        if stage == "step":
            near = [i for i in near if self._length(i) == 1]
        if not near:
            raise ValueError(_unlike(fed))
        index = min(near, key=lambda i: fed is not None and self._length(i) < len(fed))
        if not self._repeat:
            self._waiting.remove(index)
        return self.row(index, seen, earlier)

    def _length(self, index: int) -> int:
        told = self._prompts[index]
        return told if isinstance(told, int) else len(told)

    def goes_on(self, prompt: Prompt, seen: int, fed: Sequence[int] | None, stage: str | None) -> bool:
        """Whether a row whose prompt was told before is still at it: the same is told again, and not fed anew.

        Args:
            prompt: the row's prompt.
            seen: how many of its tokens the model has seen.
            fed: the tokens of the forward that is about to run, where they are known.
            stage: as in `next`.

        Raises:
            PositionError: nobody can tell.
        """
        told: Any = prompt.told
        if prompt.length is None or told not in self._prompts:
            return False
        if seen < prompt.length:
            return True
        if stage is not None:
            return stage == "step" and (isinstance(told, int) or len(told) > 1 or fed != told)
        if isinstance(told, int) or fed is None:
            return fed is None or len(fed) == 1
        if len(fed) == 1 and fed[0] == told[0]:
            raise PositionError(
                f"token {fed[0]} may begin the prompt that is told anew, or go on from what was generated: keep one "
                "steering for the whole text, or enter the same one again, `steering = model.steer(...)`."
            )
        return not _begins(told, fed)

    def begins_anew(self, fed: Sequence[int] | None, stage: str | None) -> bool:
        """Whether a forward under one and the same steering, behind a prompt that was told, begins the next turn's."""
        if stage is not None:
            return stage == "prompt"
        several = fed is not None and len(fed) > 1
        return several and any(not isinstance(told, int) and _begins(told, fed) for told in self._prompts)

    @staticmethod
    def check(prompt: Prompt, seen: int, fed: Sequence[int] | None, stage: str | None) -> None:
        """Hold what is fed against what was told of a prompt.

        Raises:
            ValueError: they differ, in tokens or in number.
        """
        if prompt.told is None or prompt.length is None or fed is None or seen >= prompt.length:
            return
        count = prompt.told if isinstance(prompt.told, int) else len(prompt.told)
        done = seen - (prompt.length - count)
        if (stage == "step" and done < count - 1) or (stage == "prompt" and done + len(fed) >= count):
            runs = "more" if stage == "prompt" else done + 1
            raise ValueError(
                f"prompt_tokens= tells of {count} tokens, and the prompt that runs has {runs}: tell the ids that will "
                "run, special tokens included."
            )
        if not isinstance(prompt.told, int) and not _begins(prompt.told[max(done, 0) :], fed):
            raise ValueError(_unlike(fed))

    def row(self, index: int, seen: int = 0, earlier: Sequence[int] | None = None) -> Prompt:
        """The prompt of row `index`."""
        told = self._prompts[index]
        if isinstance(told, int):
            return Prompt(seen + told, None, self._decode, told=told)
        known = [] if not seen else earlier
        return Prompt(seen + len(told), None if known is None else [*known, *told], self._decode, told=told)

    def alone(self, index: int, ids: Sequence[int] | None) -> Prompt:
        """The prompt of row `index` of a forward without a cache, which runs it whole.

        Raises:
            ValueError: there is none, or the row doesn't begin with it.
        """
        if not self._repeat and index >= len(self._prompts):
            raise ValueError(f"prompt_tokens= holds {len(self._prompts)} prompts, and there is one more row.")
        index = 0 if self._repeat else index
        if ids is not None and (self._length(index) > len(ids) or not _begins(self._prompts[index], ids)):
            raise ValueError(_unlike(ids))
        return self.row(index)


def _unlike(fed: Sequence[int] | None) -> str:
    shown = ", ".join(map(str, (fed or ())[:8])) + (", …" if len(fed or ()) > 8 else "")
    return (
        f"the model is fed the tokens [{shown}], and no prompt in prompt_tokens= that is still to come goes so: tell "
        "the ids that will run, special tokens included."
    )


def _begins(told: int | list[int], fed: Sequence[int] | None, padded: bool = False) -> bool:
    """Whether a prompt and what is fed are the same as far as both go."""
    if padded and fed is not None and not isinstance(told, int):
        end = len(told) - 1
        return list(fed[:end]) == told[:-1][: len(fed)] and not any(fed[end:])
    return fed is None or isinstance(told, int) or all(a == b for a, b in zip(told, fed, strict=False))


def stage() -> str | None:
    """What mlx-lm's generators are doing with the model that is running.

    Returns:
        ``"prompt"`` where they feed a prompt, all of it but its last token; ``"step"`` where they feed the token that
        the next one follows; None where it isn't one of them that called the model.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "mlxsteer":
        frame = frame.f_back
    found = None
    while frame is not None and frame.f_globals.get("__name__") == "mlx_lm.generate":
        if frame.f_code.co_name == "_step":
            return "step"
        found, frame = "prompt", frame.f_back
    return found
