"""Routes: a steering chosen by the prompt's text, before anything runs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class route:  # noqa: N801 - reads as a word: interventions=route({...}, by=topic_of)
    """A steering for each kind of prompt: taken wherever `generate` and `stream` take interventions, row by row.

    Args:
        choices: name → key dict of interventions (or None for none).
        by: a function from the prompt's text to one of the names, or to None. Without one the names are regular
            expressions, and the first that is found in the text is taken. A prompt given as a text is that text; token
            ids and chats are decoded, without the special tokens in front, so that ``"^The"`` finds a first word.
        otherwise: the key dict of prompts for which there is no name; None leaves them plain.

    Raises:
        TypeError: the choices are no dict, or `by` is no function.
        ValueError: there are none, or a name is no regular expression.
    """

    choices: Mapping[str, Mapping[str, Any] | None]
    by: Callable[[str], str | None] | None = None
    otherwise: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.choices, Mapping):
            raise TypeError(f"route: choices are a dict from names to key dicts, not {type(self.choices).__name__}.")
        if not self.choices:
            raise ValueError("route: there is nothing to choose from: give at least one name with its key dict.")
        if self.by is not None and not callable(self.by):
            raise TypeError(f"route: by is a function from a text to a name, not {self.by!r}.")
        for name, value in [*self.choices.items(), ("otherwise", self.otherwise)]:
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"route: {name!r} is a key dict such as {{'layers.5': add_vector(v)}}, not {value!r}.")
        if self.by is None:
            for name in self.choices:
                try:
                    re.compile(name)
                except (re.error, TypeError) as error:
                    raise ValueError(f"route: {name!r} is no regular expression ({error}); or give by=.") from error

    def of(self, text: str) -> Mapping[str, Any] | None:
        """The interventions for a prompt.

        Raises:
            ValueError: `by` gave a name that there is not.
        """
        if self.by is None:
            name = next((pattern for pattern in self.choices if re.search(pattern, text)), None)
        else:
            name = self.by(text)
        if name is None:
            return self.otherwise
        try:
            return self.choices[name]
        except (KeyError, TypeError):  # a list, say, is no name at all
            near = difflib.get_close_matches(str(name), self.choices, n=3) or list(self.choices)
            raise ValueError(
                f"route: by gives one of the names, or None; it gave {name!r}, and there is "
                f"{', '.join(map(repr, near))}."
            ) from None

    def branches(self) -> list[Mapping[str, Any]]:
        """Every key dict that a prompt may be given."""
        return [given for given in (*self.choices.values(), self.otherwise) if given is not None]
