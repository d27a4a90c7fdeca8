"""Output that is whole or not there at all: text or JSON, on a stream or in a file, and words on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

import typer

from meshwright.errors import InputError
from meshwright.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.verify import Finding

BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports a writer that lost its reader


def present(
    document: Callable[[], Mapping[str, Any]],
    show: Callable[[Console], None],
    as_json: bool,
    output: str | None,
) -> None:
    """Deliver a result in the form that was asked for; the form that was not is never built."""
    if as_json:
        deliver(json.dumps(document(), ensure_ascii=False, allow_nan=False) + "\n", output)
        return
    from meshwright.terminal import rendered

    deliver(rendered(show, is_terminal=output is None and _has_stdout() and sys.stdout.isatty()), output)


def _has_stdout() -> bool:
    """Whether there is a standard output: a shell's `>&-` leaves a process without one."""
    stream: object = sys.stdout
    return stream is not None


def deliver(text: str, output: str | None = None) -> None:
    """Print a whole output, or write it to a file whole or not at all."""
    if output is not None:
        from meshwright.files import write_text

        write_text(output, text)
        return
    if not _has_stdout():
        raise InputError("standard output", "closed", "there is no place to print to", ["-o PATH"])
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_the_rest()
        raise typer.Exit(BROKEN_PIPE) from None
    except OSError as error:
        discard_the_rest()
        raise InputError("standard output", error.strerror, "the output cannot be written") from None


def discard_the_rest() -> None:
    """Give what is still buffered a place to go, or the interpreter complains when it ends."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(defaults: Mapping[str, str], findings: Iterable[Finding]) -> None:
    """Say on stderr, where stdout carries JSON, which defaults were used and what is worth knowing."""
    for key, why in defaults.items():
        say(f"default: {key} = {why}")
    for finding in findings:
        say(f"{finding.level}: {finding.raised()}")


def say(message: str) -> None:
    """Print one line on stderr, whatever the message holds: names and values in it come from outside."""
    stream: TextIO | None = sys.stderr
    if stream is not None:  # `print` would take standard output instead
        with suppress(OSError):  # no place is left to complain about that
            print(printable(message), file=stream, flush=True)
