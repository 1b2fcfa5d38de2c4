"""Which of several processes this one is, where they make a run's training steps together.

`torchrun`, `accelerate launch` and our own launcher tell each process its rank in the environment.
Rank 0 is the pipeline; what it says through the team's store, the others follow. No torch here:
how gradients meet is `train/team.py`'s.
"""

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from tutelage.core.errors import EngineError

LAUNCHER = "TUTELAGE_LAUNCHER"
"""Set by our own launcher, to its process id: it tells of a process that was killed."""
POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
"""What fails in one process mostly fails in all of them: rank 0 is given so long to say it, which
ends the others."""
PART_SECONDS = 30.0
TOLD = "told"


class TeammateLost(EngineError):
    """Another process of the team has ended; why is for that one, or its launcher, to say."""


@dataclass
class Team:
    """This process's place among all; alone unless told otherwise."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank on this machine, which is also its device's number."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    store: Any = None
    """Where the processes leave word for each other (a torch store), once it is opened."""
    trainings: int = 0
    """How many training steps it has joined."""
    _words: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process is the pipeline, which alone writes and reports."""
        return self.rank == 0

    def tell(self, word: str) -> None:
        """Rank 0's next word to the others; an empty one is the last."""
        if self.size > 1:
            self.store.set(f"word-{self._words}", word)
            self._words += 1

    def hear(self) -> str:
        """Wait for rank 0's next word, which may take hours."""
        key = f"word-{self._words}"
        while not self.store.check([key]):
            time.sleep(POLL_SECONDS)
        self._words += 1
        return self.store.get(key).decode()

    def part(self) -> None:
        """The end of the run: rank 0, which may hold the store, goes last."""
        if self.size == 1:
            return
        gone = self.store.add("parted", 0 if self.leads else 1)
        until = time.monotonic() + PART_SECONDS
        while self.leads and gone < self.size - 1 and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            gone = self.store.add("parted", 0)

    def should_tell(self, error: BaseException) -> bool:
        """Whether this process is the one to print `error`, so that it is said once."""
        if self.size == 1:
            return True
        if isinstance(error, TeammateLost):
            return self.leads and LAUNCHER not in os.environ and not self._told()
        if not self.leads:
            time.sleep(GRACE_SECONDS)
        with contextlib.suppress(Exception):  # no store yet, or its process has ended
            self.store.set(TOLD, str(self.rank))
        return True

    def _told(self) -> bool:
        try:
            return self.store.check([TOLD])
        except Exception:  # whatever torch raises when the store's process has ended
            return False


def team_of(environment: Mapping[str, str]) -> Team:
    """The place that a launcher gave this process; alone where there is none."""
    size = int(environment.get("WORLD_SIZE", "1"))
    if size <= 1:
        return Team()
    rank = int(environment["RANK"])
    return Team(rank, size, int(environment.get("LOCAL_RANK", rank)))


@cache
def this_process() -> Team:
    """The team of this process, read from its environment once."""
    return team_of(os.environ)
