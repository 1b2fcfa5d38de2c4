"""The walls around one untrusted process: bubblewrap's arguments and the seccomp filter.

Owns what of the system is visible inside and which system calls are refused. Knows nothing of
programs, tests or verdicts. Linux on x86_64 and aarch64.
"""

import itertools
import os
import platform
import shutil
import struct
import sys
import sysconfig
from pathlib import Path

UIDS = range(61184, 65520)
"""User ids systemd lends to short-lived services; no account has one. Each sandbox that root
starts runs under its own, because the kernel counts processes by user and never limits root."""

_serial = itertools.count(os.getpid())
_X86, _ARM = 0xC000003E, 0xC00000B7  # AUDIT_ARCH_*
_ARCHES = {"x86_64": (_X86, 0), "aarch64": (_ARM, 1)}
_FIRST_COMMON = 424
"""Calls from here on have the same number on every machine and are all newer than Linux 5.0:
pidfd_*, io_uring, clone3, the new mount calls. They do "not exist" inside; glibc falls back."""

_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG0, _ARG0_HIGH = 0, 4, 16, 20  # offsets in struct seccomp_data, little-endian
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
_AF_UNIX = 1

_CLONE, _SOCKET, _PRLIMIT = (56, 220), (41, 198), (302, 261)
_REFUSED = {
    # other processes' memory and descriptors
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "move_pages": (279, 239), "migrate_pages": (256, 238),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262), "quotactl": (179, 60),
    # the kernel itself
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "personality": (135, 92), "vhangup": (153, 58), "io_setup": (206, 0), "vmsplice": (278, 75),
    "mbind": (237, 235), "set_mempolicy": (238, 237), "remap_file_pages": (216, 234),
    # keys
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # memory that no resource limit counts
    "memfd_create": (319, 279), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180),
    # only on x86_64
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None),
}  # fmt: skip


def command(inner: list[str], *, seccomp_fd: int, tmp_bytes: int) -> list[str]:
    """The command line that runs `inner` behind the walls.

    New pid, network, ipc and uts namespaces; of the system only /usr, its /bin and /lib*, and the
    running Python with its standard library, all read-only; four harmless devices; no /proc; an
    empty environment; /tmp in memory, of `tmp_bytes`. Started by root, it runs as another user;
    by anybody else, in a user namespace without capabilities.

    `inner` is process 1 of its namespace: nothing in it can kill or stop that process, whose end
    kills all the others, and bubblewrap returns only when they are gone.
    """
    return [
        shutil.which("bwrap") or "bwrap", "--unshare-pid", "--as-pid-1", "--unshare-net",
        "--unshare-ipc", "--unshare-uts",
        "--unshare-cgroup-try", "--die-with-parent", "--new-session",
        *_privileges(), "--perms", "1777", "--size", str(tmp_bytes), "--tmpfs", "/tmp",
        *_system(), *_python(), *_devices(), "--remount-ro", "/", "--chdir", "/tmp",
        "--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp",
        "--setenv", "PYTHONHASHSEED", "0",
        "--seccomp", str(seccomp_fd), "--", *_drop(), *inner,
    ]  # fmt: skip


def python() -> str:
    """The interpreter inside: the one in use, or its base where a virtual environment is."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def supported() -> bool:
    """Whether the filter knows this system's call numbers."""
    return sys.platform == "linux" and platform.machine() in _ARCHES


def missing() -> list[str]:
    """Programs the command line needs and this system lacks."""
    needed = ["bwrap", "setpriv"] if os.geteuid() == 0 else ["bwrap"]
    return [name for name in needed if not shutil.which(name)]


def seccomp_filter() -> bytes:
    """The filter as classic BPF, an array of `struct sock_filter`.

    Another architecture's calls kill; calls numbered 424 and up fail with ENOSYS; `_REFUSED`, new
    namespaces through clone, sockets other than AF_UNIX, and changing the limits of another
    process fail with EPERM; the rest is allowed. Source: seccomp(2), Linux's
    Documentation/userspace-api/seccomp_filter.rst.
    """
    arch, column = _ARCHES[platform.machine()]
    refuse, lines = _ERRNO | _EPERM, [(_LOAD, 0, 0, _ARCH), (_JEQ, 1, 0, arch)]
    lines += [(_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    lines += [(_JGE, 0, 1, _FIRST_COMMON), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    for numbers in _REFUSED.values():
        if numbers[column] is not None:
            lines += [(_JEQ, 0, 1, numbers[column]), (_RETURN, 0, 0, refuse)]
    # Skip four lines unless it is the call; then refuse if the argument says so, else allow.
    checks = [
        (_CLONE, (_JSET, 0, 1, _NEW_NAMESPACES)),
        (_SOCKET, (_JEQ, 1, 0, _AF_UNIX)),
        (_PRLIMIT, (_JEQ, 1, 0, 0)),
    ]
    for numbers, test in checks:
        lines += [(_JEQ, 0, 4, numbers[column]), (_LOAD, 0, 0, _ARG0), test]
        lines += [(_RETURN, 0, 0, refuse), (_RETURN, 0, 0, _ALLOW)]
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


def _privileges() -> list[str]:
    if os.geteuid() == 0:
        return ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return ["--unshare-user", "--uid", str(UIDS[0]), "--gid", str(UIDS[0]), "--cap-drop", "ALL"]


def _drop() -> list[str]:
    """Stop being root, inside."""
    if os.geteuid() != 0:
        return []
    uid = str(UIDS[next(_serial) % len(UIDS)])
    user = ["--reuid", uid, "--regid", uid, "--clear-groups"]
    return ["setpriv", *user, "--inh-caps=-all", "--"]


def _system() -> list[str]:
    words = ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in [Path("/bin"), *sorted(Path("/").glob("lib*"))]:
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    return words


def _python() -> list[str]:
    """Its binary, libraries and standard library; installed packages are covered."""
    packages, base = sysconfig.get_path("purelib", vars={"base": sys.base_prefix}), sys.base_prefix
    words = []
    if not Path(base).is_relative_to("/usr"):
        lib = str(Path(base) / "lib")
        words += [*_folders(python()), "--ro-bind", python(), python()]
        words += [*_folders(lib), "--ro-bind", lib, lib]
    if Path(packages).is_dir():
        words += ["--size", "4096", "--tmpfs", packages, "--remount-ro", packages]
    return words


def _devices() -> list[str]:
    names = ("null", "zero", "random", "urandom")
    binds = [word for name in names for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    return [*_folders("/dev/null"), *binds]


def _folders(path: str) -> list[str]:
    """The folders above it, open to every user: bubblewrap makes some for their owner only."""
    above = [str(folder) for folder in reversed(Path(path).parents)][1:]
    return [word for folder in above for word in ("--perms", "0755", "--dir", folder)]
