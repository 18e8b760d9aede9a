# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Stages that overlap: order, who runs where, how many items there are at a time, and how they end."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from mapseg_components.prediction.overlap import in_stages

LONG = 20  # seconds that no stage waits if all is well


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_item_goes_through_all_stages_in_order(count, overlap):
    seen = {"read": [], "work": [], "write": []}

    def stage(name, item):
        time.sleep(0.01 * ((item * 7 + len(name)) % 3))  # now this stage is the slowest, now another
        seen[name].append(item)
        return [item, name]

    def work(item, value):
        assert value == [item, "read"]
        return stage("work", item)

    def write(item, value):
        assert value == [item, "work"]
        stage("write", item)

    in_stages(range(count), lambda item: stage("read", item), work, write, overlap)
    assert list(seen.values()) == [list(range(count))] * 3


def test_work_waits_for_neither_the_next_read_nor_the_last_write():
    read, written = ([threading.Event() for _ in range(3)] for _ in range(2))

    def work(item, value):
        if item < 2:
            assert read[item + 1].wait(LONG)  # within work on this item
        if item:
            assert not written[item - 1].is_set()
            released[item - 1].set()
            assert written[item - 1].wait(LONG)

    released = [threading.Event() for _ in range(3)]

    def write(item, value):
        assert item == 2 or released[item].wait(LONG)
        written[item].set()

    in_stages(range(3), lambda item: read[item].set(), work, write)
    assert written[2].is_set()


def test_without_overlap_there_is_one_thread():
    seen = []
    here = threading.current_thread
    in_stages([1, 2], lambda _: seen.append(here()), lambda _, value: seen.append(here()),
              lambda _, value: seen.append(here()), overlap=False)  # fmt: skip
    assert set(seen) == {here()} and len(seen) == 6


@pytest.mark.parametrize("slow", ["read", "work", "write"])
def test_at_most_one_item_waits_on_each_side(slow):
    begun, ended, most = [], [], []

    def stage(name, item):
        if name == "read":
            begun.append(item)
        most.append(len(begun) - len(ended))
        time.sleep(0.03 if name == slow else 0)
        if name == "write":
            ended.append(item)

    in_stages(range(8), lambda item: stage("read", item), lambda item, _: stage("work", item),
              lambda item, _: stage("write", item))  # fmt: skip
    assert max(most) <= 3


@pytest.mark.parametrize("failing", ["read", "work", "write"])
def test_what_a_stage_raises_arrives_and_nothing_hangs(failing):
    done = []

    def stage(name, item):
        if (name, item) == (failing, 2):
            raise ValueError(f"{name} {item}")
        if name == "write":
            done.append(item)

    with pytest.raises(ValueError, match=f"{failing} 2"):
        in_stages(range(9), lambda item: stage("read", item), lambda item, _: stage("work", item),
                  lambda item, _: stage("write", item))  # fmt: skip
    assert done == [0, 1]
    assert not [one for one in threading.enumerate() if one.name.startswith(("read", "write"))]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("again", [0, 1, 3])
def test_an_interruption_waits_for_what_is_being_written(again):
    """Else a file could appear after the tables that do not list it. Users press Ctrl-C again while they wait."""
    writing, done = threading.Event(), []

    def work(item, value):
        if item == 1:
            assert writing.wait(LONG)
            raise KeyboardInterrupt

    def write(item, value):
        writing.set()
        for _ in range(again):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        done.append(item)

    with pytest.raises(KeyboardInterrupt):
        in_stages(range(5), lambda item: None, work, write)
    assert done == [0]
