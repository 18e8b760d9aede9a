# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What an installation without a clone has: files and requirements of the wheel, sdist, container, README."""

from __future__ import annotations

import ast
import configparser
import email
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mapseg_components.commands.declarations import declaration_of
from mapseg_components.commands.main import COMMANDS, arguments_of
from mapseg_components.shipped_files import PACKAGE, SEGMENTS
from setup import LINK, readme_for_packages
from tests.conftest import ROOT, make_scan, write_nifti
from tests.warm import Server, python

# name of an import, where it is not that of the distribution
DISTRIBUTIONS = {"yaml": "pyyaml", "skimage": "scikit-image", "ignite": "pytorch-ignite", "PIL": "pillow"}
OPTIONAL_PARTS = {"federated/flare": "fl", "scans/segmentation.py": "dicom", "inferers/onnx_runtime.py": "export"}
NOT_IN_THE_SDIST = (".ci/", ".github/", ".pre-commit-config.yaml")  # of the host of the repository
LITTER = ("eval/volumes.csv", "data/scan.nii.gz", "models/last.pt", "configs/.hidden.yaml")
TINY = {
    **{"patch_size": [16, 16, 16], "window_stride": [12, 12, 12], "max_epochs": 1, "epoch_length": 1},
    **{"local_block_size": 4, "val_interval": 1},
}


def configured(section, key=None):
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return settings[section] if key is None else settings[section][key]


def copied_by_the_dockerfile():
    """Sources of COPY, below the folder of the Dockerfile."""
    lines = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return [source for line in lines for source in line.split()]


def build(kind, tree, output):
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(output)!r}))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return output / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of what the image is built of, in a clone where runs have left results."""
    tree = tmp_path_factory.mktemp("tree")
    for name in copied_by_the_dockerfile():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    for bundle in (tree / "bundles").iterdir():
        for name in LITTER:
            (bundle / name).parent.mkdir(exist_ok=True)
            (bundle / name).write_text("of a run")
    return build("wheel", tree, tmp_path_factory.mktemp("dist"))


def test_the_wheel_holds_bundles_weights_and_sample_and_nothing_of_a_run(wheel):
    found = {name for name in zipfile.ZipFile(wheel).namelist() if "/shipped/" in name}
    wanted = {path for name in ("bundles", "sample") for path in (ROOT / name).rglob("*") if path.is_file()}
    kept = {
        f"mapseg_components/shipped/{path.relative_to(ROOT).as_posix()}"
        for path in wanted
        if not {"eval", "data", "__pycache__"} & set(path.relative_to(ROOT).parts)
        and (path.parent.name != "models" or path.name == "model.pt")
    }
    assert found == kept
    assert {"train.json", "inference.json", "evaluate.json", "metadata.json", "model.pt", "datalist.json"} <= {
        Path(name).name for name in found
    }
    assert wheel.stat().st_size < 30e6


def test_its_page_has_no_link_that_leads_nowhere(wheel):
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    metadata = email.message_from_string(text)
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata.get_all("Project-URL")
    page = metadata.get_payload()
    assert "mapseg demo" in page and page.count("](") > 0
    assert [match["target"] for match in LINK.finditer(page) if not match["target"].startswith("https://")] == []


def test_links_of_the_readme_become_absolute_where_the_repository_has_an_address():
    text = "![a scan](docs/a.png) [page](docs/b.md#part) [`x`](x) [arXiv](https://arxiv.org/abs/1) [up](#limits)"
    assert readme_for_packages(text, "https://example.org/us/it/") == (
        "![a scan](https://example.org/us/it/raw/main/docs/a.png) "
        "[page](https://example.org/us/it/blob/main/docs/b.md#part) [`x`](https://example.org/us/it/blob/main/x) "
        "[arXiv](https://arxiv.org/abs/1) [up](#limits)"
    )
    assert readme_for_packages(text, None) == (
        "*a scan* (docs/a.png) page (docs/b.md) `x` [arXiv](https://arxiv.org/abs/1) [up](#limits)"
    )
    whole = (ROOT / "README.md").read_text()
    targets = [m["target"].partition("#")[0] for m in LINK.finditer(whole) if not m["target"].startswith("http")]
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


# requirements


def required(names):
    """Installed distributions of requirements and all that these require."""
    found, todo = {}, [Requirement(name) for name in names]
    while todo:
        one = todo.pop()
        extras = ("", *one.extras)
        if one.marker is not None and not any(one.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if canonicalize_name(one.name) in found:
            continue
        try:
            installed = distribution(one.name)
        except PackageNotFoundError:
            pytest.skip(f"{one.name} is not installed here as a distribution")
        found[canonicalize_name(one.name)] = installed
        todo += [Requirement(line) for line in installed.requires or () if "extra ==" not in line]
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Environment variables of processes that see the wheel's content and its requirements, nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    links, package, start = (folder / name for name in ("links", "package", "start"))
    for each in (links, package, start):
        each.mkdir()
    archive = zipfile.ZipFile(wheel)
    archive.extractall(package)
    metadata = next(package.glob("*.dist-info/METADATA"))
    lines = email.message_from_string(metadata.read_text(encoding="utf-8")).get_all("Requires-Dist")
    for one in required([line for line in lines if "extra ==" not in line]).values():
        for top in {file.parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(one.locate_file(top))
    (start / "sitecustomize.py").write_text(
        "import sys\n"
        "kept = [p for p in sys.path if not p.endswith(('site-packages', 'dist-packages'))]\n"
        f"sys.path[:] = [*kept, {str(package)!r}, {str(links)!r}]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    )
    return {**os.environ, "PYTHONPATH": str(start), "OMP_NUM_THREADS": "1"}, package


@pytest.mark.slow
def test_a_wheel_alone_does_what_the_main_commands_promise(installed, tmp_path):
    environment, package = installed
    server = Server(environment)

    def mapseg(*words, code=0, start=server.command):
        line = [*start, "-m", "mapseg_components.commands", *map(str, words)]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == code, f"{words}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        return done

    code = "import mapseg_components, importlib.util as u; print(mapseg_components.__file__, u.find_spec('pytest'))"
    for start in ([sys.executable], server.command):
        place = subprocess.run([*start, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert place.stdout.split() == [str(package / "mapseg_components" / "__init__.py"), "None"]

    first = mapseg("demo", "--sample", "fetal_age")
    assert "mean of structures" in first.stdout and (tmp_path / "mapseg_demo" / "comparison.png").is_file()
    for seed in range(2):
        image, label = make_scan(seed=seed)
        write_nifti(tmp_path / "source" / "images" / f"{seed}.nii.gz", image)
        write_nifti(tmp_path / "source" / "labels" / f"{seed}.nii.gz", label)
    write_nifti(tmp_path / "target" / "7.nii.gz", make_scan(seed=7, contrast=-0.7)[0])
    mapseg("check", "target", "--output", "checked")
    adapted = ("adapt", "--source", "source", "--target", "target", "--output", "run", "--num_threads", 1)
    mapseg(*adapted, "--settings", json.dumps(TINY), "--pretraining=false")
    (tmp_path / "run" / "report.html").unlink()
    mapseg("report", "run")
    assert (tmp_path / "run" / "report.html").is_file()
    mapseg("predict", "source/images", "out", "--bundle", "run", "--keep_largest", "all", "--probabilities")
    assert len(list((tmp_path / "out" / "previews").glob("*.png"))) == 2
    mapseg("evaluate", "out", "source/labels", "--labels", "run", "--output", "scores")
    mapseg("prepare", "target", "prepared", "--spacing", 1)
    said = mapseg("predict", "target", "fetal", "--bundle", "shipped", start=[sys.executable]).stderr
    assert SEGMENTS in said and (tmp_path / "fetal" / "7_seg.nii.gz").is_file()
    server.close()


def imported(path, seen=None):
    """Top-level names of what a file imports, directly and through files of this repository."""
    seen = set() if seen is None else seen
    if path in seen:
        return set()
    seen.add(path)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "optional_import":
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    found = set()
    for name in names:
        own = ROOT / name.replace(".", "/")
        if name.split(".")[0] not in ("tests", "tools", "benchmarks", "mapseg_components", "setup"):
            found.add(name.split(".")[0])
        for file in (own.with_suffix(".py"), own / "__init__.py"):
            if file.is_file() and "mapseg_components" not in file.parts[len(ROOT.parts) :]:
                found |= imported(file, seen)
    return found - set(sys.stdlib_module_names) - {"__future__"}


def undeclared(names, *extras):
    """Of imports those whose distribution is declared neither by the package nor by an extra of it."""
    lines = configured("options", "install_requires").split("\n")
    for extra in extras:
        lines += configured("options.extras_require", extra).split("\n")
    declared = {canonicalize_name(Requirement(line).name) for line in lines if line.strip() and line[0] != "#"}
    return sorted(name for name in names if canonicalize_name(DISTRIBUTIONS.get(name, name)) not in declared)


SOURCES = sorted((ROOT / "mapseg_components").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_the_package_imports_is_declared(path):
    name = path.relative_to(ROOT / "mapseg_components").as_posix()
    extras = [extra for part, extra in OPTIONAL_PARTS.items() if name.startswith(part)]
    if name == "federated/flare/job.py":
        extras.append("wire")
    assert undeclared(imported(path), *extras) == []


def test_overlays_need_yaml_which_is_declared():
    overlays = list((ROOT / "bundles").rglob("configs/*.yaml"))
    assert overlays and undeclared({"yaml"}) == []


RUN_BY_HAND = (
    "tests/poc/run.py",
    "benchmarks/federation_cost.py",
    "tools/domain_gap.py",
    "tools/demo.py",
    "tools/demo_figure.py",
)


@pytest.mark.parametrize("name", RUN_BY_HAND)
def test_a_script_runs_with_the_extra_that_it_names(name):
    path = ROOT / name
    extras = re.findall(r"extra\s+``(\w+)``", ast.get_docstring(ast.parse(path.read_text())))
    assert undeclared(imported(path), *extras) == []


# the source distribution


def tracked():
    """Files of the repository, from git. Skips where this is no clone."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Unpacked, built of the files of the repository."""
    names = tracked()
    tree, output = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("sdist")
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    with tarfile.open(build("sdist", tree, output)) as archive:
        archive.extractall(output)
    return next(path for path in output.iterdir() if path.is_dir())


def test_the_sdist_is_the_repository(sdist):
    assert [name for name in tracked() if not (sdist / name).exists()] == [
        name for name in tracked() if name.startswith(NOT_IN_THE_SDIST)
    ]


@pytest.mark.slow
def test_tests_run_from_the_sdist(sdist):
    environment = {**os.environ, "PYTHONPATH": str(sdist), "OMP_NUM_THREADS": "1"}
    chosen = "test_sample.py or test_docs_links.py or test_architecture.py"
    line = [python(), "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen]  # collects all: no file is missing
    run = subprocess.run(line, cwd=sdist, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]


# the container


def test_the_image_is_made_of_files_that_docker_sees():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    seen = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and {name for name in copied_by_the_dockerfile() if name not in seen} == set()
    assert all((ROOT / name).exists() for name in copied_by_the_dockerfile())


def test_the_image_runs_mapseg_and_monai_without_another_entry_point():
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"^ENTRYPOINT", dockerfile, re.MULTILINE)
    assert 'CMD ["mapseg", "--help"]' in dockerfile
    page = (ROOT / "docs" / "how-to" / "container.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    runs = [words for block in blocks for words in map(shlex.split, block.replace("\\\n", "").splitlines()) if words]
    assert all("--entrypoint" not in words for words in runs) and "<" not in "".join(blocks)
    assert [words for words in runs if words[:2] == ["docker", "build"]] == [["docker", "build", "-t", "mapseg", "."]]
    inside = [words[words.index("mapseg") + 1 :] for words in runs if words[:2] == ["docker", "run"]]
    assert {words[0] for words in inside} == {"mapseg", "python"}
    for program, name, *rest in inside:
        if program == "mapseg":
            assert name in COMMANDS and arguments_of(declaration_of(name), rest)
        else:
            assert [name, rest[0]] == ["-m", "monai.bundle"]


def test_the_shipped_weights_are_for_what_the_metadata_says():
    metadata = PACKAGE.parent / "bundles" / "mapseg_adaptation" / "configs" / "metadata.json"
    assert f"The shipped weights segment {SEGMENTS}" in json.loads(metadata.read_text())["description"]
