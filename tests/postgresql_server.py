"""A PostgreSQL server for one test session, from the programs of a Debian package or of PATH."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE

_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # where Debian has them


def programs() -> Path | None:
    """The folder of initdb and postgres."""
    found = shutil.which("initdb")
    return _PROGRAMS[-1] if _PROGRAMS else (Path(found).resolve().parent if found else None)


class Server:
    """A server on a socket in `folder`; `url` is a database of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.url = f"postgresql://tester@/postgres?host={folder}"
        # it refuses to run as root, so root runs it as somebody else
        self._as = {"user": _other(), "extra_groups": []} if os.getuid() == 0 else {}
        self._process: subprocess.Popen | None = None
        if self._as:
            shutil.chown(folder, self._as["user"])
        data = folder / "data"
        self._run(
            "initdb", "-D", data, "-A", "trust", "-U", "tester", "--no-sync"
        ).check_returncode()

    def start(self) -> None:
        arguments = ["-D", self.folder / "data", "-k", self.folder, "-c", "listen_addresses="]
        arguments += ["-c", "fsync=off"]
        command = [programs() / "postgres", *arguments]
        output = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(
            command, cwd=self.folder, stdout=output, stderr=output, **self._as
        )
        deadline = time.monotonic() + PATIENCE
        while self._run("pg_isready", "-h", self.folder).returncode:
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # a fast shutdown: connections are cut
            self._process.wait(PATIENCE)
            self._process = None

    def _run(self, program: str, *arguments) -> subprocess.CompletedProcess:
        command = [programs() / program, *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, **self._as)


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A running server; skips the test where there is none to run."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    if programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if os.getuid() == 0 and _other() is None:
        pytest.skip("PostgreSQL does not run as root, and there is no user nobody or postgres")
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        found = Server(Path(folder))
        found.start()
        try:
            yield found
        finally:
            found.stop()


def _other() -> str | None:
    users = {user.pw_name for user in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in users), None)
