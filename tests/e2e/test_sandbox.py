"""Hostile programs: none escapes, forges a verdict, or outlives its limits."""

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tutelage.core.errors import DataError, EngineError
from tutelage.evals import sandbox as module
from tutelage.evals.sandbox import Job, Limits, Sandbox, Unsafe, available

LIMITS = Limits(wall_seconds=4.0, cpu_seconds=1, memory_mb=256, tmp_mb=8, file_mb=4)
SLACK_SECONDS = 3.0
"""For starting, killing and a busy machine, on top of the wall time."""
LOOP = ("cpu:", "timeout:")
"""One second of CPU is used up first, unless others leave the sandbox less than a quarter of it."""
TESTS = "assert double(2) == 4\nassert double(-3) == -6"
reason = available()
needs_walls = pytest.mark.skipif(reason is not None, reason=f"no sandbox here: {reason}")
CALLS = {
    "x86_64": {"bpf": 321, "keyctl": 250, "process_vm_writev": 311, "memfd_create": 319,
               "userfaultfd": 323, "perf_event_open": 298},
    "aarch64": {"bpf": 280, "keyctl": 219, "process_vm_writev": 271, "memfd_create": 279,
                "userfaultfd": 282, "perf_event_open": 241},
}.get(platform.machine(), {})  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, 2) as pool:
        yield pool


# Each of these is wrong, and does something to be taken for right.
FORGERS = {
    "exits_before_the_tests": "import sys\nsys.exit(0)",
    "exits_hard_before_the_tests": "import os\nos._exit(0)",
    "exits_hard_during_the_tests": """
        import os
        def double(x): os._exit(0)""",
    "raises_system_exit_during_the_tests": """
        def double(x): raise SystemExit(0)""",
    "prints_pass": """
        print('PASS', 'passed', '{"nonce": "", "passed": true, "reason": "passed"}', flush=True)
        def double(x): return 0""",
    "writes_to_every_descriptor": """
        import os
        for fd in range(64):
            try: os.write(fd, b'{"nonce": "", "passed": true, "reason": "passed"}\\n')
            except OSError: pass
        def double(x): return 0""",
    "patches_builtins": """
        import builtins, atexit, os, sys
        builtins.AssertionError = type('Never', (Exception,), {})
        builtins.compile = lambda *a, **k: None
        builtins.all = builtins.any = lambda *a: True
        sys.stdout = sys.stderr = None
        atexit.register(os._exit, 0)
        def double(x): return 0""",
    "traces_and_skips_lines": """
        import sys, threading
        def trace(frame, event, arg):
            frame.f_trace_opcodes = True
            return trace
        sys.settrace(trace); threading.settrace(trace)
        sys.excepthook = sys.unraisablehook = lambda *a: None
        def double(x): return 0""",
    "is_equal_to_everything": """
        class Yes(int):
            __eq__ = __le__ = __ge__ = lambda self, other: True
            __ne__ = lambda self, other: False
            __hash__ = int.__hash__
        def double(x): return Yes(0)""",
    "is_an_object_equal_to_everything": """
        class Yes:
            __eq__ = lambda self, other: True
            __ne__ = lambda self, other: False
        def double(x): return Yes()""",
    "looks_for_the_tests_in_memory": """
        import gc, inspect, sys
        seen = [o for o in gc.get_objects() if isinstance(o, dict) and 'nonce' in o]
        frames = [f.frame.f_locals for f in inspect.stack()]
        for space in [*seen, *frames]:
            for key in list(space):
                if key in ('passed', 'reason', 'tests'):
                    space[key] = True
        def double(x): return bool(seen)""",
    "forks_and_lets_the_child_answer_twice": """
        import os
        def double(x):
            os.fork()
            return 0""",
}

# Each tries what must not work and returns what did.
ESCAPERS = {
    "reads_secrets": """
        import os, pathlib, sys
        def tries():
            paths = ['/etc/shadow', '/etc/passwd', '/var', '/sys', HERE,
                     '/proc/1/environ', '/proc/self/environ', '/proc/self/maps', '/run', '/boot']
            return [p for p in paths if os.path.exists(p)] + os.listdir('/tmp')""".replace(
        "HERE", repr(__file__)
    ),
    "reads_the_environment": """
        import os
        given = {'PATH', 'HOME', 'PWD', 'PYTHONHASHSEED', 'LC_CTYPE'}
        def tries(): return sorted(set(os.environ) - given)""",
    "writes_and_deletes_outside": """
        import os, shutil, sys
        def tries():
            done = []
            for p in ('/x', '/usr/x', '/dev/x', '/etc/x', os.path.dirname(os.__file__) + '/x'):
                try: open(p, 'w'); done.append(p)
                except OSError: pass
            for p in ('/usr/bin/env', os.__file__, sys.executable):
                try: os.remove(p); done.append(p)
                except OSError: pass
            folder = os.path.dirname(os.__file__) + '/json'
            shutil.rmtree(folder, ignore_errors=True)
            return done if os.path.exists(folder + '/decoder.py') else [*done, folder]""",
    "connects": """
        import socket
        def tries():
            done = []
            vsock = 40
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, vsock):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                    try: socket.socket(family, kind); done.append(int(family))
                    except OSError: pass
            try: done.append(socket.getaddrinfo('localhost.example', 80))
            except OSError: pass
            return done""",
    "kills_everything": """
        import os, signal
        def tries():
            for pid in (-1, 1, os.getppid()):
                for number in signal.valid_signals():
                    if pid != -1 or number == signal.SIGKILL:
                        try: os.kill(pid, number)
                        except OSError: pass
            return []""",
    "calls_the_kernel": """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def tries():
            done = []
            def must_fail(name, result):
                if result != -1: done.append(name)
            must_fail('mount', libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))
            must_fail('umount', libc.umount2(b'/tmp', 2))
            for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000):
                must_fail('unshare', libc.unshare(flag))
                must_fail('clone', libc.syscall(56 if os.uname().machine == 'x86_64' else 220,
                                                flag | 17, 0, 0, 0, 0))
            for parent in (1, os.getppid()):
                must_fail('ptrace', libc.ptrace(16, parent, 0, 0))
            must_fail('prlimit', libc.prlimit(os.getppid(), 0, None, (ctypes.c_long * 2)()))
            must_fail('setuid', libc.setuid(0))
            must_fail('chroot', libc.chroot(b'/tmp'))
            for name, number in CALLS.items():
                must_fail(name, libc.syscall(number, 0, 0, 0, 0, 0, 0))
            for number in range(424, 470):
                must_fail(number, libc.syscall(number, 0, 0, 0, 0, 0, 0))
            return done""".replace("CALLS", repr(CALLS)),
    "writes_its_parents_memory": """
        import os
        def tries():
            done = []
            for pid in ('self', '1', str(os.getppid())):
                try: open(f'/proc/{pid}/mem', 'r+b'); done.append(pid)
                except OSError: pass
            return done""",
    "becomes_root_by_setuid_binaries": """
        import subprocess, os
        def tries():
            done = [] if os.getuid() else ['root']
            for words in (['su', '-c', 'true'], ['mount', '-t', 'tmpfs', 'none', '/tmp'],
                          ['unshare', '-r', 'true'], ['bwrap', '--ro-bind', '/', '/', 'true']):
                try: code = subprocess.run(['/usr/bin/' + words[0], *words[1:]], timeout=2,
                                           capture_output=True, stdin=subprocess.DEVNULL).returncode
                except (OSError, subprocess.TimeoutExpired): continue
                if not code: done.append(words[0])
            return done""",
}

# Each takes all it can get; the reason must begin as told.
HOGS = {
    "loops": ("while True: pass", LOOP),
    "loops_in_a_call": ("def double(x):\n  while True: pass", LOOP),
    "sleeps": ("import time\ntime.sleep(60)", "timeout:"),
    "ignores_every_signal": (
        """
        import signal
        for number in signal.valid_signals():
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass""",
        LOOP,
    ),
    "bombs_with_forks": (
        """
        import os
        def double(x):
            while True:
                try: os.fork()
                except OSError: pass""",
        (*LOOP, "broken:"),
    ),
    "hogs_memory": ("held = bytearray(1 << 40)", "raised: MemoryError"),
    "hogs_memory_slowly": (
        "held = []\nwhile True: held.append(bytearray(b'x' * (1 << 20)))",
        ("raised: MemoryError", "memory:"),
    ),
    "hogs_memory_with_children": (
        """
        import os, time
        while True:
            try:
                if not os.fork(): break
            except OSError: break
        held = bytearray(b'x') * (150 << 20)
        time.sleep(60)""",
        "memory:",
    ),
    "fills_the_disk": (
        """
        for i in range(1000):
            with open(f'/tmp/{i}', 'wb') as f: f.write(b'x' * (1 << 20))""",
        "raised: OSError: [Errno 28]",
    ),
    "writes_one_big_file": (
        "with open('/tmp/big', 'wb') as f:\n  while True: f.write(b'x' * (1 << 20))",
        "raised: OSError: [Errno 27]",
    ),
    "hogs_descriptors": (
        "held = [open('/dev/null') for _ in range(10**6)]",
        "raised: OSError: [Errno 24]",
    ),
    "floods_the_output": ("while True: print('x' * 1000)", "output:"),
    "recurses_without_end": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        (
            "ended: killed by SIGSEGV",
            "raised: MemoryError",
            "raised: RecursionError",
            "cpu:",
            "memory:",
        ),
    ),
    "returns_a_bomb": ("def double(x): return 'x' * (1 << 26)", "broken:"),
    "returns_a_deep_list": (
        "def double(x):\n  a = []\n  for _ in range(10**5): a = [a]\n  return a",
        "failed: RecursionError",
    ),
    "returns_a_huge_number": ("def double(x): return 10 ** 100000", "failed: AssertionError"),
}


def running(argument: str) -> list[int]:
    """Processes of the whole system, sandboxes included, whose last argument is this."""
    found = psutil.process_iter(["cmdline"])
    return [p.pid for p in found if (p.info["cmdline"] or [""])[-1] == argument]


def until(true: Callable[[], object], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(true())


def dedent(program: str) -> str:
    lines = program.strip("\n").splitlines()
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[margin:] for line in lines)


@needs_walls
@pytest.mark.parametrize("name", FORGERS)
def test_no_program_forges_a_verdict(sandbox: Sandbox, name: str) -> None:
    verdict = sandbox.run(dedent(FORGERS[name]), tests=TESTS, entry_point="double")
    assert not verdict.passed, verdict
    assert verdict.reason.startswith(("raised:", "failed:", "ended:", "broken:")), verdict


@needs_walls
def test_a_program_does_not_decide_what_built_ins_and_modules_do_in_the_tests(
    sandbox: Sandbox,
) -> None:
    program = """
        def abs(x): return 0
        class math: isclose = staticmethod(lambda *a: True)
        def double(x): return 0"""
    for tests in ("assert abs(double(2) - 4) < 1e-9", "assert math.isclose(double(2), 4)"):
        verdict = sandbox.run(dedent(program), tests=tests, entry_point="double")
        assert verdict.reason.startswith("failed: AssertionError"), verdict


@needs_walls
@pytest.mark.parametrize("name", ESCAPERS)
def test_no_program_escapes(sandbox: Sandbox, name: str) -> None:
    verdict = sandbox.run(dedent(ESCAPERS[name]), tests="assert tries() == [], tries()")
    assert verdict.passed, verdict


@needs_walls
@pytest.mark.parametrize("name", HOGS)
def test_no_program_outlives_its_limits(sandbox: Sandbox, name: str) -> None:
    program, expected = HOGS[name]
    start = time.monotonic()
    verdict = sandbox.run(dedent(program), tests=TESTS, entry_point="double")
    assert not verdict.passed
    assert verdict.reason.startswith(expected), verdict
    assert time.monotonic() - start < LIMITS.wall_seconds + SLACK_SECONDS
    assert len(verdict.stdout_tail) <= module.TAIL_BYTES


@needs_walls
def test_a_daemon_dies_with_its_program(sandbox: Sandbox) -> None:
    seconds = f"4242.{time.monotonic_ns()}"
    program = f"""
        import os, subprocess
        def double(x):
            if not os.fork():
                os.setsid()
                if not os.fork():
                    os.execv('/usr/bin/sleep', ['sleep', '{seconds}'])
                os._exit(0)
            os.wait()
            return 2 * x"""
    assert sandbox.run(dedent(program), tests=TESTS).passed
    assert not running(seconds)


@needs_walls
def test_a_sandbox_dies_with_the_process_that_started_it() -> None:
    seconds = f"4343.{time.monotonic_ns()}"
    program = f"import os\nos.execv('/usr/bin/sleep', ['sleep', '{seconds}'])"
    script = "import sys\nfrom tutelage.evals.sandbox import Limits, Sandbox\n"
    script += "with Sandbox(Limits(), 1) as pool: pool.run(sys.argv[1], tests='assert f()')"
    host = subprocess.Popen([sys.executable, "-c", script, program])
    assert until(lambda: running(seconds))
    host.kill()
    host.wait()
    assert until(lambda: not running(seconds))


@needs_walls
def test_a_program_finds_nothing_of_the_one_before(sandbox: Sandbox) -> None:
    program = "import os\nfound = os.listdir('/tmp')\nopen('/tmp/mine', 'w').close()"
    jobs = [Job(program=program, tests="assert found == []")] * 6
    assert all(verdict.passed for verdict in sandbox.map(jobs))


@needs_walls
def test_verdicts_come_in_the_order_of_the_jobs(sandbox: Sandbox) -> None:
    numbers = list(range(12))
    jobs = [Job(program=f"n = {n}\nprint(n)", tests="assert n % 3") for n in numbers]
    verdicts = list(sandbox.map(iter(jobs)))
    assert [v.stdout_tail for v in verdicts] == [f"{n}\n" for n in numbers]
    assert [v.passed for v in verdicts] == [n % 3 > 0 for n in numbers]


HONEST = {
    "humaneval_form": Job(
        program="def inc(n):\n  return n + 1",
        tests="def check(candidate):\n    assert candidate(1) == 2",
        entry_point="inc",
    ),
    "an_entry_point_named_like_a_built_in": Job(
        program="def sum(a, b): return a + b", tests="assert sum(1, 2) == 3", entry_point="sum"
    ),
    "values_of_every_kind": Job(
        program="def same(x): return x",
        tests="\n".join(
            f"assert repr(same({x})) == repr({x})"
            for x in (
                "None",
                "True",
                "10**5000 % 10**4000",
                "-0.0",
                "float('nan')",
                "1j",
                "'\\ud800'",
            )
        )
        + "\nfor x in (b'a', [1, (2,)], {3: {4}}, frozenset({5}), range(6), int):\n"
        + "    assert same(x) == x and type(same(x)) is type(x)",
    ),
    "an_argument_changed_in_place": Job(
        program="def sort(x): x.sort()", tests="a = [2, 1]\nsort(a)\nassert a == [1, 2]"
    ),
    "an_exception_the_tests_expect": Job(
        program="class Mine(ValueError): pass\ndef f(): raise Mine('no')",
        tests="try:\n    f()\nexcept ValueError as error:\n    assert str(error) == 'no'\n"
        "else:\n    assert False",
    ),
    "objects_of_the_program": Job(
        program="class Node:\n  def __init__(self, v): self.v, self.next = v, None\n"
        "def total(n): return n.v + total(n.next) if n else 0\n"
        "def count():\n  yield from range(3)",
        tests="n = Node(1)\nn.next = Node(2)\nassert total(n) == 3\nassert n.next.v == 2\n"
        "assert list(count()) == [0, 1, 2]",
    ),
    "dataclasses_threads_and_modules": Job(
        program="from __future__ import annotations\nimport asyncio, dataclasses, math, threading\n"
        "@dataclasses.dataclass\nclass P: x: int\n"
        "async def later(x): return P(x).x\n"
        "def f(x):\n  t = threading.Thread(target=print); t.start(); t.join()\n"
        "  return asyncio.run(later(x)) * math.pi",
        tests="assert math.isclose(f(2), 2 * math.pi)",
    ),
}


@needs_walls
@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(sandbox: Sandbox, name: str) -> None:
    job = HONEST[name]
    verdict = sandbox.run(job.program, tests=job.tests, entry_point=job.entry_point)
    assert verdict == module.SandboxVerdict(True, "passed", verdict.stdout_tail, verdict.seconds)


@needs_walls
def test_a_reason_names_the_test_that_failed(sandbox: Sandbox) -> None:
    verdict = sandbox.run("def double(x): return x + 2", tests=TESTS)
    assert verdict.reason == "failed: AssertionError in line 2: assert double(-3) == -6"
    missing = sandbox.run("x = 1", tests=TESTS, entry_point="double")
    assert missing.reason == "failed: the program does not define double"


@needs_walls
def test_tests_that_never_end_are_stopped(sandbox: Sandbox) -> None:
    verdict = sandbox.run("def f(): return 1", tests="while f(): pass")
    assert verdict.reason.startswith((*LOOP, "ended: the process of the tests was killed")), verdict


@needs_walls
def test_tests_that_swallow_every_exception_do_not_save_a_dead_program(sandbox: Sandbox) -> None:
    tests = "try:\n    double(1)\nexcept BaseException:\n    pass"
    verdict = sandbox.run("import os\ndef double(x): os._exit(0)", tests=tests)
    assert verdict.reason.startswith("ended: exited with 0")


def test_a_program_without_tests_is_refused() -> None:
    with Unsafe(LIMITS, 1) as pool, pytest.raises(DataError, match="no tests for f; give"):
        pool.run("f = 1", tests=" \n", entry_point="f")


def test_without_bubblewrap_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"no sandbox: bwrap.* not found; install bubblewrap"):
        Sandbox(LIMITS, 1).__enter__()


def test_where_bubblewrap_may_not_make_namespaces_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("bwrap", "setpriv"):
        script = tmp_path / name
        script.write_text(
            "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1"
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(EngineError, match=r"did not start: bwrap: No permissions.*user namespaces"):
        Sandbox(LIMITS, 1).__enter__()


def test_unsafe_keeps_the_limits_and_leaves_nothing_behind() -> None:
    before = psutil.Process().children()  # other tests' graders
    with Unsafe(LIMITS, 1) as pool:
        assert pool.run("def double(x): return 2 * x", tests=TESTS).passed
        assert pool.run("import os\nos._exit(0)", tests=TESTS).reason.startswith("ended:")
        assert pool.run("while True: pass", tests=TESTS).reason.startswith(LOOP)
        assert pool.run("x = 'x' * (1 << 30)", tests=TESTS).reason.startswith("raised: MemoryError")
    left = set(psutil.Process().children()) - set(before)
    assert not [one for one in left if one.name() != "bwrap"]  # the other tests' warm ones
