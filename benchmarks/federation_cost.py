# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a federated round costs: python -m benchmarks.federation_cost [SITES ...]. Prints two tables in Markdown.

Bytes per round are counted on the networks of the bundle's configs, without any training: float32; 16 bits (bfloat16,
or float16 of ``job.py --wire``); 8 and 4 bits (``--wire blockwise8``, ``normfloat4``) with their scales and code books.
Seconds per round are measured with simulated sites at test size, in CPU seconds of one thread: other work on the
machine counts little.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from monai.bundle import ConfigParser

from mapseg_components.federated import Site, simulate
from mapseg_components.federated.core import local_names, payload_bytes
from mapseg_components.federated.site import parser_of
from tests.federation import CONFIGS, make_federation, make_site, small_plan, small_settings

SIZES = {
    "train.json (the sample)": ["train.json"],
    "paper.yaml": ["train.json", "paper.yaml"],
    "small_data.yaml": ["train.json", "small_data.yaml"],
    "tiny.yaml (tests)": ["train.json", "tiny.yaml"],
}


def quantized_bytes(weights: dict[str, torch.Tensor], bits: int) -> int:
    """Bytes of bitsandbytes' block-wise formats: a scale per block, a code book per tensor, both float32."""
    block, codes = {8: (4096, 256), 4: (64, 16)}[bits]
    counts = [value.numel() for value in weights.values()]
    return sum(-(-count * bits // 8) + 4 * (-(-count // block) + codes) for count in counts)


def bytes_table() -> list[str]:
    """Bytes that one site receives and sends in a round; both ways are the same."""
    rows = [
        "| config | parameters | one way, float32 | 16 bits | 8 bits | 4 bits | share of `*norm*` |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, files in SIZES.items():
        parser = parser_of(ConfigParser.load_config_files([CONFIGS / file for file in files]))
        with torch.device("meta"):
            weights = parser.get_parsed_content("network_def").state_dict()
        sizes = [payload_bytes(weights, dtype) for dtype in (torch.float32, torch.bfloat16)]
        sizes += [quantized_bytes(weights, bits) for bits in (8, 4)]
        count = sum(value.numel() for value in weights.values())
        local = sum(weights[each].numel() for each in local_names(weights, ["*norm*"]))
        rows.append(
            f"| `{name}` | {count:,} | {' | '.join(f'{size / 1e6:,.2f} MB' for size in sizes)} | {local / count:.2%} |"
        )
    return rows


def seconds_table(counts: list[int], rounds: int = 3, steps: int = 2) -> list[str]:
    """CPU seconds of a round after the first, which also reads the scans; all of it, and what is not training."""
    rows = ["| sites | CPU s per round | of it outside training | per site |", "|---|---|---|---|"]
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            datalist, _ = make_federation(folder, 0)
            sites = {f"site-{k}": make_site(folder / f"site-{k}", 1, k) for k in range(count)}
            trained, ends = [0.0], []
            train = Site._train

            def timed(self, broadcast, train=train, trained=trained, ends=ends):
                if self.side == "source":
                    ends.append((time.process_time(), trained[0]))
                started = time.process_time()
                try:
                    return train(self, broadcast)
                finally:
                    trained[0] += time.process_time() - started

            Site._train = timed
            try:
                plan = small_plan(rounds=rounds, server_steps=steps, client_steps=steps)
                simulate(plan, datalist, sites, folder / "m", folder / "o", settings=small_settings())
            finally:
                Site._train = train
            ends.append((time.process_time(), trained[0]))
            total = (ends[-1][0] - ends[1][0]) / (rounds - 1)
            outside = total - (ends[-1][1] - ends[1][1]) / (rounds - 1)
            lines = [json.loads(line) for line in (folder / "o" / "rounds.jsonl").read_text().splitlines()]
            assert all(len(line["sites"]) == count for line in lines)
            rows.append(f"| {count} | {total:.2f} | {outside:.3f} | {(total / (count + 1)):.3f} |")
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    given = [int(each) for each in sys.argv[1:]] or [2, 4, 8, 16]
    sys.stdout.write("\n".join([*bytes_table(), "", *seconds_table(given)]) + "\n")
