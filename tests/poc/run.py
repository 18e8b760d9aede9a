# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A federation of real processes on this machine: python -m tests.poc.run FOLDER. Needs the extra ``fl``.

NVFlare's POC mode: a server and three clients on localhost, each a process with its own start-up kit, talking by mutual
TLS. After the first round a client is killed (SIGKILL) and the rounds must go on; then the server is killed in a round
and started again with that client, the same job is submitted again, and the rounds must go on from the last closed one,
with the moments that each site has kept of this federation.
Exit code 0 if all of that was seen.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from nvflare.fuel.flare_api.flare_api import new_secure_session

from mapseg_components.federated.flare.job import allow_components, make_job
from tests.federation import make_federation, write_parties

ROOT = Path(__file__).resolve().parents[2]
SITES = ["site-1", "site-2", "site-3"]
ADMIN = "admin@nvidia.com"
ROUNDS, TIMEOUT_S, PATIENCE_S = 6, 150, 900


class Federation:
    """Start-up kits, processes and rounds of one POC folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.rounds_file = self.folder / "own" / "server" / "eval" / "rounds.jsonl"
        self.state_file = self.folder / "own" / "server" / "models" / "federation.pt"
        home = self.folder / "home"  # nvflare notes its start-up kits there
        home.mkdir(parents=True)
        self.environment = {
            **os.environ,
            "HOME": str(home),
            "NVFLARE_POC_WORKSPACE": str(self.folder / "poc"),
            "MAPSEG_PARTY_DIR": str(self.folder / "parties"),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self.running: dict[str, subprocess.Popen] = {}
        self.began = time.monotonic()

    def kept_file(self, site: str) -> Path:
        """What a site keeps from round to round."""
        return self.folder / "own" / site / "eval" / "sites" / site / "kept.pt"

    def say(self, text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - self.began:6.0f} s  {text}\n")
        sys.stdout.flush()

    def prepare(self) -> None:
        """Scans, settings of each party, start-up kits, and what each party allows."""
        datalist, sites = make_federation(self.folder / "scans", len(SITES))
        changes = {"rounds": ROUNDS, "min_sites": 2, "round_timeout_s": TIMEOUT_S}
        changes |= {"upload": "student", "keep_moments": True}
        write_parties(self.folder / "parties", self.folder / "own", datalist, sites, **changes)
        command = [sys.executable, "-m", "nvflare.cli", "poc", "prepare", "-c", *SITES]
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL, cwd=self.folder)
        self.kits = next((self.folder / "poc").glob("*/prod_00"))
        for name in ("server", *SITES):
            allow_components(self.kits / name / "local" / "resources.json")
        make_job(SITES, min_sites=2).export_job(str(self.folder / "jobs"))
        require(not list((self.folder / "jobs").rglob("*.py")), "the job carries no code")

    def start(self, name: str) -> None:
        """One party's process, as its start-up kit starts it."""
        with (self.folder / f"{name}.log").open("a") as log:
            script = self.kits / name / "startup" / "sub_start.sh"
            self.running[name] = subprocess.Popen(
                ["bash", str(script), "--once"], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, name: str) -> None:
        """SIGKILL to a party's process and all that it started."""
        process = psutil.Process(self.running.pop(name).pid)
        for each in [*process.children(recursive=True), process]:
            try:
                each.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        self.say(f"{name} killed (SIGKILL)")

    def submit(self) -> None:
        """The same job each time; the server may still be starting."""

        def try_once() -> bool:
            try:
                session = new_secure_session(ADMIN, str(self.kits / ADMIN), timeout=20.0)
            except Exception:
                return False
            try:
                clients = {client.name for client in session.get_system_info().client_info}
                if not {*SITES} & {*self.running} <= clients:
                    return False
                session.submit_job(str(self.folder / "jobs" / "mapseg_federated"))
                return True
            finally:
                session.close()

        self.wait(try_once, "all clients to join")
        self.say("job submitted")

    def lines(self) -> list[dict]:
        text = self.rounds_file.read_text() if self.rounds_file.is_file() else ""
        return [json.loads(line) for line in text.splitlines()]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end:
                raise SystemExit(f"waited {PATIENCE_S} s for {what}: see the logs in {self.folder}")
            time.sleep(1.0)

    def wait_for_rounds(self, count: int) -> None:
        self.wait(lambda: len(self.lines()) >= count, f"round {count - 1}")
        line = self.lines()[count - 1]
        self.say(f"round {line['round']} closed with {sorted(line['sites'])}, without {sorted(line['excluded'])}")


def main() -> None:
    """The story of the docstring; every step is asserted."""
    federation = Federation(Path(sys.argv[1]))
    federation.prepare()
    federation.say("start-up kits are made")
    try:
        for name in ("server", *SITES):
            federation.start(name)
        federation.submit()
        federation.wait_for_rounds(1)
        require(sorted(federation.lines()[0]["sites"]) == SITES, "round 0 has all sites")

        federation.kill("site-3")
        gone = len(federation.lines())
        federation.wait_for_rounds(gone + 2)
        require(sorted(federation.lines()[-1]["sites"]) == SITES[:2], "rounds go on without site-3")

        federation.kill("server")
        before = federation.lines()
        require(torch.load(federation.state_file, weights_only=True)["round"] >= len(before), "the state is readable")
        for name in ("server", "site-3"):  # the two other clients find the server again
            federation.start(name)
        federation.submit()
        federation.wait_for_rounds(ROUNDS)
        after = federation.lines()
        require(after[: len(before)] == before, "closed rounds stay as they were")
        require([line["round"] for line in after] == list(range(ROUNDS)), "no round is missing or repeated")
        require(sorted(after[-1]["sites"]) == SITES, "site-3 is back")
        state = torch.load(federation.state_file, weights_only=True)
        for site in SITES:
            kept = torch.load(federation.kept_file(site), weights_only=True)
            require(kept["federation"] == state["federation"], f"{site} keeps the moments of this federation")
            steps = {int(entry["step"]) for entry in kept["after"]["moments"].values()}
            require(max(steps) > max(int(entry["step"]) for entry in kept["before"]["moments"].values()), "they go on")
    finally:
        for name in list(federation.running):
            federation.kill(name)
    federation.say("all of it was seen")


def require(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"not so: {what}")


if __name__ == "__main__":
    main()
