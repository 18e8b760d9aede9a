# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""The console script ``mapseg``: arguments in, one readable result or one readable error out, and the exit code."""

from __future__ import annotations

import difflib
import io
import logging
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from inspect import Parameter
from typing import Any

from mapseg_components import __version__, commands
from mapseg_components.commands.declarations import Declaration, declaration_of
from mapseg_components.errors import ConfigError, ResourceError, user_error

__all__ = ["main"]

COMMANDS = ("demo", "check", "prepare", "methods", "adapt", "predict", "restore", "evaluate", "report")
WIDTH = 100
EXIT_CODES = """Exit codes: 0 all that was asked exists and was verified, 2 usage or setting, 3 data, 4 weights,
5 a result is not finite, 6 disk, memory or permission, 7 a federation, 130 interrupted,
143 stopped (SIGTERM)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mapseg`` with arguments (by default those of the process); returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not end the command
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    wants_help = any(word in ("-h", "--help") for word in arguments)
    words = [word for word in arguments if word not in ("-h", "--help")]
    if words[:1] == ["--version"]:
        sys.stdout.write(f"mapseg {__version__}\n")
        return 0
    if not words or words == ["help"]:
        (sys.stdout if wants_help or words else sys.stderr).write(overview())
        return 0 if wants_help or words else ConfigError.exit_code
    verbose = "--verbose" in words
    try:
        if words[0] not in COMMANDS:
            raise ConfigError(f"there is no command {words[0]!r}{nearest(words[0], COMMANDS)}: see mapseg --help")
        if wants_help:
            sys.stdout.write(command_help(words[0]))
            return 0
        return run(words[0], words[1:], verbose)
    except KeyboardInterrupt:
        sys.stderr.write("mapseg: interrupted; what was finished is kept.\n")
        return 130
    except Exception as error:
        return report(error, verbose)


def run(name: str, words: Sequence[str], verbose: bool) -> int:
    """Import and call a command, and print its result."""
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING)
    if not verbose:
        warnings.simplefilter("ignore")  # of libraries; findings are reported by this package itself
    given = arguments_of(declaration_of(name), words)
    result = getattr(commands, name)(**given)
    sys.stdout.write(f"{result}\n")
    return int(getattr(result, "exit_code", 0))


def report(error: Exception, verbose: bool) -> int:
    """Report an error on standard error; returns the exit code."""
    if verbose:
        traceback.print_exception(error)
    ours = user_error(error)
    if ours is not None:
        sys.stderr.write(f"mapseg: {ours}\n")
        return ours.exit_code
    if isinstance(error, (MemoryError, OSError)):
        sys.stderr.write(f"mapseg: {type(error).__name__}: {error or 'out of memory'}\n")
        return ResourceError.exit_code
    if not verbose:
        traceback.print_exception(error)
    sys.stderr.write("mapseg: this is a bug in mapseg; please report it with the lines above\n")
    return 1


def kinds_of(command: Declaration) -> dict[str, str]:
    """Argument to ``bool``, ``int``, ``float`` or ``str``."""
    kinds = {}
    for name, parameter in command.signature.parameters.items():
        found = re.match(r"bool|int|float", str(parameter.annotation))
        kinds[name] = found.group() if found else "str"
    return kinds


def arguments_of(command: Declaration, words: Sequence[str]) -> dict[str, Any]:
    """Values of the arguments that words give, by name.

    Raises:
        ConfigError: an option is unknown, lacks its value or has one of another kind; there are too many or too few
            arguments.
    """
    kinds, parameters = kinds_of(command), command.signature.parameters
    places = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    values: dict[str, Any] = {}
    rest, free = list(words), iter(places)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            option, equals, value = word[2:].partition("=")
            name = option.replace("-", "_")
            if name not in kinds:
                raise ConfigError(f"unknown option --{option}{nearest(name, list(kinds), '--')}: {see(command)}")
            if kinds[name] == "bool":
                follows = not equals and rest and rest[0].lower() in ("true", "false")  # as in monai.bundle's commands
                value = value if equals else rest.pop(0) if follows else "true"
            elif not equals:
                if not rest or rest[0].startswith("--"):
                    raise ConfigError(f"option --{option} lacks its value: {see(command)}")
                value = rest.pop(0)
        else:
            if re.match(r"-\D", word):
                raise ConfigError(f"unknown option {word}: options begin with two dashes; {see(command)}")
            name, value = next(free, ""), word
            if not name:
                raise ConfigError(f"one argument too many: {word!r}: {see(command)}")
        if name in values:
            raise ConfigError(f"{name} is given twice: {see(command)}")
        values[name] = checked(name, kinds[name], value)
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in values]
    if missing:
        named = ", ".join(name.upper() if name in places else f"--{name}" for name in missing)
        meaning = f" ({described(command)[2].get(missing[0], '').rstrip('.')})" if len(missing) == 1 else ""
        raise ConfigError(f"{named} is missing{meaning}: {see(command)}")
    return values


def checked(name: str, kind: str, value: str) -> Any:
    """A value of its kind. Raises `ConfigError`."""
    if kind == "bool":
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"--{name} is {value!r}, expected nothing, true or false")
        return value.lower() == "true"
    if kind in ("int", "float"):
        try:
            return {"int": int, "float": float}[kind](value)
        except ValueError as error:
            raise ConfigError(f"--{name} is {value!r}, expected a{'n' * (kind == 'int')} {kind}") from error
    return value


def nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """The known word that is most like an unknown one, as a question."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""


def see(command: Declaration) -> str:
    """Where to look."""
    return f"see mapseg {command.name} --help"


def overview() -> str:
    """Help of ``mapseg`` itself."""
    lines = [f"mapseg {__version__}: segmentation of scans that you have no labels for", "", "Commands:"]
    lines += [f"  {name:<10} {described(declaration_of(name))[0]}" for name in COMMANDS]
    lines += ["", "mapseg COMMAND --help shows arguments and options.", "", *EXIT_CODES.splitlines()]
    return "\n".join(lines) + "\n"


def command_help(name: str) -> str:
    """Help of a command, made of its signature and docstring."""
    command = declaration_of(name)
    summary, about, texts = described(command)
    parameters, kinds = command.signature.parameters, kinds_of(command)
    places = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    usage = [p.name.upper() if p.default is p.empty else f"[{p.name.upper()}]" for p in places]
    usage += [f"--{p.name} {p.name.upper()}" for p in options if p.default is p.empty] + ["[options]"] * bool(options)
    lines = [summary, "", f"Usage: mapseg {name} {' '.join(usage)}", ""]
    for paragraph in about:
        lines += [*textwrap.wrap(paragraph, WIDTH), ""]
    for title, found in (("Arguments", places), ("Options", options)):
        lines += [f"{title}:"] * bool(found)
        for p in found:
            shown = p.name.upper() if p in places else f"--{p.name}"
            if p in options and kinds[p.name] != "bool":
                shown += f" {kinds[p.name].upper() if kinds[p.name] != 'str' else 'TEXT'}"
            default = "" if p.default in (p.empty, None, False) else f" (default: {default_text(p)})"
            text = textwrap.wrap(texts.get(p.name, "") + default, WIDTH - 28) or [""]
            if len(shown) > 25:
                lines.append(f"  {shown}")
                shown = ""
            lines += [f"  {shown:<26}{text[0]}", *(" " * 28 + line for line in text[1:])]
        lines += [""] * bool(found)
    return "\n".join([*lines, *EXIT_CODES.splitlines()]) + "\n"


def default_text(p: Parameter) -> str:
    """A default as a user would type it; of what is on, how to turn it off."""
    if p.default is True:
        return f"on; --{p.name}=false turns it off"
    return ",".join(map(str, p.default)) if isinstance(p.default, tuple) else str(p.default)


def described(command: Declaration) -> tuple[str, list[str], dict[str, str]]:
    """Summary, paragraphs and texts of the arguments of a Google docstring, on plain lines."""
    document = command.document.replace("``", "").replace("`", "")
    head, rest = re.split(r"\n(?:Args|Returns|Raises):\n", document)[0], document.partition("\nArgs:\n")[2]
    summary, *about = [" ".join(part.split()) for part in head.split("\n\n") if part.strip()]
    texts: dict[str, str] = {}
    name = ""
    for line in re.split(r"\n(?=\S)", rest)[0].splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start.group(1)
            texts[name] = start.group(2)
        elif name:
            texts[name] += " " + line.strip()
    return summary, about, {key: text.strip() for key, text in texts.items()}
