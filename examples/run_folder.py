"""The folder of one training run: its options, and the checkpoint to continue from."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def same_run(folder: Path, settings: Mapping[str, Any], write: bool) -> None:
    """Compare `options.json` with the settings of this run; if the file does not exist and `write` is set, write it.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    path = folder / "options.json"
    if path.is_file():
        before = json.loads(path.read_text())
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if names:
            differ = "; ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in names)
            raise ValueError(
                f"{folder} holds another run: {differ}. Give the same options to go on with it, and another folder for "
                "a run of its own"
            )
    elif write:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n")


def last_checkpoint(folder: Path, processes: int) -> Path | None:
    """The newest checkpoint of transformers' Trainer that was written to its end.

    An incomplete one is skipped: the first process writes `trainer_state.json` last, and each other process the state
    of its random numbers.
    """
    states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        if all(zipfile.is_zipfile(checkpoint / state) for state in states):
            return checkpoint
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
