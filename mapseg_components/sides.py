# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Sides of the body: structure names that have one, which a mirrored scan exchanges, and the axis between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mapseg_components.errors import ConfigError

__all__ = ["ACROSS", "across_body", "axis_across", "refuse_sides", "sided_names", "unnamed", "without_side"]

ACROSS = 0.3  # share of left and right in the direction of an axis from which a flip exchanges the sides of the body

# The parts of a name, split at signs, digits and changes of case: FemurHeadL is Femur, Head, L.
PARTS = re.compile(r"[^\W\d_]*?[^\W\d_A-Z](?=[A-Z])|[A-Z]+(?=[A-Z][a-z])|[^\W\d_]+|\d+")
# Parts that are a side by themselves: English, hemispheres (FreeSurfer), abbreviations of radiotherapy, Latin,
# German, French, Spanish, Portuguese, Italian, Dutch, Swedish.
LATERAL = frozenset(
    "l r lt rt lft rgt rght lh rh lhs rhs lhemi rhemi sin dex dext dxt dx sx "
    "links rechts gauche droit droite izq izquierdo izquierda derecho derecha esq esquerdo esquerda direito direita "
    "sinistro destro destra linker rechter höger".split()
)
# Abbreviations whose first letter is a side: chambers and vessels of the heart, lobes of the lungs, carotid arteries.
SIDE_PARTS = LATERAL | frozenset(
    "lv rv la ra laa raa lvm rvm lvc rvc lvbp rvbp lvmyo rvmyo lvot rvot lpa rpa lpv rpv lspv rspv lipv ripv "
    "lad lcx lca rca lmca rmca lcca rcca lica rica leca reca "
    "lul lll rul rml rll".split()
)
# Left or right within a part (leftkidney, kidneyright), in words that mean a side in some language.
WITHIN = re.compile(
    "left|right|sinist|dext(er|r|ra|ro|rum)$|^dextr|gauche|droite?$|^droit|^links|^linke|^rechts|^rechte"
    "|izquierd|derech[oa]|esquerd|direit[oa]|vänster|左|右|^лев|^прав"
)
# Words that hold such letters and mean no side; they are taken out of a name before it is looked at.
NO_SIDE = re.compile(
    r"\b(sub)?cleft\w*|(?<![a-z])leftovers?|\b(a|b|down|f|out|up|w)right\w*|(?<![a-z])l[\s_.-]*spine"
    r"|copyright|dextrocardi\w*|dextrose",
    re.IGNORECASE,
)
# Abbreviations that are a side only beside their partner: "Niere li" with "Niere re", "rein g" with "rein d".
PARTNERS = {"li": "re", "g": "d", "e": "d", "i": "d", "sn": "dx", "izda": "dcha", "ll": "lr", "ul": "ur"}
UNNAMED = re.compile(r"structure \d+")  # see `unnamed`
# Parts beside which L and a number are a lumbar vertebra.
SPINE = re.compile(
    r"\d+|[ctsl]|th|.*(vert|dis[ck]|ivd|spin|lumb|body|canal|level|root|nerve|cord|plate|facet|lamina).*"
)


def sided_names(names: Iterable[str]) -> list[str]:
    """Structures whose names have a side of the body, in order; in doubt a name counts as one.

    Looked for are left and right as words or parts of words, as abbreviations (``Lung_L``, ``Kidney_Rt``, ``lh``,
    ``LV`` of the heart), in Latin and some other languages, and names of the set that differ by l and r alone at an end
    of a part (``kidneyl``, ``kidneyr``). ``L3`` is a vertebra, unless the rest of the name tells otherwise or the set
    has ``R3`` as well. Of several structures that are numbered for want of names (`unnamed`) each may be one of a side.

    Args:
        names: of all structures of one task.
    """
    listed = [str(name) for name in names]
    parts = {name: tuple(parts_of(name)) for name in listed}
    whole = set(parts.values())
    numbered = [name for name in listed if UNNAMED.fullmatch(name)]
    doubtful = {*numbered} if len(numbered) > 1 else set()
    return [n for n in listed if n in doubtful or says_side(parts[n]) or has_partner(parts[n], whole)]


def unnamed(value: float) -> str:
    """Name of a structure of which the value in the label maps is all that is known.

    Examples:
        >>> from mapseg_components.sides import unnamed
        >>> unnamed(17.0)
        'structure 17'
    """
    return f"structure {int(value)}"


def refuse_sides(option: str, labels: Iterable[str] | Mapping[str, int]) -> None:
    """Refuse what mirrors scans left to right where a structure's name says a side.

    Args:
        option: the setting that asks for it.
        labels: names of all structures.

    Raises:
        ConfigError: names the structures.
    """
    sided = sided_names(labels)
    if sided:
        more = f" and {len(sided) - 4} more" if len(sided) > 4 else ""
        raise ConfigError(
            f"{option} mirrors left and right, but by their names structures have a side, or may have one "
            f"({', '.join(sided[:4])}{more}): leave {option} out; if none has a side, name them so in labels"
        )


def across_body(directions: Sequence[Sequence[float]] | None) -> list[float]:
    """How far each array axis runs between left and right, from 0 to 1.

    Args:
        directions: of the array axes in RAS+ (3, 3), or ``None`` for the body's own.
    """
    frame = np.eye(3) if directions is None else np.asarray(directions, dtype=float)
    return [float(abs(axis[0])) for axis in frame]


def axis_across(
    option: str, labels: Iterable[str] | Mapping[str, int], directions: Sequence[Sequence[float]] | None
) -> int:
    """The array axis that runs between left and right, of scans that may be mirrored along it.

    Args:
        option: the setting that mirrors them.
        labels: names of all structures.
        directions: as for `across_body`.

    Raises:
        ConfigError: a structure's name says a side, or axes are more than 17 degrees oblique.

    Examples:
        >>> from mapseg_components.sides import axis_across
        >>> axis_across("flip_tta", ["heart"], None)
        0
        >>> axis_across("flip_tta", ["heart"], [[0, 1, 0], [0, 0, 1], [1, 0, 0]])
        2
    """
    refuse_sides(option, labels)
    across = across_body(directions)
    axis = int(np.argmax(across))
    if any(share >= ACROSS for other, share in enumerate(across) if other != axis):
        raise ConfigError(
            f"{option} mirrors left and right, and no axis of the scans as they are segmented runs between them "
            f"(working_directions is {directions}): leave {option} out"
        )
    return axis


def parts_of(name: str) -> Iterator[str]:
    """Parts of a name in lower case, numbers as they stand."""
    for part in PARTS.findall(NO_SIDE.sub(" ", name)):
        yield part.casefold()


def without_side(name: str) -> tuple[str, ...]:
    """Parts of a name, in lower case, without words that say a side.

    Examples:
        >>> from mapseg_components.sides import without_side
        >>> without_side("Left-Thalamus-Proper"), without_side("ctx_rh"), without_side("rightputamen")
        (('thalamus', 'proper'), ('ctx',), ('putamen',))
        >>> without_side("Cortex LV")  # a chamber of the heart
        ('cortex', 'lv')
    """
    kept = (WITHIN.sub("", part) for part in parts_of(name) if part not in LATERAL)
    return tuple(part for part in kept if part)


def says_side(parts: tuple[str, ...]) -> bool:
    """Whether one name says a side by itself."""
    vertebra = is_vertebra(parts)
    return any((part in SIDE_PARTS and not (part == "l" and vertebra)) or WITHIN.search(part) for part in parts)


def is_vertebra(parts: tuple[str, ...]) -> bool:
    """Whether every L stands before a number from 1 to 6, in a name of the spine."""
    numbered = all(after in set("123456") for part, after in zip(parts, (*parts[1:], "")) if part == "l")
    return numbered and all(SPINE.fullmatch(part) for part in parts)


def has_partner(parts: tuple[str, ...], others: set[tuple[str, ...]]) -> bool:
    """Whether another name of the set is the same but for a side in one part."""
    for number, part in enumerate(parts):
        for swapped in swaps_of(part) if len(parts) > 1 or len(part) > 1 else ():  # structures a to h have no sides
            if (*parts[:number], swapped, *parts[number + 1 :]) in others:
                return True
    return False


def swaps_of(part: str) -> Iterator[str]:
    """The part for the other side: l and r exchanged at either end, or an abbreviation's partner."""
    for one, other in (("l", "r"), ("r", "l")):
        if part.startswith(one):
            yield other + part[1:]
        if part.endswith(one):
            yield part[:-1] + other
    for one, other in PARTNERS.items():
        if part in (one, other):
            yield other if part == one else one
