# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Commands that start warm do what those of the interpreter do: streams, exit codes, signals, random states."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm import python, server

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it is the interpreter itself")
SHOWN = "import os, sys; print(sys.argv, os.getcwd(), sys.path[0], os.environ['SHOWN'], __name__, 'é')"


def both(*words, **options):
    """What the interpreter and the warm program give."""
    return [subprocess.run([program, *words], capture_output=True, **options) for program in (sys.executable, python())]


@pytest.mark.parametrize(
    "code",
    [
        SHOWN,
        f"{SHOWN}; sys.exit(7)",
        "raise SystemExit('a message')",
        "import sys; sys.exit(-1)",
        "raise KeyError('x')",
        "raise KeyboardInterrupt",
        "import os; os.kill(os.getpid(), 9)",
        "import atexit, threading, time; atexit.register(print, 'end'); "
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
        "import sys; print(sys.stdin.read(), end='', file=sys.stderr)",
        "import os; os.write(1, os.environ['SHOWN'].encode()); os.fork() or os._exit(5)",
    ],
)
def test_a_program_ends_as_that_of_the_interpreter(tmp_path, code):
    options = {"cwd": tmp_path, "env": {**os.environ, "SHOWN": "1", "PYTHONIOENCODING": "latin-1"}, "input": b"given"}
    expected, found = both("-c", code, "a b", **options)
    last = [one.stderr.splitlines()[-1:] for one in (expected, found)]
    assert (found.returncode, found.stdout, last[1]) == (expected.returncode, expected.stdout, last[0])


def test_files_modules_and_standard_input_are_programs(tmp_path):
    (tmp_path / "own.py").write_text(f"{SHOWN}\nprint(__file__, sys.modules['__main__'].__name__)")
    options = {"cwd": tmp_path, "env": {**os.environ, "SHOWN": "1"}}
    for words in (["own.py", "a"], ["-m", "own", "a"], ["-u", "-m", "own"]):
        expected, found = both(*words, **options)
        assert found.returncode == 0 and found.stdout == expected.stdout
    expected, found = both("-", "a", input=SHOWN.encode(), **options)
    assert found.stdout == expected.stdout != b""


def test_libraries_are_there_and_the_package_is_not():
    code = "import sys; print([name in sys.modules for name in ('torch', 'monai', 'mapseg_components', 'tests')])"
    assert both("-c", code)[1].stdout == b"[True, True, False, False]\n"


def test_what_is_drawn_without_a_seed_is_drawn_anew():
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())"
    first, second = (subprocess.run([python(), "-c", code], capture_output=True).stdout.split() for _ in range(2))
    assert len(first) == 3 and not set(first) & set(second)


def test_other_options_and_locales_are_those_of_the_interpreter():
    code = "import sys; print(sys.executable, sys.flags.optimize, sys.flags.utf8_mode)"
    for words, environment in ((["-O"], {}), ([], {"PYTHONUTF8": "1"}), ([], {"LC_ALL": "POSIX", "PYTHONUTF8": "0"})):
        expected, found = both(*words, "-c", code, env={**os.environ, **environment})
        assert found.stdout == expected.stdout and sys.executable.encode() in found.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_signals_reach_the_command(number):
    code = "import time; print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"1\n"
        process.send_signal(number)
        assert process.stdout.read() == b""  # the command has ended, or it would hold the stream
    assert process.returncode == -number


def test_a_signal_that_comes_before_the_command_is_not_lost():
    python()
    os.kill(server().process.pid, signal.SIGSTOP)  # what is sent to it waits
    try:
        process = subprocess.Popen([python(), "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE)
        for _ in range(3000):  # until the client waits for an answer
            time.sleep(0.01)
            handled = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
            if int(handled, 16) & 1 << (signal.SIGTERM - 1):
                break
        process.terminate()
    finally:
        os.kill(server().process.pid, signal.SIGCONT)
    assert process.wait(30) == -signal.SIGTERM and process.stdout.read() == b""
    process.stdout.close()


def test_workers_start_warm(warm_processes):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(eval, ["'monai' in __import__('sys').modules", "1 + 1"]) == [True, 2]
