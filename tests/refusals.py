"""What a refusal looks like: one line, that names every culprit."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from minihogwild import InputError


@contextmanager
def refused(*culprits: str) -> Iterator[None]:
    """The body must raise an InputError of one line that names these."""
    with pytest.raises(InputError) as raised:
        yield
    message = str(raised.value)
    assert len(message.splitlines()) == 1, message
    for culprit in culprits:
        assert culprit in message


def assert_one_line(err: str, program: str, *culprits: str) -> None:
    """What a command wrote to standard error is one line, that begins with the command's name and names these."""
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"{program}: ")
    assert len(err) < 1200
    for culprit in culprits:
        assert culprit in err
