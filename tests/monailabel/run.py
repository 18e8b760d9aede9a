# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Ask a real MONAI Label server for one scan, compare with ``monai.bundle run`` voxel by voxel, and train through it.

python -m tests.monailabel.run --label-env ENV --bundle bundles/mapseg_adaptation --scan SCAN.nii.gz \\
    --labelled FOLDER

ENV is a virtual environment with ``tests/monailabel/requirements.txt``; ``mapseg_components`` need not be installed in
it, the bundle is served as packed by ``pack_bundle.py``. FOLDER has ``images`` and ``labels`` by the same names: its
label maps are saved through the server, which is then asked to train, twice, and asked for label maps again. Without it
nothing is trained. The server listens on this machine alone and is ended with the script. Exit code 0 only if label map
and affine are equal, both trainings end, the weights that are served change, and the ones before are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from tools.pack_bundle import pack

# MONAI Label loads torchvision for pictures that this round trip does not make. Where its compiled operators do not fit
# PyTorch (a CUDA build beside a CPU build), its import fails over these two names; declared, they are never called.
START = """
import runpy, sys, torch
try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
runpy.run_module("monailabel.main", run_name="__main__", alter_sys=True)
"""
BOUNDARY = "mapseg-roundtrip"


def monailabel(environment: Path, *arguments: object) -> list[str]:
    """Command line of MONAI Label in its environment."""
    return [str(environment / "bin" / "python"), "-c", START, *map(str, arguments)]


@contextlib.contextmanager
def server(environment: Path, bundle: Path, scans: list[Path], folder: Path, timeout_s: float) -> Iterator[str]:
    """A running server with one bundle and some scans; yields its address.

    Args:
        environment: of MONAI Label.
        bundle: zip of `pack_bundle.py`.
        scans: NIfTI.
        folder: for the app and the log.
        timeout_s: seconds to wait for the first answer.
    """
    settings = {**os.environ, "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    settings.pop("PYTHONPATH", None)  # nothing but the packed bundle brings our code
    app, studies, log = folder / "apps" / "monaibundle", folder / "studies", folder / "server.log"
    made = subprocess.run(
        monailabel(environment, "apps", "--download", "--name", "monaibundle", "--output", folder / "apps"),
        capture_output=True,
        text=True,
        env=settings,
    )
    if made.returncode:
        sys.exit(f"MONAI Label did not make its app: {made.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(app / "model")
        name = archive.namelist()[0].split("/")[0]
    studies.mkdir()
    for scan in scans:
        shutil.copy(scan, studies)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = monailabel(environment, "start_server", "-a", app, "-s", studies, "-i", "127.0.0.1", "-p", port)
    for key, value in {"models": name, "zoo_source": "local", "sam2": "false", "preload": "false"}.items():
        command += ["--conf", key, value]  # a zoo source other than monaihosting: the local folder, no download
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=settings)
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + timeout_s
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                    urllib.request.urlopen(f"{address}/info/", timeout=10).read()
                    break
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit("the server did not start; its log ends with\n" + tail(log))
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def tail(log: Path) -> str:
    """Last lines of a log."""
    return "\n".join(log.read_text().splitlines()[-20:])


def send(url: str, method: str, content: bytes, kind: str, timeout_s: float) -> bytes:
    """An HTTP request; returns the answer's content."""
    headers = {"Content-Type": kind, "Accept": "application/json"}
    request = urllib.request.Request(url, data=content, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return answer.read()


def form(parameters: dict[str, object], label: Path | None = None) -> tuple[bytes, str]:
    """A form with ``params`` and, with a file, ``label``; its content and kind."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="params"\r\n\r\n{json.dumps(parameters)}\r\n'
    content = head.encode()
    if label is not None:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="label"; filename="{label.name}"\r\n'
        content += head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + label.read_bytes() + b"\r\n"
    return content + f"--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}"


def study(scan: Path) -> str:
    """Name of a scan in the server's store."""
    return scan.name.removesuffix(".gz").removesuffix(".nii")


def ask(address: str, name: str, scan: Path, label_map: Path, timeout_s: float) -> None:
    """Have the server segment a scan that it holds; writes the label map that it answers with."""
    query = urllib.parse.urlencode({"image": study(scan), "output": "image"})
    content = send(f"{address}/infer/{name}?{query}", "POST", *form({"device": "cpu"}), timeout_s)
    label_map.write_bytes(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)


def train(address: str, name: str, labelled: Path, models: Path, epochs: int, timeout_s: float) -> str:
    """Save label maps through the server and train twice; returns what is wrong, or nothing.

    Args:
        labelled: folder with ``images``, which the server holds, and ``labels``.
        models: of the bundle that is served.
    """
    offered = json.loads(urllib.request.urlopen(f"{address}/info/", timeout=10).read())["trainers"]
    if name not in offered:
        return f"the server offers training for {sorted(offered)}, not for {name}"
    for label in sorted((labelled / "labels").glob("*.nii*")):
        query = urllib.parse.urlencode({"image": study(label), "tag": "final"})
        send(f"{address}/datastore/label?{query}", "PUT", *form({}, label), timeout_s)
    request = json.dumps({"device": "cpu", "max_epochs": epochs, "val_split": 0.34}).encode()
    for number in (1, 2):
        before = (models / "model.pt").read_bytes()
        send(f"{address}/train/{name}?run_sync=true", "POST", request, "application/json", timeout_s)
        if (models / "model.pt").read_bytes() == before:
            return f"training {number} ended, but model.pt is as before"
        if (models / "previous_model.pt").read_bytes() != before:
            return f"training {number} did not keep the weights before it"
    print(f"Trained twice, {epochs} epochs each; model.pt has changed, previous_model.pt has the weights before.")
    return ""


def main() -> None:
    """Serve, ask, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label-env", type=Path, required=True, help="virtual environment with MONAI Label")
    parser.add_argument("--bundle", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--scan", type=Path, required=True, help="one NIfTI scan")
    parser.add_argument("--labelled", type=Path, help="folder with images and labels: train through the server, too")
    parser.add_argument("--epochs", type=int, default=5, help="of each training")
    parser.add_argument("--timeout_s", type=float, default=300, help="longest wait for the server and for its answer")
    arguments = parser.parse_args()
    # the folder of the environment is not resolved: its python is a link
    bundle, scan, environment = arguments.bundle.resolve(), arguments.scan.resolve(), arguments.label_env.absolute()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        served, after = folder / "served.nii", folder / "after_training.nii"
        labelled, wrong = arguments.labelled, ""
        scans = [scan, *(sorted((labelled / "images").glob("*.nii*")) if labelled else ())]
        with server(environment, pack(bundle, folder), scans, folder, arguments.timeout_s) as address:
            try:
                ask(address, bundle.name, scan, served, arguments.timeout_s)
                if labelled:
                    models = folder / "apps" / "monaibundle" / "model" / bundle.name / "models"
                    wrong = train(address, bundle.name, labelled, models, arguments.epochs, arguments.timeout_s)
                    ask(address, bundle.name, scan, after, arguments.timeout_s)
            except urllib.error.HTTPError as error:
                sys.exit(f"the server answered {error.code}; its log ends with\n{tail(folder / 'server.log')}")
        (folder / "scans").mkdir()
        shutil.copy(scan, folder / "scans")
        command = [sys.executable, "-m", "monai.bundle", "run", "run", "--config_file", "configs/inference.json"]
        command += ["--dataset_dir", str(folder / "scans"), "--output_dir", str(folder / "run")]
        command += ["--device", "$torch.device('cpu')"]
        ran = subprocess.run(command, cwd=bundle, capture_output=True, text=True)
        if ran.returncode:
            sys.exit("monai.bundle run failed:\n" + "\n".join(ran.stderr.splitlines()[-5:]))
        first, second = nib.load(served), nib.load(next((folder / "run").glob("*_seg.nii.gz")))
        one, other = np.asarray(first.dataobj), np.asarray(second.dataobj)
        if one.shape != other.shape:
            sys.exit(f"MONAI Label's label map has shape {one.shape}, the bundle's {other.shape}")
        differing, shift = int((one != other).sum()), float(np.abs(first.affine - second.affine).max())
        values = np.unique(one).astype(int).tolist()
        print(f"{differing} of {one.size} voxels differ, values {values}, affine by {shift:.1g}")
        if labelled and not wrong:
            changed = int((one != np.asarray(nib.load(after).dataobj)).sum())
            print(f"After training {changed} of {one.size} voxels are labelled otherwise.")
            wrong = "" if changed else "the label map is the same after training"
        if wrong:
            sys.exit(wrong)
        sys.exit(0 if differing == 0 and shift < 1e-4 else 1)


if __name__ == "__main__":
    main()
