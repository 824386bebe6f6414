"""Runs a study's tasks one after the other in this process, on small made-up domains."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from molora_studies.framework import actions
from molora_studies.framework.action_ids import load_action
from molora_studies.framework.contract import Done, Task, TaskContext

from molora_fed.plugins import hookimpl, load_plugins
from molora_fed.training.builtin_base import BuiltinBaseConfig
from molora_fed.types import Document

DOMAINS = ("birds", "tools")
_COMMON = ("the", "of", "and", "with", "small", "old")
_WORDS = {
    "birds": ("wing", "feather", "nest", "song", "beak", "flock", "egg", *_COMMON),
    "tools": ("hammer", "blade", "bolt", "wrench", "drill", "nail", "grip", *_COMMON),
}

Run = Callable[[Task], Done]


def read_domain(domain: str) -> list[Document]:
    """Sixty documents in which a word decides most of the next one.

    A number now and then keeps their 8-grams apart: text that others have read is in no figure.
    """
    random, words = np.random.default_rng(len(domain)), _WORDS[domain]
    follows = random.integers(0, len(words), (len(words), 2))
    documents = []
    for number in range(60):
        place, text = int(random.integers(len(words))), []
        for position in range(120):
            text.append(words[place] if position % 6 else str(random.integers(10_000)))
            likely = random.random() < 0.85
            place = int(random.choice(follows[place]) if likely else random.integers(len(words)))
        documents.append(Document(f"{domain}-{number}", " ".join(text)))
    return documents


@hookimpl
def register_domains(register):
    """Register the made-up domains."""
    for domain in DOMAINS:
        register(
            domain,
            lambda domain=domain: read_domain(domain),
            summary="Made-up text",
            source="own definition",
        )


@contextmanager
def running(root: Path) -> Iterator[Run]:
    """A function that runs a task after what it needs; every task once."""
    finished: dict[str, Done] = {}
    plugins = load_plugins(extra=[("test", sys.modules[__name__])])

    def run_task(task: Task) -> Done:
        if task.key not in finished:
            needs = tuple(run_task(other) for other in task.needs)
            folder = root / task.key
            folder.mkdir()
            context = TaskContext(folder, needs, 1, root / "cache")
            settings = json.loads(json.dumps(task.settings))
            result = load_action(task.action)(settings, context)
            finished[task.key] = Done(task, folder, json.loads(json.dumps(result)))
        return finished[task.key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actions, "get_plugins", lambda: plugins)
        # Two threads of a busy machine wait for each other longer than they work.
        patch.setattr(actions, "BuiltinBaseConfig", partial(BuiltinBaseConfig, threads=1))
        yield run_task
