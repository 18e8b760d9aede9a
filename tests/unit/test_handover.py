# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The hand-over package: what is in it, and what of an untrusted package is refused before it is used."""

from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from mapseg_components.checkpoints import write_atomic
from mapseg_components.data import median_spacing
from mapseg_components.errors import CheckpointError, ConfigError
from mapseg_components.handover import (
    HandoverPackage,
    SourceOnlyWeights,
    resize_package,
    resized_spacing,
    volume_priors,
    write_handover,
)
from mapseg_components.handover.fragments import network_of
from mapseg_components.networks import GlobalLocalDeepLabV3
from mapseg_components.plans.package import figures_of
from tests.conftest import write_nifti
from tests.pictures import write_picture

LABELS = {"first": 1, "second": 2}
NETWORK = {
    "_target_": "mapseg_components.networks.GlobalLocalDeepLabV3",
    "in_channels": 1,
    "num_classes": 3,
    "width": 8,
    "depth": 1,
    "stride": 4,
    "dilations": [1, 2],
    "head_channels": 8,
}
PREPROCESSING = {"in_channels": 1, "patch_size": [16, 16, 16], "percentile": 99.5, "percentile_foreground": False}
TRAINING = {"mask_ratio": 0.7, "mask_value": "mean", "target_negative_values": None, "local_block_size": [4, 4, 8]}
SETTING = {"preprocessing": PREPROCESSING, "training": TRAINING}


class Validation:
    """An evaluator that found these Dice; the second structure is absent from the second scan."""

    def __init__(self):
        details = {"dice": torch.tensor([[0.5, 0.6], [0.7, float("nan")]])}
        self.state = SimpleNamespace(key_metric_name="dice", metric_details=details)

    def run(self):
        pass


def label_maps(folder, sizes):
    """One label map per row of voxel counts (first, second), voxels of 0.5 x 1 x 2 mm."""
    cases = []
    for number, counts in enumerate(sizes):
        voxels = np.zeros(4 * 5 * 6, np.uint8)
        voxels[: counts[0]], voxels[counts[0] : sum(counts)] = 1, 2
        path = write_nifti(folder / f"{number}.nii.gz", voxels.reshape(4, 5, 6), np.diag([0.5, 1.0, 2.0, 1.0]))
        cases.append({"image": path, "label": path, "case_id": str(number)})
    return cases


@pytest.fixture
def package(tmp_path, tiny_network):
    """A sound package; the network with its weights."""
    write_atomic(tiny_network.state_dict(), tmp_path / "weights.pt")
    cases = label_maps(tmp_path / "labels", [(10, 4), (20, 0)])
    places = (tmp_path / "package", tmp_path / "weights.pt")
    write_handover(*places, tiny_network, NETWORK, SETTING, LABELS, Validation(), cases, 2)
    return tmp_path / "package"


def change(package, **changes):
    """Edit handover.json as text in the place of a value (``a__b``)."""
    path = package / "handover.json"
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content).replace("Infinity", "1e999"))


def test_a_package_reads_as_it_was_written(package, tiny_network):
    read = HandoverPackage(package)
    assert read.labels == LABELS and read.settings == SETTING
    assert read.content["source_validation"] == {
        "metric": "Dice",
        "scans": 2,
        "mean": 0.6,
        "structures": {"first": 0.6, "second": 0.6},
    }
    assert read.content["spacing_mm"] == [0.5, 1.0, 2.0]
    found = torch.load(read.weights, weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in tiny_network.state_dict().items())
    same = {"preprocessing": {**PREPROCESSING, "patch_size": (16, 16, 16)}, "training": {"mask_ratio": 0.5}}
    read.require(LABELS, same, read.network)
    read.network.load_state_dict(found)
    assert {path.name for path in package.iterdir()} == {"weights.pt", "handover.json"}


@pytest.mark.parametrize(
    ("working", "own", "directions", "expected"),
    [
        ([2.0, 2.0, 3.0], None, None, [1.0, 1.0, 1.5]),
        (None, [0.5, 1.0, 2.0], None, [0.25, 0.5, 1.0]),
        ([0.0, 2.0, 0.0], [0.5, 1.0, 2.0], None, [0.25, 1.0, 1.0]),
        (None, None, None, None),
        ([2.0, 2.0, 0.0], None, None, None),
        ([2.0, 2.0, 0.0], [0.5, 1.0, 2.0], np.eye(3).tolist(), None),  # its axes are not those of the working frame
        ([2.0, 2.0, 3.0], None, np.eye(3).tolist(), [1.0, 1.0, 1.5]),
    ],
)
def test_bodies_of_half_the_size_are_worked_on_with_half_the_spacing(working, own, directions, expected):
    assert resized_spacing(working, own, directions, 0.5) == expected


def test_a_resized_package_says_all_lengths_and_volumes_of_the_other_size(package):
    preprocessing = {**PREPROCESSING, "working_spacing": None, "working_directions": None}
    change(package, settings__preprocessing=preprocessing, foreground_mm=[20.0, 10.0, 30.0])
    before, weights = HandoverPackage(package).content, (package / "weights.pt").read_bytes()
    content = resize_package(HandoverPackage(package), 0.5).content
    assert content["settings"]["preprocessing"] == {**preprocessing, "working_spacing": [0.25, 0.5, 1.0]}
    assert content["foreground_mm"] == [10.0, 5.0, 15.0] and content["spacing_mm"] == [0.25, 0.5, 1.0]
    found, known = (one["volumes"]["structures"] for one in (content, before))
    assert found["second"] is None and found["first"]["share"] == known["first"]["share"]
    assert found["first"]["volume_mm3"]["range"] == [end / 8 for end in known["first"]["volume_mm3"]["range"]]
    assert found["first"]["scans"] == known["first"]["scans"]
    same = ("weights", "network", "labels", "source_validation", "versions")
    assert all(content[name] == before[name] for name in same)
    assert (package / "weights.pt").read_bytes() == weights
    change(package, spacing_mm=None, settings__preprocessing=preprocessing)
    without = (package / "handover.json").read_bytes()
    assert resize_package(HandoverPackage(package), 0.5) is None
    assert (package / "handover.json").read_bytes() == without


@pytest.mark.parametrize("value", [[1.0, 2.0], [1.0, 2.0, 0.0], "large", [1.0, 2.0, True]])
def test_an_extent_that_cannot_be_is_refused(package, value):
    change(package, foreground_mm=value)
    with pytest.raises(ConfigError, match="foreground_mm is"):
        assert HandoverPackage(package).content


def test_the_extent_of_what_scans_show_is_written_unless_they_are_few(tmp_path, tiny_network):
    cases = label_maps(tmp_path / "labels", [(10, 4), (20, 0)])
    for case in cases:
        case["image"] = write_nifti(tmp_path / f"{case['case_id']}.nii.gz", np.pad(np.ones((4, 6, 2)), 2), np.eye(4))
    write_atomic(tiny_network.state_dict(), tmp_path / "weights.pt")
    for scans, expected in ((2, [4.0, 6.0, 2.0]), (3, None)):
        places = (tmp_path / f"package{scans}", tmp_path / "weights.pt")
        write_handover(*places, tiny_network, NETWORK, SETTING, LABELS, Validation(), cases, scans)
        assert HandoverPackage(places[0]).content["foreground_mm"] == expected


def test_the_pixel_size_is_that_of_the_images_whatever_their_label_maps_name(tmp_path, tiny_network):
    labels = np.pad(np.repeat(np.uint8([[1, 2]]), [9, 6], axis=1).repeat(7, axis=0), 3)
    cases = []
    for number, dots in enumerate((254000, 254000, 508000)):  # an inch: 0.1 and 0.05 micrometres a pixel
        image = write_picture(tmp_path / "images" / f"{number}.png", 80 * labels + 9, dpi=(dots, dots))
        cases.append({"image": image, "label": write_picture(tmp_path / "labels" / f"{number}.png", labels)})
    write_atomic(tiny_network.state_dict(), tmp_path / "weights.pt")
    places = (tmp_path / "package", tmp_path / "weights.pt")
    write_handover(*places, tiny_network, NETWORK, SETTING, LABELS, Validation(), cases, 2)
    content = HandoverPackage(tmp_path / "package").content
    assert content["spacing_mm"] == median_spacing([case["image"] for case in cases]) == [0.1, 0.1, 0.1]
    assert content["spacing_mm"] != median_spacing([case["label"] for case in cases])


@pytest.mark.parametrize("size, unit, um", [(4, "nm", 0.004), (1.2, "mm", 1200.0), (0.12345, "um", 0.1235)])
def test_a_package_of_any_pixel_size_is_written_and_read(tmp_path, tiny_network, size, unit, um):
    labels = np.pad(np.repeat(np.uint8([[1, 2]]), [9, 6], axis=1).repeat(7, axis=0), 3)
    cases = [{key: write_picture(tmp_path / f"{n}_{key}.png", labels) for key in ("image", "label")} for n in range(2)]
    (tmp_path / "pixel_size.json").write_text(json.dumps({"PixelSize": size, "PixelSizeUnits": unit}))
    write_atomic(tiny_network.state_dict(), tmp_path / "weights.pt")
    places = (tmp_path / "package", tmp_path / "weights.pt")
    write_handover(*places, tiny_network, NETWORK, SETTING, LABELS, Validation(), cases, 2)
    assert HandoverPackage(tmp_path / "package").content["spacing_mm"] == [um, um, um]


def test_packages_of_earlier_versions_name_no_extent(package):
    content = json.loads((package / "handover.json").read_text())
    assert content.pop("foreground_mm") is None, "label maps that fill the image"
    (package / "handover.json").write_text(json.dumps(content))
    assert "foreground_mm" not in HandoverPackage(package).content


def test_what_every_label_map_allows_after_the_network_travels_but_not_of_few_scans(tmp_path, tiny_network):
    cases = label_maps(tmp_path / "labels", [(12, 6), (18, 6), (24, 0)])
    with_hole = np.zeros((9, 8, 7), np.uint8)
    with_hole[1:6, 1:6, 1:6], with_hole[3, 3, 3] = 1, 0
    with_hole[7, 1, 1] = with_hole[7, 6, 1] = 2
    hole = {"label": write_nifti(tmp_path / "hole.nii.gz", with_hole)}
    write_atomic(tiny_network.state_dict(), tmp_path / "weights.pt")
    whole = {"largest_component": ["first"], "kept_components": {}, "fill_holes": ["first"]}
    both = {"largest_component": ["first", "second"], "kept_components": {}, "fill_holes": ["first", "second"]}
    silent = {"largest_component": [], "kept_components": {}, "fill_holes": []}
    holed = {"largest_component": ["first"], "kept_components": {}, "fill_holes": ["second"]}
    for number, (given, scans, expected) in enumerate(
        [(cases, 2, both), (cases, 3, whole), (cases, 4, silent), ([*cases, cases[0] | hole], 3, holed)]
    ):
        places = (tmp_path / f"package{number}", tmp_path / "weights.pt")
        write_handover(*places, tiny_network, NETWORK, SETTING, LABELS, Validation(), given, scans)
        written = HandoverPackage(places[0])
        assert written.after_network == written.content["after_network"] == expected


def test_as_many_structures_as_a_label_table_may_have_can_have_one_component(package):
    many = {f"structure {number}": number for number in range(1, 105)}
    after = {"largest_component": [*many], "kept_components": dict.fromkeys(many, 2), "fill_holes": [*many]}
    change(package, labels=many, after_network=after)
    assert HandoverPackage(package).after_network == after
    for wrong in (
        {"fill_holes": ["liver"]},
        {"kept_components": {"structure 1": 0}},
        {"another": []},
        {"fill_holes": 1},
    ):
        change(package, after_network=after | wrong)
        with pytest.raises(ConfigError, match=f"after_network#{next(iter(wrong))} is"):
            assert HandoverPackage(package).content


def test_validation_scans_have_a_say_in_what_follows(tmp_path, tiny_network):
    cases, more = label_maps(tmp_path / "a", [(12, 6), (18, 6)]), label_maps(tmp_path / "b", [(16, 4)])
    write_atomic(tiny_network.state_dict(), tmp_path / "weights.pt")
    for number, validation in enumerate(([], more)):
        places = (tmp_path / f"package{number}", tmp_path / "weights.pt")
        write_handover(*places, tiny_network, NETWORK, SETTING, LABELS, Validation(), cases, 2, validation)
    one, both = (HandoverPackage(tmp_path / f"package{number}").after_network for number in (0, 1))
    assert one["largest_component"] == ["first", "second"] and both["largest_component"] == ["first"]


def test_packages_of_earlier_versions_say_nothing_of_what_follows(package):
    content = json.loads((package / "handover.json").read_text())
    del content["after_network"]
    (package / "handover.json").write_text(json.dumps(content))
    silent = {"largest_component": [], "kept_components": {}, "fill_holes": []}
    assert HandoverPackage(package).after_network == silent


def test_volumes_are_figures_over_scans_and_never_of_one(tmp_path):
    cases = label_maps(tmp_path, [(31, 4), (47, 8), (59, 0)])
    found = volume_priors(cases, LABELS, 3)
    assert found["structures"]["second"] is None  # only two scans have it
    first = found["structures"]["first"]
    volumes = [31.0, 47.0, 59.0]  # mm3: a voxel has 1
    assert first["volume_mm3"] == {"mean": 46.0, "sd": 14.0, "range": [31.0, 59.0]}
    assert first["share"] == {"mean": 0.91, "sd": 0.077, "range": [0.85, 1.0]}
    shares = [31 / 35, 47 / 55, 1.0]
    assert np.mean(volumes) == pytest.approx(46, abs=0.5) and np.std(shares, ddof=1) == pytest.approx(0.077, abs=5e-4)
    assert first["scans"] == 3 and volume_priors(cases, LABELS, 4)["structures"] == {"first": None, "second": None}


@pytest.mark.parametrize("scale", [1e-3, 0.7, 1.0, 13.0, 4567.0])
def test_a_rounded_range_holds_every_scan_and_names_none(scale):
    from mapseg_components.handover.writing import rounded

    values = scale * np.random.default_rng(0).uniform(1, 3, 50)
    low, high = rounded(values)["range"]
    assert low <= values.min() and values.max() <= high
    assert high < 1.2 * values.max() and low > 0.85 * values.min()
    for figure in (low, high):
        assert float(f"{figure:.2g}") == figure


def test_figures_of_one_scan_must_not_leave(tmp_path, tiny_network):
    with pytest.raises(ConfigError, match="handover_min_scans is 1"):
        write_handover(tmp_path, tmp_path / "w.pt", tiny_network, NETWORK, SETTING, LABELS, Validation(), [], 1)
    assert not list(tmp_path.iterdir())


def test_spacing_is_along_ras_axes(tmp_path):
    turned = np.array([[0, 0, -2.0, 9], [0.5, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])
    straight = np.diag([2.0, 0.5, 1.0, 1.0])
    scans = [
        write_nifti(tmp_path / f"{n}.nii.gz", np.zeros((4, 5, 6), np.uint8), a)
        for n, a in enumerate([turned, straight])
    ]
    assert nib.aff2axcodes(turned) == ("A", "S", "L")
    assert median_spacing(scans[:1]) == median_spacing(scans[1:]) == [2.0, 0.5, 1.0]


def test_another_spacing_is_said(package, tmp_path, caplog):
    near, far = np.diag([0.6, 1.0, 2.0, 1.0]), np.diag([0.7, 1.0, 2.0, 1.0])
    for affine, said in ((near, False), (far, True)):
        scan = write_nifti(tmp_path / f"scan{said}.nii.gz", np.zeros((4, 5, 6), np.uint8), affine)
        HandoverPackage(package).compare_spacing([{"image": scan}])
        assert ("resample the scans" in caplog.text) is said


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_one_changed_byte_of_the_weights_is_found(package, place):
    content = bytearray((package / "weights.pt").read_bytes())
    content[int(place * len(content))] ^= 1
    (package / "weights.pt").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"weights.pt has sha256 \w{64}, handover.json says \w{64}: copy the whole"
    ):
        HandoverPackage(package).weights  # noqa: B018


@pytest.mark.parametrize("name", ["weights.pt", "handover.json"])
def test_a_missing_file_is_named(package, name):
    (package / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.* missing.*copy the whole package again"):
        HandoverPackage(package).weights  # noqa: B018


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"schema": 3}, "has schema 3, this version reads 2: update mapseg_components"),
        ({"schema": 1}, "has schema 1, this version reads 2: ask the source site"),
        ({"schema": "1"}, "is no hand-over package"),
        ({"settings": []}, "settings is []"),
        ({"settings__preprocessing": []}, "settings#preprocessing is []"),
        ({"settings__preprocessing__patch_size": [10**9, 16]}, "settings#preprocessing#patch_size#0 is 1000000000"),
        ({"settings__training__mask_ratio": float("inf")}, "settings#training#mask_ratio is inf"),
        ({"settings__training__mask_value": "$print()"}, "settings#training#mask_value is '$print()'"),
        ({"settings__training__mask_ratio": float("nan")}, "settings#training#mask_ratio is nan"),
        ({"settings__training__mask_value": "@ckpt_dir"}, "settings#training#mask_value is '@ckpt_dir'"),
        ({"versions__torch": "9" * 2**20}, "bytes, expected a few thousand"),
        ({"network": {"width": 8}}, "network#_target_ is 'absent'"),
        ({"network__width": 10**9}, "network#width is 1000000000"),
        ({"network__depth": "$__import__('pathlib').Path('SENTINEL').touch()"}, "network#depth is"),
        ({"network___target_": "pathlib.Path"}, "network#_target_ is 'pathlib.Path'"),
        ({"network__norm": {"_target_": "os.system", "command": "touch SENTINEL"}}, "network#norm#_target_ is"),
        ({"network__norm": {"_target_": "DynUNet"}}, "network#norm#_target_ is 'DynUNet'"),
        (
            {"network": {"_target_": "mapseg_components.networks.passes.torch.os.system", "command": "touch SENTINEL"}},
            "network#_target_ is 'mapseg_components.networks.passes.torch.os.system'",
        ),
        ({"network___target_": "mapseg_components.networks.passes.torch.hub.load"}, "network#_target_ is"),
        ({"network___target_": "monai.networks.nets.senet.load_state_dict_from_url"}, "network#_target_ is"),
        ({"network___target_": "monai.networks.nets.DenseNet121", "network__pretrained": True}, "network#_target_ is"),
        ({"network___mode_": "debug"}, "network#_mode_ is 'debug'"),
        ({"labels": {}}, "labels is {}"),
        ({"labels": {"a\nb": 1}}, "labels is"),
        ({"labels": {"a": 1, "b": 1}}, "labels is"),
        ({"labels": {"a": 0}}, "labels is"),
        ({"weights__sha256": "../../etc"}, "weights#sha256 is '../../etc'"),
        ({"spacing_mm": [1.0, 1.0]}, "spacing_mm is [1.0, 1.0]"),
        ({"source_validation__mean": 7}, "source_validation#mean is 7"),
        ({"source_validation": {"scans": 2}}, "source_validation#mean is 'absent'"),
        ({"source_validation__structures": [0.5]}, "source_validation#structures is [0.5]"),
        ({"source_validation__structures__first": 2}, "source_validation#structures is {'first': 2"),
        ({"volumes__structures": [1]}, "volumes#structures is [1]"),
        ({"volumes__structures__first": {"scans": 2}}, "volumes#structures#first#volume_mm3 is 'absent'"),
        ({"volumes__structures__first": 7}, "volumes#structures#first#volume_mm3 is 'absent'"),
        ({"volumes__structures__first__volume_mm3": {"mean": 9}}, "volumes#structures#first#volume_mm3 is {'mean': 9}"),
        ({"volumes__structures__first__volume_mm3__range": [9, 1]}, "'range': [9, 1]"),
        ({"volumes__structures__a#b": {}}, "volumes#structures#a#b#volume_mm3 is 'absent'"),
    ],
)
def test_impossible_values_are_refused_by_name(package, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    change(package, **changes)
    with pytest.raises(ConfigError) as caught:
        HandoverPackage(package).settings  # noqa: B018
    assert words in str(caught.value) and str(package / "handover.json") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "SENTINEL").exists()


def test_figures_that_are_not_told_are_null_and_not_left_out(package):
    change(package, source_validation__mean=None, volumes__structures__first=None)
    untold = HandoverPackage(package)
    assert untold.share_ranges == {} and figures_of(untold)["ranges_ml"] == {}
    change(package, volumes__structures__first={"scans": 2})
    with pytest.raises(ConfigError, match="copy the whole package again, or ask for one with null in the place of"):
        HandoverPackage(package).share_ranges  # noqa: B018


def test_a_network_that_cannot_be_made_is_an_error_of_the_package(package):
    change(package, network__wings=2)
    with pytest.raises(ConfigError, match=r"network cannot be made.*wings.*another package"):
        HandoverPackage(package).network  # noqa: B018


def test_a_network_that_is_not_the_weights_takes_no_memory(package):
    """Eight terabytes of weights are refused by their shapes."""
    change(package, network__width=8192, network__depth=8)
    with pytest.raises(CheckpointError, match=r"its network has fingerprint \w+, its weights \w+"):
        HandoverPackage(package).network  # noqa: B018


@pytest.mark.parametrize("prefix", ["", "monai.networks.nets."])
def test_a_network_of_monai_travels(prefix, tmp_path):
    fragment = {
        "_target_": f"{prefix}DynUNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 3,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 4, 8],
    }
    network = network_of(fragment)
    write_atomic(network.state_dict(), tmp_path / "weights.pt")
    cases = label_maps(tmp_path / "labels", [(10, 4), (20, 0)])
    places = (tmp_path / "package", tmp_path / "weights.pt")
    write_handover(*places, network, fragment, SETTING, LABELS, Validation(), cases, 2)
    read = HandoverPackage(tmp_path / "package")
    read.network.load_state_dict(torch.load(read.weights, weights_only=True))
    with pytest.raises(ConfigError, match="has no setting 'width'"):
        read.settings["training"]["width"]


@pytest.mark.parametrize("text", ["", "[" * 10**5, '{"schema": NaN}', "\x80", "9" * 5000], ids=lambda t: t[:9])
def test_what_is_no_json_is_refused(package, text):
    (package / "handover.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"handover\.json.*copy the whole package again"):
        HandoverPackage(package).labels  # noqa: B018


@pytest.mark.parametrize(
    "labels, settings, words",
    [
        ({"second": 2, "first": 1}, {}, "labels is [('second', 2), ('first', 1)], the package has [('first', 1)"),
        ({"first": 1}, {}, "labels is [('first', 1)]"),
        (LABELS, {"in_channels": 2}, "in_channels is 2, the package has 1"),
        (LABELS, {"percentile": 95}, "percentile is 95, the package has 99.5"),
    ],
)
def test_a_run_with_other_settings_is_refused(package, tiny_network, labels, settings, words):
    with pytest.raises(ConfigError) as caught:
        HandoverPackage(package).require(labels, {"preprocessing": {**PREPROCESSING, **settings}}, tiny_network)
    assert words in str(caught.value) and "handover.json" in str(caught.value) and "handover.yaml" in str(caught.value)


def test_another_architecture_is_refused_by_its_fingerprint(package, tiny_network):
    wide = GlobalLocalDeepLabV3(
        in_channels=1, num_classes=3, width=16, depth=1, stride=4, dilations=(1, 2), head_channels=8
    )
    with pytest.raises(CheckpointError, match=r"handover.json is of a network with fingerprint \w+, this run's has"):
        HandoverPackage(package).require(LABELS, SETTING, wide)


def test_a_run_does_not_resume_from_another_package(package):
    state = HandoverPackage(package).state_dict()
    HandoverPackage(package).load_state_dict(state)
    change(package, weights__sha256="0" * 64)
    with pytest.raises(ValueError, match="the run began with weights"):
        HandoverPackage(package).load_state_dict(state)


def test_source_only_weights_stay_beside_and_are_not_replaced(package, tmp_path, tiny_network):
    keep = SourceOnlyWeights(HandoverPackage(package), str(tmp_path / "out"))
    keep(None)
    path, record = tmp_path / "out" / "source_only.pt", tmp_path / "out" / "model_selection.json"
    found = torch.load(path, weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in tiny_network.state_dict().items())
    assert json.loads(record.read_text())["source_only.pt"]["source_dice"] == 0.6
    before = path.stat().st_mtime_ns
    keep(None)
    assert path.stat().st_mtime_ns == before
