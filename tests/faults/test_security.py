# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Untrusted files: weights, datalists, scans. Nothing in them runs, and nothing is written outside the results.

A sentinel is a file that hostile input would make; it must not exist afterwards. SECURITY.md names these tests.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import random
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.nifti1 import Nifti1Extension

import mapseg_components
from mapseg_components.checkpoints import load_weights, read_checked
from mapseg_components.data import load_datalist
from mapseg_components.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from mapseg_components.transforms import SaveLabelMap
from tests.conftest import ROOT, make_dataset, make_scan, write_nifti
from tests.faults.test_output import ADAPTATION, infer, label_map, model, names, refusal  # noqa: F401

SECRET = "DOE^JOHN 1970-01-01"


class Touch:
    """Pickles to a call that makes a file."""

    def __init__(self, path, how="system"):
        self.path, self.how = str(path), how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.path}",)
        if self.how == "eval":
            return eval, (f"open({self.path!r}, 'w').close()",)
        return open, (self.path, "w")


def refused_weights(path):
    """The message of both doors; neither advises to open the file without the guard."""
    for read in (read_checked, lambda p: load_weights(torch.nn.Linear(2, 2), p)):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        message = str(caught.value)
        assert caught.value.exit_code == 4 and path.name in message
        assert "weights_only" not in message and "likely succeed" not in message and "safe_globals" not in message
        assert len(message.splitlines()) == 1


# ---- weights


@pytest.mark.parametrize("how", ["system", "eval", "open"])
@pytest.mark.parametrize("kind", ["pickle", "zip", "inside a state_dict", "legacy"])
def test_code_in_weights_does_not_run(tmp_path, how, kind):
    sentinel, path = tmp_path / "sentinel", tmp_path / "model.pt"
    hostile = Touch(sentinel, how)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    elif kind == "zip":
        torch.save({"weight": torch.zeros(2, 2)}, path)
        rewrite(path, lambda name, content: pickle.dumps(hostile, 2) if name.endswith("/data.pkl") else content)
    else:
        legacy = {"_use_new_zipfile_serialization": False} if kind == "legacy" else {}
        torch.save({"weight": torch.zeros(2, 2), "bias": hostile}, path, **legacy)
    refused_weights(path)
    assert not sentinel.exists() and names(tmp_path) == ["model.pt"]


def test_these_pickles_would_run_without_the_guard(tmp_path):
    """Otherwise the test above would show nothing."""
    for how in ("system", "eval", "open"):
        sentinel = tmp_path / how
        pickle.loads(pickle.dumps(Touch(sentinel, how)))
        assert sentinel.exists()


def rewrite(path, change, more=()):
    """Change the members of a zip file, and add some."""
    with zipfile.ZipFile(path) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, content in [*((name, change(name, content)) for name, content in members), *more]:
            new.writestr(name, content)


@pytest.mark.parametrize("place", ["added", "renamed"])
def test_member_names_of_weights_lead_nowhere(tmp_path, place):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = folder / "model.pt"
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, path)
    if place == "added":
        more = [(name, b"x") for name in ("../x", "../../x", "model/../../x", f"{tmp_path}/x", "x")]
        rewrite(path, lambda name, content: content, more)
    else:
        with zipfile.ZipFile(path) as old:
            members = [(f"../{info.filename.split('/', 1)[1]}", old.read(info)) for info in old.infolist()]
        with zipfile.ZipFile(path, "w") as new:
            for name, content in members:
                new.writestr(name, content)
    try:
        found = read_checked(path)
    except CheckpointError as error:
        assert "model.pt" in str(error)
    else:
        assert set(found) == {"weight", "bias"}
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["b"] and names(folder) == ["model.pt"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_weights_are_refused(tmp_path, share):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(50, 50)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused_weights(path)
    assert path.stat().st_size == int(len(content) * share)


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_are_no_weights(tmp_path, seed):
    path = tmp_path / "model.pt"
    start = [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04"][seed % 4]
    path.write_bytes(start + random.Random(seed).randbytes(2000))
    refused_weights(path)


def test_what_is_no_state_dict_is_no_weights(tmp_path):
    path = tmp_path / "model.pt"
    for content in ([1, 2], {"weight": "text"}, torch.zeros(2)):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"model\.pt holds no plain state_dict"):
            load_weights(torch.nn.Linear(2, 2), path)


# ---- datalists


def datalist_with(folder, **fields):
    """The datalist of a small data set whose first test case has these fields."""
    path = make_dataset(folder)
    content = json.loads(path.read_text())
    content["target_test"][0] |= fields
    path.write_text(json.dumps(content))
    return path


HOSTILE_IDS = ["a/b", "a\\b", "..", "../x", "a..b", "/etc/passwd", "a\0b", "-rf", "~", "a\nb", "$x", "@x", "%x", "=1+1"]


@pytest.mark.parametrize("case_id", HOSTILE_IDS, ids=repr)
def test_a_case_id_that_is_no_file_name_is_refused(tmp_path, case_id):
    path = datalist_with(tmp_path / "data", case_id=case_id)
    error = refusal(DataError, lambda: load_datalist(path, "target_test"), str(path), "use letters, digits")
    assert repr(case_id) in str(error) and len(str(error).splitlines()) == 1


def test_a_long_case_id_names_no_file(tmp_path, model):  # noqa: F811
    """Refused, or only ever a word in a table: files are named after the scan."""
    path = datalist_with(tmp_path / "data", case_id="x" * 300)
    try:
        load_datalist(path, "target_test")
    except DataError as error:
        assert "case id" in str(error)
        return
    infer(model, path.parent, tmp_path / "out", "evaluate.json")
    assert {"0_seg.nii.gz", "volumes.csv", "metrics.json"} <= set(names(tmp_path / "out"))
    assert not [name for name in names(tmp_path / "out") if "xxx" in name]


EXPRESSION = "$__import__('pathlib').Path({!r}).touch()"


@pytest.mark.parametrize("reference", ["$__import__('os').system('true')", "@output_dir", "%output_dir"])
def test_expressions_in_a_case_id_are_refused(tmp_path, reference):
    path = datalist_with(tmp_path / "data", case_id=reference)
    refusal(DataError, lambda: load_datalist(path, "target_test"), str(path), "case id")


def test_expressions_in_a_datalist_are_text(tmp_path, model):  # noqa: F811
    """They stand where any text may stand, in a run that ends well, and nothing of them happens."""
    sentinel = tmp_path / "sentinel"
    expression = EXPRESSION.format(str(sentinel))
    path = datalist_with(tmp_path / "data", domain=expression, site="@output_dir", note="%weights", more=[expression])
    content = json.loads(path.read_text())
    content |= {expression: expression, "_target_": "builtins.open", "file": str(sentinel), "mode": "w"}
    path.write_text(json.dumps(content))
    infer(model, path.parent, tmp_path / "out", "evaluate.json")
    assert "metrics.json" in names(tmp_path / "out")
    assert not sentinel.exists()


@pytest.mark.parametrize("field", ["image", "label"])
@pytest.mark.parametrize("value", ["$__import__('pathlib').Path('SENTINEL').touch()", "@weights", "%weights"])
def test_expressions_as_paths_are_paths_that_do_not_exist(tmp_path, model, field, value):  # noqa: F811
    sentinel = tmp_path / "sentinel"
    value = value.replace("SENTINEL", str(sentinel))
    path = datalist_with(tmp_path / "data", **{field: value}, case_id="plain")
    action = lambda: infer(model, path.parent, tmp_path / "out", "evaluate.json")  # noqa: E731
    refusal(DataError, action, value.split("/")[-1], "no such file")
    assert not sentinel.exists() and not list(tmp_path.glob("out/*.nii.gz"))


def test_a_config_in_place_of_a_datalist_is_not_run(tmp_path):
    sentinel = tmp_path / "sentinel"
    config = tmp_path / "train.json"
    hostile = {"_target_": "builtins.open", "file": str(sentinel), "mode": "w"}
    for section in (hostile, EXPRESSION.format(str(sentinel)), [hostile], [EXPRESSION.format(str(sentinel))]):
        config.write_text(json.dumps({"imports": ["$import os"], "run": [hostile], "source_training": section}))
        with pytest.raises((ConfigError, DataError)) as caught:
            load_datalist(config, "source_training")
        assert str(config) in str(caught.value) and caught.value.exit_code in (2, 3)
        refusal(ConfigError, lambda: load_datalist(config, "target_test"), str(config), "add this list")
    for name in ("inference.json", "train.json"):
        file = ADAPTATION / "configs" / name
        refusal(ConfigError, lambda: load_datalist(file, "target_test"), str(file), "add this list")  # noqa: B023
    assert not sentinel.exists()


def test_a_pickle_in_place_of_a_datalist_is_not_read(tmp_path):
    sentinel, path = tmp_path / "sentinel", tmp_path / "datalist.json"
    path.write_bytes(pickle.dumps(Touch(sentinel)))
    refusal(ConfigError, lambda: load_datalist(path, "source_training"), str(path), "correct the datalist")
    assert not sentinel.exists()


# ---- scans, and where results go


def test_a_scan_may_be_a_link_out_of_the_folder(tmp_path, model):  # noqa: F811
    elsewhere = write_nifti(tmp_path / "elsewhere" / "real.nii.gz", make_scan()[0])
    before = Path(elsewhere).read_bytes()
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "linked.nii.gz").symlink_to(elsewhere)
    infer(model, tmp_path / "scans", tmp_path / "out")
    assert {"linked_seg.nii.gz", "volumes.csv"} <= set(names(tmp_path / "out"))
    assert names(tmp_path / "elsewhere") == ["real.nii.gz"] and Path(elsewhere).read_bytes() == before


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "dangling"])
def test_a_link_in_place_of_a_result_is_replaced_not_followed(tmp_path, exists):
    elsewhere = tmp_path / "elsewhere.txt"
    if exists:
        elsewhere.write_text("precious")
    link = tmp_path / "out" / "scan_seg.nii.gz"
    link.parent.mkdir()
    link.symlink_to(elsewhere)
    refusal(ConfigError, lambda: SaveLabelMap(link.parent)(label_map()), str(link), "overwrite")
    assert link.is_symlink()
    SaveLabelMap(link.parent, overwrite=True)(label_map())
    assert not link.is_symlink() and nib.load(link).shape == (9, 11, 13)
    assert elsewhere.read_text() == "precious" if exists else not elsewhere.exists()


@pytest.mark.parametrize("name", ["../../x.nii.gz", "/tmp/../../x.nii.gz", "..nii.gz", "a/../../..", "-x.nii.gz"])
@pytest.mark.parametrize("separate", [True, False])
def test_results_stay_in_their_folder_whatever_the_scans_path(tmp_path, name, separate):
    folder = tmp_path / "a" / "b"
    try:
        SaveLabelMap(folder, separate_folder=separate)(label_map(name=name))
    except ConfigError as error:
        assert str(folder) in str(error)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(folder in path.resolve().parents for path in written)


def hostile_header(path):
    """A scan with a patient's name wherever a NIfTI header has text."""
    image = nib.Nifti1Image(make_scan()[0], np.eye(4))
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = SECRET.encode()[: image.header[field].dtype.itemsize]
    image.header.extensions.append(Nifti1Extension("comment", SECRET.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    assert SECRET.encode()[:10] in nib.load(path).header.binaryblock
    return path


def holds_secret(text):
    text = text.encode(errors="surrogateescape") if isinstance(text, str) else text
    return SECRET[:8].encode() in text


@pytest.mark.parametrize("ends", ["well", "with NaN", "on a bad scan"])
def test_header_text_reaches_neither_logs_nor_results(tmp_path, model, caplog, capfd, ends):  # noqa: F811
    """Patient names stand in headers; logs and results are passed on."""
    caplog.set_level(logging.DEBUG)
    hostile_header(tmp_path / "scans" / "scan.nii.gz")
    settings = {}
    error = None
    if ends == "with NaN":
        weights = torch.load(model["weights"], weights_only=True)
        settings["weights"] = str(tmp_path / "huge.pt")
        torch.save({name: torch.full_like(value, 3e38) for name, value in weights.items()}, settings["weights"])
        error = refusal(NonFiniteError, lambda: infer(model, tmp_path / "scans", tmp_path / "out", **settings))
    elif ends == "on a bad scan":
        scan = nib.load(tmp_path / "scans" / "scan.nii.gz")
        nib.save(nib.Nifti1Image(np.zeros((8, 9, 10), np.float32), None, scan.header), scan.get_filename())
        error = refusal(DataError, lambda: infer(model, tmp_path / "scans", tmp_path / "out"))
    else:
        infer(model, tmp_path / "scans", tmp_path / "out")
        assert {"scan_seg.nii.gz", "volumes.csv"} <= set(names(tmp_path / "out"))
    printed = capfd.readouterr()
    chain = []
    while error is not None:
        chain.append(str(error))
        error = error.__cause__ or error.__context__
    assert not holds_secret(caplog.text + printed.out + printed.err + "\n".join(chain))
    for path in tmp_path.glob("out/**/*"):
        if path.is_file():
            content = path.read_bytes()
            if path.name.endswith(".nii.gz"):
                image = nib.load(path)
                content = image.header.binaryblock + repr(list(image.header.extensions)).encode()
            assert not holds_secret(content), path


# ---- the package itself

DOORS = {
    "torch.load": {"mapseg_components/checkpoints.py"},
    "torch.save": {"mapseg_components/checkpoints.py"},
    "torch.jit.load": set(),
    "pickle.load": set(),
    "pickle.loads": set(),
    "pickle.Unpickler": set(),
    "yaml.load": set(),
    "yaml.unsafe_load": set(),
    "os.system": set(),
    "os.popen": set(),
    "eval": set(),
    "exec": set(),
    "compile": set(),
    "__import__": set(),
    "importlib.import_module": {"commands/__init__.py"},  # a name of its own __all__, at its first use
}
MODULES = {"subprocess", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
# a stage of mapseg adapt: this Python with a list of arguments, never a shell
STARTS_PROCESSES = {"commands/stages.py"}


def dotted(node):
    """``torch.load`` of a call's function; empty for anything that is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def misuses(source, file):
    """Calls and imports that a file may not have."""
    found = []
    closed = MODULES - ({"subprocess"} if file in STARTS_PROCESSES else set())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in closed]
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in full if name in DOORS or name.split(".")[0] in closed]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in DOORS and file not in DOORS[name]:
                found.append(name)
            guarded = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if guarded.get("allow_pickle", False) is not False or guarded.get("weights_only", True) is not True:
                found.append(f"{name} without its guard")
            if "shell" in guarded:
                found.append(f"{name} through a shell")
            if name == "torch.load" and "weights_only" not in guarded:
                found.append("torch.load without weights_only")
    return found


SOURCES = sorted(Path(mapseg_components.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(SOURCES[0].parent)))
def test_no_second_door_for_code(path):
    assert misuses(path.read_text(), f"{path.parent.name}/{path.name}") == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "torch.save(x, path)",
        "import pickle\npickle.load(stream)",
        "from torch import load",
        "numpy.load(path, allow_pickle=True)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "import subprocess",
        "from subprocess import run",
    ],
)
def test_a_second_door_would_be_seen(source):
    assert misuses(source, "other.py")
    assert not misuses(
        "network.eval(); numpy.load(path); json.load(x); torch.load(p, weights_only=True)",
        "mapseg_components/checkpoints.py",
    )


def test_no_config_reads_files_around_the_door():
    """Expressions of the bundles are code; none of them opens weights, pickles or shells."""
    for path in sorted((ROOT / "bundles").glob("*/configs/*.[jy]*")):
        for word in ("torch.load", "pickle", "subprocess", "os.system", "eval(", "exec(", "weights_only", "__import__"):
            assert word not in path.read_text(), f"{path}: {word}"


def test_what_training_saves_is_plain(model):  # noqa: F811
    """Weights can be read by the guarded door, so nobody has a reason to open another one."""
    for path in [Path(model["weights"]), *sorted((ROOT / "bundles").glob("*/models/model.pt"))]:
        found = read_checked(path)
        assert found and all(isinstance(value, torch.Tensor) for value in found.values())
