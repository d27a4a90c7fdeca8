"""The console entry: one line for what went wrong, never a traceback, and the exit codes.

0: the command did its job; 1: what was checked does not hold and `--strict` was given; 2: bad input;
3: a defect of meshwright itself; 130: interrupted; 141: the reader of the output went away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from meshwright.cli import UsageError, app
from meshwright.delivery import discard_the_rest, say
from meshwright.errors import MeshwrightError

BAD_INPUT, DEFECT, INTERRUPTED = 2, 3, 130
TRACEBACK_SWITCH = "MESHWRIGHT_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (of this process unless given) and return its exit code.

    Errors become one line on stderr. With the environment variable MESHWRIGHT_TRACEBACK set, a defect
    shows its traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):  # None where the shell closed one
        if hasattr(stream, "reconfigure"):  # a sign that the terminal's encoding lacks is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        code = app(arguments, prog_name="meshwright", standalone_mode=False)
    except MeshwrightError as error:
        return _fail(str(error))
    except UsageError as error:
        return _fail(f"{error.format_message()} (see meshwright --help)")  # type: ignore[attr-defined]
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # the command-line library prints help itself; files raise errors of their own
        if os.environ.get(TRACEBACK_SWITCH):
            raise
        discard_the_rest()
        place = error.filename or "standard output"
        return _fail(f"{place}: {error.strerror or error}: it cannot be read or written")
    except Exception as error:
        if os.environ.get(TRACEBACK_SWITCH):
            raise
        cause = f"{type(error).__name__}: {error}"
        return _fail(f"a defect of meshwright, {cause} (see where with {TRACEBACK_SWITCH}=1)", DEFECT)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int = BAD_INPUT) -> int:
    say(f"error: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
