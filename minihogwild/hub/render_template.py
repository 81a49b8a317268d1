"""Renders chat templates as a process of its own: for each line of JSON on standard input, one on standard output.

Beside jinja's sandbox a template gets a limit of memory here, where the system has one, and of time from the parent
(`chat_template.render_chat`); here too, should the parent be gone. Nothing else of the package is imported.
"""

import os
import sys

if __name__ == "__main__":
    # Python looks for modules beside a program, and often in the current folder too. Whatever lies there under the name
    # of one of Python's own modules, or of jinja's, would be run in its place.
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    try:
        current_folder = os.getcwd()
    except OSError:
        current_folder = None  # it has been deleted

    def may_be_imported_from(folder: str) -> bool:
        if not os.path.isabs(folder):
            return False  # it depends on the current folder
        real = os.path.realpath(folder)
        is_of_package = os.path.join(real, "").startswith(os.path.join(package, ""))
        return real != current_folder and not is_of_package

    sys.path = [folder for folder in sys.path if may_be_imported_from(folder)]

import json
import re
import signal
from contextlib import suppress
from time import strftime

from jinja2.sandbox import ImmutableSandboxedEnvironment

BYTES = 2**29  # of address space
SECONDS = 15  # of computing, for one line: more than the parent allows, for when it has died
# `{% generation %}` and `{% endgeneration %}`, around what a model is trained on: what stands before and after the name
GENERATION_TAG = re.compile(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})")


def render(template: str, special_tokens: dict[str, str], prompts: list[str], allowed: float) -> list[str]:
    """The conversation that opens with each prompt and asks for the reply, as transformers' apply_chat_template.

    Raises ValueError for more than `allowed` characters; what else fails raises what jinja does.
    """
    # Jinja knows no generation tags; `with` is a pair of brackets that does nothing.
    source = GENERATION_TAG.sub(r"\1with\2", template)
    compiled = sandbox().from_string(source)
    texts = []
    for prompt in prompts:
        text = compiled.render(
            special_tokens,
            messages=[{"role": "user", "content": prompt}],
            tools=None,
            documents=None,
            add_generation_prompt=True,
        )
        if len(text) > allowed:
            fail(f"it gives more than {allowed} characters")
        texts.append(text)
    return texts


def sandbox() -> ImmutableSandboxedEnvironment:
    """Where templates run: with the settings and functions that transformers gives them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = strftime
    return environment


def to_json(value: object, ensure_ascii: bool = False, **options) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def fail(message: str):
    raise ValueError(message)


def limit_memory_and_time() -> None:
    """For what is rendered from now on."""
    try:
        import resource
    except ImportError:
        return  # Windows has no such limits
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SECONDS
    for limit, most in ((resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CPU, seconds)):
        _, allowed = resource.getrlimit(limit)  # nobody may have more than the system, or the user, has said
        with suppress(ValueError, OSError):  # macOS does not have all of them
            resource.setrlimit(limit, (most, allowed))


def answer(line: str) -> dict:
    try:
        return {"texts": render(**json.loads(line))}
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, and this ends with it
    for line in sys.stdin:
        limit_memory_and_time()
        print(json.dumps(answer(line)), flush=True)
