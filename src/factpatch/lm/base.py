"""`BaseLM`: what a model in hand and one behind an endpoint share, the stack of patches above all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

__all__ = ["Attachable", "BaseLM", "Context"]

T = TypeVar("T")
M = TypeVar("M", bound="BaseLM")


@runtime_checkable
class Attachable(Protocol):
    """Anything that can be laid on a model and taken off again; every patch is one."""

    def attach(self, lm: Any) -> Callable[[], None]:
        """Change what `lm`, a `BaseLM`, says and return what undoes exactly that; on an error, change nothing."""
        ...


@runtime_checkable
class Context(Protocol):
    """Text put before what the model is asked; patches that work through the prompt add one to `LM.contexts`."""

    def before(self, prompts: Sequence[str]) -> list[str]:
        """The text for each prompt, with its own final space; empty for none."""
        ...


class BaseLM(ABC):
    """A language model that answers, and a stack of patches.

    name      what the user called it; for people, never for decisions
    contexts  what patches put before everything that is asked
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.contexts: list[Context] = []
        self._stack: list[tuple[Attachable, Callable[[], None]]] = []
        self._memory: dict[Hashable, Any] = {}

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Tells the base model from all others, patches or not."""

    @property
    def shape(self) -> tuple[int, int] | None:
        """Number of blocks and hidden size, where they are known."""
        return None

    @abstractmethod
    def answer(self, prompts: Sequence[str], *, chat: bool = False, max_new: int = 64) -> list[str]:
        """What the model says by itself: greedy, until it ends, a new line or the end of a sentence."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name, fingerprint and what else is known, JSON-ready."""

    def before(self, prompts: Sequence[str]) -> dict[str, str]:
        """By prompt, the text that the patches' contexts put before it."""
        wanted = list(dict.fromkeys(prompts))
        found = dict.fromkeys(wanted, "")
        for context in self.contexts:
            for prompt, text in zip(wanted, context.before(wanted), strict=True):
                found[prompt] += text
        return found

    def ask(self, prompt: str, *, chat: bool = False) -> str:
        """The model's own answer to one prompt."""
        return self.answer([prompt], chat=chat)[0]

    @property
    def patches(self) -> tuple[Attachable, ...]:
        """The patches that lie on the model, first to last."""
        return tuple(patch for patch, _ in self._stack)

    def apply(self, patch: Attachable) -> None:
        """Lay a patch on top. Raises WrongBase if it was made for another model; then nothing changes."""
        _ = self.fingerprint
        self._stack.append((patch, patch.attach(self)))

    def remove(self, patch: Attachable) -> None:
        """Take a patch off, wherever in the stack it lies; the model is bit for bit as if it had never been there.

        Raises ValueError if it does not lie on the model.
        """
        index = max((i for i, (p, _) in enumerate(self._stack) if p is patch), default=None)
        if index is None:
            raise ValueError("this patch does not lie on the model")
        above = [p for p, _ in self._stack[index + 1 :]]
        while len(self._stack) > index:
            self._stack.pop()[1]()
        for later in above:
            self.apply(later)

    @contextmanager
    def patched(self: M, *patches: Attachable) -> Iterator[M]:
        """Lay patches on in order for the length of a `with`, and take them off whatever happens inside."""
        laid: list[Attachable] = []
        try:
            for patch in patches:
                self.apply(patch)
                laid.append(patch)
            yield self
        finally:
            for patch in reversed(laid):
                if any(p is patch for p in self.patches):  # it may have been taken off inside
                    self.remove(patch)

    @contextmanager
    def unpatched(self: M) -> Iterator[M]:
        """The base model for the length of a `with`; afterwards the same patches lie on it again."""
        with self.without(*self.patches):
            yield self

    @contextmanager
    def without(self: M, *patches: Attachable) -> Iterator[M]:
        """These patches off for the length of a `with`; afterwards the same stack lies on the model again."""
        stack = self.patches
        for patch in reversed(patches):  # from the top, so that little has to be lifted and laid on again
            self.remove(patch)
        try:
            yield self
        finally:
            for patch in reversed(self.patches):
                self.remove(patch)
            for patch in stack:
                self.apply(patch)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What depends on the base model alone, computed once while it is in hand; `key` holds all else it depends on."""
        if key not in self._memory:
            with self.unpatched():
                self._memory[key] = compute()
        found: T = self._memory[key]
        return found
