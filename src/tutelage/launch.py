"""`[runtime] processes`: this run again, in several processes on this machine, under torchrun.

The processes are those of `torchrun --standalone`; here only the words about one that is killed are
ours. On several machines, `torchrun` or `accelerate launch` is started by hand (docs/scale.md).
"""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence

from tutelage.core.errors import EngineError
from tutelage.core.team import LAUNCHER, this_process
from tutelage.recipe.tables import Runtime

POLL_SECONDS = 0.5


def wanted(runtime: Runtime) -> bool:
    """Whether processes are asked for that nobody has started yet."""
    return runtime.processes > 1 and this_process().size == 1


def launched(words: Sequence[str], runtime: Runtime) -> int:
    """Run `tutelage WORDS` in `runtime.processes` processes; returns the exit code of the first.

    What they say is theirs; Ctrl-C and SIGTERM end all of them. Raises EngineError for a process
    that was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    share = max(1, (os.cpu_count() or 1) // runtime.processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(runtime.threads or share))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # of the sockets of one that ends
    os.environ[LAUNCHER] = str(os.getpid())
    logging.disable(logging.CRITICAL)  # torchrun's own report of a process that failed
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=runtime.processes, run_id=uuid.uuid4().hex,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "tutelage", *words)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return exit_code(codes, runtime.processes)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + error.sigval
    finally:
        logging.disable(logging.NOTSET)
    return 0


def exit_code(codes: Mapping[int, int], processes: int) -> int:
    """The first failing process's own code; EngineError where one was killed, which says nothing.

    The others fail of a killed one, so it goes first.
    """
    for rank, code in sorted(codes.items()):
        if code < 0:
            raise EngineError(
                f"process {rank} of {processes} (from 0) was ended by signal {-code} "
                f"({'out of memory?' if code == -signal.SIGKILL else signal.strsignal(-code)}); "
                "run again: it goes on from the last checkpoint"
            )
    return codes[min(codes)]


def end_with_launcher() -> None:
    """In a process of ours: end when its launcher does, whatever ended it; Ctrl-C is for that."""
    if launcher := os.environ.get(LAUNCHER):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        threading.Thread(target=_watch, args=(int(launcher),), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)  # a session of its own, with all that this process started
