"""What one process finds out for all of them."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def on_main(find: Callable[[], T]) -> T:
    """What `find` returns on the main process, on every process; an error that it raises is raised on every one."""
    found: list = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = find()
        except (ValueError, OSError) as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]
