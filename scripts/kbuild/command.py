"""What the command lines of this package share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .errors import Status


class Parser(argparse.ArgumentParser):
    """Keeps the layout of the description and the epilog; a usage error is one sentence."""

    def __init__(
        self,
        prog: str,
        description: str | None,
        epilog: str | None = None,
        usage: str | None = None,
        status: int = Status.USAGE,
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.usage_status = status

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with the status of a usage error."""
        self.exit(self.usage_status, f"{self.prog}: {message}\n(see {self.prog} --help)\n")
