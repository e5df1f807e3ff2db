"""How names of vLLM are changed: every change is prepared first, then all are made or none.

A change that does not fit the installed vLLM says so while it is prepared, when nothing has been
touched yet.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

_MARK = "_kvpca"


class Misfit(Exception):
    """A name that we change or build on is missing in the installed vLLM, or is another thing."""


@dataclass(frozen=True)
class Step:
    """A prepared change: neither way can fail for reasons that are known beforehand."""

    make: Callable[[], None]
    undo: Callable[[], None]


class Change(Protocol):
    """One change of vLLM."""

    @property
    def target(self) -> str:
        """What is changed, as "module:Class.name" or "module:name"."""

    def is_made(self) -> bool:
        """Whether it is in effect; False if vLLM lacks the name."""

    def prepare(self) -> Step:
        """Everything up to the change itself.

        Raises:
            Misfit: the installed vLLM has no such name, or with another signature.
        """


@dataclass(frozen=True)
class Patch:
    """Changes that belong together, with what a reader asks of each.

    Attributes:
        title: what it is for, in a few words.
        why: what vLLM offers no hook for.
        how: what the changed names do.
        waits_for: what vLLM would have to offer for the patch to go.
        fails: what happens if it cannot be made, or an error arises in it.
    """

    title: str
    why: str
    how: str
    waits_for: str
    fails: str
    changes: tuple[Change, ...]


def owner_of(target: str) -> tuple[Any, str]:
    """The class and the name that "module:Class.name" stands for; the module for "module:name".

    Raises:
        Misfit: there is no such class or module.
    """
    module, _, path = target.partition(":")
    owner, _, name = path.rpartition(".")
    try:
        found = import_module(module)
        return getattr(found, owner) if owner else found, name
    except Exception as error:  # an import of another vLLM may fail in any way
        raise Misfit(f"vLLM has no {owner} in {module}") from error


@dataclass(frozen=True)
class Wrap:
    """Replaces a method or function by `wrapper(original)`; class and static methods stay such.

    Attributes:
        takes: the first parameters of the original, which the wrapper relies on.
    """

    target: str
    wrapper: Callable[[Any], Any]
    takes: tuple[str, ...]

    def is_made(self) -> bool:
        try:
            owner, name = owner_of(self.target)
        except Misfit:
            return False
        return self._made_in(owner.__dict__.get(name))

    def _made_in(self, found: Any) -> bool:
        return getattr(getattr(found, "__func__", found), _MARK, None) is self.wrapper

    def prepare(self) -> Step:
        owner, name = owner_of(self.target)
        found = owner.__dict__.get(name)
        function = getattr(found, "__func__", found)
        if not callable(function):
            raise Misfit(f"vLLM's {owner.__name__} has no method {name}")
        has = tuple(inspect.signature(function).parameters)
        if has[: len(self.takes)] != self.takes:
            wanted = ", ".join(self.takes)
            raise Misfit(f"vLLM's {owner.__name__}.{name} takes ({', '.join(has)}), not ({wanted})")
        replacement: Any = functools.wraps(function)(self.wrapper(function))
        setattr(replacement, _MARK, self.wrapper)
        if isinstance(found, (classmethod, staticmethod)):
            replacement = type(found)(replacement)
        return Step(
            lambda: setattr(owner, name, replacement),
            lambda: setattr(owner, name, found),
        )


@dataclass(frozen=True)
class Add:
    """Gives a class a method that it lacks."""

    target: str
    method: Callable[..., Any]

    def is_made(self) -> bool:
        try:
            owner, name = owner_of(self.target)
        except Misfit:
            return False
        return owner.__dict__.get(name) is self.method

    def prepare(self) -> Step:
        owner, name = owner_of(self.target)
        if hasattr(owner, name):
            raise Misfit(f"vLLM's {owner.__name__} has a method {name} of its own")
        return Step(
            lambda: setattr(owner, name, self.method),
            lambda: delattr(owner, name),
        )


def make_all(changes: Iterable[Change]) -> list[Step]:
    """Make all changes that are not in effect yet, or none.

    Returns:
        The steps made, in order; `undo_all` takes them back.

    Raises:
        Misfit: one does not fit the installed vLLM; nothing was changed.
    """
    steps = [change.prepare() for change in changes if not change.is_made()]
    made: list[Step] = []
    try:
        for step in steps:
            step.make()
            made.append(step)
    except Exception:
        undo_all(made)
        raise
    return made


def undo_all(steps: list[Step]) -> None:
    """Take changes back, the last one first, and empty the list."""
    while steps:
        steps.pop().undo()
