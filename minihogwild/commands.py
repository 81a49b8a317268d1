"""What all commands of this package share: for whatever can't be done, an exit code and one clear line."""

import argparse
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from . import interrupts
from .config import Config
from .errors import InputError, is_out_of_memory, one_line
from .hub import DTYPES, Model
from .sampling import Sampling

# Exit codes, beside 0; a command may give 1 a meaning of its own
OUTPUT_CLOSED = 1
MISTAKE = 1  # of ours: Python's own
CANNOT_BE_DONE = 2
INTERRUPTED = 130  # as shells have it: 128, and the number of the signal

# A model may write any of these, and no terminal should obey them: what moves the cursor, changes colours and the like
# (all but tab and newline), and what reverses the direction of text, so that it reads as something else
CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LONGEST_MESSAGE = 1000  # characters: what an error quotes from a file may be of any length
LONG_WORD = re.compile(r"(\S{150})\S{200,}(\S{50})")  # a file's name, say: shortened, so that what follows is read
SMALL_HIDDEN_SIZE = 512

DUET = Path(__file__).with_name("duet")


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError for wrong options: they are told as everything else that is wrong."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._negative_number_matcher = re.compile(r"-\d")  # a value, and no option; argparse knows -1, but not -1:

    def parse_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        for argument in given:
            if argument == "--":
                break  # what follows is no option
            option, _, value = argument.partition("=")
            if value == "--" and option.startswith("--"):  # argparse would make an empty list of it
                self.error(f"argument {option}: invalid value: '--'")
        return super().parse_args(args, namespace)

    def error(self, message: str):
        raise InputError(message)


def add_model_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="default: config.json's")
    add("--context", type=positive, metavar="N", help="tokens that a view may hold (default: as config.json has it)")
    add("--quantize", type=int, choices=[8, 4], help="round the weights of a plain checkpoint to so many bits")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--kernels", choices=["auto", "off"], default="auto", help="off: plain PyTorch on a GPU too")


def positive(text: str) -> int:
    """A whole number above 0, from an option. Raises ValueError for others."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def add_sampling_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--temperature", type=float, help="0 takes the likeliest token (default: the model's, as the next three)")
    add("--top-k", type=int, metavar="K", help="keep the K likeliest tokens; 0: all")
    add("--top-p", type=float, metavar="P", help="keep the fewest likeliest tokens that reach probability P; 1: all")
    add("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest; 0: all")


def sampling_asked_for(options: argparse.Namespace) -> dict[str, float]:
    """The sampling options that were given, by the names of Sampling's fields. Raises InputError for wrong ones."""
    asked = {}
    for field in fields(Sampling):
        value = getattr(options, field.name)
        if value is not None:
            asked[field.name] = value
    Sampling(**asked)
    return asked


def run_command(command: Callable[[argparse.Namespace], int], parser: Parser, argv: list[str] | None) -> int:
    """Parse `argv` (None: what the program was called with), run `command`, and return the exit code.

    The command's own code; or 2, with one line on standard error, for what can't be done; 130 when interrupted; 1 when
    nobody reads the output any more. An error that none of this is, a mistake of ours, is raised.

    Where torchrun has started several processes, the first one does all this, and the others follow it; none of them
    comes back from here.
    """
    is_whole_program = argv is None
    if is_whole_program and ranks_started() > 1 and int(os.environ["RANK"]) > 0:
        from .gpu.several import follow  # not above: most have one GPU, if any

        follow(parser.prog)
    if sys.stderr is None:  # closed: what belongs there goes nowhere, where print would take standard output
        sys.stderr = io.StringIO()
    logging.basicConfig(format=f"{parser.prog}: %(message)s")
    replace_what_the_terminal_cannot_show()
    if is_whole_program:
        interrupts.raise_keyboard_interrupt()
    ranks = None
    code = CANNOT_BE_DONE
    try:
        if is_whole_program and ranks_started() > 1:
            from .gpu.several import join

            ranks = join(parser.prog)  # first of all: the others are there already, and end when this one does
        options = parser.parse_args(argv)
        options.ranks = ranks
        code = command(options)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        discard_remaining_output()
        code = OUTPUT_CLOSED
    except BaseException as error:
        if isinstance(error, SystemExit):  # after --help
            code = error.code
            raise
        if not is_told_in_one_line(error):
            code = MISTAKE
            if ranks is not None:
                traceback.print_exc()  # the process will not come to where Python does it
            raise
        print(f"{parser.prog}: {message_of(error)}", file=sys.stderr)
    finally:
        if is_whole_program:
            interrupts.end_at_once()
        if ranks is not None:
            if code == INTERRUPTED and ranks.failure is not None:  # torchrun interrupts all, where one has failed
                print(f"{parser.prog}: {message_of(InputError(ranks.failure))}", file=sys.stderr)
                code = CANNOT_BE_DONE
            ranks.end(code)
    return code


def ranks_started() -> int:
    """How many processes torchrun has started for this command; 1 where it was not torchrun that did."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in names) else 1


def replace_what_the_terminal_cannot_show() -> None:
    """Print a question mark for what standard output's encoding lacks: that is no reason to stop."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not None, nor a notebook's
        sys.stdout.reconfigure(errors="replace")


def discard_remaining_output() -> None:
    """Let standard output lead nowhere: Python writes what is left of it at exit, and would fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


def is_told_in_one_line(error: BaseException) -> bool:
    """Does the message say all, so that a traceback would only hide it?"""
    if isinstance(error, (InputError, OSError)):
        return True
    return is_out_of_memory(error) or is_failure_of_gpu(error)


def is_failure_of_gpu(error: BaseException) -> bool:
    """Has the GPU been lost, or failed? PyTorch has an exception for it only from version 2.8 on."""
    if hasattr(torch, "AcceleratorError") and isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith("CUDA error")


def message_of(error: BaseException) -> str:
    text = str(error) or "out of memory"  # Python's MemoryError says nothing as a rule
    line = LONG_WORD.sub(r"\1…\2", one_line(text))
    return CONTROL_CODES.sub("", line)[:LONGEST_MESSAGE]


def warn_without_template(model: Model) -> None:
    """A model made to chat answers worse without one: its author may have forgotten it."""
    if model.tokenizer.template is None:
        logging.warning("%s: no chat template: the prompt is given as it is", model.name)


def spare_threads(config: Config) -> None:
    """Take one thread for a small model.

    Its products are too short to be shared: threads would mostly wait for each other, and where other programs run
    beside, for fifty times as long.
    """
    if config.hidden_size < SMALL_HIDDEN_SIZE:
        torch.set_num_threads(1)
