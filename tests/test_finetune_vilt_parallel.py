"""The example that fine-tunes ViLT on two processes, killed on the way: it ends as if nothing had happened."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples import finetune_vilt
from examples.run_folder import last_checkpoint
from tests.helpers.finetuning import column, command, make_tiny, same, weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def torchrun(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Two processes on CPU, started as a person would; none is left behind."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        options: dict[str, Any] = {"cwd": ROOT, "env": env, "stdout": out, "stderr": out, "start_new_session": True}
        process = subprocess.Popen([*launch, "-m", "examples.finetune_vilt", *arguments], **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.wait(timeout=900) == 0, log.read_text()


def test_two_processes_killed_and_started_again(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "tiny")
    changes = ["--loss", "cacr", "--weight", "30", "--steps", "30", "--save-every", "5", "--accumulate"]
    names = ("whole", "killed", "again", "one")
    folders, logs = ({name: tmp_path / f"{name}{kind}" for name in names} for kind in ("", ".log"))
    whole, again = (command(tiny, folders[name], *changes, "1") for name in ("whole", "killed"))
    with torchrun(whole, logs["whole"]) as uninterrupted:
        with torchrun(again, logs["killed"]) as killed:
            while last_checkpoint(folders["killed"], processes=2) is None:
                assert killed.poll() is None, logs["killed"].read_text()
                time.sleep(0.01)
            killed.send_signal(signal.SIGTERM)
            assert killed.wait(timeout=300) != 0
        assert not (folders["killed"] / "metrics.json").exists()
        with torchrun(again, logs["again"]) as resumed:
            one = finetune_vilt.main(command(tiny, folders["one"], *changes, "2"))
            finish(resumed, logs["again"])
        finish(uninterrupted, logs["whole"])

    expected, found = (json.loads((folders[name] / "metrics.json").read_text()) for name in ("whole", "killed"))
    assert expected["options"]["processes"] == 2
    assert [row["step"] for row in expected["training"]] == list(range(1, 31))
    assert re.search(r"Continuing from .*checkpoint-\d+\n", logs["again"].read_text())
    assert found == expected
    assert same(weights(folders["killed"], 30), weights(folders["whole"], 30))
    # And like one process that takes as many queries a step.
    for name in ("loss", "learning_rate", "grad_norm"):
        assert column((expected, tmp_path), name) == pytest.approx(column((one, tmp_path), name), rel=1e-3)
    assert expected["winoground"][0] == one["winoground"][0]
