"""Renders chat templates as a process of its own: JSON on standard input, JSON on standard output.

A template is a program by whoever made the model folder. Beside jinja's sandbox it gets a limit of memory here,
where the system has one, and of time from the parent (`text.render`). Nothing else of the package is imported.
"""

import json
import re
import sys
from time import strftime

from jinja2.sandbox import ImmutableSandboxedEnvironment

BYTES = 2**29  # of address space


def render(template: str, special: dict[str, str], prompts: list[str], allowed: float = float("inf")) -> list[str]:
    """The conversation that opens with each prompt and asks for the reply, as transformers' apply_chat_template.

    Raises ValueError for more than `allowed` characters; what else fails raises what jinja does.
    """

    def fail(message: str):
        raise ValueError(message)

    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False, **options})
    environment.globals |= {"raise_exception": fail, "strftime_now": strftime}
    # `generation` marks what to train on: for rendering it is no more than a pair of brackets
    compiled = environment.from_string(re.sub(r"(\{%[-+]?\s*)(end|)generation(\s*[-+]?%\})", r"\1\2with\3", template))
    given = special | {"tools": None, "documents": None, "add_generation_prompt": True}
    texts = [compiled.render(given, messages=[{"role": "user", "content": prompt}]) for prompt in prompts]
    if max(map(len, texts)) > allowed:
        fail(f"it gives more than {allowed} characters")
    return texts


if __name__ == "__main__":
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on Windows and macOS
    try:
        print(json.dumps(render(**json.load(sys.stdin))))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
