"""The command line: parse, call the library, print. One module for each verb."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Run the command; exit with 0 for done, 1 for not good enough, 2 for bad input, 130 if it was interrupted."""
    heard: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where whoever started this ignores it
        signal.signal(signal.SIGINT, interrupt)
    try:
        from factpatch.cli.app import run  # here, so that an interruption while it is imported is told too

        run()
    # Libraries being imported make other errors of an interruption, and Typer an exit that says nothing.
    except BaseException as error:
        if not heard or (isinstance(error, SystemExit) and error.code in {None, 0, 1}):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # while Python ends
        sys.stderr.write(f"Interrupted{_kept(error)}\n")
        sys.exit(130)


def _kept(error: BaseException) -> str:
    """What was said of the interruption on its way (`terminal.if_interrupted`)."""
    said = (str(each) for each in _chain(error) if isinstance(each, KeyboardInterrupt) and each.args)
    return next((f"; {text}" for text in said), ".")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
