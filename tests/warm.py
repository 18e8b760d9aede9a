# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A ``python`` that starts at once: its commands are forks of a process that has PyTorch and MONAI imported.

:func:`python` is the path of a program that is called as the interpreter is: ``-m module``, ``-c code``, ``-`` or a
file, with arguments, folder, environment and streams of the caller; it ends with the command's exit code or signal, and
passes signals on. The package itself is not imported before the fork: each command imports it, from its ``PYTHONPATH``.
Random states are drawn anew. Whatever else an interpreter reads when it starts (other options, ``PYTHONUTF8``, the
locale) makes the program be the interpreter itself, as does another system than Linux. Tests of the start, of
installations and of processes that are killed call ``sys.executable``.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import io
import json
import multiprocessing.spawn
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LIBRARIES = ("torch.distributed.launcher", "monai.bundle", "ignite.engine", "fire", "nibabel", "yaml", "scipy.ndimage")
LIBRARIES += ("torch._dynamo",)  # which PyTorch imports for the first optimizer
# what is read after the start; the other variables of the interpreter and the locale must be those of the server
READ_LATER = ("PYTHONPATH", "PYTHONWARNINGS", "PYTHONIOENCODING", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
READ_LATER += ("PYTHON_EXEC",)  # of torchrun
COERCED = {"LC_CTYPE": "C.UTF-8"}  # an interpreter adds it to its environment where there is no locale

CLIENT = """
import json, os, select, signal, socket, sys

words = sys.argv[1:]
while words and words[0] in ("-u", "-B"):
    words.pop(0)
start = {k: v for k, v in os.environ.items() if k.startswith(("PYTHON", "LC_", "LANG"))}
start = {k: v for k, v in start.items() if k not in READ_LATER and COERCED.get(k) != v}
if not words or (words[0][0] == "-" and words[0] not in ("-m", "-c", "-")) or start != STARTED:
    os.execv(EXECUTABLE[0], [*EXECUTABLE, *sys.argv[1:]])
streams = [0, 1, 2, *sorted(number for number in map(int, os.listdir("/proc/self/fd")) if number > 2)]
streams = [number for number in streams if os.path.exists(f"/proc/self/fd/{number}")]
text = lambda value: os.fsencode(value).decode("latin-1")
environment = {text(key): text(value) for key, value in os.environ.items()}
request = {"words": [*map(text, words)], "cwd": text(os.getcwd()), "environment": environment, "streams": streams}
request = json.dumps(request).encode()
server = socket.socket(socket.AF_UNIX)
server.connect(ADDRESS)
socket.send_fds(server, [len(request).to_bytes(8, "big")], streams)
server.sendall(request)
server.setblocking(False)
signal.set_wakeup_fd(server.fileno())  # a signal's number goes to the server even where no bytecode follows it
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(number, lambda *_: None)
select.select([server], [], [])
answer = server.recv(4)
if len(answer) != 4:
    sys.exit("the process that keeps the command was ended")
code = int.from_bytes(answer, "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def python() -> str:
    """Path of the program; the process that it forks starts with the first call and ends with this one."""
    return server().command[0]


@functools.cache
def server() -> Server:
    """The process that all of this process's commands are forks of."""
    return Server()


@contextlib.contextmanager
def warm_processes() -> Iterator[None]:
    """Context in which commands and workers that the package starts are of :func:`python`."""
    before, worker = sys.executable, multiprocessing.spawn.get_executable()
    sys.executable = python()
    multiprocessing.spawn.set_executable(sys.executable)
    try:
        yield
    finally:
        sys.executable = before
        multiprocessing.spawn.set_executable(worker)


class Server:
    """A process that waits with everything imported.

    Args:
        environment: what its interpreter starts with; as here, without ``PYTHONPATH``, if ``None``.
        options: of the interpreter.

    Attributes:
        command: begins the command line of a program, as the interpreter and its options do.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, *options: str) -> None:
        self.command, self.process = [sys.executable, *options], None
        if not sys.platform.startswith("linux"):
            return
        given = os.environ if environment is None else environment
        unset = {"PYTHONIOENCODING"} if environment else {"PYTHONIOENCODING", "PYTHONPATH"}
        started = {k: v for k, v in given.items() if k not in unset}
        self.folder = tempfile.TemporaryDirectory(prefix="warm-")
        place = Path(self.folder.name)
        self.command = [str(place / "python")]
        own = {k: v for k, v in started.items() if k.startswith(("PYTHON", "LC_", "LANG"))}
        own = {k: v for k, v in own.items() if k not in READ_LATER and COERCED.get(k) != v}
        values = {"ADDRESS": str(place / "socket"), "EXECUTABLE": [sys.executable, *options], "STARTED": own}
        values |= {"READ_LATER": READ_LATER, "COERCED": COERCED}
        lines = [f"{name} = {value!r}" for name, value in values.items()]
        (place / "client.py").write_text("\n".join(lines) + CLIENT)
        for name, module in {"python": "", "mapseg": "-m mapseg_components.commands"}.items():
            call = f"exec {shlex.quote(sys.executable)} -IS {shlex.quote(str(place / 'client.py'))} {module}"
            (place / name).write_text(f'#!/bin/sh\n{call} "$@"\n')
            (place / name).chmod(0o755)
        closed, self.lifeline = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, *options, __file__, str(place / "socket"), str(closed), *self.command],
            env={**started, "OMP_NUM_THREADS": "1"},
            pass_fds=[closed],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(closed)
        assert self.process.stdout is not None and self.process.stdout.readline() == b"ready\n"
        atexit.register(self.close)

    def close(self) -> None:
        """End the process; commands that still run are killed."""
        if self.process is None:
            return
        os.close(self.lifeline)
        self.process.wait()
        self.folder.cleanup()
        atexit.unregister(self.close)


def serve(address: str, lifeline: int) -> tuple[dict[str, Any], list[int]]:
    """Fork at each call; returns in the forks alone, with the call and its streams."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    keepers: set[int] = set()
    while True:
        ready = select.select([listener, lifeline], [], [], 1.0)[0]
        keepers -= {pid for pid in keepers if os.waitpid(pid, os.WNOHANG)[0] == pid}
        if lifeline in ready:
            for pid in keepers:
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)
            os._exit(0)
        if listener in ready:
            connection = listener.accept()[0]
            keeper = os.fork()
            if keeper == 0:
                listener.close()
                os.close(lifeline)
                return keep(connection)
            keepers.add(keeper)
            connection.close()


def keep(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork the command, pass signals to it and tell its caller how it ended; returns in the command alone."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 250)
    # no byte more is read: a signal's number may follow
    request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    command = os.fork()
    if command == 0:
        connection.close()
        return request, streams
    for one in streams:
        os.close(one)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(command, signal.SIGKILL))

    def pass_on() -> None:
        with contextlib.suppress(OSError):
            while received := connection.recv(1):
                os.kill(command, received[0])
            os.kill(command, signal.SIGKILL)  # whoever called it is gone

    threading.Thread(target=pass_on, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    try:
        connection.sendall(code.to_bytes(4, "big", signed=True))
    finally:
        os._exit(0)


def text(value: str) -> str:
    """Bytes that came as their code points, as this interpreter reads names and arguments."""
    return os.fsdecode(value.encode("latin-1"))


def become(request: Mapping[str, Any], streams: list[int], executable: str) -> None:
    """Do what an interpreter does with its command line and environment."""
    import numpy as np
    import torch

    high = [fcntl.fcntl(stream, fcntl.F_DUPFD, 256) for stream in streams]  # out of the way of their own numbers
    os.closerange(3, 256)
    for one, number in zip(high, request["streams"]):
        os.dup2(one, number)
        os.close(one)
    words = [text(word) for word in request["words"]]
    os.environ.clear()
    os.environ.update({text(key): text(value) for key, value in request["environment"].items()})
    os.chdir(text(request["cwd"]))
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        raw = io.FileIO(number, "rw"[number > 0], closefd=False)
        buffer = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
        started = getattr(sys, name)  # by the locale
        how = "backslashreplace" if number == 2 else errors or ("strict" if encoding else started.errors)
        lines = number == 2 or bool(os.environ.get("PYTHONUNBUFFERED"))
        stream = io.TextIOWrapper(buffer, encoding or started.encoding, how, line_buffering=lines, write_through=lines)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    for option in reversed(os.environ.get("PYTHONWARNINGS", "").split(",")):
        if option:
            warnings.simplefilter(option)  # type: ignore[arg-type]
    np.random.seed()
    torch.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    sys.executable = executable
    first, *rest = words
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    where = {"-m": os.getcwd(), "-c": "", "-": ""}.get(first, os.path.dirname(os.path.abspath(first)))
    sys.path[:] = [where, *own, *(path for path in sys.path[1:] if path not in own)]
    importlib.invalidate_caches()
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    name, sys.argv = "<string>", words
    if first == "-c":
        code, sys.argv = rest[0], ["-c", *rest[1:]]
    elif first == "-":
        code = sys.stdin.read()
    else:
        name = main.__file__ = os.path.abspath(first)
        code = Path(first).read_text(encoding="utf-8")
    exec(compile(code, name, "exec"), main.__dict__)


def ended(*call: Any) -> int:
    """Exit code of a command, after what an interpreter does at its end but for freeing half a second of objects."""
    code = 1
    try:
        become(*call)
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, str):
            code = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    os._exit(ended(*serve(sys.argv[1], int(sys.argv[2])), sys.argv[3]) & 255)
