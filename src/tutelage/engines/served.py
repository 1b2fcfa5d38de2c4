"""What every server API promises: one file `served_<name>.py` and its name in `server.APIS`."""

from collections.abc import Sequence
from typing import Protocol

from tutelage.engines.base import Completion, SamplingParams, Scorable
from tutelage.engines.http import Session
from tutelage.engines.readings import Reading


class Api(Protocol):
    """How one kind of server is asked; made with (served name, vocabulary size)."""

    async def texts(self, session: Session, ids: Sequence[int]) -> list[str]:
        """What the server's tokenizer reads each id as."""
        ...

    async def complete(
        self, session: Session, prompt: Sequence[int], params: SamplingParams, *, key: int,
        name: str,
    ) -> Completion:  # fmt: skip
        """One answer to a prompt; `name` is how an error calls it."""
        ...

    async def read(self, session: Session, sequence: Scorable, *, top: int, name: str) -> Reading:
        """The response's log-probabilities, and the `top` likeliest ids of each token (0: none).

        Raises EngineError where it cannot.
        """
        ...
