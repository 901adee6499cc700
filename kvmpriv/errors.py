"""Errors that mean the caller made a mistake; what the kernel refuses is an OSError."""

__all__ = ["ArgumentError", "ClosedError"]


class ArgumentError(ValueError):
    """An argument cannot be used: out of range, not aligned, or a struct of the wrong type.

    The message names the argument and its value.  No call has been made with it.
    """


class ClosedError(ValueError):
    """The object is closed: its descriptor or its mapping is gone."""
