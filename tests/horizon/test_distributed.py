"""``is_sync_quantize`` in processes of its own (``ranks.py``), on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pyobserver
from pyobserver.horizon import MinMaxObserver


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_every_forward_takes_in_all_ranks() -> None:
    root = Path(pyobserver.__file__).parent.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(Path(__file__).with_name("ranks.py"))),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_sync_without_a_group_does_nothing() -> None:
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    MinMaxObserver().sync_minmax(low, high)
    assert (low, high) == (-1.0, 1.0)
