"""benchmarks/gpu.py from end to end in tiny shapes, in Triton's interpreter: every row is there and none an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_part_runs(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--smoke", "--out", tmp_path]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, "--parts", "copy,attention,model"], check=True, env=environment, capture_output=True)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["copy_bytes_per_s"] > 0
    ours = [f"kvfold {name}" for name in ("dense", "8", "4", "3", "2")]
    assert [row["what"] for row in result["attention"]] == [*ours, "sdpa flash", "flex"]
    assert all(row["median_s"] > 0 for row in result["attention"])
    assert all(row["tokens_per_s"] > 0 for row in result["model"])
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert sum(line.startswith("| 300 | 1 |") for line in lines) == 7
    assert sum(line.startswith("| 200 |") for line in lines) == 5
