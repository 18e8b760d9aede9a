# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Pages and pictures can be read: tables, names, figures and slices, in light and dark, wide and narrow windows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest

from mapseg_components.commands import check
from mapseg_components.commands.adapt import AdaptReport
from mapseg_components.commands.check import findings_table
from mapseg_components.commands.report import (
    CONTINUED_NOTE,
    OF_CONTINUED,
    VERDICTS,
    method_note,
    report,
    source_stage,
    verdict_line,
)
from mapseg_components.errors import ConfigError
from mapseg_components.plans.recipes import read_recipe, recipe_names
from mapseg_components.reports import ComparedScan, curves, sortable_table
from mapseg_components.reports.comparison import comparison_figure
from mapseg_components.reports.curves import small_multiples
from mapseg_components.reports.page import STYLE, breakable
from mapseg_components.reports.preview import plane_of, preview_figure
from mapseg_components.reports.slices import slice_viewer
from tests.commands.made_run import ML, NAMES, make_run
from tests.conftest import write_nifti
from tests.pictures import write_picture

VOID = {"meta", "wbr", "input", "br", "path", "use", "rect"}
AXIS_TITLE = re.compile(r".+ \((ml|voxels|epochs|0 to 1|no unit)\)")


class Page(HTMLParser):
    """Tables of a page as rows of cells (tag, classes, text, parts of a name), and texts and styles of its SVG."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.svg, self.colours, self.labels = [], [], [], []
        self._cell = self._in_svg = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        have = dict(attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self._cell = [tag, have.get("class", "").split(), "", have.get("scope")]
            self.tables[-1][-1].append(self._cell)
        elif tag == "svg":
            self._in_svg = []
            self.svg.append(self._in_svg)
            self.labels.append((have.get("role"), have.get("aria-label", "")))
        if self._in_svg is not None:
            self.colours += re.findall(r"(?:fill|stroke): ([^;]+)", have.get("style", ""))

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._cell = None
        elif tag == "svg":
            self._in_svg = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell[2] += data
        elif self._in_svg is not None and data.strip():
            self._in_svg.append(data.strip())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A made run with long names, guesses and findings."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    report(str(folder))
    return folder


@pytest.fixture(scope="module")
def text(run):
    return (run / "report.html").read_text()


def page_of(folder, **options):
    return Page(open(report(str(make_run(folder, **options)))).read())


def heads(page):
    return [cell[2] for table in page.tables for cell in table[0]]


def test_no_column_of_any_table_is_empty(tmp_path, text):
    full, sure = Page(text), page_of(tmp_path, structures=3, scans=2, sure=True)
    for page in (full, sure):
        for head, *rows in page.tables:
            assert rows and {len(row) for row in rows} == {len(head)}
            for column in zip(*rows):
                assert any(cell[2].strip(" \u2013") for cell in column)
    assert {"estimate", "missing or off their place", "remedy"} <= set(heads(full))
    assert not {"estimate", "missing or off their place", "remedy"} & set(heads(sure))


def test_numbers_stand_right_aligned_under_their_names(run, text, tmp_path):
    check(str(run / "scans"), output=str(tmp_path), quiet=True)
    seen = 0
    for page in (Page(text), Page((tmp_path / "check.html").read_text())):
        for head, *rows in page.tables:
            for title, *column in zip(head, *rows):
                numeric = all(re.fullmatch(r"-?[\d.]+( x [\d.]+)*|\u2013", cell[2]) for cell in column)
                assert {"number" in cell[1] for cell in (title, *column)} == {numeric}, title
                seen += numeric
    assert seen >= 12
    rule = re.search(r"\n\.number \{([^}]*)\}", STYLE).group(1)
    assert "text-align: right" in rule and "font-variant-numeric: tabular-nums" in rule
    assert "text-align: inherit" in re.search(r"th button \{([^}]*)\}", STYLE).group(1)


def test_unknown_numbers_leave_their_column_one_of_numbers():
    head, *rows = Page(sortable_table(["scan", "dice"], [["7", 0.5], ["8", None], ["9", float("nan")]])).tables[0]
    assert [row[1][2] for row in rows] == ["0.500", "\u2013", "\u2013"]
    assert all("number" in row[1][1] for row in (head, *rows))
    assert all("number" not in row[0][1] for row in (head, *rows)), "a name of digits is a name"


def test_names_go_on_in_the_next_line_only_after_a_separator(text):
    assert breakable("sub-1_ses-b/a<b") == "sub-1_<wbr>ses-b/<wbr>a&lt;b"
    named = [cell for table in Page(text).tables for row in table[1:] for cell in row if cell[3] == "row"]
    assert named and all("name" in cell[1] for cell in named)
    assert {*NAMES, "sub-101_ses-baseline_acq-highres_run-01_T2w"} <= {cell[2] for cell in named}
    assert not re.search(r"overflow-wrap: anywhere|word-break|hyphens: auto", text)
    assert "white-space: nowrap" in re.search(r"\.name \{([^}]*)\}", STYLE).group(1)


def test_every_axis_has_a_title_with_its_unit_and_every_figure_words(text):
    page = Page(text)
    assert len(page.svg) == 4 + len(NAMES)
    for texts, (role, words) in zip(page.svg, page.labels):
        titles = [one for one in texts if not re.fullmatch(r"[\u2212\d.]+", one)]
        assert len(titles) == 2 and titles[0] == "Time (epochs)" and all(map(AXIS_TITLE.fullmatch, titles)), titles
        assert role == "img" and "in epoch 12" in words
    assert sum("Volume (ml)" in texts for texts in page.svg) == len(NAMES)


@pytest.mark.parametrize("scale", [0.001, 1.0, 700.0])
def test_a_small_structure_can_be_read_beside_a_large_one(scale):
    """Each has a separate axis: its curve has the same height whatever the others' size."""
    shape = [0.5, 0.8, 1.0, 0.9]
    history = [{"epoch": i + 1, "a": scale * value, "b": 350 * value} for i, value in enumerate(shape)]
    drawn = small_multiples(history, {"a": "a", "b": "b"}, "Volume", "ml", {"a": [scale * 1e4, scale * 2e4]})
    spans = []
    for svg in drawn.split("<svg ")[1:]:
        height = float(re.search(r'viewBox="0 0 \S+ (\S+)"', svg).group(1))
        (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-1\)', svg)
        levels = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
        spans.append((max(levels) - min(levels)) / height)
    assert len(spans) == 2 and min(spans) > 0.15 and max(spans) - min(spans) < 0.02


def test_the_history_of_an_earlier_version_is_shown_in_voxels(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / "stages" / "adaptation" / "history.jsonl"
    path.write_text(path.read_text().replace("target_ml_", "target_voxels_"))
    page = Page(open(report(str(folder))).read())
    assert sum("Size (voxels)" in texts for texts in page.svg) == len(NAMES)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_both_colour_schemes_have_every_colour_with_contrast():
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in STYLE.split("@media")[:2])
    assert set(light) == set(dark)
    for scheme in (light, dark):
        for name in ("text", "muted", "error", "warning", "note", "good", *(f"series-{i}" for i in range(1, 5))):
            for ground in ("back", "soft"):
                low, high = sorted((luminance(scheme[name]), luminance(scheme[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def test_figures_take_their_colours_from_the_page(text):
    colours = set(Page(text).colours)
    assert {"currentColor", "var(--series-1)", "var(--line)"} <= colours
    assert all(re.fullmatch(r"currentColor|var\(--[\w-]+\)|none", colour) for colour in colours), colours
    assert '<meta name="color-scheme" content="light dark">' in text and "prefers-color-scheme: dark" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "<style type" not in text and curves([], {"a": "b"}, "title", "Dice (0 to 1)") == ""


def test_the_answer_comes_first(text):
    body = text[text.index("<body>") :]
    place = [body.index(part) for part in ('class="answer good"', "use the adapted model", "95 % interval", "<h2>")]
    assert place == sorted(place)
    assert re.search(r"<dt>Difference</dt><dd><b>\+0\.\d{3}</b>", body) and "± 0.06" in body


@pytest.mark.parametrize("verdict", ["adapted", "no gain", "worse than source"])
def test_a_baseline_is_called_trained_on_and_no_adaptation(tmp_path, verdict):
    """What stands for an adapted model learnt from no target: neither page nor terminal may say that it did."""
    folder = make_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["assessment"]["verdict"]["verdict"] = verdict
    for method in recipe_names():
        record["request"]["method"], record["report"] = method, "report.html"
        said = str(AdaptReport("out", record)).splitlines()[0]
        baseline = method.startswith("source_only") or method == "intensity_order"
        assert said == (OF_CONTINUED if baseline else VERDICTS)[verdict]
        assert (CONTINUED_NOTE in method_note(record)) is baseline
    record["request"]["method"] = "source_only"
    (folder / "run.json").write_text(json.dumps(record))
    body = open(report(str(folder))).read()
    recipe = read_recipe("source_only")
    for text in (OF_CONTINUED[verdict], CONTINUED_NOTE, recipe.title, f"Known to fail {recipe.fails}."):
        assert escape(text) in body
    record["request"]["method"] = "of_a_later_version"
    assert method_note(record) == "" and verdict_line(record) == VERDICTS[verdict]


def test_panes_share_the_width_of_any_window(text):
    """No width in pixels: columns of a grid, the picture in proportion to them, the scan's strip once per plane."""
    panes = [re.sub(r"url[(].*?[)]", "", pane) for pane in re.findall(r'class="pane"[^>]*style="([^"]*)"', text)]
    assert len(panes) == 4 * 3 * 3
    assert all("aspect-ratio" in style and "width" not in style and "px" not in style for style in panes)
    assert "grid-template-columns: repeat(var(--panes), minmax(0, 1fr))" in text
    assert text.count("--scan:url(") == 4 * 3


def test_a_check_without_findings_says_so(tmp_path):
    assert findings_table([]) == "<p>None.</p>"
    write_nifti(tmp_path / "in" / "a.nii.gz", np.random.default_rng(0).random((20, 24, 28), np.float32) + 1)
    check(str(tmp_path / "in"), output=str(tmp_path / "out"), quiet=True)
    page = (tmp_path / "out" / "check.html").read_text()
    assert page.index("No blocking finding.") < page.index("<h2>Findings</h2>")
    assert "shape (voxels)" in heads(Page(page)) and "remedy" not in page


def test_a_preview_names_units_and_keeps_long_names_inside(run):
    (scan,) = (run / "scans").glob("sub-101*")
    (label_map,) = (run / "predictions" / "adapted").glob("sub-101*")
    names = [f"{name} of the {'left ' * 4}side" for name in NAMES]
    grey, labels = nib.load(scan), nib.load(label_map)
    turned = labels.affine @ np.diag([-1, 1, 1, 1])
    voxels = [np.asarray(one.dataobj)[::-1] for one in (grey, labels)]
    figure = preview_figure(*voxels, turned, names, f"{scan.name} {'long ' * 40}")
    figure.canvas.draw()
    (legend,) = figure.legends
    assert figure.bbox.contains(*legend.get_window_extent().min) and figure.bbox.contains(
        *legend.get_window_extent().max
    )
    volumes = [text.get_text() for text in legend.get_texts()]
    assert len(volumes) == len(ML) and all(re.fullmatch(r".* side, [\d.]+ ml", text) for text in volumes)
    title = figure.get_suptitle()
    assert "voxels of 1.6 x 1.5 x 1.7 mm" in title and max(map(len, title.splitlines())) < 130
    for axis, letters in zip(figure.axes, ("PAIS", "RLIS", "RLPA")):
        texts = [text.get_text() for text in axis.texts]
        assert "".join(texts[:4]) == letters and re.fullmatch(r"\d+ mm", texts[4])
        bar = np.ptp(axis.lines[0].get_xdata()) * {"P": 1.5, "R": 1.6}[letters[0]]
        assert bar == pytest.approx(int(texts[4].split()[0]))


def test_the_picture_of_a_comparison_names_slice_sides_and_length():
    label = np.zeros((20, 30, 12), np.uint8)
    label[14:18, 4:9, 7] = 1  # right, back
    grey = np.random.default_rng(0).random(label.shape)
    figure = comparison_figure([ComparedScan("sub_1", (2.0, 3.0, 4.0), grey, [label, label])], ["adapted"], ["liver"])
    scan, truth, adapted = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["scan", "truth", "adapted"]
    assert scan.get_ylabel() == "sub 1\nslice 8 of 12"
    texts = [text.get_text() for text in scan.texts]
    assert texts == ["R", "L", "P", "A", "10 mm"] and np.ptp(scan.lines[0].get_xdata()) * 2 == pytest.approx(10)
    for axis in (truth, adapted):
        shown = np.asarray(axis.images[1].get_array())
        assert np.argwhere(shown).mean(axis=0).tolist() == [6, 19 - 15.5], "the right side of the body on the left"
        assert axis.get_aspect() == 1.5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["liver"]


def test_the_first_curve_is_that_of_the_source_model_that_was_chosen():
    assert source_stage({}) == "source"
    assert source_stage({"source_choice": {"chosen": "source_2", "confidence": {}}}) == "source_2"


def test_a_preview_has_the_right_side_on_the_left():
    volume = np.zeros((4, 5, 6))
    volume[3, 4, 5] = 1  # right, front, top
    assert np.argwhere(plane_of(volume, 1, 4)).tolist() == [[5, 0]]
    assert np.argwhere(plane_of(volume, 2, 5)).tolist() == [[4, 0]]
    assert np.argwhere(plane_of(volume, 0, 3)).tolist() == [[5, 4]]


def run_of_images(folder, **options):
    """A made run whose target scans are PNG images."""
    make_run(folder, structures=2, scans=2, epochs=3)
    listed = json.loads((folder / "datalist.json").read_text())
    for case in listed["target_training"]:
        pixels = np.random.default_rng(0).integers(20, 200, (50, 80)).astype(np.uint8)
        case["image"] = write_picture(folder / "png" / f"{case['case_id']}.png", pixels, **options)
        for model in ("source_only", "adapted"):
            write_picture(
                folder / "predictions" / model / f"{case['case_id']}_seg.png", np.uint8(pixels > 150), **options
            )
    (folder / "datalist.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize(
    "options, unit", [({}, "pixels"), ({"dpi": (25400, 25400)}, "pixels"), ({"dpi": (5080, 5080)}, "um^3")]
)
def test_structures_of_images_have_no_volume_in_ml_and_no_side_of_a_body(tmp_path, options, unit):
    """What the record of a run calls ml is a thousandth of a cubic um, or of a pixel."""
    folder = run_of_images(tmp_path, **options)
    assessment = json.loads((folder / "run.json").read_text())["assessment"]
    text = open(report(str(folder))).read()
    page = Page(text)
    assert f"adapted, {unit}" in heads(page) and not any(" ml" in head for head in heads(page))
    assert sum(f"Size ({unit})" in texts for texts in page.svg) == 2
    assert "side of the body" not in text and "Images" in text
    (table,) = (table for table in page.tables if f"source lowest, {unit}" in [cell[2] for cell in table[0]])
    lowest = assessment["prior_ml"][NAMES[0]][0]
    assert table[1][3][2] == f"{1000 * lowest:.3f}"


def test_a_single_judged_scan_has_no_interval(tmp_path):
    text = open(report(str(make_run(tmp_path, structures=2, scans=1, epochs=3)))).read()
    assert "one scan: no interval" in text and "One scan: no interval, the gain is uncertain." in text
    assert "95 % interval" not in text


def test_a_folder_in_the_place_of_the_page_is_a_usage_error(run, tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder: name the file to write, such as .*report.html"):
        report(str(run), str(tmp_path))


def test_a_scan_is_chosen_by_its_name_with_all_blanks(tmp_path):
    folder = make_run(tmp_path, structures=2, scans=1, epochs=3)
    for name in ("run.json", "datalist.json"):
        record = (folder / name).read_text()
        (folder / name).write_text(record.replace('": "sub-101_ses-baseline_acq-highres_run-01_T2w"', '": "a  b"'))
    record = json.loads((folder / "run.json").read_text())
    record["assessment"]["between"] = {"a  b": 0.8}
    (folder / "run.json").write_text(json.dumps(record))
    assert '<option value="a  b">' in open(report(str(folder))).read()


@pytest.mark.parametrize("axis, plane", enumerate(["sagittal", "coronal", "axial"]))
def test_a_volume_of_one_slice_shows_that_alone(axis, plane):
    shape = [20, 30, 24]
    shape[axis] = 1
    label_map = np.zeros(shape, np.uint8)
    label_map[..., :8] = 1
    grey = np.random.default_rng(0).random(shape)
    (shown,) = preview_figure(grey, label_map, np.eye(4), ["a"], "title").axes
    assert shown.get_title() == f"{plane}, slice 1 of 1" and min(shown.images[0].get_array().shape) > 1
    drawn = slice_viewer(grey, (1, 1, 1), {"a": label_map}, 2, "case")
    assert re.findall('data-name="(.*?)"', drawn) == [plane]


def test_a_dollar_in_the_name_of_a_structure_is_a_dollar():
    label = np.ones((6, 7, 8), np.uint8)
    preview = preview_figure(label, label, np.eye(4), ["a$_{b", "$$x^"], "title")
    compared = comparison_figure([ComparedScan("a", (1, 1, 1), label, [label])], [], ["a$_{b", "$$x^"])
    for figure in (preview, compared):
        figure.canvas.draw()
        assert [text.get_text().partition(",")[0] for text in figure.legends[0].get_texts()] == ["a$_{b", "$$x^"]


PROBE = """<script>{
const seen = {}, first = () => document.querySelector("tbody tr").cells[0].textContent;
const head = document.querySelector("thead button");
head.click(); seen.up = first(); head.click(); seen.down = first();
const chooser = document.getElementById("scan");
chooser.value = chooser.options[1].value; chooser.dispatchEvent(new Event("change"));
const viewer = [...document.querySelectorAll(".viewer")].filter(one => !one.hidden);
seen.shown = viewer.map(one => one.dataset.case).join(); seen.chosen = chooser.value;
const slider = viewer[0].querySelector("input"), panes = [...viewer[0].querySelectorAll(".plane")];
slider.value = 3; slider.dispatchEvent(new Event("input"));
const at = parseFloat(panes[0].querySelector(".pane").style.backgroundPositionY);
seen.moved = Math.abs(at - 300 / slider.max) < 0.01;
seen.caption = slider.parentElement.innerText.trim();
const top_of = pane => pane.getBoundingClientRect().top;
seen.rows = panes.map(plane => new Set([...plane.querySelectorAll(".pane")].map(top_of)).size);
seen.width = innerWidth; seen.narrow = document.documentElement.scrollWidth <= innerWidth;
seen.under = [...document.querySelectorAll("table.compact")].every(table => [...table.tHead.rows[0].cells].every(
  (cell, i) => [...table.tBodies[0].rows].every(row => !cell.classList.contains("number") ||
    Math.abs(row.cells[i].getBoundingClientRect().right - cell.getBoundingClientRect().right) < 1)));
seen.whole = [...document.querySelectorAll("table .name")].every(cell => {
  const walk = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), range = document.createRange();
  for (let node; (node = walk.nextNode());) for (const word of node.data.matchAll(/[^\\s-]+/g)) {
    range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
    if (range.getClientRects().length > 1) return false;
  } return true; });
top.document.title = JSON.stringify(seen);
}</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
@pytest.mark.parametrize("width", [1400, 700, 390])
def test_the_report_in_a_browser(run, tmp_path, width):
    """The page's own script sorts, chooses scans and moves slices, with its content policy in force.

    A window is no narrower than 500 pixels: the page stands in a frame.
    """
    page, frame = tmp_path / "page.html", tmp_path / "frame.html"
    page.write_text((run / "report.html").read_text().replace("</body>", PROBE))
    frame.write_text(f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>')
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=5000", f"--window-size={width + 50},900", "--dump-dom", frame.as_uri()]
    home = {**os.environ, "HOME": str(tmp_path)}
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, env=home).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom, re.DOTALL).group(1).replace("&quot;", '"'))
    assert seen["width"] == width and seen["narrow"]
    assert seen["up"].startswith("sub-101") and seen["down"].startswith("sub-104")
    assert seen["shown"] == seen["chosen"] and seen["moved"]
    assert re.search(r"sagittal, slice \d+ of 40", seen["caption"])
    assert seen["rows"] == [1, 1, 1], "the panes of a plane stand side by side"
    assert seen["under"] and seen["whole"]
