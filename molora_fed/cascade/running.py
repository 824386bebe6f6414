"""Running a cascade over tasks: ask the probe, escalate, decide, record; then the next task."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from molora_fed.cascade.asking import compute_seed
from molora_fed.cascade.config import DEFAULT_TEMPLATE, PromptTemplate
from molora_fed.cascade.contract import (
    CascadeModel,
    CascadeTask,
    EscalationPolicy,
    Extractor,
    JudgeFunction,
    Request,
    Sample,
)
from molora_fed.cascade.escalation import Lineup, Rules, assess_probe, decide, list_asked
from molora_fed.cascade.records import (
    Asked,
    RecordedDecision,
    build_record,
)
from molora_fed.cascade.retrieval import Retrieval
from molora_fed.errors import CascadeError
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.untrusted import clean, writable

__all__ = [
    "Cascade",
    "CascadeSettings",
    "RunTotals",
    "add_to_totals",
    "answer_task",
    "ask",
    "build_rules",
    "describe_totals",
]

MAX_FAILURE_CHARACTERS = 300


@dataclass(frozen=True)
class CascadeSettings:
    """How models are asked.

    Attributes:
        samples: N, samples of the probe.
        temperature: Of the probe; at 0 all samples are alike and nothing escalates.
        member_temperature: Of members.
        max_new_tokens: Of every sample.
        stop: Texts that end a sample.
        seed: Of the run.
        template: How a task becomes a prompt.
    """

    samples: int = 3
    temperature: float = 0.7
    member_temperature: float = 0.0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    seed: int = 0
    template: PromptTemplate = DEFAULT_TEMPLATE


@dataclass(frozen=True, eq=False)
class Cascade:
    """Everything that answers a task.

    Attributes:
        lineup: Who takes part.
        models: Models by name: probe, members, and what the judge may ask beside.
        policy: Chooses the mode.
        policy_name: The name it is registered under.
        judge: Chooses among members' answers.
        judge_name: The name it is registered under.
        extractors: By registered name.
        settings: How models are asked.
        judge_options: What the judge is told beside.
        environment: Versions and hardware; their fingerprint is part of every seed.
        retrieval: Examples before a prompt; none by default.
    """

    lineup: Lineup
    models: Mapping[str, CascadeModel]
    policy: EscalationPolicy
    policy_name: str
    judge: JudgeFunction
    judge_name: str
    extractors: Mapping[str, Extractor]
    settings: CascadeSettings = CascadeSettings()
    judge_options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    retrieval: Retrieval | None = None

    def __post_init__(self) -> None:
        """Refuse a line-up that is empty, repeats a name or names no model.

        Raises:
            CascadeError: Naming what is wrong.
        """
        names = [*([self.lineup.probe] if self.lineup.probe else []), *self.lineup.members]
        unknown = [name for name in names if name not in self.models]
        if not names or unknown or len(set(names)) < len(names):
            raise CascadeError(
                "Cannot use cascade: expected a probe or members, each named once and each a "
                f"model, got {', '.join(unknown or names) or 'nobody'}. Correct probe and members."
            )

    @cached_property
    def environment_hash(self) -> str:
        """SHA-256 of the environment, lower-case hex; empty where none is known."""
        return hash_bytes(canonical_json(dict(self.environment))) if self.environment else ""

    def rules(self, task: CascadeTask) -> Rules:
        """What decides this task; each text is extracted once.

        Args:
            task: The task; its extractor counts.

        Raises:
            CascadeError: If its extractor is not among the cascade's.
        """
        if task.extractor not in self.extractors:
            raise CascadeError(
                f"Cannot answer task '{task.id}': expected one of the extractors "
                f"{', '.join(sorted(self.extractors))}, got '{task.extractor}'. Correct the task."
            )
        return build_rules(
            self.extractors[task.extractor], self.policy, self.judge, self.judge_options
        )

    def build_requests(self, name: str, role: str, task_id: str, prompt: str) -> list[Request]:
        """What a model is asked: N samples of the probe, one of a member.

        Args:
            name: Of the model.
            role: "probe" or "member".
            task_id: The task.
            prompt: What the model reads.
        """
        settings, is_probe = self.settings, role == "probe"
        return [
            Request(
                prompt=prompt,
                seed=self.compute_seed(task_id, self.models[name].fingerprint, number),
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature if is_probe else settings.member_temperature,
                stop=settings.stop,
            )
            for number in range(settings.samples if is_probe else 1)
        ]

    def compute_seed(self, task_id: str, fingerprint: str, number: int) -> int:
        """The seed of a sample; see `molora_fed.cascade.asking`.

        Args:
            task_id: The task.
            fingerprint: Of the model.
            number: Which sample of this model on this task.
        """
        return compute_seed(
            task_id,
            self.settings.template.hash,
            fingerprint,
            number,
            environment=self.environment_hash,
            run_seed=self.settings.seed,
        )


def build_rules(
    extract: Extractor,
    policy: EscalationPolicy,
    judge: JudgeFunction,
    judge_options: Mapping[str, Any] | None = None,
) -> Rules:
    """Rules of one task, whose extractor runs once for each distinct text.

    Args:
        extract: The extractor.
        policy: The policy.
        judge: The judge.
        judge_options: What the judge is told beside.
    """
    known: dict[str, str | None] = {}

    def extract_once(task: CascadeTask, text: str) -> str | None:
        if text not in known:
            known[text] = extract(task, text)
        return known[text]

    return Rules(extract_once, policy, judge, judge_options or {})


@dataclass(frozen=True)
class RunTotals:
    """How far a run is.

    Attributes:
        tasks: Tasks decided.
        known: Those whose right answer is known.
        correct: Those answered rightly.
        failed: Those without an answer.
        flops: Operations.
        price: In the currency of the cost table.
    """

    tasks: int = 0
    known: int = 0
    correct: int = 0
    failed: int = 0
    flops: float = 0.0
    price: float = 0.0


def add_to_totals(totals: RunTotals, body: Mapping[str, Any]) -> RunTotals:
    """Totals with one more "decision" record.

    Args:
        totals: Before.
        body: Of the record.
    """
    return RunTotals(
        tasks=totals.tasks + 1,
        known=totals.known + (body["correct"] is not None),
        correct=totals.correct + (body["correct"] is True),
        failed=totals.failed + (body["answer"] is None),
        flops=totals.flops + body["cost"]["flops"],
        price=totals.price + body["cost"]["price"],
    )


def ask(model: CascadeModel, requests: Sequence[Request]) -> list[Sample]:
    """Ask a model; whatever goes wrong is a failed sample, so that a run goes on.

    Args:
        model: The model.
        requests: Of one prompt.
    """
    try:
        samples = list(model.sample(requests))
    except Exception as error:  # a model may fail in any way; the trace says how
        reason = clean(f"{type(error).__name__}: {clean(error, 1_000)}", MAX_FAILURE_CHARACTERS)
        return [Sample("", failure=reason) for _ in requests]
    if len(samples) != len(requests):
        reason = f"expected {len(requests)} samples, got {len(samples)}"
        return [Sample("", failure=reason) for _ in requests]
    return [replace(sample, text=writable(sample.text)) for sample in samples]


def _ask_as(
    cascade: Cascade, name: str, role: str, task: CascadeTask, prompt: str
) -> tuple[Asked, ...]:
    """Samples of one model on a task: N of the probe, one of a member."""
    requests = cascade.build_requests(name, role, task.id, prompt)
    samples = ask(cascade.models[name], requests)
    return tuple(
        Asked(name, role, number, request, sample)
        for number, (request, sample) in enumerate(zip(requests, samples, strict=True))
    )


def answer_task(task: CascadeTask, cascade: Cascade) -> dict[str, Any]:
    """Answer one task.

    Args:
        task: The task.
        cascade: What answers it.

    Returns:
        Body of its "decision" record.

    Raises:
        CascadeError: If its extractor is unknown, or the judge chooses nobody.
        MoloraError: Whatever extractor, policy or judge refuse for good.
    """
    started = time.perf_counter()
    rules, lineup = cascade.rules(task), cascade.lineup
    examples = cascade.retrieval.find(task.prompt) if cascade.retrieval else ()
    shown = [(one.prompt, one.answer) for one in examples]
    prompt = cascade.settings.template.render(task.prompt, shown)
    asked: tuple[Asked, ...] = ()
    members = lineup.members
    if lineup.probe is not None:
        asked = _ask_as(cascade, lineup.probe, "probe", task, prompt)
        probing = assess_probe(task, [one.sample for one in asked], rules)
        members = list_asked(probing.mode, lineup)
    for name in members:
        asked += _ask_as(cascade, name, "member", task, prompt)
    seed = cascade.compute_seed(task.id, f"judge {cascade.judge_name}", 0)
    recorded = RecordedDecision(task, prompt, asked, seed, ())
    decision = decide(
        task,
        lineup,
        recorded.probe_samples,
        recorded.member_samples,
        rules,
        models=cascade.models,
        seed=seed,
    )
    return build_record(
        replace(recorded, calls=decision.calls),
        decision,
        policy=cascade.policy_name,
        judge=cascade.judge_name,
        seconds=time.perf_counter() - started,
        examples=[{"id": one.id, "similarity": one.similarity} for one in examples],
    )


def describe_totals(totals: RunTotals) -> dict[str, float | str]:
    """What progress shows: cost and accuracy so far.

    Args:
        totals: So far.
    """
    fields: dict[str, float | str] = {"operations": f"{totals.flops:.3g}"}
    if totals.known:
        fields["accuracy"] = f"{100 * totals.correct / totals.known:.1f} %"
    if totals.price:
        fields["price"] = f"{totals.price:.4f}"
    if totals.failed:
        fields["unanswered"] = str(totals.failed)
    return fields
