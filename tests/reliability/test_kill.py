"""`kill -9` at random times and at counted places; scripts/kill_test.py does it, here with few kills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kill_test.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_killed_run_ends_with_the_same_bytes() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "2", "--renames", "12", "--short"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for command in ("quantize", "compensate"):
        assert f"{command}, 2 kills at random times: the same bytes and figures" in done.stdout
        assert f"{command}, 12 kills after a rename: the same bytes and figures" in done.stdout
