"""What every model of the study `acar` says to every task, asked or not, in one table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from molora_acar.tasks.families import FAMILIES

from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.cascade.asking import compute_seed
from molora_fed.cascade.config import DEFAULT_TEMPLATE
from molora_fed.cascade.contract import CascadeTask, Request, Sample, TaskSplit
from molora_fed.cascade.escalation import hide_answer
from molora_fed.cascade.local import LocalModel
from molora_fed.cascade.retrieval import Example, Retrieval
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.inference.opening import PlainModel
from molora_fed.models.base import Base, load_base
from molora_fed.models.runtime import limit_threads
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_studies.acar.batched import sample_in_batches
from molora_studies.acar.models import STOP
from molora_studies.framework.contract import TaskContext

__all__ = ["MAX_NEW_TOKENS", "SCORERS", "collect_answers"]

MAX_NEW_TOKENS = 64
SCORERS = ("base", "fused")
"""Models that may judge by likelihood."""

ROUTER = "evidence-zero"
"""Nothing of it is fitted: who predicts the prompt best speaks."""

EXAMPLE_SEED = 1  # added to a study's seed: examples are training problems, but not in its order


@dataclass(frozen=True, eq=False)
class _Models:
    """Everything that is asked.

    Attributes:
        probe: The probe's checkpoint.
        base: The members' base.
        adapters: What each member adds to it.
        scorers: Judges' models by name.
    """

    probe: Base
    base: Base
    adapters: Mapping[str, Adapter]
    scorers: Mapping[str, LocalModel]

    def open(self, name: str | None) -> FusedForCausalLM:
        """A member, or the probe."""
        if name is None:
            return build_causal_lm(PlainModel(self.probe))
        return build_causal_lm(PlainModel(self.base, self.adapters[name]))


def _load_models(settings: Mapping[str, Any], context: TaskContext, plugins: Plugins) -> _Models:
    base, probe = (load_base(context.needs[place].folder / "base") for place in (0, 1))
    adapters = {
        name: load_adapter(done.folder / "adapter", plugins=plugins, name=name)
        for name, done in zip(settings["members"], context.needs[2:], strict=True)
    }
    router_class = plugins.routers.resolve(ROUTER)
    router = router_class(len(adapters), router_class.Options(), {})
    experts = tuple(FusedExpert(name, adapter) for name, adapter in adapters.items())
    fused = FusedModel(base, experts, router, ROUTER, "probability", 0)
    scorers = {
        "base": LocalModel("base", build_causal_lm(PlainModel(base))),
        "fused": LocalModel("fused", build_causal_lm(fused)),
    }
    return _Models(probe, base, adapters, scorers)


def _draw(settings: Mapping[str, Any], split: TaskSplit, count: int) -> list[CascadeTask]:
    return [
        task
        for name, levels in sorted(settings["levels"].items())
        for level in levels
        for task in FAMILIES[name](level, count, settings["seed"], split)
    ]


def _build_retrieval(settings: Mapping[str, Any]) -> Retrieval:
    seed = settings["seed"] + EXAMPLE_SEED
    examples = [
        Example(f"{name}-{level}-{place}", problem.prompt, problem.solution)
        for name, levels in sorted(settings["levels"].items())
        for level in levels
        for place, problem in enumerate(
            FAMILIES[name].draw(level, settings["examples"], seed, "train")
        )
    ]
    return Retrieval(examples, threshold=0.0, count=1)


def _ask(
    models: _Models,
    name: str | None,
    tasks: Sequence[CascadeTask],
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    context: TaskContext,
) -> list[list[Sample]]:
    """Samples of one model on every task: N of the probe, one of a member."""
    model = models.open(name)
    fingerprint = model.fingerprint
    count = settings["samples"] if name is None else 1
    requests = [
        Request(
            prompt,
            compute_seed(
                task.id, DEFAULT_TEMPLATE.hash, fingerprint, number, run_seed=settings["seed"]
            ),
            MAX_NEW_TOKENS,
            settings["temperature"] if name is None else 0.0,
            (STOP,),
        )
        for task, prompt in zip(tasks, prompts, strict=True)
        for number in range(count)
    ]
    samples = sample_in_batches(model, requests, context.progress)
    return [samples[at : at + count] for at in range(0, len(samples), count)]


class _Extractors:
    """Canonical answers; each text of a task is extracted once."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins
        self._known: dict[tuple[str, str], str | None] = {}

    def __call__(self, task: CascadeTask, sample: Sample) -> str | None:
        key = (task.id, sample.text)
        if key not in self._known:
            extract = self._plugins.extractors.resolve(task.extractor)
            self._known[key] = extract(hide_answer(task), sample.text)
        return self._known[key]


def _score(
    scorer: LocalModel, task: CascadeTask, said: Mapping[str, Sequence[Any]]
) -> dict[str, list[float]]:
    """Log-likelihood in nats and operations of each text a member said, where answers differ."""
    answered = {row[0].strip(): row[1] for row in said.values() if row[1] is not None}
    if len(set(answered.values())) < 2:
        return {}
    ended = [text + STOP for text in answered]
    scores = scorer.score(task.prompt, ended)
    return {
        text: [score, scorer.count_scoring(task.prompt, [text]).flops]
        for text, score in zip(ended, scores, strict=True)
    }


def _collect(
    models: _Models,
    tasks: Sequence[CascadeTask],
    prompts: Sequence[str],
    extract: _Extractors,
    settings: Mapping[str, Any],
    context: TaskContext,
) -> list[dict[str, Any]]:
    """Answers to one set of prompts, a row a task: text, answer, tokens read, written, FLOPs."""

    def pack(task: CascadeTask, one: Sample) -> list[Any]:
        return [one.text, extract(task, one), one.prompt_tokens, one.new_tokens, one.flops]

    probe = _ask(models, None, tasks, prompts, settings, context)
    members = {
        name: _ask(models, name, tasks, prompts, settings, context) for name in models.adapters
    }
    rows = []
    for place, task in enumerate(tasks):
        said = {name: pack(task, found[place][0]) for name, found in members.items()}
        rows.append(
            {
                "probe": [pack(task, one) for one in probe[place]],
                "members": said,
                "scores": {
                    name: _score(scorer, task, said) for name, scorer in models.scorers.items()
                },
            }
        )
        if context.progress is not None:
            context.progress(place + 1, len(tasks))
    return rows


def collect_answers(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Ask all models all tasks; see `recipe.plan_answers`.

    Returns:
        `parameters` of probe and member, and by split a row a task: the task, and what was said.
        Test rows hold the same with one retrieved example before the prompt.
    """
    plugins = get_plugins()
    models = _load_models(settings, context, plugins)
    extract = _Extractors(plugins)
    found: dict[str, Any] = {}
    with limit_threads(context.threads):
        for split in ("calibration", "test"):
            tasks = _draw(settings, split, settings["tasks" if split == "test" else split])
            prompts = [task.prompt for task in tasks]
            rows = _collect(models, tasks, prompts, extract, settings, context)
            for task, row in zip(tasks, rows, strict=True):
                row["task"] = _describe(task)
            if split == "test":
                _retrieve(rows, models, tasks, extract, settings, context)
            found[split] = rows
    sizes = {"probe": _count(models.probe), "member": _count(models.base)}
    return {"parameters": sizes, **found}


def _count(base: Base) -> int:
    return sum(parameter.numel() for parameter in base.model.parameters())


def _retrieve(
    rows: Sequence[dict[str, Any]],
    models: _Models,
    tasks: Sequence[CascadeTask],
    extract: _Extractors,
    settings: Mapping[str, Any],
    context: TaskContext,
) -> None:
    """Ask again with the most similar solved problem before each prompt."""
    retrieval = _build_retrieval(settings)
    examples = [retrieval.find(task.prompt) for task in tasks]
    prompts = [
        DEFAULT_TEMPLATE.render(task.prompt, [(one.prompt, one.answer) for one in shown])
        for task, shown in zip(tasks, examples, strict=True)
    ]
    again = _collect(models, tasks, prompts, extract, settings, context)
    for row, shown, said in zip(rows, examples, again, strict=True):
        row["retrieved"] = {"similarity": shown[-1].similarity if shown else 0.0, **said}


def _describe(task: CascadeTask) -> dict[str, Any]:
    """A task without what only its extractor needs."""
    kept = asdict(task)
    del kept["details"]
    return kept
