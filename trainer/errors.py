"""Errors that a user can act on."""


class UserError(Exception):
    """Something in the configuration, the data or the storage that the user can mend.

    Printed as one message without a traceback: what is wrong (field and value) and what to do about it.
    """


class ConfigError(UserError, ValueError):
    """A value of the run's configuration is not usable."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}: {value!r} is not usable. {remedy}")
        self.field, self.value, self.remedy = field, value, remedy
