"""An exception on its way from one process to another: as plain text, raised again over there."""

import builtins
import traceback
from dataclasses import dataclass

from tutelage.core import errors
from tutelage.core.errors import TutelageError


@dataclass(frozen=True)
class Fault:
    """What is left of an exception that can be sent."""

    kind: str
    text: str
    trace: str
    errno: int = 0
    """Of an OSError: a full disk must be known as one on the other side too."""

    @classmethod
    def of(cls, error: BaseException) -> "Fault":
        """Of an exception that is being handled."""
        trace = "".join(traceback.format_exception(error))
        text, number = str(error), 0
        if isinstance(error, OSError) and error.errno:
            text, number = error.strerror or text, error.errno
            text += f": {error.filename!r}" if error.filename else ""
        return cls(type(error).__name__, text, trace, number)

    def error(self) -> Exception:
        """The same error again: ours and Python's own by their types, others as RuntimeError.

        One that is not the user's to mend keeps the traceback of where it was, as a note.
        """
        ours = getattr(errors, self.kind, None)
        if isinstance(ours, type) and issubclass(ours, TutelageError):
            return ours(self.text)
        kind = getattr(builtins, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            found: Exception = RuntimeError(f"{self.kind}: {self.text}")
        elif self.errno:
            found = OSError(self.errno, self.text)
        else:
            try:
                found = kind(self.text)
            except TypeError:  # one that is not made of a text alone, such as UnicodeDecodeError
                found = RuntimeError(f"{self.kind}: {self.text}")
        found.add_note(f"in another process:\n{self.trace}")
        return found
