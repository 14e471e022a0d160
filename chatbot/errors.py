"""Errors that a user can act on."""


class UserError(Exception):
    """Something in the configuration, the storage or a request that the user can mend.

    Printed as one message without a traceback: what is wrong and what to do about it.
    """


class ConfigError(UserError, ValueError):
    """A value of the chatbot's configuration is not usable."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}: {value!r} is not usable. {remedy}")
        self.field, self.value, self.remedy = field, value, remedy


class NotReadyError(UserError):
    """No model can answer now: none is loaded yet, or the served one has vanished."""


class BusyError(UserError):
    """The waiting line is full; the client should come back after a moment."""
