"""Integers that know their name in the kernel's headers, for what people read.

The generated enums, :mod:`kvmpriv.cdefs.enums` and ``exit_reason``, are made of these.  An integer
without a name is not an error: a newer kernel may return one.  It is shown as ``exit 77``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import TypeVar

__all__ = ["NamedFlag", "NamedInt", "named"]

_E = TypeVar("_E", bound="NamedInt")

#: class -> how the header spells a member, and the word that goes before a number without a name
_SPELLING: dict[type, tuple[str, str]] = {}

#: What a member's name ends with where an older ABI gave the header's name another value.
_OLDER = ("_V9", "_V10")


def named(pattern: str, noun: str) -> Callable[[type[_E]], type[_E]]:
    """Tell a class how its members are spelled in C: ``KVM_EXIT_{}``, and what they are."""

    def decorate(cls: type[_E]) -> type[_E]:
        _SPELLING[cls] = (pattern, noun)
        return cls

    return decorate


class NamedInt(IntEnum):
    """An int with its name in C; ``str`` of one without a name is, for example, ``exit 77``."""

    @classmethod
    def _missing_(cls, value: object) -> NamedInt | None:
        if not isinstance(value, int):
            return None  # enum raises its ValueError
        member = int.__new__(cls, value)
        member._name_ = ""
        member._value_ = value
        return member

    def __str__(self) -> str:
        pattern, noun = _SPELLING[type(self)]
        if not self._name_:
            return f"{noun} {self._value_}"
        name = self._name_
        for suffix in _OLDER:
            name = name.removesuffix(suffix)
        return pattern.format(name)

    def __repr__(self) -> str:
        dot = f".{self._name_}" if self._name_ else ""
        return f"<{type(self).__name__}{dot}: {self._value_}>"

    def __format__(self, spec: str) -> str:
        # As a number where a number is asked for ("#x"), by its name otherwise: in every Python.
        return format(int(self), spec) if spec else str(self)


class NamedFlag(IntFlag):
    """Bits with names: ``READONLY|PRIVATE``; bits without one are shown as a number."""

    def __str__(self) -> str:
        left = int(self)
        shown = []
        for name, member in type(self).__members__.items():
            if member and left & member == member:
                shown.append(name)
                left &= ~int(member)
        if left or not shown:
            shown.append(f"{left:#x}")
        return "|".join(shown)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self}: {int(self):#x}>"

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec else str(self)
