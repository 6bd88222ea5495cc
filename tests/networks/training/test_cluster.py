"""The Slurm script of docs/cluster.md, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# A training that is stopped as ours is: it writes run.json, waits for a signal, says how it ended, and exits with 0.
SRUN = """#!/bin/bash
echo "$*" > "$TRIED/srun.txt"
echo $$ > "$TRIED/pid"
mkdir -p "$TRIED/isic"
[ "$ENDS" = failed ] && exit 1
if [ "$ENDS" = stopped ]; then
    trap 'echo "{\\"how_it_ended\\": \\"stopped by SIGUSR1\\"}" > "$TRIED/isic/run.json"; exit 0' USR1
    touch "$TRIED/ready"
    while true; do sleep 0.02; done
fi
echo '{"how_it_ended": "completed"}' > "$TRIED/isic/run.json"
"""
SCONTROL = """#!/bin/bash
echo "$*" > "$TRIED/scontrol.txt"
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    page = (ROOT / "docs/cluster.md").read_text()
    found = re.search(r"```\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    assert found is not None
    path = tmp_path / "job.sh"
    path.write_text(found[1].replace("run=/scratch/isic", f"run={tmp_path}/isic"))
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("ends", "code", "requeued"), [("stopped", 0, "requeue 77\n"), ("completed", 0, None), ("failed", 1, None)]
)
def test_a_job_that_is_stopped_is_queued_again(
    ends: str, code: int, requeued: str | None, script: Path, tmp_path: Path
) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    environment |= {"TRIED": str(tmp_path), "ENDS": ends}
    with subprocess.Popen(["bash", str(script)], env=environment) as job:
        if ends == "stopped":
            end = time.monotonic() + 20
            while not (tmp_path / "ready").exists() and time.monotonic() < end:
                time.sleep(0.01)
            # --signal without B: reaches what srun has started, not the script
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
        assert job.wait(30) == code
    words = (tmp_path / "srun.txt").read_text()
    assert words.startswith("python -m monai.bundle run training --config_file bundles/vmunet_isic/configs/train.yaml")
    assert f"--ckpt_dir {tmp_path}/isic" in words
    assert words.endswith("--resume auto\n")
    assert ((tmp_path / "scontrol.txt").read_text() if (tmp_path / "scontrol.txt").exists() else None) == requeued


def test_the_script_asks_for_what_the_page_says() -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    options = " ".join(re.findall(r"^#SBATCH (.*)$", page, re.MULTILINE)).split()
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append"} <= set(options)
