"""Runs one program in the process that it is started in, shut off as far as the system permits.

    python -I sandbox.py PARENT MEMORY PROCESSES FILE_BYTES SECONDS < program

A script for ``programs.run_program``, in an empty folder; it imports nothing but Python's own
library. It ends with PARENT, the process that started it. On standard output it says how the
program is shut off, a JSON object in a line, and then, if the program came to its end, how:
``passed``, or the name of the exception; or ``timed out``.

Limits of the system hold for its time, memory, processes and files. An audit hook refuses, from
within Python, sockets, further processes, and files opened for writing outside the folder; that
stops accidents, not an attack. Where Linux permits, the process gets namespaces of its own as well:
without a network, with nothing to write but the folder, which lies in memory and holds 64 MiB, and
with process numbers of its own, so that whatever was started ends with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

# linux/sched.h, sys/mount.h, linux/mount.h, sys/prctl.h, linux/capability.h
_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000
_PRIVATE, _ROOM = 0x4000 | 0x40000, b"size=64m,nr_inodes=4096"
_MOUNT_SETATTR, _HERE, _RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
# Audit events of Python
_REFUSED = (
    *("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill"),
    "ctypes.dlopen",
)
_CHANGES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "shutil."),
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES, _CAPABILITIES = 1, 38, 0x20080522


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "not permitted")


def _separate(libc: Any, folder: bytes) -> dict[str, bool]:
    """Enter namespaces of our own; return which of them hold."""
    user, group = os.getuid(), os.getgid()
    try:
        _checked(libc.unshare(_NAMESPACES))
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as out:
                out.write(text)
    except OSError:  # not permitted
        return {"namespaces": False, "read_only": False}
    try:
        _checked(libc.mount(b"none", b"/", None, _PRIVATE, None))
        # That of the namespace before would show its processes.
        _checked(libc.mount(b"none", b"/proc", b"tmpfs", 0, None))
        _checked(libc.mount(b"none", folder, b"tmpfs", 0, _ROOM))
        for path, flags, *change in ((b"/", _RECURSIVE, 1, 0), (folder, 0, 0, 1)):
            set_, clear = (_READ_ONLY * one for one in change)
            wanted = (ctypes.c_uint64 * 4)(set_, clear, 0, 0)
            _checked(libc.syscall(_MOUNT_SETATTR, _HERE, path, flags, wanted, 32))
        os.chdir(folder)  # the folder as it is mounted now
    except OSError:  # before Linux 5.12
        return {"namespaces": True, "read_only": False}
    return {"namespaces": True, "read_only": True}


def _drop_powers(libc: Any) -> None:
    _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _checked(libc.capset((ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()))


def _watch(folder: str) -> None:
    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(f"{event} is not permitted here")
        opened = event == "open" and isinstance(args[2], int) and args[2] & _WRITES
        for path in args[:2] if event.startswith(_CHANGES) else args[:1] if opened else ():
            if isinstance(path, (str, bytes, os.PathLike)):
                place = os.path.realpath(os.fsdecode(path))
                if place != os.devnull and not place.startswith(folder + os.sep):
                    raise PermissionError(f"{place} is outside the program's folder")

    sys.addaudithook(hook)


def _limit(memory: int, processes: int, file_bytes: int, seconds: int) -> None:
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (least, least))


def _run(source: str) -> str:
    try:
        code = compile(source, "program", "exec", dont_inherit=True)
        exec(code, {"__name__": "program"})
    except BaseException as error:  # also SystemExit: the tests after it did not run
        return type(error).__name__
    return "passed"


def main() -> None:
    """Shut this process off, run the program in a child of it, and end when the child has."""
    source, folder = sys.stdin.read(), os.path.realpath(os.getcwd())
    parent, *limits = (int(text) for text in sys.argv[1:])
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    libc = ctypes.CDLL(None, use_errno=True)
    held = _separate(libc, os.fsencode(folder))
    _checked(libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:  # it has ended already
        return
    os.write(answers, json.dumps(held).encode() + b"\n")
    child = os.fork()  # the first process of a namespace takes all others with it
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU):
            os.write(answers, b"timed out")  # at the system's limit
        return
    if held["namespaces"]:
        _drop_powers(libc)
    _checked(libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0))
    _limit(*limits)
    _watch(folder)
    os.write(answers, _run(source).encode())
    os._exit(0)  # threads that it left do not keep it


if __name__ == "__main__":
    main()
