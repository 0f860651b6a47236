"""The one exception that speaks to users."""


class UserError(Exception):
    """A mistake the user can mend: the CLI prints it without a traceback and exits with code 2.

    `message` says what is wrong, where, the value and the limit; `hint` says what to do about it.
    """

    exit_code = 2
    failure_class = "permanent"
    """Of a job that ends with it (longhaul.records): run again unchanged, it would fail again."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.hint}" if self.hint else self.message
