# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""File names of any bytes, in any locale: each scan is done, or listed with a remedy, and no table is lost."""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.commands import predict
from mapseg_components.files import as_written, readable, write_text
from mapseg_components.reports import text_table
from tests.commands.test_predict import BUNDLE, SCAN
from tests.conftest import ROOT
from tests.warm import Server, python

NAMES = [b"M\xfcller", "Müller".encode(), "e\u0301".encode(), b"two\nlines", b"tab\there", b"-dash", b"esc\x1b[31m"]
NAMES += [
    "emoji\U0001f600".encode(),
    b"case",
    b"CASE",
    b"a,b\"c'd",
    b"50%<b>$x^",
    b" blank ",
    b"back\\slash",
    b"\xff\xfe",
]
LONG = b"x" * 240
LOCALES = {
    "posix": {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "strict": {"PYTHONIOENCODING": "utf-8:strict"},
}


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """Bytes of a small scan."""
    full = nib.load(SCAN)
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(full.dataobj)[8:32, 10:38, 6:26], full.affine), path)
    return path.read_bytes()


@functools.cache
def start(**environment):
    """What starts a program where the locale is another one, and the environment."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "PYTHON"))}
    whole = {**known, "PYTHONPATH": str(ROOT), **environment}
    return (Server(whole).command if "LC_ALL" in environment else [python()]), whole


def mapseg(*words, **environment):
    """Run the command line; returns its exit code and all it printed, as bytes."""
    command, whole = start(**environment)
    done = subprocess.run([*command, "-m", "mapseg_components.commands", *words], capture_output=True, env=whole)
    return done.returncode, done.stdout + done.stderr


def folder_of(place, names, content):
    """A folder with a scan under each name."""
    place.mkdir()
    for name in names:
        with open(os.fsencode(place) + b"/" + name + b".nii.gz", "wb") as stream:
            stream.write(content)
    return place


def test_every_name_is_done_or_listed_and_all_tables_are_there(tmp_path, scan):
    source, output = folder_of(tmp_path / "in", [*NAMES, LONG], scan), tmp_path / "out"
    done = predict(source, output, bundle=BUNDLE, quiet=True)
    status = {os.fsencode(one.case): one for one in done.predictions}
    assert set(status) == {*NAMES, LONG} and done.exit_code == 3
    assert all(status[name].status == "done" for name in NAMES)
    assert "shorten it" in status[LONG].message
    assert {os.fsencode(path.name) for path in output.glob("*_seg.nii.gz")} == {name + b"_seg.nii.gz" for name in NAMES}
    assert len(list((output / "previews").iterdir())) == len(NAMES)
    with (output / "volumes.csv").open(encoding="utf-8", newline="") as stream:
        assert {row["case"] for row in csv.DictReader(stream)} == {as_written(os.fsdecode(name)) for name in NAMES}
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    assert {os.fsencode(one["case"]) for one in manifest["scans"]} == set(status)
    assert str(done).encode() and "\n" not in readable("two\nlines") and "\x1b" not in str(done)
    again = predict(source, output, bundle=BUNDLE, quiet=True, continue_prediction=True)
    assert again.kept == len(NAMES)  # rows of the table are found again


@pytest.mark.parametrize("locale", LOCALES)
def test_no_locale_ends_a_command(tmp_path, scan, locale):
    names = [b"M\xfcller", "emoji\U0001f600".encode(), b"two\nlines"]
    source, environment = str(folder_of(tmp_path / "in", names, scan)), LOCALES[locale]
    output = tmp_path / "out"
    steps = [
        ("predict", source, str(output), "--bundle", str(BUNDLE), "--no_preview"),
        ("check", source, "--output", str(tmp_path / "report")),
        ("prepare", source, str(tmp_path / "prepared"), "--bias_correction=false"),
        ("evaluate", str(output), str(output), "--labels", str(BUNDLE), "--output", str(tmp_path / "scores")),
    ]
    if locale != "posix":  # what differs by locale is in one place, for all commands
        steps = steps[:1]
    for words in steps:
        code, printed = mapseg(*words, **environment)
        assert code == 0 and b"Traceback" not in printed, printed.decode(errors="replace")
    assert len(list(output.glob("*_seg.nii.gz"))) == len(names) and (output / "volumes.csv").is_file()
    if locale == "posix":
        assert (tmp_path / "report/check.html").is_file() and len(list((tmp_path / "prepared").glob("*.nii.gz"))) == 3
    code, printed = mapseg("report", str(tmp_path / "no\udcff\U0001f600"), **environment)
    assert code == 2 and b"Traceback" not in printed and b"name the output folder" in printed


def test_a_table_keeps_one_row_a_line_and_sends_no_control_characters(tmp_path):
    names = [os.fsdecode(name) for name in NAMES]
    text = text_table(("scan", "voxels"), [(name, 1) for name in names])
    assert len(text.splitlines()) == len(names) + 2 and text.isprintable() is False  # line breaks alone are none
    assert all(one.isprintable() or one == "\n" for one in text)
    write_text("\n".join(names), tmp_path / "names.txt")
    assert (tmp_path / "names.txt").read_text(encoding="utf-8").startswith("M\\udcfcller\nMüller")


def test_names_that_are_no_text_are_the_same_name_after_a_json_file(tmp_path, scan):
    source, output = folder_of(tmp_path / "in", [b"M\xfcller"], scan), tmp_path / "out"
    for _ in range(2):  # the second call finds its sidecar
        code, printed = mapseg("prepare", str(source), str(output), "--bias_correction=false", **LOCALES["posix"])
        assert code == 0, printed
    assert b"0 done, 1 skipped, 0 failed" in printed
    prepared = nib.load(output / os.fsdecode(b"M\xfcller.nii.gz"))
    nib.save(nib.Nifti1Image(np.ones(prepared.shape, np.uint8), prepared.affine), tmp_path / "map.nii.gz")
    sidecar, back = output / os.fsdecode(b"M\xfcller.json"), tmp_path / os.fsdecode(b"\xfc.nii.gz")
    code, printed = mapseg("restore", str(tmp_path / "map.nii.gz"), str(sidecar), str(back), PYTHONIOENCODING="ascii")
    assert code == 0 and nib.load(back).shape == nib.load(next(source.iterdir())).shape, printed
