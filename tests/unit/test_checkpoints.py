# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pytest
import torch

from mapseg_components.checkpoints import (
    load_weights,
    random_state,
    read_checked,
    restore_random_state,
    write_atomic,
)
from mapseg_components.errors import CheckpointError
from mapseg_components.networks import GlobalLocalDeepLabV3, MultiScaleMAE


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def autoencoder(width=8):
    return MultiScaleMAE(1, width, 1, 4, (8, 4))


def test_failed_write_leaves_the_old_file_and_no_stray(tmp_path):
    write_atomic({"a": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(Exception):  # noqa: B017  a local class cannot be pickled, whatever the error's type
        write_atomic({"a": lambda: None}, tmp_path / "w.pt")
    assert read_checked(tmp_path / "w.pt")["a"].item() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "w.pt"
    write_atomic({"a": torch.rand(1000)}, path)
    path.write_bytes(path.read_bytes()[:700] if content is None else content)
    with pytest.raises(CheckpointError, match=r"w\.pt.*(copy it again|save a state_dict)"):
        read_checked(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights at .*absent\.pt"):
        read_checked(tmp_path / "absent.pt")


def test_code_in_a_file_is_not_run(tmp_path):
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Exploit(tmp_path / "sentinel")))
    with pytest.raises(CheckpointError) as caught:
        read_checked(tmp_path / "w.pt")
    assert not (tmp_path / "sentinel").exists()
    assert "weights_only" not in str(caught.value)


def test_encoder_loads_with_full_coverage(tmp_path, tiny_network):
    source = autoencoder()
    write_atomic(source.state_dict(), tmp_path / "mae.pt")
    count = load_weights(tiny_network, tmp_path / "mae.pt", prefix="encoder.")
    assert count == len(source.encoder.state_dict())
    for name, value in source.encoder.state_dict().items():
        torch.testing.assert_close(tiny_network.encoder.state_dict()[name], value)


def test_other_width_is_refused_with_its_coverage(tmp_path, tiny_network):
    write_atomic(autoencoder(width=16).state_dict(), tmp_path / "mae.pt")
    before = {name: value.clone() for name, value in tiny_network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"covers \d of \d+ tensors.*expected.*width"):
        load_weights(tiny_network, tmp_path / "mae.pt", prefix="encoder.")
    for name, value in tiny_network.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_deeper_encoder_is_not_loaded_in_part(tmp_path):
    write_atomic(MultiScaleMAE(1, 8, 2, 4, (8, 4)).state_dict(), tmp_path / "mae.pt")
    with pytest.raises(CheckpointError, match="not in the network"):
        load_weights(GlobalLocalDeepLabV3(1, 2, 8, 1, 4, (1,), 8), tmp_path / "mae.pt", prefix="encoder.")


def test_disjoint_weights_load_nothing(tmp_path, tiny_network):
    write_atomic({"other": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="covers 0 of"):
        load_weights(tiny_network, tmp_path / "w.pt")


def test_random_state_of_two_gpus_fits_one(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: seen.append((state, device)))
    restore_random_state({**random_state_of_cpu(), "cuda": ["first", "second"]})
    assert seen == [("first", 0)]


def random_state_of_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return random_state()


def test_random_state_comes_back_from_a_file(tmp_path):
    write_atomic(random_state(), tmp_path / "r.pt")
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    restore_random_state(read_checked(tmp_path / "r.pt"))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected
