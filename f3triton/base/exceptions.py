"""The one exception that users are meant to see."""

from .text import printable


class InputError(ValueError):
    """Something the user gave cannot be used: the message is one line that names the thing, its value and what is allowed.

    `train.py` prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))
