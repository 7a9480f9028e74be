"""Errors that a user can mend: one line that names the thing and the remedy.

The command line prints them without a traceback and leaves with status 2; library callers catch
them as `ValueError`. Everything else that is raised is a defect of fastffn.
"""

import re


class UserError(ValueError):
    """Bad input: one line (of an `ExprError` three) that says what is wrong and how to mend it."""


class ExprError(UserError):
    """A text of the expression language is wrong at one character.

    Attributes:
        text: the whole text that was parsed.
        position: index of the offending character in `text` (its length: at the end).
    """

    def __init__(self, message: str, text: str, position: int):
        self.text = text
        self.position = position
        self.message = message
        shown = re.sub(r"\s", " ", text)  # a line break would part the caret from its character
        super().__init__(f"{message} (at character {position + 1})\n  {shown}\n  {' ' * position}^")

    def __reduce__(self):
        return ExprError, (self.message, self.text, self.position)
