"""A bar on a terminal for what takes more than a moment; nothing where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from meshwright.validate.progress import Progress


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr while the block runs, gone afterwards; silent where stderr is no terminal."""
    stream: TextIO | None = sys.stderr
    if stream is None or not stream.isatty():
        yield lambda what, done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(file=stream, markup=False), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)
