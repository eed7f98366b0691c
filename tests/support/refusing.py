"""What every error of the library must do: say what is wrong, and what to do about it."""

import contextlib

import pytest

from pyro_elbo.errors import PyroElboError


def refusing(cure):
    """A context manager that expects an error; its message holds every part and matches ``cure``."""

    @contextlib.contextmanager
    def refuses(error, *parts):
        with pytest.raises(error) as caught:
            yield
        message = str(caught.value)
        assert isinstance(caught.value, PyroElboError), message
        for part in parts:
            assert str(part) in message, f"{part!r} is not in: {message}"
        assert cure.search(message), f"no cure in: {message}"

    return refuses
