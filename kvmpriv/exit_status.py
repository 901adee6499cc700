"""The exit statuses of every command, in one place."""

from enum import IntEnum

__all__ = ["ExitStatus"]


class ExitStatus(IntEnum):
    """What a command returns to the shell.

    `run` and `boot` return the guest's own status where it has one.
    """

    #: probe: usable private memory; selftest: every test that could run has passed.
    OK = 0
    #: probe: no usable private memory; selftest: a test failed, or two runs differ.
    NEGATIVE = 1
    #: A wrong command line, or an input file that can't be used.
    USAGE = 2
    #: KVM, the suite or the output can't be used.
    UNABLE = 3
    #: selftest: every test was skipped.
    ALL_SKIPPED = 4

    #: boot: the guest makes no progress.
    NO_PROGRESS = 123
    #: run, boot: the guest was ended by its time limit.
    TIMEOUT = 124
    #: run, boot: the guest crashed.
    CRASH = 125
    #: boot: the guest's kernel panicked.
    PANIC = 126
    #: Plus the number of the signal that ended the command.
    SIGNALLED = 128
