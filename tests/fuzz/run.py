# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Feed damaged scans, datalists and audit records to the readers: python -m tests.fuzz.run --minutes 10 --seed 0.

Only a `MAPSegError` with one line a finding, or success, is right. Counts inputs; every other exception is printed with
the file that caused it, which is kept; exit code 1 if there was one. Such a file becomes a test.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import logging
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mapseg_components.data import AuditRecord, check_datalist, check_scan, load_datalist
from mapseg_components.errors import MAPSegError

SECTIONS = ["source_training", "source_validation", "target_training", "target_test"]


def scan_target(content: bytes, path: Path) -> str:
    """Check bytes as a scan. Returns ``"accepted"`` or ``"refused"``; anything else is raised."""
    path.write_bytes(content)
    return outcome(lambda: check_scan(path))


def datalist_target(content: bytes, path: Path) -> str:
    """Load and check bytes as a datalist."""
    path.write_bytes(content)
    results = [outcome(lambda: check_datalist(path))]
    results += [outcome(lambda section=section: load_datalist(path, section)) for section in SECTIONS]
    return "refused" if "refused" in results else "accepted"


def record_target(content: bytes, path: Path, scan: Path) -> str:
    """Use bytes as a record of an audit; a readable scan must come out right."""
    path.write_bytes(content)
    record = AuditRecord(path)
    facts = record.facts(scan, True)
    record.save()
    if len(facts.shape) != 3:
        raise RuntimeError(f"facts of a 3D scan have shape {facts.shape}")
    return "accepted"


def outcome(call: Callable[[], Any]) -> str:
    """Run a target; a user error must have a message, one line a finding."""
    try:
        call()
    except MAPSegError as error:
        if not str(error) or len(str(error).split("\n")) != max(len(error.findings), 1):
            raise RuntimeError(f"{len(error.findings)} findings, message {str(error)!r}") from error
        return "refused"
    return "accepted"


def any_bytes(rng: random.Random) -> bytes:
    """A scan of noise, or noise alone, or noise that is packed."""
    content = rng.randbytes(rng.choice([0, 1, 4, 347, 348, 352, 540, 700, 3000]))
    return rng.choice([content, gzip.compress(content, 1), gzip.compress(content, 1)[: rng.randrange(1, 400)]])


def good_scan(rng: random.Random) -> bytes:
    """A sound scan of a random kind."""
    shape = tuple(rng.randrange(1, 9) for _ in range(3))
    dtype = rng.choice([np.uint8, np.int16, np.int32, np.float32, np.float64])
    voxels = np.random.default_rng(rng.randrange(2**32)).integers(0, 100, shape).astype(dtype)
    kind = rng.choice([nib.Nifti1Image, nib.Nifti2Image])
    return bytearray(kind(voxels, np.diag([rng.uniform(0.5, 2) for _ in range(3)] + [1])).to_bytes())


def mutated_scan(rng: random.Random) -> bytes:
    """A sound scan with some bytes or header fields changed, or cut, packed or not."""
    content = good_scan(rng)
    header = 540 if content[:2] == b"\x1c\x02" else 348
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(min(header + 4, len(content)))
        if rng.random() < 0.5:
            content[at] = rng.randrange(256)
        else:
            word = rng.choice(
                [b"\0" * 8, b"\xff" * 8, b"\x7f\x80\0\0", b"\0\0\x80\x7f", b"\0\0\xc0\x7f", rng.randbytes(4)]
            )
            content[at : at + len(word)] = word
    if rng.random() < 0.1:
        content = content[: rng.randrange(len(content))]
    return bytes(content)


def packed_scan(rng: random.Random) -> bytes:
    """A gzip of a mutated or sound scan, itself damaged or not."""
    content = bytearray(gzip.compress(mutated_scan(rng) if rng.random() < 0.5 else bytes(good_scan(rng)), 1))
    for _ in range(rng.randrange(3)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content) + rng.choice([b"", b"", bytes(20), b"trailing"])


def any_json(rng: random.Random, depth: int = 0) -> Any:
    """A value of any JSON type, often one that a datalist would have."""
    text = ["", "a.nii.gz", "../x", "/abs/y.nii", "\0", "\ud800", "ä b", "x" * 300, "image", "\n", ".", "label"]
    leaves = [None, True, 0, -1, 1e308, float("nan"), 10**30, *text]
    roll = rng.random()
    if depth > 3 or roll < 0.3:
        return rng.choice(leaves)
    if roll < 0.6:
        return [any_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = [*SECTIONS, "image", "label", "case_id", "domain", "labels", "x"]
    return {rng.choice(keys): any_json(rng, depth + 1) for _ in range(rng.randrange(6))}


def any_datalist(rng: random.Random) -> bytes:
    """Bytes that may be a datalist."""
    content: Any = {s: [{"image": f"{s}.nii", "label": f"{s}_l.nii"}] for s in SECTIONS}
    if rng.random() < 0.5:
        content[rng.choice(SECTIONS)][0][rng.choice(["image", "label", "case_id", "domain"])] = any_json(rng)
    elif rng.random() < 0.8:
        content = {section: any_json(rng, 1) for section in SECTIONS} if rng.random() < 0.7 else any_json(rng)
    data = bytearray(json.dumps(content).encode())
    if data and rng.random() < 0.2:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def any_record(rng: random.Random, good: bytes) -> bytes:
    """A record with a few bytes or values changed."""
    if rng.random() < 0.4:
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    content = json.loads(good)
    place = content["files"][next(iter(content["files"]))]
    place = place["facts"] if rng.random() < 0.8 else place
    for _ in range(rng.randrange(1, 4)):
        place[rng.choice(list(place))] = any_json(rng)
    return json.dumps(content).encode()


def main() -> int:
    """Loop until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs") / "fuzz", help="folder for inputs that escaped")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    rng, counts, escaped = random.Random(arguments.seed), collections.Counter(), 0
    until = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan = folder / "good.nii.gz"
        nib.save(nib.Nifti1Image(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), np.eye(4)), scan)
        first = AuditRecord(folder / "first.json")
        first.facts(scan, True)
        first.save()
        record = (folder / "first.json").read_bytes()
        targets: list[tuple[str, Callable[[], bytes], Callable[[bytes, Path], str], str]] = [
            ("bytes", lambda: any_bytes(rng), scan_target, "a.nii"),
            ("bytes.gz", lambda: any_bytes(rng), scan_target, "a.nii.gz"),
            ("header", lambda: mutated_scan(rng), scan_target, "a.nii"),
            ("gzip", lambda: packed_scan(rng), scan_target, "a.nii.gz"),
            ("datalist", lambda: any_datalist(rng), datalist_target, "d.json"),
            ("record", lambda: any_record(rng, record), lambda c, p: record_target(c, p, scan), "audit.json"),
        ]
        while time.monotonic() < until:
            kind, make, target, file = rng.choice(targets)
            content = make()
            try:
                counts[kind, target(content, folder / file)] += 1
            except Exception:
                escaped += 1
                counts[kind, "ESCAPED"] += 1
                arguments.keep.mkdir(parents=True, exist_ok=True)
                kept = arguments.keep / f"{escaped:04d}_{file}"
                kept.write_bytes(content)
                sys.stdout.write(f"{kept}\n{traceback.format_exc()}\n")
            if escaped >= 20:
                break
    for (kind, result), count in sorted(counts.items()):
        sys.stdout.write(f"{kind:10} {result:9} {count}\n")
    sys.stdout.write(f"{sum(counts.values())} inputs, {escaped} unhandled exceptions (seed {arguments.seed})\n")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
