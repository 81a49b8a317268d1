"""Libraries within limits: no text, and no server, keeps them for ever; their panics write nothing.

The expressions that a tokenizer searches a text for are a stranger's, and may take years. A server may send a byte now
and then.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..errors import require

Result = TypeVar("Result")

STANDARD_ERROR = 2  # as the system numbers it: what the library writes to, past Python's
only_one = threading.Lock()  # of all threads keeps standard error back


def in_time(call: Callable[[], Result], seconds: float) -> Result:
    """What `call` gives. Raises InputError where that takes longer.

    It runs in a thread of its own, which is left to itself then: the library can't be interrupted. Here one can wait,
    and be interrupted, as long as the library lets other threads run meanwhile.
    """
    results: list[Result] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # also a panic, which is no Exception
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)  # the program may end while it works
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    require(results, f"it takes more than {seconds} seconds")
    return results[0]


@contextmanager
def panics_kept_back() -> Iterator[None]:
    """Let standard error lead nowhere: the library writes a hundred lines there before it raises.

    (What another thread writes there meanwhile is lost too.)
    """
    with only_one:
        try:
            kept = os.dup(STANDARD_ERROR)
        except OSError:  # it is closed
            yield
            return
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, STANDARD_ERROR)
            os.close(nowhere)
            yield
        finally:
            os.dup2(kept, STANDARD_ERROR)
            os.close(kept)
