"""Replaying a trace: every decision again from its recorded samples, or from the models."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from molora_fed.cascade.asking import compute_seed, playback_models
from molora_fed.cascade.building import build_policy
from molora_fed.cascade.config import PromptTemplate
from molora_fed.cascade.contract import (
    CascadeModel,
    EscalationPolicy,
    JudgeFunction,
    Request,
    Sample,
    open_extractor,
    open_judge,
)
from molora_fed.cascade.escalation import Lineup, decide
from molora_fed.cascade.records import (
    Asked,
    RecordedDecision,
    build_record,
    compare_records,
    drop_times,
    parse_record,
)
from molora_fed.cascade.running import ask, build_rules
from molora_fed.errors import CascadeError, MoloraError
from molora_fed.plugins import Plugins, get_plugins

__all__ = ["ReplayReport", "Replayer", "replay_trace"]

MAX_DIFFERENCES = 1_000
SCORE_TOLERANCE = 1e-3
"""Nats a text's log-likelihood may differ by when it is asked for again: other versions of the
libraries, and of this one, add in another order."""
_SETTINGS = ("samples", "temperature", "member_temperature", "max_new_tokens", "stop", "seed")


@dataclass(frozen=True)
class ReplayReport:
    """What replaying found.

    Attributes:
        decisions: Decisions replayed.
        differences: One line each, at most 1,000 of them; empty if all is as recorded.
        resampled: Samples that were asked of models again.
    """

    decisions: int
    differences: tuple[str, ...]
    resampled: int = 0


class Replayer:
    """Makes the decisions of one run again.

    Attributes:
        decisions: Decisions replayed so far.
        resampled: Samples asked again so far.
        differences: What differed, one line each.
    """

    def __init__(
        self,
        run: Mapping[str, Any],
        *,
        models: Mapping[str, CascadeModel] | None = None,
        plugins: Plugins | None = None,
    ) -> None:
        """Read what a "run" record says.

        Args:
            run: Body of the record; its maker is not trusted.
            models: Models to ask again, by name; none replays from samples alone.
            plugins: Where extractors, policy and judge are registered; the installed ones if None.

        Raises:
            CascadeError: If it is no such record, or its judge refuses the options in it.
            UnknownNameError: If nobody registers its policy or judge.
        """
        self._plugins = plugins or get_plugins()
        self.decisions = self.resampled = 0
        self.differences: list[str] = []
        try:
            self._models: dict[str, Any] = {str(k): dict(v) for k, v in run["models"].items()}
            self._lineup = Lineup(run["probe"], tuple(run["members"]))
            self._policy_name = str(run["policy"]["name"])
            self._judge_name = str(run["judge"]["name"])
            self._judge_options = dict(run["judge"]["options"])
            self._policy = self._build_policy(run["policy"])
            self._fingerprints = {n: str(m["fingerprint"]) for n, m in self._models.items()}
            self._settings = dict(run["settings"])
            self._template = PromptTemplate(run["template"]["text"], run["template"]["example"])
            self._environment = str(run["environment"])
            self._has_retrieval = run["retrieval"] is not None
            missing = [k for k in _SETTINGS if k not in self._settings]
            if missing or run["template"]["sha256"] != self._template.hash:
                raise ValueError(f"without {', '.join(missing) or 'the hash of its template'}")
            self._scorers = [name for name, one in self._models.items() if one["scores"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, MoloraError):
                raise
            raise CascadeError(
                "Cannot replay: expected the run record of `molora cascade run`, got "
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}. Verify the trace."
            ) from error
        self._judge: JudgeFunction = open_judge(
            self._judge_name, self._plugins, self._judge_options
        )
        self._asked_again = self._match_models(models or {})

    def _build_policy(self, recorded: Mapping[str, Any]) -> EscalationPolicy:
        """The policy with its options; files among them are read from the record."""
        options, files = dict(recorded["options"]), dict(recorded.get("files", {}))
        with TemporaryDirectory(prefix="molora-replay-") as folder:
            for number, (name, text) in enumerate(sorted(files.items())):
                path = Path(folder) / str(number)
                path.write_text(str(text), encoding="utf-8")
                options[name] = path
            return build_policy(self._policy_name, options, self._plugins)

    def _match_models(self, models: Mapping[str, CascadeModel]) -> dict[str, CascadeModel]:
        """The models that are those of the run; others are a difference."""
        matched = {}
        for name, model in models.items():
            if name not in self._fingerprints:
                continue
            if model.fingerprint != self._fingerprints[name]:
                self._report(
                    f"model '{name}': fingerprint {model.fingerprint[:16]}, recorded "
                    f"{self._fingerprints[name][:16]}"
                )
            elif model.is_local:
                matched[name] = model
        return matched

    def _report(self, difference: str) -> None:
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(difference)

    def replay(self, body: Mapping[str, Any]) -> None:
        """Make one decision again, and note what differs.

        Args:
            body: Of a "decision" record; its maker is not trusted.
        """
        self.decisions += 1
        name = str(body.get("task"))[:100]
        try:
            recorded = parse_record(body)
            again = self._decide(recorded, body)
        except (MoloraError, ValueError, TypeError, KeyError) as error:
            self._report(f"task '{name}': {' '.join(str(error).split())[:300]}")
            return
        try:
            differing = compare_records(body, again)
        except (TypeError, KeyError, ValueError, AttributeError):
            differing = ["the whole record"]
        if differing:
            self._report(f"task '{name}': {', '.join(differing)} differ from the record")
        elif not self._follows(recorded):
            self._report(f"task '{name}': what was asked is not what this run asks")
        if self._asked_again:
            self._ask_again(recorded)

    def _decide(self, recorded: RecordedDecision, body: Mapping[str, Any]) -> dict[str, Any]:
        extract = open_extractor(recorded.task.extractor, self._plugins)
        decision = decide(
            recorded.task,
            self._lineup,
            recorded.probe_samples,
            recorded.member_samples,
            build_rules(extract, self._policy, self._judge, self._judge_options),
            models=playback_models(self._fingerprints, recorded.calls, self._scorers),
            seed=recorded.judge_seed,
        )
        again = build_record(
            replace(recorded, calls=decision.calls),
            decision,
            policy=self._policy_name,
            judge=self._judge_name,
            examples=body.get("examples", ()),
        )
        return drop_times(again)

    def _follows(self, recorded: RecordedDecision) -> bool:
        """Whether prompt, seeds and settings of all samples follow from the run record."""
        task_id = recorded.task.id
        rendered = self._template.render(recorded.task.prompt)
        if not self._has_retrieval and recorded.prompt != rendered:
            return False
        numbers: Counter[tuple[str, str]] = Counter()
        for one in recorded.asked:
            number = numbers[one.model, one.role]
            numbers[one.model, one.role] += 1
            temperature = "temperature" if one.role == "probe" else "member_temperature"
            expected = Request(
                prompt=recorded.prompt,
                seed=self._seed(task_id, self._fingerprints.get(one.model, ""), number),
                max_new_tokens=self._settings["max_new_tokens"],
                temperature=self._settings[temperature],
                stop=tuple(self._settings["stop"]),
            )
            if (one.number, one.request) != (number, expected):
                return False
        samples = numbers[str(self._lineup.probe), "probe"]
        judge_seed = self._seed(task_id, f"judge {self._judge_name}", 0)
        return recorded.judge_seed == judge_seed and (
            self._lineup.probe is None or samples == self._settings["samples"]
        )

    def _seed(self, task_id: str, fingerprint: str, number: int) -> int:
        return compute_seed(
            task_id,
            self._template.hash,
            fingerprint,
            number,
            environment=self._environment,
            run_seed=self._settings["seed"],
        )

    def _ask_again(self, recorded: RecordedDecision) -> None:
        """Ask probe and members again, as they were asked, and compare what they say."""
        task = recorded.task.id
        for (name, role), group in groupby(recorded.asked, key=lambda one: (one.model, one.role)):
            if name in self._asked_again:
                asked = list(group)
                again = ask(self._asked_again[name], [one.request for one in asked])
                self.resampled += len(asked)
                for one, sample in zip(asked, again, strict=True):
                    self._compare_sample(task, f"{role} '{name}' sample {one.number}", one, sample)
        if {call.model for call in recorded.calls} <= set(self._asked_again) and recorded.calls:
            self._judge_again(recorded)

    def _compare_sample(self, task: str, what: str, one: Asked, again: Sample) -> None:
        plain = [replace(s, seconds=0.0, attempts=1) for s in (one.sample, again)]
        if plain[0] != plain[1]:
            self._report(f"task '{task}': {what} is not what the model says now")

    def _judge_again(self, recorded: RecordedDecision) -> None:
        """Let the judge ask the models themselves."""
        extract = open_extractor(recorded.task.extractor, self._plugins)
        decision = decide(
            recorded.task,
            self._lineup,
            recorded.probe_samples,
            recorded.member_samples,
            build_rules(extract, self._policy, self._judge, self._judge_options),
            models=self._asked_again,
            seed=recorded.judge_seed,
        )
        calls = [
            [
                replace(
                    call, scores=(), samples=tuple(replace(s, seconds=0.0) for s in call.samples)
                )
                for call in made
            ]
            for made in (recorded.calls, decision.calls)
        ]
        scores = [
            [score for call in made for score in call.scores]
            for made in (recorded.calls, decision.calls)
        ]
        if calls[0] != calls[1] or not _are_close(*scores):
            self._report(f"task '{recorded.task.id}': what the judge is told now differs")

    def report(self) -> ReplayReport:
        """What was found so far."""
        return ReplayReport(self.decisions, tuple(self.differences), self.resampled)


def replay_trace(
    path: Path,
    *,
    models: Mapping[str, CascadeModel] | None = None,
    plugins: Plugins | None = None,
) -> ReplayReport:
    """Make every decision of a trace again, and report what differs.

    Extraction, sigma, mode, members and judge are always made again, from the recorded samples.
    Local models that are given are asked again too, as they were asked then; text is compared.

    Args:
        path: A run's folder, or one exported file.
        models: Models by name; those whose fingerprint is another are reported.
        plugins: Where extractors, policy and judge are registered; the installed ones if None.

    Raises:
        CascadeError: If the trace holds no run of a cascade.
        TraceError: If it cannot be read.
        UnknownNameError: If nobody registers its policy or judge.
    """
    from molora_fed.tracing.reading import read_records

    replayer: Replayer | None = None
    first: Mapping[str, Any] = {}
    for record in read_records(path):
        if record.kind == "run":
            if replayer is None:
                first = record.body
                replayer = Replayer(first, models=models, plugins=plugins)
            elif _plain(record.body) != _plain(first):
                replayer.differences.append("the run was continued as another cascade")
        elif record.kind == "decision":
            if replayer is None:
                raise CascadeError(
                    f"Cannot replay trace '{path}': expected a run record before the first "
                    "decision, got none. Verify the trace."
                )
            replayer.replay(record.body)
    if replayer is None:
        raise CascadeError(
            f"Cannot replay trace '{path}': expected a run of a cascade, got none. "
            "Only traces of `molora cascade run` can be replayed."
        )
    return replayer.report()


def _are_close(recorded: Sequence[float], again: Sequence[float]) -> bool:
    """Whether scores are the same but for rounding."""
    return len(recorded) == len(again) and all(
        isclose(one, other, abs_tol=SCORE_TOLERANCE)
        for one, other in zip(recorded, again, strict=True)
    )


def _plain(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "resumed"}
