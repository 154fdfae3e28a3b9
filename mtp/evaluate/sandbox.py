"""Runs programs that a model wrote, each in a fresh interpreter that has shut itself in.

What a program is kept from, by the layers that the host's kernel grants:

    user, capabilities, no_new_privs   any right beyond those of the user who runs it
    pid                    seeing or signalling other processes, leaving one behind
    net                    any network, TCP and UDP, its own loopback too; abstract sockets
    ipc, uts               the shared memory of others; changing the host's name
    mount                  seeing files but the interpreter's and the system libraries', writing
                           but to an empty directory in memory, reaching sockets in the file system
    landlock_files         reading and writing other files, by another mechanism
    landlock_tcp           TCP
    landlock_scopes        abstract sockets and signals to the outside
    limits, pid_max        much memory, large files, CPU time, many processes

On every host it has a minimal environment, no open files but its output, and bounds on output and
wall clock; at its end its whole process group is killed.

A program has passed only if it ends with exit code 0 and its end wrote a random nonce to a private
descriptor, after which nothing of it runs any more. An exit before its last line is `exited_early`.

Not covered, since tests run in the program's own process: an object that is equal to everything
passes any test of equality, and a program that walks the interpreter's frames can find the nonce.
Not covered either: the memory of many processes together, the CPU time that they take until the
wall clock ends them, side channels, errors of the kernel. The sandbox holds an honest model that
writes bad or destructive code. For one that aims at the sandbox, use a virtual machine. Linux only.
"""

from __future__ import annotations

import glob
import marshal
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

LAYERS = (
    *("user", "pid", "net", "ipc", "uts", "pid_max", "mount", "no_new_privs", "capabilities"),
    *("landlock_files", "landlock_tcp", "landlock_scopes", "limits"),
)
# The floor: of each line one layer at least.
PROMISES = {
    "files": ("mount", "landlock_files"),
    "network": ("net",),
    "processes": ("pid",),
    "memory": ("limits",),
}
LEVELS = ("strong", "weak")
CHILD = Path(__file__).with_name("_child.py")
# -I would also ignore the hash seed, without which verdicts on the order of sets change by chance.
INTERPRETER = (sys.executable, "-P", "-s", "-S", "-B", "-u", "-X", "utf8", str(CHILD))
BATCH = 8  # programs per worker between two looks at time-outs
CHUNK = 1 << 16  # bytes
TAIL = 4000  # bytes of output that an outcome keeps
MODULES = (
    *("bisect", "collections", "copy", "datetime", "decimal", "functools", "hashlib", "heapq"),
    *("itertools", "json", "math", "operator", "random", "re", "string", "typing", "unicodedata"),
)
CANARIES = (
    ("assert sorted([2, 1]) == [1, 2]", "passed"),
    ("assert sorted([2, 1]) == [2, 1]", "failed"),
    (f"import {', '.join(MODULES)}", "passed"),
)


@dataclass(frozen=True)
class Limits:
    """What one program may use. Sizes in bytes, of one process where not said otherwise."""

    seconds: float = 10.0  # wall clock with start-up, which takes some 0.03
    memory_bytes: int = 1 << 30  # address space; numpy needs about this much
    output_bytes: int = 1 << 20  # both streams together
    file_bytes: int = 4 << 20
    disk_bytes: int = 16 << 20  # all files together; needs the layer `mount`
    processes: int = 64  # with threads; does not hold for root, who has `pid_max`

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ValueError(f"{field.name}={value}: must be above 0")


@dataclass(frozen=True)
class Outcome:
    """verdict: passed, failed, exited_early, timeout, output_limit, killed (by a signal, its own or
    the kernel's) or harness_error (the sandbox could not be set up; says nothing of the program).
    output: the last 4000 bytes of both streams. seconds: wall clock.
    """

    verdict: str
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


class Sandbox:
    """Finds out what the host offers, refuses below the floor unless `level="weak"`, and checks on
    three programs that verdicts are right. `layers` are the names of what holds.

    OSError: the host lacks a layer of the floor, or the canaries failed. Thread-safe.
    """

    def __init__(self, limits: Limits | None = None, *, level: str = "strong") -> None:
        if level not in LEVELS:
            raise ValueError(f"level={level!r}: use one of {', '.join(LEVELS)}")
        if not sys.platform.startswith("linux"):
            raise OSError("the sandbox needs Linux")
        self.limits, self.level = limits or Limits(), level
        self.layers = self._probe()
        if level == "strong" and (broken := self.broken_promises()):
            raise OSError(
                f"this host cannot run untrusted programs safely: no bound on {'; '.join(broken)}. "
                'level="weak" (sandbox=weak) runs them all the same: do so only in a container or '
                "virtual machine that may be lost"
            )
        self._check()

    def broken_promises(self) -> list[str]:
        """What the active layers do not bound, each with the layers that would."""
        return [
            f"{promise} (needs {' or '.join(keepers)})"
            for promise, keepers in PROMISES.items()
            if not set(keepers) & set(self.layers)
        ]

    def describe(self) -> str:
        """One line for reports: level, active and missing layers, limits."""
        missing = [layer for layer in LAYERS if layer not in self.layers]
        return (
            f"sandbox {self.level}: {' '.join(self.layers)}; "
            f"missing: {' '.join(missing) or 'nothing'}; "
            + " ".join(f"{key}={value}" for key, value in asdict(self.limits).items())
        )

    def run(self, program: str) -> Outcome:
        """One program, source and tests; it passes if it reaches its end."""
        outcome, granted = self._attempt(program, self.layers)
        if granted != self.layers and outcome.verdict not in ("timeout", "output_limit"):
            return Outcome("harness_error", outcome.output, outcome.seconds)
        return outcome

    def run_all(self, programs: Iterable[str], workers: int | None = None) -> Iterator[Outcome]:
        """Outcomes in order, `workers` programs at a time (None: one per core of this process).

        A program that ran out of time runs once more, alone: cores may have been busy.
        """
        workers = workers or len(os.sched_getaffinity(0))
        programs = iter(programs)
        with ThreadPoolExecutor(workers) as pool:
            while batch := list(islice(programs, BATCH * workers)):
                for program, outcome in zip(batch, list(pool.map(self.run, batch)), strict=True):
                    yield self.run(program) if outcome.verdict == "timeout" else outcome

    def _probe(self) -> tuple[str, ...]:
        """The layers that the host grants, also when none but them are asked for."""
        layers: tuple[str, ...] = LAYERS
        while True:
            outcome, granted = self._attempt("", layers)
            if not outcome.passed:
                raise OSError(f"the sandbox's interpreter does not start: {outcome}")
            if granted == layers:
                return granted
            layers = granted

    def _check(self) -> None:
        for program, expected in CANARIES:
            outcome = self.run(program)
            if outcome.verdict != expected:
                raise OSError(
                    f"the sandbox does not work here: {program!r} gave {outcome.verdict}, not "
                    f"{expected}. {outcome.output.strip() or 'It wrote nothing'}"
                )

    def _attempt(self, program: str, layers: tuple[str, ...]) -> tuple[Outcome, tuple[str, ...]]:
        """The outcome, and those of the wanted layers that the child says it entered."""
        start, nonce = time.monotonic(), secrets.token_bytes(16)
        setup = {**asdict(self.limits), "program": program, "layers": layers}
        with (
            suppress(RecursionError),  # of the removal of folders nested too deep: they stay
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        ):
            setup |= {"directory": directory, "readable": readable(), "nonce": nonce}
            ending, output, report = follow(setup, start + self.limits.seconds)
        granted, _, proof = report.partition(b"\n")
        if ending == "ended":
            ending = "passed" if proof == nonce else "exited_early"
        text = output[-TAIL:].decode("utf-8", "replace")
        outcome = Outcome(ending, text, time.monotonic() - start)
        return outcome, tuple(granted.decode().split())


def readable() -> list[str]:
    """All that an interpreter needs to import its standard library and to load its libraries."""
    paths = {sys.prefix, sys.base_prefix, sys.base_exec_prefix, "/usr", *glob.glob("/lib*")}
    paths |= {"/etc/ld.so.cache", os.devnull, "/dev/urandom"}
    return sorted(filter(os.path.exists, paths))  # a folder before what lies in it


def start(setup: dict[str, Any], channel: int) -> subprocess.Popen[bytes]:
    directory = setup["directory"]
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    environment |= {"HOME": directory, "TMPDIR": directory}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each takes address space
    with tempfile.TemporaryFile() as stdin:  # a pipe would block on a long program
        marshal.dump({**setup, "channel": channel}, stdin)
        stdin.seek(0)
        return subprocess.Popen(
            INTERPRETER,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment,
            pass_fds=(channel,),
            start_new_session=True,
        )


def follow(setup: dict[str, Any], deadline: float) -> tuple[str, bytes, bytes]:
    """Runs the child to its end: how it ended, its output, and what it wrote to the channel."""
    channel, end = os.pipe()
    with open(channel, "rb", buffering=0) as private:
        try:
            process = start(setup, end)
        finally:
            os.close(end)
        public = process.stdout
        assert public is not None
        with process, public:
            received = {public.fileno(): bytearray(), private.fileno(): bytearray()}
            try:
                cut = receive(process.pid, received, setup["output_bytes"], deadline)
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # its number is not free before wait()
            code = process.wait()
    ending = cut or {0: "ended", 1: "failed"}.get(code, "killed")
    output, report = map(bytes, received.values())
    return ending, output, report


def receive(pid: int, received: dict[int, bytearray], most: int, deadline: float) -> str:
    """Reads until the process has ended (""), the time is over, or it wrote too much."""
    ended = os.pidfd_open(pid)
    try:
        with selectors.DefaultSelector() as selector:
            for fd in (*received, ended):
                selector.register(fd, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                ready = {key.fd for key, _ in selector.select(left)}
                for fd in ready - {ended}:
                    chunk = os.read(fd, CHUNK)
                    received[fd] += chunk
                    if not chunk:
                        selector.unregister(fd)
                if sum(map(len, received.values())) > most:
                    return "output_limit"
                if ready == {ended}:  # and nothing more to read, though a daemon may hold the pipe
                    return ""
            return "timeout"
    finally:
        os.close(ended)
