"""The fleet's driver: joins a Ray cluster, keeps workers on it and hands out shards.

It runs in a process of its own (`engines/fleet.py` starts it), because Ray ends the process that
drives it, without an exception, when the cluster is lost. No torch here, and no model.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from tutelage.core.errors import EngineError
from tutelage.core.fault import Fault
from tutelage.core.shards import Shard
from tutelage.engines.fleet_cluster import cluster, fits, needs, watch, whole_room
from tutelage.engines.fleet_worker import Facts, Made, Worker, facts
from tutelage.recipe.tables import Fleet

POLL_SECONDS = 1.0
STAFF_SECONDS = 5.0
"""Between looks for room, and for workers to replace."""
LOST_SHARD = 3
"""Times a shard may take its worker with it."""
LOST_WORKERS = 5
"""Workers that may be lost in a row with no shard finished in between."""
CLOSE_SECONDS = 10.0
REASON_LETTERS = 200
KEPT = "finished shards are kept: run again"


@dataclass(frozen=True)
class Order:
    """What the driver is told; `begin` is pickled already, so that no torch comes with it."""

    fleet: Fleet
    todo: Sequence[Shard]
    begin: bytes
    paths: Sequence[str]
    environment: Mapping[str, str]


@dataclass
class _Hand:
    """A worker of ours and what is known of it."""

    actor: Any
    facts: Facts | None = None
    shard: Shard | None = None
    heard: int = 0
    """Tokens of `shard` that the bar has."""
    asked: bool = False
    """Whether an answer on tokens is on its way."""


class _Failed(Exception):
    """A worker's fault, on its way up."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.text)
        self.fault = fault


def drive(order: Order, messages: Any, log: str, parent: int) -> None:
    """The process's work: sends `joined`, `say`, `tokens`, `done`, and `ended` or `failed`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
    signal.signal(signal.SIGTERM, lambda *_: _leave())
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _write_to(log)
    try:
        with cluster(order.fleet, Path(log)) as head:
            messages.send(("joined", None))
            threading.Thread(target=_leave_without, args=(head,), daemon=True).start()
            _Driver(order, messages.send).run()
        messages.send(("ended", None))
    except _Failed as failed:
        messages.send(("failed", failed.fault))
    except BaseException as error:  # reported by the parent, which raises it again
        messages.send(("failed", Fault.of(error)))


def _write_to(log: str) -> None:
    """What Ray's core prints goes to a file: the terminal has a bar on it."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    _leave()


def _leave() -> NoReturn:
    """End at once, and a Ray that was started here with it, whose agents may outlive its head."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def _leave_without(head: str) -> None:
    watch(head)
    _leave()


class _Driver:
    """Shards to hand out, and the hands."""

    def __init__(self, order: Order, send: Callable[[tuple[str, Any]], None]) -> None:
        import ray

        self._ray, self._order, self._send = ray, order, send
        self._waiting = deque(order.todo)
        self._left = len(order.todo)
        self._hands: list[_Hand] = []
        self._answers: dict[Any, tuple[_Hand, Callable[[_Hand, Any], None]]] = {}
        self._lost_at: dict[str, int] = {}
        self._lost_in_a_row = 0
        self._introduced = self._said_full = False

    def run(self) -> None:
        """Until every shard is done."""
        asked = staffed = 0.0
        while self._left:
            now = time.monotonic()
            if now - staffed > STAFF_SECONDS or not self._hands:
                self._staff()
                staffed = now
            if now - asked > POLL_SECONDS:
                self._ask_for_tokens()
                asked = now
            ready, _ = self._ray.wait(list(self._answers), num_returns=1, timeout=POLL_SECONDS)
            for ref in ready:
                self._take(ref)
        closing = [hand.actor.close.remote() for hand in self._hands]
        self._ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)

    def _staff(self) -> None:
        """Have as many hands as are wanted and there is room for; also where some were lost."""
        fleet = self._order.fleet
        at_most = whole_room(self._ray.nodes(), fleet)
        if not at_most and not any(hand.facts for hand in self._hands):
            raise EngineError(
                f"no node of the cluster has {needs(fleet)} for an actor; lower runtime.ray.cpus, "
                f"gpus or resources, or start nodes that have them ({KEPT})"
            )
        if any(hand.facts is None for hand in self._hands):  # those first
            self._introduce(late=True)
            return
        wanted = fleet.actors or min(at_most, len(self._hands) + self._free_room())
        # One is asked for in any case: it waits until somebody else's work is done.
        for _ in range(len(self._hands), min(max(wanted, 1), self._left)):
            self._hire()

    def _free_room(self) -> int:
        free = self._ray.available_resources()
        return min(fits(free, self._order.fleet), len(self._order.todo))

    def _hire(self) -> None:
        fleet = self._order.fleet
        actor = self._ray.remote(Worker).options(
            num_cpus=fleet.cpus, num_gpus=fleet.gpus, resources=dict(fleet.resources),
            max_concurrency=2, max_restarts=0, scheduling_strategy="SPREAD",
        ).remote(dict(self._order.environment))  # fmt: skip
        hand = _Hand(actor)
        self._hands.append(hand)
        self._expect(hand, actor.facts.remote(), self._met)

    def _expect(self, hand: _Hand, ref: Any, then: Callable[[_Hand, Any], None]) -> None:
        self._answers[ref] = (hand, then)

    def _take(self, ref: Any) -> None:
        hand, then = self._answers.pop(ref)
        if hand not in self._hands:  # lost before
            return
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(ref)
        except errors.RayTaskError as error:  # a worker returns its faults: this one is Ray's
            raise EngineError(f"a worker cannot begin: {_why(error)}") from None
        except errors.RayError as error:
            self._lose(hand, _why(error))
            return
        then(hand, answer)

    def _met(self, hand: _Hand, answer: Facts) -> None:
        check_version(answer)
        hand.facts = answer
        self._introduce()
        order = self._order
        self._expect(hand, hand.actor.open.remote(order.begin, order.paths), self._opened)

    def _introduce(self, *, late: bool = False) -> None:
        """Say once who is there: when all are, or some have been waited for."""
        here = [hand.facts for hand in self._hands if hand.facts]
        if not here and late and not self._said_full:
            self._said_full = True
            self._send(("say", f"  waiting for {needs(self._order.fleet)} on the cluster"))
        if self._introduced or not here or (len(here) < len(self._hands) and not late):
            return
        self._introduced = True
        nodes = len({each.node for each in here})
        rest = len(self._hands) - len(here)
        text = f"  {_count(len(here), 'actor')} on {_count(nodes, 'node')}"
        text += f" ({needs(self._order.fleet)} each)"
        self._send(("say", text + (f", {rest} more wait for room" if rest else "")))

    def _opened(self, hand: _Hand, answer: Fault | None) -> None:
        if answer:
            raise _Failed(answer)
        self._hand_out(hand)

    def _hand_out(self, hand: _Hand) -> None:
        if not self._waiting:
            hand.shard = None
            return
        hand.shard, hand.heard = self._waiting.popleft(), 0
        self._expect(hand, hand.actor.make.remote(hand.shard), self._made)

    def _made(self, hand: _Hand, answer: Made | Fault) -> None:
        if isinstance(answer, Fault):
            raise _Failed(answer)
        self._introduce(late=True)
        self._advance(hand, answer.heard)
        self._send(("done", answer))
        self._left -= 1
        self._lost_in_a_row = 0
        self._hand_out(hand)

    def _ask_for_tokens(self) -> None:
        for hand in self._hands:
            if hand.shard and not hand.asked:
                hand.asked = True
                self._expect(hand, hand.actor.heard.remote(), self._told)

    def _told(self, hand: _Hand, answer: tuple[str, int]) -> None:
        hand.asked = False
        name, heard = answer
        if hand.shard and hand.shard.name == name:
            self._advance(hand, heard)

    def _advance(self, hand: _Hand, heard: int) -> None:
        if heard != hand.heard:
            self._send(("tokens", heard - hand.heard))
            hand.heard = heard

    def _lose(self, hand: _Hand, reason: str) -> None:
        """Give its shard to others; raises EngineError when that would go on for ever."""
        self._hands.remove(hand)
        self._ray.kill(hand.actor)  # it may only be out of reach: two must not make one shard
        self._lost_in_a_row += 1
        where = f" on {hand.facts.node}" if hand.facts else ""
        if (shard := hand.shard) is not None:
            self._advance(hand, 0)  # its tokens do not count
            self._waiting.appendleft(shard)
            times = self._lost_at[shard.name] = self._lost_at.get(shard.name, 0) + 1
            if times >= LOST_SHARD:
                raise EngineError(
                    f"{shard.name} took {times} workers with it, the last{where}: {reason}; {KEPT}"
                )
        if self._lost_in_a_row >= LOST_WORKERS:
            raise EngineError(
                f"{self._lost_in_a_row} workers were lost and no shard was finished in between, "
                f"the last{where}: {reason}; {KEPT}"
            )
        at = f" at {shard.name}, which is made again" if shard else ""
        self._send(("say", f"  a worker{where} was lost{at}: {reason}"))
        for other in self._hands:  # one that has nothing to do may be there
            if shard and other.shard is None and other.facts and self._is_open(other):
                self._hand_out(other)
                return

    def _is_open(self, hand: _Hand) -> bool:
        return not any(asked is hand and then == self._opened
                       for asked, then in self._answers.values())  # fmt: skip


def check_version(worker: Facts) -> None:
    """Raises EngineError for a worker that would make other bytes, or none."""
    here = facts()
    for what, theirs, ours in (
        ("Python", worker.python, here.python), ("tutelage", worker.version, here.version),
    ):  # fmt: skip
        if theirs != ours:
            raise EngineError(
                f"the node {worker.node} has {what} {theirs}, and this one {ours}: "
                "install the same on every node"
            )


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")


def _why(error: BaseException) -> str:
    """Of the many lines of Ray what happened, without its guesses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    last = last.partition("Worker exit detail: ")[2] or last
    return last.partition(" Some common causes")[0].rstrip(".")[:REASON_LETTERS]
