# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The command line itself: help that a person reads, options that exist, exit codes that mean something."""

from __future__ import annotations

import configparser
import inspect
import os
import re
import subprocess
import sys

import pytest

from mapseg_components import commands
from mapseg_components.commands.declarations import declaration_of
from mapseg_components.commands.main import COMMANDS, arguments_of, main
from mapseg_components.errors import CheckpointError, ConfigError, DataError, MAPSegError
from mapseg_components.session import choose_device, exit_code_of, working
from tests.conftest import ROOT
from tests.warm import python

EXITS = sorted(error.exit_code for error in MAPSegError.__subclasses__())


def test_the_console_script_is_installed_with_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert "mapseg = mapseg_components.commands.main:main" in config["options.entry_points"]["console_scripts"]


def test_every_command_is_a_function_of_the_same_name():
    assert sorted(COMMANDS) == sorted(commands.__all__)
    for name in COMMANDS:
        function = getattr(commands, name)
        assert (function.__name__, function.__module__) == (name, f"mapseg_components.commands.{name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_declared_as_it_is(name):
    function, found = getattr(commands, name), declaration_of(name)
    real = inspect.signature(function)
    assert found.document == inspect.getdoc(function)
    assert list(found.signature.parameters.values()) == list(real.parameters.values())


def in_a_new_process(code, start=sys.executable):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([start, "-c", code], capture_output=True, text=True, env=environment, check=True)


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["predict", "--help"], ["predict", "--bundel"], ["predikt"]]
)
def test_help_and_usage_errors_import_neither_torch_nor_numpy(words):
    code = f"import sys; from mapseg_components.commands.main import main; main({words}); print(sorted(sys.modules))"
    loaded = in_a_new_process(code).stdout
    assert "'mapseg_components.commands.main'" in loaded
    assert not any(f"'{name}'" in loaded for name in ("torch", "monai", "numpy", "nibabel", "fire"))


@pytest.mark.parametrize("first", ["", "from mapseg_components.commands.restore import GRID_TOLERANCE_MM; "])
def test_a_commands_name_is_its_function_whatever_was_imported_first(first):
    code = first + "from mapseg_components.commands import restore; import mapseg_components.commands as c; "
    code += "print(restore.__qualname__, c.restore is restore, callable(c.restore), hasattr(c, 'no_such'))"
    assert in_a_new_process(code, python()).stdout.split() == ["restore", "True", "True", "False"]


@pytest.mark.parametrize("words", [["--help"], ["help"], ["-h"]])
def test_help_names_every_command_on_stdout(words, capsys):
    assert main(words) == 0
    printed = capsys.readouterr()
    assert all(name in printed.out for name in COMMANDS) and printed.err == ""


def test_no_command_at_all_is_a_usage_error(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_explains_every_argument_and_option(name, capsys):
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    for argument, parameter in inspect.signature(getattr(commands, name)).parameters.items():
        positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        line = next(
            row
            for row in printed.splitlines()
            if row.startswith(f"  {argument.upper()} " if positional else f"  --{argument} ")
        )
        following = printed.splitlines()[printed.splitlines().index(line) + 1]
        text = (line[28:] + " " + following[28:] * following.startswith(" " * 28)).partition("(default")[0]
        assert text.strip(), f"{argument} has no text"
    assert ":\n\n" not in printed and "find_sources" not in printed, "an empty list, or the name of a function inside"
    assert "Returns" not in printed and "Raises" not in printed, "sections for readers of the source"
    assert (
        all(re.search(rf"\b{code} ", printed) for code in EXITS)
        and "Exit codes" in printed
        and "``" not in printed
        and max(map(len, printed.splitlines())) <= 120
    )


@pytest.mark.parametrize(
    "words, parts",
    [
        (["predikt"], ["predikt", "did you mean predict?"]),
        (["predict", "in", "out", "--bundel", "b"], ["--bundel", "did you mean --bundle?"]),
        (["predict", "in", "out"], ["--bundle is missing"]),
        (["predict", "in"], ["OUTPUT, --bundle is missing"]),
        (["predict", "in", "out", "more", "--bundle", "b"], ["one argument too many", "more"]),
        (["predict", "in", "out", "--bundle"], ["--bundle lacks its value"]),
        (["predict", "in", "out", "--bundle", "b", "--num_threads", "two"], ["--num_threads is 'two'", "int"]),
        (["predict", "in", "out", "--bundle", "b", "--bundle", "c"], ["bundle is given twice"]),
        (["predict", "in", "out", "-b", "b"], ["unknown option -b", "two dashes"]),
        (["predict", "no/such/place", "out", "--bundle", "b"], ["no/such/place", "does not exist"]),
        (["check", "no/such/place"], ["no/such/place", "does not exist"]),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line(words, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1, printed.err
    assert all(part in printed.err for part in parts), printed.err
    assert list(tmp_path.iterdir()) == []


def test_options_may_stand_anywhere_and_paths_stay_as_typed():
    words = ["--overwrite", "007", "1e3", "--bundle=1.50", "--num-threads", "2"]
    expected = {"overwrite": True, "input": "007", "output": "1e3", "bundle": "1.50", "num_threads": 2}
    assert arguments_of(declaration_of("predict"), words) == expected


@pytest.mark.parametrize("words", [["--overwrite", "true"], ["--overwrite=True"], ["--overwrite"]])
def test_a_switch_may_say_true_as_in_a_bundles_command(words):
    assert arguments_of(declaration_of("check"), [*words, "scans"]) == {"overwrite": True, "input": "scans"}
    assert arguments_of(declaration_of("check"), ["scans", "--overwrite", "False"])["overwrite"] is False


def test_help_shows_what_may_be_left_out_and_how_to_turn_off_what_is_on(capsys):
    assert main(["report", "--help"]) == 0
    assert "Usage: mapseg report DIRECTORY [OUTPUT]\n" in capsys.readouterr().out
    assert main(["adapt", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Arguments:" not in printed and "(default: on; --pretraining=false turns it off)" in printed


def test_a_path_like_a_number_reaches_the_function_as_typed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "0070"]) == 2
    assert "0070 does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "CPU", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=name):
        choose_device(name)


def test_threads_are_put_back():
    import torch

    before = torch.get_num_threads()
    with working(num_threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="num_threads"), working(num_threads=0):
        pass


def test_exit_code_of_several_failures():
    assert exit_code_of([]) == 0
    assert exit_code_of([CheckpointError, CheckpointError]) == 4
    assert exit_code_of([CheckpointError, DataError]) == 3
    assert exit_code_of([ValueError]) == 3
