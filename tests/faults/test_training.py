# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Training that is killed, interrupted, fed with bad numbers or started with other settings (rows T1 to T15).

Every run here is a real process; ``make soak`` does the same for longer.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from mapseg_components.checkpoints import read_checked, write_atomic
from mapseg_components.data import SECTIONS, load_datalist
from mapseg_components.data.datalist import has_section
from mapseg_components.engines import AdaptationTrainer
from mapseg_components.errors import CheckpointError, ConfigError, MAPSegError, NonFiniteError, ResourceError
from mapseg_components.files import lock_folder, unlock_folders
from mapseg_components.methods import MAPSeg
from tests.scans import halve_sample
from tests.soak.run import BUNDLE, differences, interrupted, progress, start, train
from tests.warm import python

SHORT = {"epoch_length": 3, "max_epochs": 2, "source_masked": False}
ERRORS = {error.exit_code: error for error in (ConfigError, CheckpointError, NonFiniteError, ResourceError)}


@pytest.fixture(scope="module", autouse=True)
def sample(tmp_path_factory):
    """A small copy of the sample, which all runs train on."""
    SHORT["dataset_dir"] = str(halve_sample(tmp_path_factory.mktemp("sample")))


def guarded(folder, log, settings):
    """Train; a user error becomes its exit code, its message the log's last line."""
    try:
        train(folder, log, settings)
    except Exception as error:
        cause = error
        while cause is not None and not isinstance(cause, MAPSegError):
            cause = cause.__cause__
        if cause is None:
            raise
        print(f"\n{cause}", flush=True)
        sys.exit(cause.exit_code)


def finished(folder, settings, target=guarded):
    """Exit code and last line of a run in a separate process."""
    folder.mkdir(exist_ok=True, parents=True)
    process = start(target, folder, folder.with_suffix(".log"), settings)
    process.join()
    return process.exitcode, folder.with_suffix(".log").read_text().strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finished(folder, SHORT)[0] == 0
    return folder


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# T1, T2


def test_kills_at_random_moments_lose_nothing(tmp_path, whole):
    """Twelve SIGKILLs, with a save at every iteration so that many hit a write; then bit for bit the same weights."""
    done, number = 0, 0
    while done < 12:
        folder = tmp_path / f"{number}"
        folder.mkdir()
        settings = {**SHORT, "save_steps": 1, "num_workers": number % 2}
        kills, losses = interrupted(folder, settings, random.Random(number), 2.0, kills=12 - done)
        assert losses == []
        assert differences(whole, folder) == []
        assert not list(folder.glob(".*.tmp*"))  # what kills left was swept by the next start
        history = [json.loads(line)["epoch"] for line in (folder / "history.jsonl").read_text().splitlines()]
        assert history == [1, 2]
        done, number = done + kills, number + 1


def signalled(folder, log, settings, iteration, number):
    """Train; the process gets a signal while it is in an iteration."""
    step = AdaptationTrainer._step

    def and_signal(self, engine, batch):
        if engine.state.iteration == iteration:
            signal.raise_signal(number)
            signal.raise_signal(number)  # schedulers repeat themselves
        return step(self, engine, batch)

    AdaptationTrainer._step = and_signal
    train(folder, log, settings)


@pytest.mark.parametrize("iteration", [1, 2, 3, 5, 6])
def test_a_signal_ends_the_iteration_saves_and_exits(tmp_path, whole, iteration):
    """In the middle of an epoch and in its last iteration, of either epoch."""
    folder = tmp_path / "run"
    folder.mkdir()
    number, code = [(signal.SIGTERM, 143), (signal.SIGINT, 130)][iteration % 2]
    process = start(signalled, folder, tmp_path / "run.log", SHORT, iteration, number)
    process.join()
    assert process.exitcode == code
    state = read_checked(folder / "last.pt")["run"]
    assert state["iteration"] == iteration and state["epoch"] == iteration // 3
    assert f"saved {folder / 'last.pt'} at iteration {iteration}" in (tmp_path / "run.log").read_text()
    assert finished(folder, SHORT)[0] == 0
    assert differences(whole, folder) == []


def test_a_signal_from_outside_reaches_a_run_with_workers(tmp_path, whole):
    folder, settings = tmp_path / "run", {**SHORT, "save_steps": 1, "num_workers": 2}
    folder.mkdir()
    process = start(train, folder, tmp_path / "run.log", settings)
    wait_for(lambda: (progress(folder) or 0) >= 1)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert finished(folder, settings)[0] == 0
    assert differences(whole, folder) == []


def test_accumulated_gradients_are_not_cut_in_two(tmp_path):
    """A save within a step would lose gradients: saves and exits wait for its end."""
    settings = {**SHORT, "epoch_length": 5, "accumulate_steps": 2, "save_steps": 1}
    assert finished(tmp_path / "whole", settings)[0] == 0
    folder = tmp_path / "killed"
    folder.mkdir()
    process = start(signalled, folder, tmp_path / "killed.log", settings, 3, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143 and progress(folder) == 4
    assert finished(folder, settings)[0] == 0
    assert differences(tmp_path / "whole", folder) == []


# determinism: the same seeds, the same weights


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seeds_give_the_same_weights(tmp_path, whole, workers):
    assert finished(tmp_path / "again", {**SHORT, "num_workers": workers})[0] == 0
    assert differences(whole, tmp_path / "again") == []


def test_another_seed_gives_other_weights(tmp_path, whole):
    assert finished(tmp_path / "other", {**SHORT, "seed": 1})[0] == 0
    assert differences(whole, tmp_path / "other")


# T3, T5


def test_bad_numbers_stop_training_and_do_not_reach_a_checkpoint(tmp_path):
    code, line = finished(tmp_path / "run", {**SHORT, "learning_rate": 1e30, "save_steps": 1})
    assert code == NonFiniteError.exit_code
    assert line.startswith("loss terms ['source_local', 'source_global'")
    assert "are NaN or infinite at iteration 2, cases {'source': ['GA" in line
    assert line.endswith("or lower the learning rate; checkpoints hold only what was before")
    state = read_checked(tmp_path / "run" / "last.pt")
    assert state["run"]["iteration"] == 1
    assert all(torch.isfinite(value).all() for value in state["network"].values())


class Exploding(torch.nn.Linear):
    """A finite loss whose gradient is infinite."""

    def forward(self, image, global_image, box):
        logits = self.weight.sum().sqrt().expand(1, 2, 4, 4, 4)
        names = ("logits", "global_logits", "local_features", "context_features")
        return dict.fromkeys(names, logits)


def test_fp16_does_not_skip_steps_for_ever():
    """Loss scaling skips a step whose gradient is infinite; if that never ends, the scale is not the reason."""
    network = Exploding(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    with pytest.raises(NonFiniteError, match=r"infinite at every loss scale.*case 7"):
        one_step(network, amp="fp16", steps=60)
    assert network.weight.item() == 0


class Greedy(torch.nn.Linear):
    def forward(self, image, global_image, box):
        return torch.empty(2**60)


def one_step(network, amp=None, steps=1):
    image = torch.rand(1, 1, 4, 4, 4)
    batch = {"image": image, "global_image": image, "box": torch.zeros(1, 3, 2), "case_id": ["case 7"]}
    batch |= {"label": torch.zeros(1, 1, 4, 4, 4), "global_label": torch.zeros(1, 1, 4, 4, 4)}
    trainer = AdaptationTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[{"source": batch}] * steps,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        method=MAPSeg(None, source_masked=False),
        amp=amp,
    )
    trainer.logger.disabled = True
    trainer.run()


def test_an_infinite_gradient_changes_no_weight():
    network = Exploding(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    with pytest.raises(NonFiniteError, match=r"the gradient's norm is (nan|inf) at iteration 1.*case 7.*learning rate"):
        one_step(network)
    assert network.weight.item() == 0


def test_exhausted_memory_names_the_knobs():
    with pytest.raises(ResourceError) as caught:
        one_step(Greedy(1, 1))
    message = str(caught.value)
    assert "out of memory in iteration 1 on cpu, batch of 1 patches (4, 4, 4)" in message
    assert "lower patch_size, batch_size or width for a new run, or set batched_passes to false" in message
    assert message.endswith("go on with this one: the last checkpoint is intact") and caught.value.exit_code == 6


# T6, T8, T15: the resume file


def copied(folder, place):
    place.mkdir()
    for file in folder.iterdir():
        if not file.name.startswith("."):
            (place / file.name).write_bytes(file.read_bytes())
    return place


def fewer_scans(folder):
    place = SHORT["dataset_dir"]
    content = {section: load_datalist(place, section) for section in SECTIONS if has_section(place, section)}
    content["source_training"] = content["source_training"][:2]
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder / "datalist.json"


@pytest.mark.parametrize(
    "change, code, message",
    [
        ({"width": 16}, 4, "last.pt is of another network: fingerprint"),
        ({"learning_rate": 0.5}, 2, "last.pt was written with other settings (learning_rate was 0.003, now 0.5)"),
        (
            {"network_def#norm_groups": 4},
            2,
            "last.pt was written with other settings (network_def#norm_groups was null, now 4)",
        ),
        ({"epoch_length": 4}, 2, "(epoch_length was 3, now 4)"),
        ({"initial_weights": "other.pt"}, 2, '(initial_weights was null, now "other.pt")'),
        ({"datalist": "fewer"}, 4, "its 'loader' does not fit this run (source scans were ['GA30_operated', "),
        ({"max_epochs": 3, "num_workers": 1}, 0, ""),
    ],
)
def test_resuming_something_else_is_refused(tmp_path, whole, change, code, message):
    folder = copied(whole, tmp_path / "run")
    before = (folder / "last.pt").read_bytes()
    if "datalist" in change:
        change = {"datalist": str(fewer_scans(tmp_path))}
    found, line = finished(folder, {**SHORT, **change})
    assert found == code and message in line
    if code:
        assert "resume to false to start anew" in line
        assert (folder / "last.pt").read_bytes() == before
    else:
        assert progress(folder) == 9


@pytest.mark.parametrize("damage", ["cut", "flipped", "random"])
def test_a_damaged_save_offers_the_one_before(tmp_path, whole, damage):
    folder = copied(whole, tmp_path / "run")
    content = bytearray((folder / "last.pt").read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
    else:
        content = random.Random(0).randbytes(1000)
    (folder / "last.pt").write_bytes(content)
    code, line = finished(folder, SHORT)
    assert code == CheckpointError.exit_code
    assert "last.pt is damaged" in line and "previous.pt: move last.pt away to go on from there" in line
    assert (folder / "last.pt").read_bytes() == content
    (folder / "last.pt").rename(tmp_path / "away.pt")
    assert finished(folder, SHORT)[0] == 0
    assert differences(whole, folder) == []


# O1, O3, O4 as a run meets them


def test_a_disk_that_fills_up_leaves_the_old_save(tmp_path, whole):
    folder = copied(whole, tmp_path / "run")
    before = (folder / "last.pt").read_bytes()

    code, line = finished(folder, {**SHORT, "max_epochs": 3}, target=with_little_room)
    assert code == ResourceError.exit_code
    assert "cannot write" in line and ".pt" in line and "what was there before is untouched: free space" in line
    assert (folder / "last.pt").read_bytes() == before
    assert not list(folder.glob(".*.tmp*"))
    assert finished(folder, {**SHORT, "max_epochs": 3})[0] == 0


def with_little_room(folder, log, settings):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    room = (folder / "last.pt").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    guarded(folder, log, settings)


def test_a_full_disk_is_named_when_weights_are_written(tmp_path):
    def write(path):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            write_atomic({"a": torch.ones(100_000)}, path)
        except ResourceError as error:
            path.with_suffix(".txt").write_text(str(error))

    write_atomic({"a": torch.zeros(1)}, tmp_path / "w.pt")
    process = start(write, tmp_path / "w.pt")
    process.join()
    message = (tmp_path / "w.txt").read_text()
    assert f"cannot write {tmp_path / 'w.pt'}" in message and "free space" in message and "MiB free" in message
    assert read_checked(tmp_path / "w.pt")["a"].tolist() == [0.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.pt", "w.txt"]


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """A power cut cannot be had in a test; the order of the calls can."""
    calls = []

    def noting(name, call):
        return lambda *arguments: (calls.append(name), call(*arguments))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    write_atomic({"a": torch.zeros(1)}, tmp_path / "w.pt")
    assert calls == ["fsync", "replace", "fsync"]  # the content, the name, the folder


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_folder, "__defaults__", (0.5,))  # seconds to wait
    folder = tmp_path / "run"
    folder.mkdir()
    first = start(train, folder, tmp_path / "first.log", {**SHORT, "max_epochs": 1000})
    wait_for(lambda: (folder / "last.pt").is_file())
    code, line = finished(folder, SHORT)
    assert first.exitcode is None
    first.kill()
    first.join()
    assert code == ResourceError.exit_code
    assert f"{folder} is in use by process {first.pid} on " in line and "choose another folder" in line
    assert finished(folder, {**SHORT, "max_epochs": progress(folder) // 3 + 1})[0] == 0  # a killed run frees it


def test_the_end_of_one_run_does_not_free_the_folder_of_another(tmp_path):
    """A server may train and segment in one process."""

    claim = "import sys; from mapseg_components.files import lock_folder; lock_folder(sys.argv[1], timeout=0)"

    def refused():
        return subprocess.run([sys.executable, "-c", claim, str(tmp_path)], capture_output=True).returncode != 0

    lock_folder(tmp_path)
    lock_folder(tmp_path)
    assert refused()
    unlock_folders([tmp_path])
    assert refused()
    unlock_folders([tmp_path])
    assert not refused()


def test_a_folder_that_cannot_be_written_is_named_before_the_data(tmp_path):
    (tmp_path / "file").write_text("")
    code, line = finished(
        tmp_path / "x", {**SHORT, "ckpt_dir": str(tmp_path / "file" / "models"), "datalist": "absent"}
    )
    assert code == ConfigError.exit_code and f"{tmp_path / 'file'} is a file: name a folder" in line


# T11


def distributed(program, out, epochs=6):
    """Start two processes that train two iterations an epoch."""
    files = [f"configs/{name}" for name in ("train.json", "fetal_age.yaml", "tiny.yaml", "multi_gpu_train.json")]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program]
    line += [
        "training",
        "--config_file",
        str(files),
        "--dataset_dir",
        SHORT["dataset_dir"],
        "--max_epochs",
        f"{epochs}",
    ]
    line += ["--ckpt_dir", str(out), "--output_dir", str(out), "--save_steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON_EXEC": python()}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, cwd=BUNDLE, env=environment, **streams)


def ended(*given, **options):
    """Exit code and output of two processes."""
    process = distributed(*given, **options)
    output = process.communicate()[0]
    return process.returncode, output


SIGNALLED = """
import os, pathlib, signal, time
from mapseg_components.engines import AdaptationTrainer
from mapseg_components.handlers import checkpointing
import fire, monai.bundle

step, write, signalled = AdaptationTrainer._step, checkpointing.write_atomic, []

def and_signal(self, engine, batch):
    if engine.state.iteration == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        signalled.append(True)
    return step(self, engine, batch)

def slow(*arguments, **options):
    if signalled:
        time.sleep(3)
    write(*arguments, **options)
    if signalled:
        written.touch()

written = pathlib.Path(__file__).with_name("written")
AdaptationTrainer._step, checkpointing.write_atomic = and_signal, slow
try:
    fire.Fire(monai.bundle.run)
finally:
    print(f"\\nprocess {os.environ['RANK']} ended after the state was written: {written.exists()}", flush=True)
"""


@pytest.mark.slow
def test_a_signal_to_all_processes_waits_for_the_one_that_writes(tmp_path):
    """As a scheduler sends it: the others must not end first, or torchrun would end the writer."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    code, output = ended([str(tmp_path / "signalled.py")], tmp_path / "run", epochs=2)
    assert code != 0
    assert [f"process {rank} ended after the state was written: True" in output for rank in (0, 1)] == [True, True]
    assert progress(tmp_path / "run") == 3 and output.count("SIGTERM: saved") == 1
    code, output = ended(["-m", "monai.bundle", "run"], tmp_path / "run", epochs=2)
    assert code == 0 and "after iteration 3 (epoch 1 is complete)" in output


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_same_command_goes_on(tmp_path):
    """The restart is a new torchrun: within one, PyTorch's gloo meets addresses of the dead rank now and then."""

    program = ["-m", "monai.bundle", "run"]
    code, output = ended(program, tmp_path / "whole")
    assert code == 0, output[-3000:]
    running = distributed(program, tmp_path / "killed")
    wait_for(lambda: (progress(tmp_path / "killed") or 0) >= 3)
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    running.communicate()
    assert running.returncode == 1 and progress(tmp_path / "killed") < 12
    code, output = ended(program, tmp_path / "killed")
    assert code == 0, output[-3000:]
    assert f"Resumed from {tmp_path / 'killed' / 'last.pt'}" in output
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
