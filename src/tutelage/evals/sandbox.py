"""Verdicts on programs nobody has read: does this code pass these tests, within these limits?

Owns the pool of sandboxes, the limits and the verdict. The walls are in `sandbox_jail`, what runs
behind them in `sandbox_worker`. Knows no benchmark and no model. Linux with bubblewrap; anywhere
else it refuses, unless the caller asks for `Unsafe` by name.

How a verdict is made. Each program gets a sandbox of its own, started ahead of time and thrown away
after. In it one process runs the program and only answers questions; another holds the tests, calls
the program's functions through a pipe and compares what comes back, rebuilt as plain data. It alone
holds the way out for the verdict and the nonce of this job, and it forked the program's process
before it knew either.

Guaranteed, under the assumption that the kernel, bubblewrap and CPython's json have no hole:

- nothing of the host is readable but /usr and the Python in use, nothing is writable but a capped
  /tmp in memory; there is no network, no /proc, no other process, no environment;
- the program cannot read the tests, write a verdict, or reach the process that decides: exiting
  early, printing PASS, patching built-ins, tracing, walking the heap or a lying `__eq__` change
  nothing, since none of it happens where the comparison is made;
- all its processes are gone, and its files with them, before the verdict is returned.

Not guaranteed: that a pass means a good program. It can answer by heart, it sees the arguments of
each call, and a helper that the tests take from the program (`poly` of HumanEval/32) is the
program's to write. Inside the limits it may burn what it was given: processes times memory until
the next look (every `POLL_SECONDS`), and empty files cost kernel memory that only time bounds.

What tests may do. Arguments and results cross as None, bool, numbers, str, bytes, list, tuple, set,
frozenset, dict and range, subclasses as their base; changes to a list, dict or set passed as an
argument come back. Other results (functions, classes, instances, iterators) are a `Remote`: it can
be called, indexed, iterated, measured and printed, its attributes read and set; it equals only
itself. Tests cannot pass functions or objects of their own, nor use a class of the program's in
`isinstance` or `except`. The verdict is theirs, so take them from a source you trust; they run
behind the walls all the same. Hashes are not salted, so that a verdict repeats.
"""

import binascii
import contextlib
import json
import marshal
import os
import secrets
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tutelage.core.errors import DataError, EngineError
from tutelage.evals import sandbox_jail

WORKER = Path(__file__).with_name("sandbox_worker.py")
START_SECONDS = 20.0
"""A sandbox that is not ready by then never will be; it takes 0.05 s."""
POLL_SECONDS = 0.1
TAIL_BYTES = 2000
VERDICT_BYTES = 1 << 16
OURS = 2
"""Processes of the sandbox itself: the tests' and the program's first."""
INSTALL = "install bubblewrap and util-linux, e.g. apt-get install bubblewrap util-linux"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. Each holds for a process, except where it says otherwise."""

    wall_seconds: float = 20.0
    """From the arrival of the program to the verdict; for the sandbox."""
    cpu_seconds: int = 8
    memory_mb: int = 512
    """Address space of a process, and the sum of what its processes hold resident, looked at ten
    times a second; pages two of them share count twice."""
    processes: int = 8
    """Processes and threads of the program besides its first; for the sandbox."""
    file_mb: int = 16
    """Size of one file."""
    tmp_mb: int = 32
    """Content of /tmp; for the sandbox."""
    open_files: int = 64
    output_kb: int = 256
    """Standard output and error together; for the sandbox."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program, the tests it must pass and the function they are about.

    If `tests` defines `check`, it is called with the program's `entry_point` (HumanEval); else the
    tests are statements that fail by raising (MBPP). They see the globals of the program that they
    name, but a name of a built-in or of a standard module means the real one, except `entry_point`.
    """

    program: str
    tests: str
    entry_point: str | None = None


@dataclass(frozen=True)
class SandboxVerdict:
    passed: bool
    reason: str
    """`passed`, or one line that begins with the kind of failure: `raised:` by the program before
    the tests, `failed:` in the tests, `ended:` by itself, `timeout:`, `cpu:`, `memory:`, `output:`,
    `broken:` for what it sent instead of an answer."""
    stdout_tail: str
    """The last 2,000 bytes of standard output and error."""
    seconds: float
    """Wall time from the arrival of the program to the verdict."""


class _Box:
    """One sandbox, warm until its job comes, dead after it."""

    def __init__(self, limits: Limits, *, walls: bool) -> None:
        self.limits, self.walls, self.scratch = limits, walls, None
        self.tail, self.output_size = b"", 0
        self.verdict, verdict_out = os.pipe()
        rules, rules_in = os.pipe()
        inner = [sandbox_jail.python(), "-s", "-S", "-P", "-u", "-c", _worker()]
        inner += [str(verdict_out), json.dumps(_rlimits(limits))]
        if walls:
            os.write(rules_in, sandbox_jail.seccomp_filter())  # 1 KB: fits a pipe
            tmp_bytes = limits.tmp_mb << 20
            inner = sandbox_jail.command(inner, seccomp_fd=rules, tmp_bytes=tmp_bytes)
        else:
            self.scratch = tempfile.TemporaryDirectory(prefix="unsafe-")
        try:
            self.process = subprocess.Popen(
                inner, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=(verdict_out, rules), start_new_session=True, bufsize=0,
                cwd=self.scratch.name if self.scratch else "/",
                env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
            )  # fmt: skip
        finally:
            for fd in (verdict_out, rules, rules_in):
                os.close(fd)

    def judge(self, job: Job) -> SandboxVerdict:
        """Give it the job and wait for the verdict or a limit. Raises EngineError if not ready."""
        try:
            line = self._line(START_SECONDS)
            if line != b"ready":
                raise EngineError(f"the sandbox did not start: {self._tail().strip() or line}")
            nonce, start = secrets.token_hex(16), time.monotonic()
            said = {"program": job.program, "tests": job.tests, "entry_point": job.entry_point}
            assert self.process.stdin
            with contextlib.suppress(BrokenPipeError):  # it died; the verdict's end says so
                body = json.dumps({**said, "nonce": nonce}).encode()
                self.process.stdin.write(len(body).to_bytes(4, "little") + body)
            line = self._line(self.limits.wall_seconds)
            seconds = time.monotonic() - start
            if self.walls and isinstance(line, bytes):  # it is about to end by itself
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(1.0)
        finally:
            self.close()
        passed, reason = _parse(line, nonce) if isinstance(line, bytes) else (False, line)
        return SandboxVerdict(passed, reason, self._tail(), seconds)

    def close(self) -> None:
        """Kill it with all its processes and wait until they are gone."""
        while self.process.returncode is None:  # not reaped yet, so its number is still its own
            self._kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if self.verdict >= 0:
            os.close(self.verdict)
            self.verdict = -1
        if self.scratch:
            self.scratch.cleanup()

    def _kill(self) -> None:
        """Behind walls kill process 1 of the namespace, not bubblewrap, which waits for its end."""
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            inner = psutil.Process(self.process.pid).children() if self.walls else []
            for process in inner:
                process.kill()
            if not inner:
                os.killpg(self.process.pid, signal.SIGKILL)

    def _line(self, seconds: float) -> bytes | str:
        """The next line of the verdict channel, or the reason why there is none."""
        deadline, line, look = time.monotonic() + seconds, b"", time.monotonic() + POLL_SECONDS
        assert self.process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self.verdict, selectors.EVENT_READ, "verdict")
            selector.register(self.process.stdout.fileno(), selectors.EVENT_READ, "output")
            while True:
                now = time.monotonic()
                if now >= deadline:
                    return f"timeout: no verdict within {seconds:g} s"
                if now >= look:
                    if (used := _resident_mb(self.process.pid)) > self.limits.memory_mb:
                        return f"memory: {used} MB, more than {self.limits.memory_mb} MB"
                    look = now + POLL_SECONDS
                ready = {key.data: key.fd for key, _ in selector.select(min(look, deadline) - now)}
                if "output" in ready and not self._drain():
                    selector.unregister(ready["output"])
                if self.output_size > self.limits.output_kb << 10:
                    return f"output: more than {self.limits.output_kb} KB"
                if "verdict" in ready:
                    part = os.read(self.verdict, VERDICT_BYTES)
                    line += part
                    if line.endswith(b"\n"):
                        self._drain_rest()
                        return line[:-1]
                    if not part or len(line) > VERDICT_BYTES:
                        self._drain_rest()
                        return "ended: the process of the tests was killed"

    def _drain(self) -> bool:
        """Read some output, keep its end; False at the end of it."""
        assert self.process.stdout
        part = self.process.stdout.read(1 << 16) or b""
        self.tail = (self.tail + part)[-TAIL_BYTES:]
        self.output_size += len(part)
        return bool(part)

    def _drain_rest(self) -> None:
        """What was printed before the verdict and is still in the pipe."""
        assert self.process.stdout
        os.set_blocking(self.process.stdout.fileno(), False)
        while self.output_size <= self.limits.output_kb << 10 and self._drain():
            pass
        os.set_blocking(self.process.stdout.fileno(), True)

    def _tail(self) -> str:
        return self.tail.decode(errors="replace")


class _Pool:
    """Threads that each keep the next sandbox warm while the present one runs."""

    walls: bool

    def __init__(self, limits: Limits, workers: int) -> None:
        self.limits, self.workers = limits, workers
        self._threads: ThreadPoolExecutor | None = None
        self._own = threading.local()
        self._warm: set[_Box] = set()

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._threads
        self._threads.shutdown(cancel_futures=True)
        for box in self._warm:
            box.close()
        self._warm.clear()

    def run(self, program: str, *, tests: str, entry_point: str | None = None) -> SandboxVerdict:
        """The verdict on one program; from any thread.

        Raises: DataError if there is no test, for then the only witness is the program itself;
        EngineError if the sandbox does not start.
        """
        return self._submit(Job(program=program, tests=tests, entry_point=entry_point)).result()

    def map(self, jobs: Iterable[Job]) -> Iterator[SandboxVerdict]:
        """Verdicts in the order of the jobs, of which it takes a few ahead. Raises as `run`."""
        pending = deque[Future[SandboxVerdict]]()
        for job in jobs:
            pending.append(self._submit(job))
            if len(pending) > 4 * self.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _submit(self, job: Job) -> Future[SandboxVerdict]:
        if not job.tests.strip():
            raise DataError(f"no tests for {job.entry_point or 'a program'}; give at least one")
        if not self._threads:
            raise RuntimeError("use the sandbox in a with statement")
        return self._threads.submit(self._judge, job)

    def _judge(self, job: Job) -> SandboxVerdict:
        # A thread starts its own sandboxes, since bubblewrap dies with the thread that started it.
        box = getattr(self._own, "box", None) or _Box(self.limits, walls=self.walls)
        self._own.box = _Box(self.limits, walls=self.walls)
        self._warm.add(self._own.box)
        self._warm.discard(box)
        return box.judge(job)


class Sandbox(_Pool):
    """Runs programs behind walls, `workers` at a time. A context manager.

    Entering raises EngineError where there is no bubblewrap or the system forbids what it needs.
    """

    walls = True

    def __enter__(self) -> Self:
        if reason := available():
            raise EngineError(
                f'no sandbox: {reason}; runtime.sandbox = "none" runs programs without one, as you'
            )
        return super().__enter__()


class Unsafe(_Pool):
    """`sandbox = "none"`: the same limits and the same two processes, but no walls at all.

    The program has the user's files, network and processes; it can outlive its limits, and forge a
    verdict by writing into the other process. Only for programs you would run by hand.
    """

    walls = False


def available() -> str | None:
    """Why there can be no sandbox here, in one line with what to do; None if there can."""
    if not sandbox_jail.supported():
        return "it needs Linux on x86_64 or aarch64"
    if missing := sandbox_jail.missing():
        return f"{' and '.join(missing)} not found; {INSTALL}"
    try:
        verdict = _Box(Limits(), walls=True).judge(Job(program="a = 1", tests="assert a == 1"))
    except EngineError as error:
        return f"{error}; let this user make user namespaces, or run as root outside a container"
    return None if verdict.passed else f"a program that passes did not: {verdict.reason}"


@cache
def _worker() -> str:
    """The worker as a one-line script, compiled here: that saves 6 of the 40 ms each one costs."""
    code = marshal.dumps(compile(WORKER.read_text(), WORKER.name, "exec"))
    text = binascii.b2a_base64(code, newline=False).decode()
    return f"import marshal, binascii; exec(marshal.loads(binascii.a2b_base64('{text}')))"


def _rlimits(limits: Limits) -> dict[str, tuple[int, int]]:
    """Soft and hard resource limits by name.

    One second lies between SIGXCPU, which a program may ignore, and SIGKILL. A core of 1 byte, not
    0, also keeps a crash from the host's core handler (Linux, fs/coredump.c).
    """
    memory, processes = limits.memory_mb << 20, limits.processes + OURS
    same = {
        "RLIMIT_AS": memory, "RLIMIT_NPROC": processes, "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_FSIZE": limits.file_mb << 20, "RLIMIT_CORE": 1, "RLIMIT_MEMLOCK": 0,
    }  # fmt: skip
    cpu = (limits.cpu_seconds, limits.cpu_seconds + 1)
    return {"RLIMIT_CPU": cpu, **{name: (value, value) for name, value in same.items()}}


def _resident_mb(pid: int) -> int:
    """Resident memory of a process and all below it, in MB."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):  # it ends while we look: its pipe will tell
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total >> 20


def _parse(line: bytes, nonce: str) -> tuple[bool, str]:
    try:
        said = json.loads(line)
        if said["nonce"] == nonce and isinstance(said["passed"], bool):
            return said["passed"], str(said["reason"])
    except (ValueError, TypeError, KeyError):
        pass  # the same answer as for a wrong nonce
    return False, "ended: the verdict is not from this job's tests"
