"""Ctrl-C, a closed terminal, a polite kill: what was computed until then is kept.

Nothing heavy is imported here: `python -m minihogwild.generate` uses this before PyTorch is there.
"""

import signal
import threading
from collections.abc import Callable

# What asks a program to end; Windows lacks the last one
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def end_at_once() -> None:
    """From here on each of the signals ends the process, without a traceback.

    So it is before a command is ready to answer them, and when it has done all and Python only cleans up.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def raise_keyboard_interrupt() -> None:
    """From here on, each of the signals raises KeyboardInterrupt, as Ctrl-C does in any Python program."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as for what `nohup` or a shell has put in the background
            signal.signal(number, signal.default_int_handler)


class Interrupts:
    """While entered, a signal asks for an end and cuts off nothing; a second one may, unless `keep_all` was called."""

    def __init__(self, ask_to_end: Callable[[], None]):
        self.ask_to_end = ask_to_end
        self.asked = threading.Event()
        self.all_is_kept = False
        self.earlier_handlers = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread have handlers
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.earlier_handlers[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        second = self.asked.is_set()
        self.asked.set()
        self.ask_to_end()
        if second and not self.all_is_kept:
            raise KeyboardInterrupt

    def keep_all(self) -> None:
        """From here on nothing is cut off any more: results are being written."""
        self.all_is_kept = True

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until a signal comes."""
        self.asked.wait(max(seconds, 0))
