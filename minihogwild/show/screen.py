"""The terminal's other screen, where a program may draw without harm to what is on the first: who has it, and when."""

import os
import signal
import sys
import threading
from collections.abc import Callable

from rich.console import Console

# What stops a process, or ends it with a core dump, from the keyboard: Ctrl-Z and Ctrl-\. Windows lacks both
SIGNALS = [getattr(signal, name) for name in ("SIGTSTP", "SIGQUIT") if hasattr(signal, name)]


class OtherScreen:
    """The terminal's other screen: taken while we are in the foreground, and given back before the process stops.

    Whoever draws on it holds `lock`.
    """

    def __init__(self, console: Console, lock: threading.RLock):
        self.console = console
        self.lock = lock
        self.is_taken = False
        self.earlier_handlers: dict[int, Callable | int] = {}

    def take(self) -> bool:
        """Take the screen, where we do not have it. False in the background, where nothing may be drawn."""
        if not is_in_foreground():
            return False
        if not self.is_taken:
            self.is_taken = True
            self.console.set_alt_screen(True)
            self.console.show_cursor(False)
        return True

    def give_back(self) -> None:
        with self.lock:
            if self.is_taken:
                self.console.show_cursor(True)
                self.console.set_alt_screen(False)
                self.is_taken = False

    def answer_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():  # Python lets no other thread have handlers
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler is not None and handler is not signal.SIG_IGN:
                self.earlier_handlers[number] = signal.signal(number, self.handle)

    def leave_signals_alone(self) -> None:
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        """Give the screen back, and then do what the signal asks for. The next frame takes it again."""
        with self.lock:  # so nothing is drawn meanwhile
            self.give_back()
            signal.signal(number, self.earlier_handlers[number])
            signal.raise_signal(number)  # here the process ends, or stops until it is continued
            signal.signal(number, self.handle)


def is_in_foreground() -> bool:
    """May we draw? Not where a shell has put us in the background, by `&` or `bg`: the terminal is the shell's then."""
    try:
        return os.tcgetpgrp(sys.stdout.fileno()) == os.getpgrp()
    except (AttributeError, OSError, ValueError):  # Windows has no such thing, and neither have files and tests
        return True
