"""What runs inside the sandbox: the tests in one process, the program in another that serves it.

A script of the standard library alone; the host compiles it for `python -c`. It forks before it
knows anything: the child gets the program and answers questions about it (call this, take that
attribute); the parent holds the tests, the nonce and the only way out for a verdict. Values cross
between the two as tagged JSON and arrive as new plain objects, so a program cannot send code, or an
object whose `==` lies. Everything else stays with the program, and the tests hold a `Remote`.
"""

from __future__ import annotations

import builtins
import fcntl
import json
import os
import resource
import signal
import sys
import types

TYPE_CHECKING = False  # `typing` would cost each sandbox 5 of its 40 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Keep = Callable[[Any], Any]
    Reach = Callable[[int], Any]
    Ask = Callable[..., Any]

FRAME_BYTES = 32 << 20
"""Longest message between the two: it is rebuilt as objects within the memory of one process."""
JSON_INT = 1 << 62  # beyond it ints go as hex: decimal conversion stops at 4300 digits
CHECK = "check"  # the function in which HumanEval keeps its assertions
TESTS = "<tests>"
ENDED = "ended:"
COLLECTIONS: tuple[Any, ...] = (tuple, set, frozenset)
TYPES = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, object)
"""Built-in types that may cross as themselves: `remove_datatype(values, int)` of MBPP/533."""


class ProgramLost(BaseException):
    """The program's process is gone, or what it sends is not the protocol."""


class Channel:
    """Length-prefixed JSON over two pipes. Reading at their end raises EOFError."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes = reads, writes

    def send(self, message: object) -> None:
        body = json.dumps(message).encode()
        body = len(body).to_bytes(4, "little") + body
        while body:
            body = body[os.write(self.writes, body) :]

    def receive(self) -> Any:
        length = int.from_bytes(self._read(4), "little")
        if length > FRAME_BYTES:
            raise ProgramLost(f"a value of more than {FRAME_BYTES >> 20} MB")
        return json.loads(self._read(length))

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            part = os.read(self.reads, min(length, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


def encode(value: Any, keep: Keep) -> Any:
    """Plain data as JSON with tags, subclasses as their plain base; `keep(value)` is the rest."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        small = int(value)
        return small if -JSON_INT < small < JSON_INT else {"t": "int", "v": hex(small)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"t": "complex", "v": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"t": type(value).__name__, "v": value.hex()}
    if isinstance(value, list):
        return [encode(item, keep) for item in list.__iter__(value)]
    for kind in COLLECTIONS:
        if isinstance(value, kind):
            return {"t": kind.__name__, "v": [encode(item, keep) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        items = dict.items(value)
        return {"t": "dict", "v": [[encode(k, keep), encode(v, keep)] for k, v in items]}
    if isinstance(value, range):
        return {"t": "range", "v": [value.start, value.stop, value.step]}
    if isinstance(value, type) and value in TYPES:
        return {"t": "type", "v": value.__name__}
    return keep(value)


def decode(data: Any, reach: Reach) -> Any:
    """Inverse of `encode`; `reach(handle)` is what a handle stands for on this side."""
    if isinstance(data, list):
        return [decode(item, reach) for item in data]
    if not isinstance(data, dict):
        return data
    kind, value = data["t"], data["v"]
    if kind == "handle":
        return reach(value)
    if kind == "int":
        return int(value, 16)
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(value)
    if kind == "complex":
        return complex(*value)
    if kind == "range":
        return range(*value)
    if kind == "type":
        return {known.__name__: known for known in TYPES}[value]
    if kind == "dict":
        return {decode(k, reach): decode(v, reach) for k, v in value}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](
        decode(v, reach) for v in value
    )


def serve(channel: Channel) -> None:
    """The program's side: do what is asked until the process is killed."""
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look their class's module up
    held: list[object] = []

    def keep(value: object) -> object:
        held.append(value)
        return {"t": "handle", "v": len(held) - 1}

    questions: dict[str, Callable[..., Any]] = {
        "run": lambda text: exec(compile(text, "<program>", "exec"), module.__dict__),
        "name": lambda name: module.__dict__[name],
        "call": lambda function, args, named: function(*args, **named),
        "getattr": getattr,
        "setattr": setattr,
        "getitem": lambda target, key: target[key],
        "setitem": lambda target, key, value: target.__setitem__(key, value),
        "contains": lambda target, key: key in target,
        "iter": iter,
        "next": next,
        "len": len,
        "bool": bool,
        "str": str,
        "repr": repr,
    }
    while True:
        name, sent = channel.receive()
        arguments = [decode(item, held.__getitem__) for item in sent]
        try:
            reply = {"value": encode(questions[name](*arguments), keep)}
            if name == "call":
                after = [encode(item, keep) if mutable(item) else None for item in arguments[1]]
                if any(
                    new is not None and new != old for new, old in zip(after, sent[1], strict=True)
                ):
                    reply["after"] = after
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = {"raised": kinds, "text": str(error)[:1000]}
        channel.send(reply)


class Remote:
    """An object that stays with the program: a function, a class, an instance, an iterator.

    It is equal to itself only. Whatever else is asked of it the program answers, with plain data
    or with another Remote.
    """

    __slots__ = ("_ask", "_handle")

    def __init__(self, ask: Ask, handle: int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *args: object, **named: object) -> object:
        return self._ask("call", self, list(args), named)

    def __getattr__(self, name: str) -> object:
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("setattr", self, name, value)

    def __getitem__(self, key: object) -> object:
        return self._ask("getitem", self, key)

    def __setitem__(self, key: object, value: object) -> None:
        self._ask("setitem", self, key, value)

    def __contains__(self, key: object) -> bool:
        return bool(self._ask("contains", self, key))

    def __iter__(self) -> Iterator[object]:
        return self._ask("iter", self)

    def __next__(self) -> object:
        return self._ask("next", self)

    def __len__(self) -> int:
        return self._ask("len", self)

    def __bool__(self) -> bool:
        return bool(self._ask("bool", self))

    def __str__(self) -> str:
        return str(self._ask("str", self))

    def __repr__(self) -> str:
        return str(self._ask("repr", self))


class Program:
    """The tests' view of the other process. Once `lost`, no later success counts."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.lost = channel, ""

    def ask(self, question: str, *arguments: Any) -> Any:
        if self.lost:
            raise ProgramLost(self.lost)
        sent = [encode(item, self._handle) for item in arguments]
        try:
            self.channel.send([question, sent])
            reply = self.channel.receive()
            if "raised" not in reply:
                value = decode(reply["value"], self._reach)
                if "after" in reply:
                    renew(arguments[1], [decode(item, self._reach) for item in reply["after"]])
                return value
            error = rebuilt(reply["raised"], str(reply["text"]))
        except BaseException as fault:
            gone = isinstance(fault, (EOFError, BrokenPipeError))
            self.lost = ENDED if gone else f"broken: no answer in its message, {fault!r:.200}"
            raise ProgramLost(self.lost) from None
        raise error

    def _reach(self, handle: int) -> Remote:
        return Remote(self.ask, int(handle))

    def _handle(self, value: object) -> object:
        if type(value) is not Remote:
            raise TypeError(f"tests cannot pass a {type(value).__name__} to the program")
        return {"t": "handle", "v": value._handle}


def mutable(value: object) -> bool:
    return isinstance(value, (list, dict, set, bytearray))


def renew(arguments: list, after: list) -> None:
    """Give the tests' own lists, dicts and sets the content the program left in its copies."""
    for old, new in zip(arguments, after, strict=True):
        if isinstance(old, (list, bytearray)):
            old[:] = new
        elif isinstance(old, (dict, set)):
            old.clear()
            old.update(new)


def rebuilt(kinds: list, text: str) -> BaseException:
    """The program's exception as the nearest built-in one, so that `except ValueError` works."""
    for name in kinds:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError and its like want more than a text
                continue
    return RuntimeError(f"{kinds[0]}: {text}")  # SystemExit and its like must not end the tests


def judge(job: dict, program: Program) -> str:
    """Run the program, then the tests; the reason they failed, or "" if they all passed."""
    try:
        program.ask("run", job["program"])
    except BaseException as error:
        return program.lost or f"raised: {describe(error)}"
    tests, entry = job["tests"], job["entry_point"]
    try:
        code = compile(tests, TESTS, "exec")
        space = names(code, entry, program)
        if entry and entry not in space:
            return f"failed: the program does not define {entry}"
        exec(code, space)
        check = space.get(CHECK)
        if entry and isinstance(check, types.FunctionType):  # not a Remote: the tests made it
            check(space[entry])
    except BaseException as error:
        return program.lost or f"failed: {describe(error)}{where(error, tests)}"
    return program.lost


def names(tests: types.CodeType, entry: str | None, program: Program) -> dict:
    """The tests' globals: what they name and the program defines.

    A standard module is the real one, and a built-in the real one unless it is the entry point, so
    that a program's own `abs` or `math` does not decide what the tests see.
    """
    space: dict[str, object] = {"__name__": TESTS}
    wanted: set[str] = {*used(tests), *([entry] if entry else [])}
    for name in sorted(wanted):
        if name != entry and hasattr(builtins, name):
            continue
        try:
            theirs = program.ask("name", name)
        except KeyError:
            continue  # the tests' own name, or a NameError of theirs to come
        module = name in sys.stdlib_module_names and name != entry
        space[name] = __import__(name) if module else theirs
    return space


def used(code: types.CodeType) -> list[str]:
    """Names the code and the functions in it look up (attributes too, which does no harm)."""
    inner = [used(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return [*code.co_names, *(name for part in inner for name in part)]


def describe(error: BaseException) -> str:
    text = " ".join(str(error)[:300].split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def where(error: BaseException, tests: str) -> str:
    """The line of the tests that the error came from."""
    line, trace = 0, error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == TESTS else line
        trace = trace.tb_next
    lines = tests.splitlines()
    return f" in line {line}: {lines[line - 1].strip()[:200]}" if 0 < line <= len(lines) else ""


def limit(limits: dict) -> None:
    """Hard limits of this process and its children; see `Limits` for the meaning."""
    for name, (soft, hard) in limits.items():
        resource.setrlimit(getattr(resource, name), (soft, hard))


def leash() -> None:
    """Die when the host does: it holds the other end of standard input and writes no more.

    The kernel's parent-death signal would do, but bubblewrap, as a root without capabilities, may
    not send it to another user.
    """

    def look(number: int, frame: object) -> None:
        try:
            gone = not os.read(0, 1)
        except BlockingIOError:  # somebody else sent the signal
            gone = False
        if gone:
            os._exit(1)

    signal.signal(signal.SIGIO, look)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | fcntl.FASYNC)
    look(signal.SIGIO, None)  # it may have died before


def ended(child: int) -> str:
    """How the program's process ended."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return "cpu: killed, most likely by the limit on CPU seconds"
    if status < 0:
        return f"ended: killed by {signal.Signals(-status).name} before the tests were through"
    return f"ended: exited with {status} before the tests were through"


def main() -> None:
    verdict, limits = int(sys.argv[1]), json.loads(sys.argv[2])
    asked, to_program = os.pipe()
    answers, to_tests = os.pipe()
    child = os.fork()
    if not child:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for fd in (nothing, verdict, to_program, answers):
            os.close(fd)
        limit(limits)
        try:
            serve(Channel(asked, to_tests))
        finally:
            os._exit(1)  # the tests are through, or the program broke what serves it
    for fd in (asked, to_tests):
        os.close(fd)
    limit(limits)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a signal must not become an exception in a test
    os.write(verdict, b"ready\n")
    job = Channel(0, verdict).receive()
    leash()
    program = Program(Channel(answers, to_program))
    reason = judge(job, program)
    if program.lost == ENDED:
        reason = ended(child)
    sys.stdout.flush()
    said = {"nonce": job["nonce"], "passed": not reason, "reason": reason or "passed"}
    os.write(verdict, json.dumps(said).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
