"""How a script ends: what is foreseen is one sentence, anything else a traceback with a line on what to do with it."""

import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager

REPORT = (
    "This error was not foreseen. Please report it with the traceback above, the command, the recipe, "
    "and what `pip freeze` prints."
)


def run(main: Callable[[], object]) -> None:
    """Runs a script's `main`; an error that nobody has foreseen ends with a line on where it belongs."""
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(REPORT)


@contextmanager
def settings_checked():
    """Around all that a script checks before weights load: a setting that is refused ends it in one line.

    Raises:
        SystemExit: with the sentence of the ValueError or OSError.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
