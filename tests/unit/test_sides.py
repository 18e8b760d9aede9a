# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A side in a structure's name is found in every spelling; names without one are left alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mapseg_components.errors import ConfigError
from mapseg_components.sides import axis_across, refuse_sides, sided_names, unnamed

ORGANS = ("kidney", "Lung", "FEMUR", "hippocampus", "FemurHead", "optic_nerve", "ventricle", "Lens", "clavicula")
SIDES = (
    "left",
    "Right",
    "L",
    "R",
    "Lt",
    "Rt",
    "lh",
    "RH",
    "links",
    "rechts",
    "gauche",
    "droit",
    "sin",
    "dex",
    "sinister",
)
SIDES += ("dextra", "izquierdo", "derecha", "direito", "sinistro", "destro")
SPELLINGS = (
    "{side}_{organ}",
    "{organ}_{side}",
    "{organ}-{side}",
    "{side} {organ}",
    "{organ} ({side})",
    "{side}.{organ}",
)
CAMEL = ("left", "right", "l", "r", "lt", "rt", "lh", "rh", "sin", "dex")
PUBLISHED = """
    Lung_L Lung_Lt FemurHeadL Kidney_R Parotid_Lt OpticNrv_L Glnd_Submand_R A_LAD Lobe_LUL
    Left-Hippocampus Right-Cerebral-White-Matter ctx-lh-bankssts ctx_rh_G_cuneus lh.cortex rh_V1 wm-lh-insula
    Precentral_L Hippocampus_R lAmy rHip L_V1_ROI
    LeftVentricle RightAtrium KidneyL LKidney RLung LLung leftkidney rightlung kidneyleft LUNGRIGHT
    LV RV LA RA LVMyo RVendo lv_myocardium left_atrial_appendage rib_left_1 lung_upper_lobe_right R-PCA L-ICA 4L
    rechteNiere linkeNiere rein_gauche Kidney_sin renDexter 左肾 левая_почка lung_L1 KidneyL2
""".split()
WITHOUT = """
    cerebellum ventricles liver cleft bright rectum pelvis spleen brainstem myocardium lateral_ventricles
    cleftpalate LateralVentricles Myocardium Tumour GTV CTV PTV prostate bladder stomach aorta cortex thalamus
    pallidum putamen Rectum SpinalCord Lungs Kidneys Larynx Lips Lens WholeBrain CSF GM WM trachea lymph_nodes
    contralateral_lung bilateral_lungs L1 L5 vertebrae_L1 VertebraL3 L4L5 S1 T12 disc_L5 LGE ET TC MYO lumen wall
    lobule RNFL RPE retina linkage sinus upright pulmonary_artery postcava dexamethasone rectus_abdominis global
    rostral ventral dorsal renal lamina
""".split()
WITHOUT += ["white matter", "extra-ventricular CSF", "lateral ventricles", "4th ventricle", "L-spine", "L4/L5 disc"]
WITHOUT += [
    "cortical grey matter",
    "deep grey matter",
    "corpus callosum",
    "bright spot",
    "Wright's area",
    "vertebra L2",
]


@pytest.mark.parametrize("side, spelling", itertools.product(SIDES, SPELLINGS))
def test_a_side_is_found_in_every_spelling(side, spelling):
    names = [spelling.format(side=side, organ=organ) for organ in ORGANS]
    assert sided_names(names) == names


@pytest.mark.parametrize("side", CAMEL)
def test_a_side_is_found_by_a_change_of_case(side):
    names = [f"{organ}{side.capitalize()}" for organ in ("kidney", "Lung", "FemurHead", "opticNerve", "Lens")]
    names += [f"{side}{organ}" for organ in ("Kidney", "Lung", "FemurHead")]
    assert sided_names(names) == names


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_side_is_found_in_published_names(name):
    assert sided_names(["liver", name]) == [name]


def test_names_without_a_side_are_left_alone():
    assert sided_names(WITHOUT) == []
    assert [name for name in WITHOUT if sided_names([name])] == []


@pytest.mark.parametrize(
    "pair", [("kidneyl", "kidneyr"), ("HIPPL", "HIPPR"), ("Niere li", "Niere re"), ("rein g", "rein d"), ("L1", "R1")]
)
def test_names_that_differ_by_a_side_alone_are_found_together(pair):
    assert sided_names(["liver", *pair]) == list(pair)


def test_an_option_that_mirrors_is_refused_by_name():
    refuse_sides("flip_tta", {"liver": 1, "lateral ventricles": 2})
    with pytest.raises(ConfigError, match=r"flip_tta mirrors.*Lung_Lt, KidneyR.*leave flip_tta out; .*name them"):
        refuse_sides("flip_tta", {"liver": 1, "Lung_Lt": 2, "KidneyR": 3})


def test_the_axis_between_left_and_right_is_that_of_the_frame():
    assert axis_across("flip_tta", ["heart"], None) == 0
    sagittal = [[0.0, 1.0, 0.1], [0.1, -0.1, 1.0], [-1.0, 0.0, 0.1]]
    assert axis_across("flip_tta", ["heart"], sagittal) == 2
    with pytest.raises(ConfigError, match=r"flip_tta mirrors.*Lung_Lt"):
        axis_across("flip_tta", ["Lung_Lt"], sagittal)
    for degrees in (5, 15, 20, 45):
        far, near = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
        oblique = [[near, far, 0.0], [-far, near, 0.0], [0.0, 0.0, 1.0]]
        if degrees < 17:
            assert axis_across("symmetric", ["heart"], oblique) == 0
            continue
        with pytest.raises(ConfigError, match=r"symmetric mirrors left and right, and no axis.*leave symmetric out"):
            axis_across("symmetric", ["heart"], oblique)


def test_structures_without_names_may_have_sides():
    assert sided_names([unnamed(17), unnamed(53.0)]) == ["structure 17", "structure 53"]
    assert sided_names([unnamed(1)]) == [] == sided_names(["structure of interest", "structure 1 and 2"])
