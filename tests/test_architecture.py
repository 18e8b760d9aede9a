# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mapseg_components"
ROWS = [
    {"keys", "errors"},
    {"boxes", "masking", "files", "memory", "colours", "precision", "contrast", "quality"}
    | {"session", "shipped_files", "sides", "structures"},
    {"scans"},
    {"losses", "networks", "transforms", "checkpoints", "data", "configs", "metrics", "reports"},
    {"methods", "inferers"},
    {"engines", "handlers", "handover"},
    {"federated", "plans", "prediction", "preparation"},
    {"commands"},
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row}


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[tuple[ast.stmt, str, bool]]:
    """Statement, module, and whether it stands at the top level."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [(node, name) for name in names]
    typing_only = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    hints = {id(inner) for block in typing_only for inner in ast.walk(block)}
    top = {id(node) for node in tree.body}
    return [(node, name, id(node) in top) for node, name in found if id(node) not in hints]


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    for node, name, at_top in imports(path):
        assert at_top, f"{path.name}:{node.lineno} imports inside a function"
        parts = name.split(".")
        assert parts[0] not in ("tests", "tools", "bundles")
        if parts[0] != "mapseg_components" or len(parts) == 1:
            continue
        own, other = room(path), parts[1]
        assert own == other or ROW[other] < ROW[own], f"{path.name}:{node.lineno}: {own} may not import {other}"


def test_every_room_has_a_row():
    assert {room(path) for path in SOURCES} - {"__init__"} == set(ROW)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_room_holds_more_than_15_percent_of_the_package():
    total = sum(map(lines, SOURCES))
    rooms = [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    shares = {path.name: sum(map(lines, path.rglob("*.py"))) / total for path in rooms}
    assert {name: f"{share:.1%}" for name, share in shares.items() if share > 0.15} == {}


def test_no_file_has_more_than_400_lines():
    assert [path.relative_to(PACKAGE).as_posix() for path in SOURCES if lines(path) > 400] == []


VIEW = {"BOX", "VALID_BOX", "GLOBAL_IMAGE", "GLOBAL_LABEL", "global_image", "global_label", "global_logits", "box"}
KNOW_THE_VIEW = (
    "keys.py",
    "methods/mapseg.py",
    "networks/segmenter.py",
    "networks/unet.py",
    "networks/passes.py",
    "inferers/global_local.py",
    "transforms/pairing.py",
    "transforms/bias_field.py",
    "transforms/synthesis.py",
    "engines/pretraining.py",
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_global_view_is_known_to_its_own_method_alone(path):
    """Engine, teacher, checkpoints, Score, hand-over, federation, commands and reports serve any method."""
    room_of = path.relative_to(PACKAGE).parts[0]
    if path.relative_to(PACKAGE).as_posix() in KNOW_THE_VIEW or room_of in ("boxes.py", "data", "reports"):
        return  # there a box is one of voxels
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id != "box"}
    names |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not names & VIEW


def test_one_door_for_torch_load():
    doors = [p.name for p in SOURCES if "torch.load(" in p.read_text()]
    assert doors == ["checkpoints.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_header_and_no_print(path):
    text = path.read_text()
    assert text.startswith("# Copyright (c) MAPSeg for MONAI contributors\n# SPDX-License-Identifier: Apache-2.0\n")
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert not any(getattr(call.func, "id", "") == "print" for call in calls)
