"""Who judges a candidate, and whether that process is still there.

A worker signs what it takes with "host pid start machine": the start time tells a process from a
later one with the same pid, and the machine (the kernel's boot and the pid namespace) tells whether
this process can look at all. Inside one machine a dead worker is so found at once; from elsewhere
only missing heartbeats tell, after their grace time.
"""

import os
import socket
from functools import cache
from pathlib import Path

_PROC = Path("/proc")  # absent outside Linux: then nobody is ever seen dead, and heartbeats decide


def signature() -> str:
    """This process: "host pid start machine"."""
    return _signature(os.getpid())  # another one after a fork


def is_dead(owner: str) -> bool:
    """Whether the process that signed so ran on this machine and is gone; False where unknown."""
    _, pid, start, machine = owner.split(" ")
    return bool(_machine()) and machine == _machine() and _start(int(pid)) != start


def is_running(owner: str) -> bool:
    """Whether the process that signed so runs on this machine; False where it is stopped, too."""
    _, pid, start, machine = owner.split(" ")
    return bool(_machine()) and machine == _machine() and _start(int(pid), but="Tt") == start


def worker(owner: str) -> str:
    """host:pid, for people."""
    return ":".join(owner.split(" ")[:2])


@cache
def _signature(pid: int) -> str:
    host = socket.gethostname().replace(" ", "-") or "localhost"
    return f"{host} {pid} {_start(pid)} {_machine()}"


@cache
def _machine() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def _start(pid: int, but: str = "") -> str:
    """Start time of a process in ticks since the boot; "" if there is none, or only its remains, or
    its state is one of `but`."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()  # the name before it may hold anything
    return "" if state in "ZX" + but else rest[18]
