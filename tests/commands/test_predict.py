# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""`mapseg predict` on the shipped sample with the shipped weights: geometry, files, bad scans among good ones."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import run
from monai.inferers import SimpleInferer

from mapseg_components.commands import predict
from mapseg_components.commands.main import main
from mapseg_components.errors import ConfigError, ResourceError
from mapseg_components.inferers import AveragingInferer
from mapseg_components.prediction.run import Run
from mapseg_components.prediction.writing import Writer
from mapseg_components.transforms import Probabilitiesd
from mapseg_components.transforms.probabilities import largest_probability
from tests.conftest import ROOT, SAMPLE
from tests.warm import python

BUNDLE = ROOT / "bundles" / "mapseg_adaptation"
SCAN = SAMPLE / "test" / "images" / "GA24_notoperated.nii.gz"
NAMES = ["white matter", "ventricles", "cerebellum", "extra-ventricular CSF", "cortical grey matter"]
NAMES += ["deep grey matter", "brainstem", "corpus callosum"]


def rotation(degrees):
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One scan as it is, oblique, stored from right to left and front to back, and cut off."""
    place = tmp_path_factory.mktemp("scans")
    scan = nib.load(SCAN)
    voxels = np.asarray(scan.dataobj)[4:40, 5:45, 2:38]  # three different sides, three windows
    straight = nib.Nifti1Image(voxels, scan.affine)
    nib.save(straight, place / "a straight ü.nii.gz")
    nib.save(nib.Nifti1Image(voxels, rotation(17) @ scan.affine), place / "oblique.nii.gz")
    nib.save(straight.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]])), place / "turned.nii.gz")
    (place / "cut.nii.gz").write_bytes(SCAN.read_bytes()[:4000])
    return place


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """The command as a user types it; exit code, output and folder."""
    output = tmp_path_factory.mktemp("out") / "new"
    line = [python(), "-m", "mapseg_components.commands", "predict", str(folder), str(output)]
    line += ["--bundle", str(BUNDLE), "--probabilities", "--num_threads", "1"]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done, output


def label_map(path):
    return np.asarray(nib.load(path).dataobj)


def test_one_bad_scan_is_listed_and_the_rest_done(results):
    done, output = results
    assert done.returncode == 3, done.stderr
    assert re.search(r"cut +failed .*gzip", done.stdout) and "3 of 4 scans segmented" in done.stdout
    assert "cut.nii.gz" in done.stderr and "Traceback" not in done.stderr and "WARNING" not in done.stderr
    names = {path.name for path in output.glob("*.nii.gz")}
    stems = ("a straight ü", "oblique", "turned")
    assert names == {f"{stem}_{what}.nii.gz" for stem in stems for what in ("seg", "probabilities")}
    assert not list(output.glob(".unfinished*"))
    status = {one["case"]: one for one in json.loads((output / "manifest.json").read_text())["scans"]}
    assert {case: one["status"] for case, one in status.items()} == {
        "a straight ü": "done", "cut": "failed", "oblique": "done", "turned": "done"
    }  # fmt: skip
    assert "gzip" in status["cut"]["message"] and status["cut"]["label_map"] is None


def test_label_maps_lie_on_their_scans_grid(results, folder):
    for scan in ("a straight ü", "oblique", "turned"):
        one, two = nib.load(folder / f"{scan}.nii.gz"), nib.load(results[1] / f"{scan}_seg.nii.gz")
        assert two.shape == one.shape and two.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(two.affine, one.affine)
    straight = label_map(results[1] / "a straight ü_seg.nii.gz")
    assert set(np.unique(straight)) == set(range(9))
    np.testing.assert_array_equal(label_map(results[1] / "oblique_seg.nii.gz"), straight)
    turned = nib.as_closest_canonical(nib.load(results[1] / "turned_seg.nii.gz"))
    np.testing.assert_array_equal(np.asarray(turned.dataobj), straight)


def test_the_same_voxels_as_by_the_bundle_alone(results, folder, tmp_path):
    scan = folder / "turned.nii.gz"
    config = str(BUNDLE / "configs" / "inference.json")
    run(
        config_file=config,
        bundle_root=str(BUNDLE),
        dataset_dir=str(scan),
        output_dir=str(tmp_path),
        device="$torch.device('cpu')",
    )
    expected, found = nib.load(tmp_path / "turned_seg.nii.gz"), nib.load(results[1] / "turned_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_array_equal(found.affine, expected.affine)


def test_the_table_counts_the_voxels_of_the_label_maps(results):
    with (results[1] / "volumes.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 8
    for row in rows:
        image = nib.load(results[1] / f"{row['case']}_seg.nii.gz")
        voxels, mask = np.asarray(image.dataobj), np.asarray(image.dataobj) == NAMES.index(row["structure"]) + 1
        assert int(row["voxels"]) == mask.sum()
        np.testing.assert_allclose(float(row["volume_mm3"]), mask.sum() * np.prod(image.header.get_zooms()), rtol=1e-4)
        at_edge = any(np.take(mask, end, axis).any() for axis in range(3) for end in (0, -1))
        assert row["touches_edge"] == str(at_edge)
        # confidence, from the stored probabilities of the same scan
        stored = np.asarray(nib.load(results[1] / f"{row['case']}_probabilities.nii.gz").dataobj)
        assert stored.shape == (*voxels.shape, 9)
        assert float(row["confidence"]) == pytest.approx(stored.max(axis=-1)[mask].mean(), abs=0.5 / 255)


def test_probabilities_are_small_files_that_agree_with_the_label_map(results):
    image = nib.load(results[1] / "turned_probabilities.nii.gz")
    assert image.get_data_dtype() == np.uint8
    stored, labels = np.asarray(image.dataobj), label_map(results[1] / "turned_seg.nii.gz")
    assert stored.max() <= 1 + 1e-6 and np.abs(stored.sum(axis=-1) - 1).max() <= 9 * 0.5 / 255 + 1e-6
    chosen = np.take_along_axis(stored, labels[..., None].astype(int), axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, stored.max(axis=-1), atol=1.01 / 255)


def test_lookup_files_name_all_structures(results):
    snap = re.findall(r'^ *(\d+) .*"(.*)"$', (results[1] / "labels_itksnap.txt").read_text(), re.MULTILINE)
    assert snap == [("0", "Clear Label"), *((str(i), name) for i, name in enumerate(NAMES, start=1))]
    lines = (results[1] / "labels_freesurfer.txt").read_text().splitlines()[1:]
    table = [line.split() for line in lines]
    assert [len(row) for row in table] == [6] * 9 and [int(row[0]) for row in table] == list(range(9))
    assert len({tuple(row[2:5]) for row in table}) == 9  # no two of one colour


def test_a_picture_per_scan(results):
    pytest.importorskip("matplotlib")
    pictures = sorted((results[1] / "previews").iterdir())
    assert [path.name for path in pictures] == ["a straight ü.png", "oblique.png", "turned.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in pictures)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_scan_whose_picture_fails_is_done(folder, tmp_path, overwrite):
    (tmp_path / "previews").write_text("in the way")
    found = predict(str(folder / "oblique.nii.gz"), str(tmp_path), bundle=str(BUNDLE), overwrite=overwrite, quiet=True)
    assert found.exit_code == 0 and (tmp_path / "oblique_seg.nii.gz").is_file()
    (scan,) = json.loads((tmp_path / "manifest.json").read_text())["scans"]
    assert (scan["status"], scan["preview"]) == ("done", None)
    assert scan["message"].startswith("its picture is missing")


def test_the_manifest_says_what_was_run(results):
    manifest = json.loads((results[1] / "manifest.json").read_text())
    digest = hashlib.sha256((BUNDLE / "models" / "model.pt").read_bytes()).hexdigest()
    assert [one["sha256"] for one in manifest["weights"]] == [digest]
    assert manifest["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert manifest["command"][1] == "predict" and "--probabilities" in manifest["command"]
    assert manifest["labels"] == {name: index for index, name in enumerate(NAMES, start=1)}
    assert len(manifest["settings_sha256"]) == 64 and manifest["settings"]["width"] == 32


def test_existing_results_are_refused_before_any_work(results, folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in results[1].rglob("*")}
    assert main(["predict", str(folder), str(results[1]), "--bundle", str(BUNDLE)]) == 2
    assert "results of an earlier run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in results[1].rglob("*")} == before


def test_overwriting_leaves_nothing_of_the_label_map_before(folder, tmp_path, monkeypatch):
    scan, out = str(folder / "oblique.nii.gz"), tmp_path / "out"
    predict(scan, str(out), bundle=str(BUNDLE), probabilities=True, quiet=True)
    (out / "oblique_seg.dcm").write_text("not of ours, for the scan is no series")
    before = {path.name for path in out.rglob("oblique*")}
    assert before == {"oblique_seg.nii.gz", "oblique_probabilities.nii.gz", "oblique.png", "oblique_seg.dcm"}

    replace = os.replace

    def fails(source, target):
        if str(target).endswith("oblique_seg.nii.gz") and ".unfinished" not in str(target):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    assert predict(scan, str(out), bundle=str(BUNDLE), no_preview=True, overwrite=True, quiet=True).failed
    assert {path.name for path in out.rglob("oblique*")} == before  # all that belongs to the old label map

    monkeypatch.undo()
    predict(scan, str(out), bundle=str(BUNDLE), no_preview=True, overwrite=True, quiet=True)
    assert {path.name for path in out.rglob("oblique*")} == {"oblique_seg.nii.gz", "oblique_seg.dcm"}


@pytest.mark.parametrize("below", ["file", "file/out"])
def test_a_file_in_the_place_of_the_output_folder_is_a_usage_error(folder, tmp_path, capsys, below):
    (tmp_path / "file").write_text("in the way")
    assert main(["predict", str(folder), str(tmp_path / below), "--bundle", str(BUNDLE)]) == 2
    assert f"{tmp_path / 'file'} is a file: name a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, code, part",
    [
        (["EMPTY", "OUT", "--bundle", str(BUNDLE)], 2, "no NIfTI scan"),
        (["SCANS", "SCANS", "--bundle", str(BUNDLE)], 2, "output is the input folder"),
        (["SCANS", "OUT", "--bundle", "EMPTY"], 2, "no config at"),
        (["SCANS", "OUT", "--bundle", str(BUNDLE), "--weights", "EMPTY/none.pt"], 4, "no weights at"),
        (["SCANS", "OUT", "--bundle", str(BUNDLE), "--keep_largest", "spleen"], 2, ""),
        (["SCANS", "OUT", "--bundle", str(BUNDLE), "--modality", "T2w"], 2, "no BIDS dataset"),
        (["SCANS", "OUT", "--bundle", str(BUNDLE), "--device", "gpu"], 2, "device is 'gpu'"),
        (["SCANS", "OUT", "--bundle", str(BUNDLE), "--settings", '{"window_stride": "x"}'], 2, 'window_stride is "x"'),
        (
            ["SCANS", "OUT", "--bundle", str(BUNDLE), "--settings", '{"window_stride": ["x", 1, 1]}'],
            2,
            "numbers such as",
        ),
    ],
)
def test_bad_input_ends_with_its_exit_code_and_no_label_map(words, code, part, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"SCANS": str(folder), "OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty")}
    words = [re.sub("SCANS|OUT|EMPTY", lambda found: places[found.group()], word) for word in words]
    assert main(["predict", *words]) == code
    printed = capsys.readouterr().err
    assert part in printed and "Traceback" not in printed
    assert not list(tmp_path.rglob("*.nii.gz")) and not list(tmp_path.rglob("manifest.json"))


def test_a_run_that_is_interrupted_keeps_what_is_finished(folder, tmp_path, monkeypatch, capsys):
    segment = Run.segment
    monkeypatch.setattr(Run, "segment", lambda run, todo, batch: segment(run, todo, batch)
                        if "straight" in todo[0].case else (_ for _ in ()).throw(KeyboardInterrupt))  # fmt: skip
    assert main(["predict", str(folder), str(tmp_path), "--bundle", str(BUNDLE), "--no_preview"]) == 130
    assert "interrupted" in capsys.readouterr().err
    status = {one["case"]: one["status"] for one in json.loads((tmp_path / "manifest.json").read_text())["scans"]}
    assert status == {"a straight ü": "done", "cut": "failed", "oblique": "not done", "turned": "not done"}
    assert len((tmp_path / "volumes.csv").read_text(encoding="utf-8").splitlines()) == 1 + 8


def test_an_error_in_one_scan_while_segmenting_is_its_own(folder, tmp_path, monkeypatch, capsys):
    keep = Writer.keep

    def full(writer, one, case, place, output):
        if one.case == "oblique":
            raise ResourceError("disk full")
        return keep(writer, one, case, place, output)

    monkeypatch.setattr(Writer, "keep", full)
    (tmp_path / "in").mkdir()
    for name in ("oblique", "turned"):
        shutil.copyfile(folder / f"{name}.nii.gz", tmp_path / "in" / f"{name}.nii.gz")
    words = ["predict", str(tmp_path / "in"), str(tmp_path / "out"), "--bundle", str(BUNDLE), "--no_preview"]
    assert main(words) == 6
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["turned_seg.nii.gz"]
    assert "disk full" in capsys.readouterr().out


def test_only_bad_scans_end_with_3_and_a_manifest(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text.nii.gz").write_text("no scan")
    assert main(["predict", str(tmp_path / "in"), str(tmp_path / "out"), "--bundle", str(BUNDLE)]) == 3
    assert "0 of 1 scans" in capsys.readouterr().out
    scans = json.loads((tmp_path / "out" / "manifest.json").read_text())["scans"]
    assert [one["status"] for one in scans] == ["failed"] and "rename" in scans[0]["message"]


@pytest.fixture
def bids(tmp_path, folder):
    """Two subjects, one with sessions, and a T1w that must be left alone."""
    place = tmp_path / "raw"
    for name in ("sub-01/anat/sub-01_T2w", "sub-02/ses-1/anat/sub-02_ses-1_run-2_T2w", "sub-01/anat/sub-01_T1w"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "turned.nii.gz", place / f"{name}.nii.gz")
    (place / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.9.0"}')
    return place


def test_a_bids_dataset_becomes_a_bids_derivative(bids, tmp_path):
    output = tmp_path / "derivatives"
    with pytest.raises(ConfigError, match="T1w, T2w: choose one by modality"):
        predict(bids, output, bundle=BUNDLE)
    shutil.copytree(bids, tmp_path / "other")  # a dataset of somebody, whose description must stay
    with pytest.raises(ConfigError, match="dataset_description"):
        predict(bids, tmp_path / "other", bundle=BUNDLE, modality="T2w")
    done = predict(bids, output, bundle=BUNDLE, modality="T2w", probabilities=True, no_preview=True, quiet=True)
    assert done.exit_code == 0
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    stems = ("sub-01/anat/sub-01", "sub-02/ses-1/anat/sub-02_ses-1_run-2")
    endings = ("dseg.nii.gz", "dseg.json", "probseg.nii.gz")
    known = {"dataset_description.json", "dseg.tsv", ".bidsignore", ".run.lock"}
    ignored = set((output / ".bidsignore").read_text().split())
    assert files - known - ignored == {f"{stem}_{ending}" for stem in stems for ending in endings}
    description = json.loads((output / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative" and description["GeneratedBy"][0]["Name"] == "mapseg-monai"
    assert re.fullmatch(r"1\.\d+\.\d+", description["BIDSVersion"])
    rows = [line.split("\t") for line in (output / "dseg.tsv").read_text().splitlines()]
    assert rows[0] == ["index", "name", "color"] and [row[1] for row in rows[2:]] == NAMES
    sidecar = json.loads((output / f"{stems[1]}_dseg.json").read_text())
    assert sidecar["Sources"] == [f"bids:raw:{stems[1]}_T2w.nii.gz"]
    labels = set(np.unique(label_map(output / f"{stems[0]}_dseg.nii.gz")))
    assert labels == {int(row[0]) for row in rows[1:]}


def test_the_largest_component_of_one_structure(folder, tmp_path):
    measure = pytest.importorskip("skimage.measure")
    scan, one = tmp_path / "two heads.nii.gz", nib.load(folder / "a straight ü.nii.gz")
    voxels = np.asarray(one.dataobj)
    both = np.concatenate([voxels, np.zeros_like(voxels[:20]), voxels[:, :, ::-1]])
    nib.save(nib.Nifti1Image(both, one.affine), scan)
    predict(scan, tmp_path / "plain", bundle=BUNDLE, no_preview=True, quiet=True)
    plain = label_map(tmp_path / "plain" / "two heads_seg.nii.gz")
    value = max(range(1, 9), key=lambda one: measure.label(plain == one).max())
    parts = measure.label(plain == value)
    assert parts.max() > 1  # else the test shows nothing
    predict(scan, tmp_path / "kept", bundle=BUNDLE, keep_largest=NAMES[value - 1], no_preview=True, quiet=True)
    kept = label_map(tmp_path / "kept" / "two heads_seg.nii.gz")
    largest = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
    np.testing.assert_array_equal(kept == value, largest)
    np.testing.assert_array_equal(kept[plain != value], plain[plain != value])


def test_several_weights_and_the_mirror_image(folder, results, tmp_path):
    weights = BUNDLE / "models" / "model.pt"
    scan = folder / "turned.nii.gz"
    predict(scan, tmp_path / "two", bundle=BUNDLE, weights=f"{weights},{weights}", no_preview=True, quiet=True)
    np.testing.assert_array_equal(
        label_map(tmp_path / "two" / "turned_seg.nii.gz"), label_map(results[1] / "turned_seg.nii.gz")
    )
    assert len(json.loads((tmp_path / "two" / "manifest.json").read_text())["weights"]) == 2
    # a scan and its mirror image have mirrored label maps
    voxels = nib.load(scan)
    left = next(axis for axis, code in enumerate(nib.aff2axcodes(voxels.affine)) if code in "LR")
    nib.save(nib.Nifti1Image(np.flip(np.asarray(voxels.dataobj), left), voxels.affine), tmp_path / "mirror.nii.gz")
    for path in (scan, tmp_path / "mirror.nii.gz"):
        predict(path, tmp_path / "flip" / path.name[:3], bundle=BUNDLE, flip_tta=True, no_preview=True)
    one, two = (label_map(next((tmp_path / "flip" / name).glob("*_seg.nii.gz"))) for name in ("tur", "mir"))
    assert (np.flip(two, left) != one).mean() < 1e-4  # windows start at the other side


@pytest.mark.parametrize("name", ["Left-Hippocampus", "Lung_Lt", "FemurHeadL", "LeftVentricle", "rightlung"])
def test_flips_are_refused_where_a_structure_has_a_side(folder, tmp_path, name):
    overlay = tmp_path / "sides.yaml"
    overlay.write_text(f"labels: {{{name}: 1, b: 2, c: 3, d: 4, e: 5, f: 6, g: 7, h: 8}}\n")
    with pytest.raises(ConfigError, match=rf"\({name}\).*leave flip_tta out"):
        predict(folder, tmp_path / "out", bundle=BUNDLE, overlays=str(overlay), flip_tta=True)


class Scaled(torch.nn.Module):
    """Logits of two classes: 0, and a weight times the voxel's value."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, image):
        ramp = torch.linspace(0, 1, image.shape[2]).reshape(1, 1, -1, 1, 1)
        return torch.cat([torch.zeros_like(image), self.weight * (image + ramp)], dim=1)


def test_averaging_is_the_mean_of_probabilities(tmp_path):
    torch.save(Scaled(-3.0).state_dict(), tmp_path / "other.pt")
    image = torch.rand(1, 1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inferer = AveragingInferer(SimpleInferer(), [tmp_path / "other.pt"], flip_axes=[0])
        found = torch.softmax(inferer(image, Scaled(2.0)), dim=1)
        views = [net(image) for net in (Scaled(2.0), Scaled(-3.0))]
        views += [net(image.flip(2)).flip(2) for net in (Scaled(2.0), Scaled(-3.0))]
    torch.testing.assert_close(found, torch.stack([torch.softmax(one, dim=1) for one in views]).mean(dim=0))
    with pytest.raises(ConfigError, match="flip_axes"):
        AveragingInferer(SimpleInferer(), flip_axes=[3])


def test_confidence_is_the_largest_probability():
    logits = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(1)) * 5
    probabilities = torch.softmax(logits, dim=0)
    torch.testing.assert_close(largest_probability(logits)[0], probabilities.amax(dim=0))
    stored = Probabilitiesd()({"pred": logits})["probabilities"]
    assert stored.dtype == torch.uint8 and (stored / 255 - probabilities).abs().max() <= 0.5 / 255 + 1e-6


def test_label_maps_and_channels_among_scans_are_named_and_the_scans_done(folder, tmp_path, caplog):
    scans = tmp_path / "in" / "imagesTs"
    scans.mkdir(parents=True)
    for name in ("a", "b_0000", "b_0001", "c_0000"):
        shutil.copy(folder / "oblique.nii.gz", scans / f"{name}.nii.gz")
    shutil.copy(folder / "oblique.nii.gz", scans / "a_seg.nii.gz")
    found = predict(scans, tmp_path / "out", bundle=BUNDLE, no_preview=True, quiet=True)
    assert {one.case: one.status for one in found.predictions} == {
        **dict.fromkeys(("a", "c_0000"), "done"),
        **dict.fromkeys(("b_0000", "b_0001"), "failed"),
    }
    assert found.exit_code == 3 and sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == [
        "a_seg.nii.gz",
        "c_0000_seg.nii.gz",
    ]
    messages = {one.case: one.message for one in found.failed}
    assert "one of 2 channels" in messages["b_0001"]
    assert "a label map by its name" in str(found) and "a_seg.nii.gz" in str(found)


def test_a_mapping_of_labels_with_background_gives_the_same_results(results, folder, tmp_path):
    labels = json.dumps({"background": 0, **{name: value for value, name in enumerate(NAMES, start=1)}})
    (tmp_path / "background.json").write_text(f'{{"labels": {labels}}}')
    overlay = str(tmp_path / "background.json")
    scan = folder / "oblique.nii.gz"
    found = predict(scan, tmp_path / "out", bundle=BUNDLE, overlays=overlay, no_preview=True, quiet=True)
    assert [row["structure"] for row in found.volumes] == NAMES
    np.testing.assert_array_equal(
        label_map(tmp_path / "out" / "oblique_seg.nii.gz"), label_map(results[1] / "oblique_seg.nii.gz")
    )
