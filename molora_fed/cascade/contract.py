"""What a cascade is made of, and the contracts of models, extractors, judges, policies, families.

A task is put to a cheap probe N times; an extractor turns each sample into a canonical answer, and
their disagreement sigma decides how many members are asked beside it.
"""

import abc
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from molora_fed.errors import CascadeError, ConfigError
from molora_fed.guard import guarded, refuse
from molora_fed.plugins import Entry, Plugins
from molora_fed.storage.options import Configurable, PluginOptions
from molora_fed.storage.settings import open_options
from molora_fed.storage.untrusted import writable

__all__ = [
    "MODES",
    "TASK_SPLITS",
    "Candidate",
    "CascadeModel",
    "CascadeTask",
    "CountsScoring",
    "EscalationPolicy",
    "Extractor",
    "Judge",
    "JudgeFunction",
    "JudgeOptions",
    "JudgeRequest",
    "Mode",
    "PolicyOptions",
    "ProbeEvidence",
    "Request",
    "Sample",
    "Scorer",
    "TaskFamily",
    "TaskSplit",
    "Verdict",
    "compute_sigma",
    "draw_tasks",
    "open_extractor",
    "open_judge",
    "parse_levels",
]


Mode = Literal["single_agent", "arena_lite", "full_arena"]
"""How many members are asked: none, two, all three."""

MODES: tuple[Mode, ...] = ("single_agent", "arena_lite", "full_arena")


@dataclass(frozen=True)
class CascadeTask:
    """One task to answer.

    Attributes:
        id: Unique in a run; seeds follow from it.
        family: Sort of task, e.g. "arithmetic".
        prompt: What a model reads.
        extractor: Registered extractor that makes its answers canonical.
        answer: Canonical right answer; None if nobody knows it.
        level: Difficulty, 1 is the easiest.
        details: What the extractor needs beside, JSON values, e.g. choices or unit tests.
    """

    id: str
    family: str
    prompt: str
    extractor: str
    answer: str | None = None
    level: int = 1
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One sample that is asked of a model.

    Attributes:
        prompt: Text to continue.
        seed: Of sampling, not negative.
        max_new_tokens: Tokens to add at most.
        temperature: 0 takes the likeliest token.
        stop: The sample ends before the first of these texts.
    """

    prompt: str
    seed: int
    max_new_tokens: int = 64
    temperature: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """What a model said, and what it cost.

    Attributes:
        text: Its continuation; empty where it failed.
        prompt_tokens: Tokens read.
        new_tokens: Tokens written.
        flops: Floating-point operations, reading included; 0 where nobody knows.
        price: In the currency of the cost table; 0 where it is free.
        seconds: Time taken; never part of what is compared or hashed as a decision.
        failure: What went wrong, one line; None if nothing did.
        attempts: Times it was tried.
    """

    text: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    flops: float = 0.0
    price: float = 0.0
    seconds: float = 0.0
    failure: str | None = None
    attempts: int = 1


class CascadeModel(Protocol):
    """A model behind the one interface: local, or an endpoint.

    Attributes:
        name: Unique in a cascade.
        fingerprint: Of its weights, or of endpoint and model name; part of every seed.
        is_local: Whether the same request gives the same text at any time, so that a run can be
            replayed from the model.
    """

    name: str
    fingerprint: str
    is_local: bool

    def sample(self, requests: Sequence[Request]) -> Sequence[Sample]:
        """Answer requests that have one prompt, in order; a failure is a sample, not an error."""


@runtime_checkable
class Scorer(Protocol):
    """A model that can say how likely an answer is."""

    def score(self, prompt: str, answers: Sequence[str]) -> Sequence[float]:
        """Log-likelihood of each answer after the prompt, summed over its tokens, nats."""


@runtime_checkable
class CountsScoring(Protocol):
    """A scorer that can say what scoring costs."""

    def count_scoring(self, prompt: str, answers: Sequence[str]) -> Sample:
        """Tokens and operations of scoring these answers, as a sample without text."""


Extractor = Callable[[CascadeTask, str], str | None]
"""Canonical answer in a text, or None if it has none. Never raises on any text."""


@dataclass(frozen=True)
class ProbeEvidence:
    """What an escalation policy may look at.

    Attributes:
        task: Without its right answer.
        answers: Canonical answer of each probe sample; None where it has none.
        texts: The samples.
        sigma: (distinct - 1) / (N - 1).
    """

    task: CascadeTask
    answers: tuple[str | None, ...]
    texts: tuple[str, ...]
    sigma: float


class PolicyOptions(PluginOptions):
    """Base of every escalation policy's options: unknown keys are refused."""


class EscalationPolicy(abc.ABC):
    """Decides the mode of a task from its probe samples; deterministic.

    Attributes:
        Options: Pydantic model of its options.
        entry: Who registered it; None of one that was made by hand.
        label: Name of a run under this policy in tables; empty takes the registered name.
        label_with_retrieval: The same where examples are retrieved.
    """

    Options: ClassVar[type[PolicyOptions]] = PolicyOptions
    entry: Entry | None = None
    label: ClassVar[str] = ""
    label_with_retrieval: ClassVar[str] = ""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abc.abstractmethod
    def choose(self, evidence: ProbeEvidence) -> Mode:
        """The mode of a task."""

    def choose_mode(self, evidence: ProbeEvidence) -> Mode:
        """What `choose` gives, under the guard that names the plugin if it fails.

        Raises:
            PluginError: If it fails, or gives no mode.
        """
        if self.entry is None:
            return self.choose(evidence)
        with guarded(self.entry, "choosing"):
            mode = self.choose(evidence)
        if mode not in MODES:
            raise refuse(self.entry, "choosing", expected=f"one of {', '.join(MODES)}", got=mode)
        return mode


@dataclass(frozen=True)
class Candidate:
    """An answer a judge may choose.

    Attributes:
        model: Name of the model it is from.
        answer: Canonical answer; None if it gave none.
        text: What the model said.
    """

    model: str
    answer: str | None
    text: str


@dataclass(frozen=True, eq=False)
class JudgeRequest:
    """What a judge is given.

    Attributes:
        task: Without its right answer.
        candidates: At least one, in the order of the members.
        models: All models of the cascade by name, for judges that ask.
        seed: Of whatever the judge draws.
        options: `[cascade.judge_options]`, JSON values, for judges that are plain functions; a
            `Judge` finds them checked in its own `options`.
    """

    task: CascadeTask
    candidates: tuple[Candidate, ...]
    models: Mapping[str, CascadeModel]
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a judge decided.

    Attributes:
        chosen: Place of the candidate that wins.
        reason: One line for people and for the trace.
        samples: What it asked of models, by model name, in order, for people. Costs are counted
            by the cascade itself, from every call to a model it handed over.
    """

    chosen: int
    reason: str
    samples: tuple[tuple[str, Sample], ...] = ()


class JudgeOptions(PluginOptions):
    """Base of every judge's options: unknown keys are refused."""


class Judge(Configurable[JudgeOptions], abc.ABC):
    """A judge with options, registered as a class; its instance is called like a function.

    Attributes:
        Options: Pydantic model of its options.
    """

    Options: ClassVar[type[JudgeOptions]] = JudgeOptions
    options: Any

    @abc.abstractmethod
    def __call__(self, request: JudgeRequest) -> Verdict:
        """Choose a candidate; the same request and the same answers of models, the same verdict."""


JudgeFunction = Callable[[JudgeRequest], Verdict]
"""What chooses among candidates: a plain function without options, or an instance of `Judge`."""


def open_extractor(name: str, plugins: Plugins) -> Extractor:
    """A registered extractor under the guard.

    Args:
        name: Registered name.
        plugins: Where it is registered.

    Raises:
        UnknownNameError: If nobody registers it.
        PluginError: From the extractor: if it fails, or gives neither text nor None.
    """
    entry, place = plugins.extractors.entry(name), "extracting"
    target = plugins.extractors.resolve(name)

    def extract(task: CascadeTask, text: str) -> str | None:
        with guarded(entry, place):
            answer = target(task, text)
        if answer is not None and not isinstance(answer, str):
            raise refuse(entry, place, expected="text or None", got=type(answer).__name__)
        return answer if answer is None else writable(answer)

    return extract


def open_judge(
    name: str, plugins: Plugins, options: Mapping[str, Any] | None = None
) -> JudgeFunction:
    """A registered judge under the guard.

    Args:
        name: Registered name.
        plugins: Where it is registered.
        options: Those of a class; a plain function finds them in each request instead.

    Raises:
        UnknownNameError: If nobody registers it.
        CascadeError: If it refuses its options; all that are wrong are named.
        PluginError: From the judge: if it fails, or gives no verdict on one of the candidates.
    """
    entry, place = plugins.judges.entry(name), "judging"
    target = plugins.judges.resolve(name)
    if inspect.isclass(target):
        fix = "Correct [cascade.judge_options]."
        made, settings = open_options(plugins.judges, name, options, error=CascadeError, fix=fix)
        with guarded(entry, "construction"):
            target = made(settings)

    def judge(request: JudgeRequest) -> Verdict:
        with guarded(entry, place):
            verdict = target(request)
        count = len(request.candidates)
        if not isinstance(verdict, Verdict) or not isinstance(verdict.reason, str):
            raise refuse(entry, place, expected="a Verdict", got=type(verdict).__name__)
        if type(verdict.chosen) is not int or not 0 <= verdict.chosen < count:
            raise refuse(
                entry, place, expected=f"a candidate from 0 to {count - 1}", got=verdict.chosen
            )
        return verdict

    return judge


def compute_sigma(answers: Sequence[str | None]) -> float:
    """Disagreement of N samples: (distinct - 1) / (N - 1), in [0, 1].

    A sample without an answer agrees with nothing, itself included: it counts as an answer of its
    own. One sample alone cannot disagree, 0; but one without an answer is 1.

    Args:
        answers: Canonical answers, at least one.

    Raises:
        ValueError: If there are none.

    Source: arXiv 2602.21231, section on routing by self-consistency variance.
    """
    if not answers:
        raise ValueError("expected at least one answer, got none")
    missing = sum(answer is None for answer in answers)
    if missing == len(answers):
        return 1.0
    if len(answers) == 1:
        return 0.0
    distinct = len({answer for answer in answers if answer is not None}) + missing
    return (distinct - 1) / (len(answers) - 1)


TaskSplit = Literal["train", "validation", "calibration", "test"]
"""What tasks are for: models train on the first, recipes are chosen on the second, escalation
policies are fitted on the third, results are reported on the last."""

TASK_SPLITS: tuple[TaskSplit, ...] = get_args(TaskSplit)


class TaskFamily(Protocol):
    """Generates the tasks of a family, registered by `register_task_families`.

    The same arguments give the same tasks. A prompt belongs to one split, whatever seed and level
    it is drawn with: no prompt that anybody is tested on occurs in training. Levels differ in
    difficulty, 1 is the easiest.
    """

    def __call__(
        self, level: int, count: int, seed: int, split: TaskSplit = "test"
    ) -> Sequence[CascadeTask]:
        """Draw tasks with their answers; prompts differ, those of the train split may repeat.

        Args:
            level: Difficulty, at least 1.
            count: Tasks wanted.
            seed: Seed.
            split: What they are for.

        Raises:
            ConfigError: If the family has no such level, or too few different prompts at it.
        """


def parse_levels(text: str) -> tuple[int, ...]:
    """Levels from text, e.g. "1,2".

    Raises:
        ConfigError: If it says anything else than whole numbers from 1.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ConfigError(
            f"Cannot read levels '{text}': expected whole numbers from 1, separated by commas, "
            "got something else. Write e.g. 1,2."
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def draw_tasks(
    families: Sequence[str],
    levels: Sequence[int],
    *,
    count: int,
    seed: int,
    split: str,
    plugins: Plugins,
) -> list[CascadeTask]:
    """Tasks of several families and levels, by family, then by level.

    Args:
        families: Registered names.
        levels: Difficulties.
        count: Tasks of each family and level.
        seed: Seed.
        split: What they are for.
        plugins: Where families are looked up.

    Raises:
        ConfigError: If there is no such split, or a family cannot draw that many.
        UnknownNameError: If no plugin registers a family.
    """
    if split not in TASK_SPLITS:
        raise ConfigError(
            f"Cannot draw tasks: expected one of the splits {', '.join(TASK_SPLITS)}, got "
            f"'{split}'. Choose one of these."
        )
    drawn: list[CascadeTask] = []
    for name in families:
        entry, place = plugins.task_families.entry(name), "drawing tasks"
        family = plugins.task_families.resolve(name)
        for level in levels:
            with guarded(entry, place, passing=(ConfigError,)):
                tasks = list(family(level, count, seed, split))
            strange = [type(task).__name__ for task in tasks if not isinstance(task, CascadeTask)]
            if strange or len(tasks) != count:
                got = f"{len(tasks)}, of {', '.join(sorted(set(strange))) or 'CascadeTask'}"
                raise refuse(entry, place, expected=f"{count} CascadeTasks", got=got)
            drawn.extend(tasks)
    return drawn
