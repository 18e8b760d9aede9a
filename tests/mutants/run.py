#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Plant one bug after the other and see whether the closest tests notice: ``make mutants``.

A mutant is a YAML file below ``planted/``: ``what`` (one sentence), ``file``, ``original`` (text that the file holds
exactly once), ``mutated`` (what takes its place) and ``tests`` (for pytest). Each is planted in a copy of the tree, so
that the tree itself is never touched. Prints one line per mutant and what survived; the exit code is 1 if any did, or
if one does not fit the code any more.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PLANTED = Path(__file__).parent / "planted"
LEFT_OUT = (".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", "*.egg-info")
NO_TEST = (4, 5)  # pytest's exit codes for an unknown test, and for none
TIME_LIMIT_S = 600


@dataclass(frozen=True)
class Mutant:
    """One planted bug; see the module's text."""

    name: str
    what: str
    file: str
    original: str
    mutated: str
    tests: tuple[str, ...]

    def plant(self, text: str) -> str:
        """Content of the file with the bug in it. Raises `ValueError` if it does not fit."""
        if text.count(self.original) != 1:
            raise ValueError(f"{self.file} holds its original {text.count(self.original)} times, expected once")
        return text.replace(self.original, self.mutated)


def mutants(folder: Path = PLANTED) -> list[Mutant]:
    """All mutants by name."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        found.append(Mutant(path.stem, **{**content, "tests": tuple(content["tests"])}))
    return found


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of pytest in a copy of the tree; 1 if the time is up, for a bug that hangs is noticed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return 1, "time is up"
    return done.returncode, done.stdout + done.stderr


def verdict(copy: Path, mutant: Mutant) -> str:
    """``killed``, or why not."""
    path = copy / mutant.file
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(mutant.plant(before), encoding="utf-8")
        code, output = run_tests(copy, mutant.tests)
    except ValueError as error:
        return f"STALE: {error}"
    finally:
        path.write_text(before, encoding="utf-8")
    if code in NO_TEST:
        return f"STALE: {' '.join(mutant.tests)}: {output.strip().splitlines()[-1]}"
    return "killed" if code else "SURVIVED"


def main() -> int:
    """Run the mutants; returns the number that survived or do not fit, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone, by a part of their names")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    arguments = parser.parse_args()
    chosen = [m for m in mutants() if not arguments.only or any(part in m.name for part in arguments.only)]
    if not chosen:
        parser.error(f"no mutant is named {arguments.only}: see {PLANTED.relative_to(ROOT)}")
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(arguments.jobs):
            copies.put(Path(folder) / str(number))
            shutil.copytree(ROOT, Path(folder) / str(number), ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)

        def take(mutant: Mutant) -> str:
            copy = copies.get()
            try:
                result = verdict(copy, mutant)
            finally:
                copies.put(copy)
            print(f"{result:10}  {mutant.name}: {mutant.what}", flush=True)
            return result

        tests = sorted({test for mutant in chosen for test in mutant.tests})
        code, output = run_tests(Path(folder) / "0", tests)
        if code:
            print(output)
            print("The tests fail without any mutant: nothing can be said.")
            return 1
        with ThreadPoolExecutor(arguments.jobs) as pool:
            results = list(pool.map(take, chosen))
    bad = [mutant.name for mutant, result in zip(chosen, results) if result != "killed"]
    print(f"{len(chosen)} mutants, {len(bad)} survivors{': ' if bad else ''}{', '.join(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
