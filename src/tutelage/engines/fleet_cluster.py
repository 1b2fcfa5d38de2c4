"""A Ray cluster as the fleet's driver meets it: started or joined, watched, its room counted."""

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.core.errors import EngineError
from tutelage.recipe.tables import Fleet

GONE_SECONDS = 20.0
"""Without an answer of the cluster's head, until it counts as gone."""
PROBE_SECONDS = 5.0
WATCH_SECONDS = 1.0
STORE_BYTES = 100 * 2**20  # shards are files: what goes through Ray is small
AUTH_MODE = "RAY_AUTH_MODE"


@contextlib.contextmanager
def cluster(fleet: Fleet, log: Path) -> Iterator[str]:
    """Start Ray or join it; yields the address of its head."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent to anybody
    more: dict[str, Any] = {}
    address = fleet.address
    if address == "auto":  # as Ray does
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "local":
        _own_token(log.with_name("token"))
        more = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    elif address != "auto" and not _answers(address):
        raise EngineError(
            f"nothing answers at {address}; set runtime.ray.address to the head's HOST:PORT, "
            "as `ray start --head` says it (its port is 6379 by default)"
        )
    import ray
    import ray.exceptions

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **more)
    except ConnectionError:
        raise EngineError(_not_joined(address, log.read_text(errors="replace"))) from None
    except ray.exceptions.RayError as error:  # a token that is not there, or another one
        text = " ".join(str(error).split())
        raise EngineError(f"the Ray cluster at {address} refuses: {text[:300]}") from None
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise EngineError(f"{' '.join(str(error).split())}; install the same on all") from None
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _own_token(path: Path) -> None:
    """Nobody else gets into a Ray of ours, and no token is left behind.

    Without this Ray would make one in `~/.ray`, and clusters started later would ask for it.
    """
    if AUTH_MODE not in os.environ:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
        os.environ |= {AUTH_MODE: "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def _not_joined(address: str, log: str) -> str:
    if "InvalidAuthToken" in log:
        return (
            f"the Ray cluster at {address} asks for a token: set {AUTH_MODE}=token, and have its "
            "token in ~/.ray/auth_token or where RAY_AUTH_TOKEN_PATH says"
        )
    return (
        f"no Ray cluster to join (address = {address!r}): start one with `ray start --head`, or "
        'set runtime.ray.address = "local"'
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS):
            return True
    except (OSError, ValueError):  # ValueError: no port, in a RAY_ADDRESS of another form
        return False


def watch(head: str) -> None:
    """Return when the cluster's head has not answered for a while; Ray itself waits longer."""
    last = time.monotonic()
    while time.monotonic() - last < GONE_SECONDS:
        if _answers(head):
            last = time.monotonic()
        time.sleep(WATCH_SECONDS)
    print(f"the head {head} has not answered for {GONE_SECONDS:.0f} s", flush=True)


def _request(fleet: Fleet) -> dict[str, float]:
    wanted = {"CPU": fleet.cpus, "GPU": fleet.gpus, **fleet.resources}
    return {name: amount for name, amount in wanted.items() if amount}


def fits(free: Mapping[str, float], fleet: Fleet) -> int:
    """Actors that this much holds."""
    # Shares such as 0.1 are not exact: 1 / 0.1 must be 10 actors.
    return min(int(free.get(name, 0) / need + 1e-6) for name, need in _request(fleet).items())


def whole_room(nodes: Sequence[Mapping[str, Any]], fleet: Fleet) -> int:
    """Actors that the cluster could hold if it had nothing else to do: one lives on one node."""
    return sum(fits(node["Resources"], fleet) for node in nodes if node["Alive"])


def needs(fleet: Fleet) -> str:
    """What one actor asks for, in words."""
    return ", ".join(f"{amount:g} {name}" for name, amount in _request(fleet).items())
