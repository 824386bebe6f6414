"""Real processes that start fast: forked from one that has already loaded torch and the models.

Only where the process is what a test needs (it is killed, its disk is full, it is another one), not
where the loading is what is tested.
"""

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "molora_fed.adapters.kinds",
    "molora_fed.models.base",
    "molora_fed.contributions.receive",
    "molora_fed.population.generations",
    "molora_fed.training.specialists",
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Its exit code; the negative number of the signal that ended it.
        out: Its standard output.
        err: Its standard error.
    """

    code: int
    out: str
    err: str


def _redirect(folder: Path, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    target(*arguments)


def run_forked(
    folder: Path, target: Callable[..., Any], *arguments: Any, timeout: float = 120.0
) -> Ended:
    """Call a function in a process of its own, and wait for its end.

    Args:
        folder: Keeps what it prints, files `out` and `err`; made if absent.
        target: A function of a module.
        arguments: Its arguments; they are pickled.
        timeout: Seconds.

    Raises:
        AssertionError: If it takes longer; it is killed, and not taken for one that was killed as
            a test wants it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = _context.Process(target=_redirect, args=(folder, target, arguments))
    process.start()
    process.join(timeout)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
        raise AssertionError(f"{target.__name__} did not end within {timeout} s")
    return Ended(code, *((folder / name).read_text() for name in ("out", "err")))
