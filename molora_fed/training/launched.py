"""One of the processes that a contributor's launcher started to train one specialist together.

`accelerate launch … -m molora_fed.training.launched JOB`; `molora_fed.training.launching` writes
JOB and runs this. Every process takes its share of each step's batch; the first one writes. Killed
in any of them and started again, the training ends with the same bytes.
"""

import contextlib
import faulthandler
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from accelerate import PartialState
from safetensors.numpy import load

from molora_fed.charter import AdapterRules
from molora_fed.errors import BaseCheckpointError, MoloraError, TrainingError
from molora_fed.models.base import load_base
from molora_fed.models.runtime import Placement
from molora_fed.plugins import get_plugins
from molora_fed.storage.files import write_json
from molora_fed.storage.untrusted import clean
from molora_fed.training.adapter_job import AdapterJob, finish_job, train_job
from molora_fed.training.language_model import TrainConfig
from molora_fed.training.launching import (
    ARRAYS,
    ARRAYS_FILE,
    JOB_FILE,
    PROCESS_LOG,
    PROGRESS_FILE,
)
from molora_fed.training.team import Team

__all__ = ["main"]

_WATCH_SECONDS = 0.5
_MAX_MESSAGE = 2_000
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def run(place: Path) -> None:
    """Take this process's part in a job.

    Args:
        place: Folder of the job's files.

    Raises:
        MoloraError: Whatever training refuses.
    """
    described = json.loads((place / JOB_FILE).read_text(encoding="utf-8"))
    _watch(described)
    team = _join(described["device"])
    job, plugins = _read_job(described, place, team), get_plugins()
    folder = Path(described["folder"])
    with (place / PROGRESS_FILE).open("a", encoding="utf-8") as file:

        def tell(done: int, total: int, **fields: float | str) -> None:
            file.write(json.dumps({"done": done, "total": total, **fields}) + "\n")
            file.flush()

        model, result = train_job(job, folder, plugins, tell if team.is_first else None)
    if team.size > 1:
        team.meet()  # nobody takes its connections down while another one still reads from them
        torch.distributed.destroy_process_group()
    if team.is_first:
        finish_job(job, model, result, folder, plugins)


def _join(device: str) -> Team:
    """Meet the other processes.

    Raises:
        TrainingError: If the launcher meant to start more than one, and started this one alone.
    """
    if "MASTER_ADDR" in os.environ and not any(name in os.environ for name in _SIZES):
        raise TrainingError(
            "Cannot train in several processes: expected a launcher that starts them, got one "
            "process; `accelerate launch --cpu` starts more only through MPI. Use `accelerate "
            "launch --multi_gpu`, which starts them on CPUs, too, with --device cpu."
        )
    state = PartialState(cpu=device == "cpu")
    return Team(state.process_index, state.num_processes, state.device)


def _read_job(described: Mapping[str, Any], place: Path, team: Team) -> AdapterJob:
    """The job with the base loaded where this process computes.

    Raises:
        BaseCheckpointError: If the base is another by now.
    """
    base = load_base(
        Path(described["base"]), Placement(team.device, getattr(torch, described["dtype"]))
    )
    if base.weights != described["base_weights"]:
        raise BaseCheckpointError(
            f"Cannot train on base '{base.folder}': expected weights "
            f"{described['base_weights'][:12]}, got {base.weights[:12]}. Leave it as it is until "
            "the training has ended."
        )
    arrays = load((place / ARRAYS_FILE).read_bytes())
    config = TrainConfig(**described["config"])
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", team.size))
    return AdapterJob(
        base=base,
        domain=described["domain"],
        kind=described["kind"],
        rank=described["rank"],
        rules=AdapterRules.model_validate(described["rules"]),
        # The threads asked for are those of a machine, which its processes share.
        config=TrainConfig(
            **{**described["config"], "threads": max(1, config.threads // neighbours)}
        ),
        options=described["options"],
        domain_options=described["domain_options"],
        team=team,
        **{name: arrays.get(name) for name in ARRAYS},
    )


def _watch(described: Mapping[str, Any]) -> None:
    """End this process when the one that launched it, or the one that asked for it, has ended."""
    parent = os.getppid()

    def is_asked_for() -> bool:
        if platform.node() != described["host"]:
            return True  # it cannot be seen from here
        try:
            return psutil.Process(described["process"]).create_time() == described["started"]
        except psutil.Error:
            return False

    watches_asker = is_asked_for()

    def watch() -> None:
        while os.getppid() == parent and (not watches_asker or is_asked_for()):
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _keep_words(place: Path, rank: str) -> None:
    """Send what this process says on standard error to a file of its own, faults included."""
    with (place / PROCESS_LOG.format(rank)).open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())  # C++ writes there without asking Python
    faulthandler.enable()


def _leave(code: int) -> NoReturn:
    """End this process without finalising the interpreter; what has to last is on the disk.

    A thread of gloo lets go of the tensors of the last sum when it gets to it, on a busy machine
    long after the sum is there, and it may outlive `destroy_process_group`. Letting go takes the
    interpreter's lock. Python before 3.14 ends a thread that asks for it while the interpreter is
    finalised, by unwinding its stack, which holds destructors of C++ that must not be unwound: the
    process is aborted ("terminate called without an active exception") after all its work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if torch.distributed.is_mpi_available():
        raise SystemExit(code)  # MPI counts a process that ends without finalising it as failed
    os._exit(code)


def main(arguments: list[str]) -> NoReturn:
    """Take part in the job of a file, and end the process; an error is left beside the file.

    Raises:
        SystemExit: Where torch was built with MPI, with the exit code of what was refused.
    """
    place = Path(arguments[0]).parent
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    _keep_words(place, rank)
    code = 0
    try:
        run(place)
    except Exception as error:
        traceback.print_exc()
        found = {"type": type(error).__name__, "message": clean(error, _MAX_MESSAGE)}
        write_json(place / f"error-{rank}.json", found)
        code = error.exit_code if isinstance(error, MoloraError) else 1
    _leave(code)


if __name__ == "__main__":
    main(sys.argv[1:])
