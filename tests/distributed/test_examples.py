"""The examples for torchrun, on two ranks."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import warm

from tests.distributed.pool import HAS_FSDP2_ON_CPU

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["torchrun_ddp", "torchrun_fsdp2"])
@pytest.mark.parametrize("ranks", [2])
@pytest.mark.timeout(120)
def test_example(name, ranks):
    if name.endswith("fsdp2") and not HAS_FSDP2_ON_CPU:
        pytest.skip("this torch's fully_shard needs an accelerator")
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 80
    run = subprocess.run(
        [
            *warm.python(),  # torchrun itself, which starts each rank in a Python of its own
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            script,
            "--steps=8",
        ],
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stderr
    losses = [
        float(number) for number in re.findall(r"^loss (\S+)  StepReport\(step", run.stdout, re.MULTILINE)
    ]
    assert len(losses) == 8  # one rank prints
    assert losses[-1] < losses[0]
    assert "Warning" not in run.stderr
