"""How many random examples a property is tried with: so many, and ten times as many in a nightly run."""

import os

from hypothesis import settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "minihogwild")  # see conftest.py
TIMES = 10 if PROFILE == "nightly" else 1


def examples(count: int, **options: object) -> settings:
    return settings(max_examples=count * TIMES, **options)
