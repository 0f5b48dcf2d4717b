"""The exception tree is the one its docstring draws."""

import re

import pytest

from minwm import errors
from minwm.errors import MinwmError

pytestmark = pytest.mark.unit


def test_the_docstring_draws_every_error_under_its_base() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert drawn == [cls.__name__ for cls in MinwmError.__subclasses__() if cls.__module__ == errors.__name__]
