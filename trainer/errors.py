"""Errors that a user can act on."""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 10


def shown(value: object) -> str:
    """A value for a message: bounded, however large it is (YAML's aliases make much of little)."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no number of more than 4300 digits
        return "a number of thousands of digits"


class UserError(Exception):
    """Something in the configuration, the data or the storage that the user can mend.

    Printed as one message without a traceback: what is wrong (field and value) and what to do about it. Bytes of a file that are no text
    (lone surrogates here) are shown escaped, so that every terminal and log takes the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode())


class ConfigError(UserError, ValueError):
    """A value of the run's configuration is not usable."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}: {shown(value)} is not usable. {remedy}")
        self.field, self.value, self.remedy = field, value, remedy
