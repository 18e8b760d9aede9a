# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapseg_components.errors import ConfigError, DataError
from mapseg_components.federated.statistics import FEATURES, Range, feature_summary, summary_of
from mapseg_components.reports.domain_gap import draw_domain_gap
from tests.conftest import ROOT, write_nifti
from tests.federation import write_parties

SHAPE = (20, 24, 28)


def make_scans(folder: Path, count: int, side_mm: float = 1.0, power: float = 1.0) -> list[str]:
    """Scans of 20 x 24 x 28 voxels, a quarter of them foreground, with evenly spread values to a power."""
    paths = []
    for number in range(count):
        image = np.zeros(SHAPE, np.float32)
        inside = image[:, 6:18, 7:21]
        values = np.linspace(0.001, 1, inside.size, dtype=np.float32) ** power
        inside[:] = 500 * np.random.default_rng(number).permutation(values).reshape(inside.shape)
        paths.append(str(write_nifti(folder / f"{number}.nii.gz", image, np.diag([side_mm, 2.0, 4.0, 1.0]))))
    return paths


def test_a_summary_says_what_is_in_the_scans(tmp_path):
    summary = summary_of(make_scans(tmp_path, 4, side_mm=0.5), least=3)
    features = summary["features"]
    assert summary["scans"] == 4 and list(features) == list(FEATURES)
    assert features["log10_field_of_view_mm3"]["mean"] == 4.75  # 20 x 24 x 28 voxels of 4 mm3: 10^4.73
    assert features["log10_foreground_mm3"]["mean"] == 4.15  # a quarter of that: 10^4.13
    assert (features["least_voxel_side_mm"]["mean"], features["greatest_voxel_side_mm"]["mean"]) == (0.5, 4.0)
    shares = features["intensity"]["histogram"]
    assert len(shares) == 20 and abs(sum(shares) - 100) <= 10
    assert all(share == 5 for share in shares[:-1]) and 5 <= shares[-1] <= 7  # values are evenly spread
    assert features["greatest_voxel_side_mm"]["histogram"] == [0] * 8 + [4] + [0] * 3


def test_other_contrasts_give_another_picture(tmp_path):
    dark = summary_of(make_scans(tmp_path, 3, power=3.0), 3)["features"]["intensity"]
    assert dark["histogram"][0] > 30 and dark["mean"] < 0.3


@pytest.mark.parametrize("scans", [1, 2, 4])
def test_too_few_scans_tell_nothing(tmp_path, scans):
    with pytest.raises(DataError, match=rf"has {scans} scans, statistics_min_scans is 5: no statistics are sent"):
        summary_of(make_scans(tmp_path, scans), 5)


def test_nobody_may_allow_less_than_three(tmp_path):
    with pytest.raises(ConfigError, match="statistics_min_scans is 2, expected 3 or more"):
        summary_of(make_scans(tmp_path, 4), 2)


@given(st.lists(st.floats(-5, 15), min_size=3, max_size=12), st.integers(3, 6))
def test_no_bin_shows_fewer_scans_than_the_minimum(values, least):
    bins = feature_summary(values, Range(0, 10, 5), least)["histogram"]
    assert all(count == 0 or count >= least for count in bins)
    missing = len(values) - sum(bins)
    assert missing == 0 or missing >= least or sum(bins) == 0


def test_who_sees_the_bins_of_the_others_does_not_find_a_single_scan():
    assert feature_summary([1, 1, 1, 1, 9], Range(0, 10, 5), 3)["histogram"] == [0] * 5
    assert feature_summary([1, 1, 1, 1, 5, 7, 9], Range(0, 10, 5), 3)["histogram"] == [4, 0, 0, 0, 0]


@given(st.lists(st.floats(-5, 15), min_size=3, max_size=12))
def test_means_and_deviations_are_rounded_to_a_fifth_of_a_bin(values):
    found, inside = feature_summary(values, Range(0, 10, 5), 3), np.clip(values, 0, 10)
    for name, exact in (("mean", inside.mean()), ("stddev", inside.std(ddof=1))):
        assert abs(found[name] - exact) <= 0.2 + 1e-9 and found[name] / 0.4 == pytest.approx(round(found[name] / 0.4))


def test_a_scan_like_the_others_is_lost_in_the_rounding(tmp_path):
    scans = make_scans(tmp_path, 12)
    (tmp_path / "other").mkdir()
    (other,) = make_scans(tmp_path / "other", 1, power=1.05)
    assert summary_of([*scans, other], 5)["features"] == summary_of([*scans, scans[0]], 5)["features"]


def test_a_scan_without_contrast_is_named(tmp_path):
    scans = make_scans(tmp_path, 3)
    write_nifti(Path(scans[1]), np.ones(SHAPE, np.float32))
    with pytest.raises(DataError, match=r"1.nii.gz has no contrast"):
        summary_of(scans, 3)


def result_of(*sites):
    """What NVFlare's statistics job writes, with two scans less for each further site."""
    result = {}
    for name, bounds in FEATURES.items():
        edges = bounds.edges.tolist()
        bins = [[low, high, 5] for low, high in zip(edges, edges[1:])]
        kinds = {"count": 9, "mean": bounds.low + 1.0, "stddev": 0.1, "histogram": bins}
        result[name] = {kind: {site: {"scans": value} for site in (*sites, "Global")} for kind, value in kinds.items()}
    return result


def test_the_picture_is_drawn_and_says_who_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "domain_gap.json").write_text(json.dumps(result_of("berlin", "lyon")))
    missing = draw_domain_gap(tmp_path / "domain_gap.json", tmp_path / "gap.png", ["berlin", "lyon", "oslo"])
    assert missing == ["oslo"]
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"intensity": {"histogram": {"berlin": {}}}}'])
def test_another_file_is_no_result(tmp_path, content):
    pytest.importorskip("matplotlib")
    (tmp_path / "domain_gap.json").write_text(content)
    with pytest.raises(DataError, match=r"domain_gap.json is no result of the statistics job"):
        draw_domain_gap(tmp_path / "domain_gap.json", tmp_path / "gap.png")
    assert not (tmp_path / "gap.png").exists()


def make_sites(folder: Path, **counts_of_scans: int) -> dict[str, str]:
    """A datalist with unlabelled scans for each site."""
    sites = {}
    for number, (name, count) in enumerate(counts_of_scans.items()):
        (folder / name).mkdir()
        scans = make_scans(folder / name, count, side_mm=0.5 + 0.5 * number, power=1.0 + 2 * number)
        entries = [{"image": Path(path).name, "case_id": Path(path).stem} for path in scans]
        (folder / name / "datalist.json").write_text(json.dumps({"target_training": entries}))
        sites[name] = str(folder / name / "datalist.json")
    return sites


@pytest.fixture
def answering(tmp_path, monkeypatch):
    """A site's side of the statistics job, with its own settings."""
    module = pytest.importorskip("mapseg_components.federated.flare.statistics", reason="nvflare is not installed")

    def make(scans=4, **changes):
        sites = make_sites(tmp_path, berlin=scans)
        write_parties(tmp_path / "parties", tmp_path / "own", "nowhere", sites, **changes)
        monkeypatch.setenv("MAPSEG_PARTY_DIR", str(tmp_path / "parties"))
        site = module.SiteStatistics()
        site.site = "berlin"
        return site

    return make


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, ConfigError, r"berlin: share_statistics is False: set it to true in berlin.json"),
        ({"share_statistics": "yes"}, ConfigError, r"berlin: share_statistics is 'yes'"),
        ({"share_statistics": True}, DataError, r"berlin: has 4 scans, statistics_min_scans is 5"),
    ],
)
def test_a_site_that_takes_no_part_says_so_by_its_name(answering, changes, error, message, tmp_path):
    site = answering(**changes)
    for question in (site.features, lambda: site.count("scans", "intensity"), lambda: site.mean("scans", "intensity")):
        with pytest.raises(error, match=message):
            question()
    assert not list((tmp_path / "own").rglob("statistics.json"))


def test_a_site_answers_from_its_summary_alone(answering, tmp_path):
    site = answering(share_statistics=True, statistics_min_scans=3)
    assert [feature.feature_name for feature in site.features()["scans"]] == list(FEATURES)
    summary = json.loads((tmp_path / "own/berlin/eval/sites/berlin/statistics.json").read_text())
    mean = summary["features"]["intensity"]["mean"]
    assert site.count("scans", "intensity") == 4 and site.mean("scans", "intensity") == mean
    histogram = site.histogram("scans", "intensity", 20, 0.0, 1.0)
    assert [each.sample_count for each in histogram.bins] == summary["features"]["intensity"]["histogram"]
    assert (site.min_value("scans", "intensity"), site.max_value("scans", "intensity")) == (0.0, 1.0)
    for bins, low, high in ((2000, 0.0, 1.0), (20, 0.3, 0.31)):
        with pytest.raises(ConfigError, match=r"berlin: .* bins of intensity"):
            site.histogram("scans", "intensity", bins, low, high)
    with pytest.raises(NotImplementedError):
        site.quantiles("scans", "intensity", [50])
    deviation = summary["features"]["intensity"]["stddev"]
    assert site.variance_with_mean("scans", "intensity", mean, 4) == pytest.approx(deviation**2)


@pytest.mark.slow
def test_nvflare_collects_the_picture_and_goes_on_without_a_site_that_refuses(tmp_path):
    pytest.importorskip("nvflare", reason="nvflare is not installed: pip install -c constraints.txt -e '.[fl]'")
    sites = make_sites(tmp_path, berlin=4, lyon=5, oslo=2)
    changes = {"share_statistics": True, "statistics_min_scans": 3}
    write_parties(tmp_path / "parties", tmp_path / "own", "nowhere", sites, **changes)
    environment = {
        **os.environ,
        "MAPSEG_PARTY_DIR": str(tmp_path / "parties"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "mapseg_components.federated.flare.job", "--sites", *sites]

    def run(*options):
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    log = run("--statistics", "--min-sites", "2", "--simulate", str(tmp_path / "work"))
    assert "oslo sends no statistics: oslo: has 2 scans, statistics_min_scans is 3" in log
    (result,) = (tmp_path / "work").rglob("domain_gap.json")
    content = json.loads(result.read_text())
    for name in FEATURES:
        for site in ("berlin", "lyon"):
            own = json.loads((tmp_path / f"own/{site}/eval/sites/{site}/statistics.json").read_text())
            expected = own["features"][name]
            assert content[name]["count"][site]["scans"] == own["scans"]
            assert content[name]["mean"][site]["scans"] == expected["mean"]
            assert [each[2] for each in content[name]["histogram"][site]["scans"]] == expected["histogram"]
        assert "oslo" not in content[name]["mean"]
    assert "no answer: oslo" in run("--draw", str(result), str(tmp_path / "gap.png"))
    assert (tmp_path / "gap.png").is_file()
