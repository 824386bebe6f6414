"""Broken plugins over all hooks, as one table: tests and bench/broken_plugins.py go through it.

Each case registers one small broken thing, uses it on a cooperative, and gives what the user is
told. "before" is what happened at 87873ee, "now" a part of today's message.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel

from molora_fed import hookimpl
from molora_fed.adapters.contract import AdapterKind
from molora_fed.cascade.building import build_policy
from molora_fed.cascade.contract import (
    CascadeTask,
    EscalationPolicy,
    draw_tasks,
    open_extractor,
    open_judge,
)
from molora_fed.charter import FusionRules
from molora_fed.contributions.admission import AdmissionCandidate, admit
from molora_fed.contributions.carried import compute_carried
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.corpus.documents import open_domain
from molora_fed.errors import PluginError
from molora_fed.fusion.boundary import PROBED_BLOCKS
from molora_fed.fusion.fuse import fuse
from molora_fed.plugins import Plugins, load_plugins
from molora_fed.population.contract import (
    AdapterRouter,
    Fitness,
    LifecycleOperator,
)
from molora_fed.population.lifecycle import compute_fitness, open_operators, run_lifecycle
from molora_fed.population.router_files import open_router
from molora_fed.population.setup import build_start
from molora_fed.routing.contract import OutputRouter
from molora_fed.storage.options import Choice, name_choices
from molora_fed.testing import (
    build_carried_context,
    build_evidence,
    build_judge_request,
    build_loss_table,
)
from molora_fed.types import Document, Finding, Forecast

ORIGIN = "broken (molora-broken 0.1.0)"


# Routers ------------------------------------------------------------------------------------------


class _Even(OutputRouter):
    readings: ClassVar[Any] = frozenset({"evidence"})

    def scores(self, view):
        return torch.zeros_like(view.evidence)


class SeesTheFuture(_Even):
    def scores(self, view):
        return 0.05 * view.evidence.flip(1).cumsum(1).flip(1)


class BreaksItsPromise(_Even):
    @classmethod
    def bound_excess(cls, num_experts):
        return 0.0


class PromisesNothingFinite(_Even):
    @classmethod
    def bound_excess(cls, num_experts):
        return float("nan")


class WrongShape(_Even):
    def gates(self, view):
        return torch.ones(*view.evidence.shape[:2], view.evidence.shape[2] + 1)


class NotNormalised(_Even):
    def gates(self, view):
        return 2 * super().gates(view)


class NegativeGates(_Even):
    def gates(self, view):
        gates = super().gates(view).clone()
        gates[..., 0] -= 1
        gates[..., -1] += 1
        return gates


class NanGates(_Even):
    def gates(self, view):
        return super().gates(view) * float("nan")


class NoGates(_Even):
    def gates(self, view):
        return None


class IntegerGates(_Even):
    def gates(self, view):
        return torch.ones(view.evidence.shape, dtype=torch.int64)


class MutatesTheBank(_Even):
    @classmethod
    def learn(cls, bank, options, seed, progress):
        bank.logprob.mul_(0.5)
        return cls(bank.num_experts, options)


class MutatesBehindTorch(_Even):
    @classmethod
    def learn(cls, bank, options, seed, progress):
        bank.logprob.numpy()[:] = 0
        return cls(bank.num_experts, options)


class MutatesDomains(_Even):
    @classmethod
    def learn(cls, bank, options, seed, progress):
        bank.domain_of[:] = 0
        return cls(bank.num_experts, options)


class MutatesItsView(_Even):
    def gates(self, view):
        view.document_starts.fill_(False)
        return super().gates(view)


class CrashesInFit(_Even):
    @classmethod
    def learn(cls, bank, options, seed, progress):
        return [][bank.num_experts]


class CrashesInGates(_Even):
    def gates(self, view):
        raise KeyError("no such thing")


class CrashesOnHeldOut(_Even):
    """Fails only where it is evaluated: the second time it goes through a whole bank."""

    left: ClassVar[int | None] = None

    @classmethod
    def learn(cls, bank, options, seed, progress):
        if cls.left is None:
            cls.left = len(list(bank.chunks()))
        return cls(bank.num_experts, options)

    def gates(self, view):
        if len(view.evidence) > PROBED_BLOCKS:
            if self.left == 0:
                raise RuntimeError("only once")
            type(self).left -= 1
        return super().gates(view)


class Exits(_Even):
    @classmethod
    def learn(cls, bank, options, seed, progress):
        raise SystemExit(0)


class Unprintable(_Even):
    @classmethod
    def learn(cls, bank, options, seed, progress):
        class SilentError(Exception):
            def __str__(self):
                raise ValueError

        raise SilentError


class ReadsUnknown(_Even):
    readings: ClassVar[Any] = frozenset({"logits"})


class StepsOtherwise(_Even):
    def scores(self, view):
        return torch.arange(view.evidence.shape[-1]).expand(view.evidence.shape).float()

    def step(self, view, state):
        return super().gates(view).flip(-1), state


class FitsNothing(_Even):
    @classmethod
    def learn(cls, bank, options, seed, progress):
        return None


class NamedOtherwise(_Even):
    name = "somebody-else"


class Abstract(OutputRouter):
    pass


class OpenOptions(_Even):
    class Options(BaseModel):
        pass


class Unseeded(_Even):
    """Harmless: the guard of collapse judges what it gives like anyone's."""

    @classmethod
    def shapes(cls, num_experts, options):
        return {"bias": (num_experts,)}

    @classmethod
    def learn(cls, bank, options, seed, progress):
        return cls(bank.num_experts, options, {"bias": 0.1 * torch.rand(bank.num_experts)})

    def scores(self, view):
        return torch.zeros_like(view.evidence) + self.bias


# Gain predictors ----------------------------------------------------------------------------------


def _claim(**changes):
    fields = {"reference": "best_alone", "point": 2.0, "low": 1.0, "high": 3.0, "level": 0.8}
    return Forecast(**{**fields, "note": "Made up.", **changes})


def predict_a_number(case, past):
    return 3.0


def predict_out_of_its_interval(case, past):
    return _claim(point=10.0)


def predict_an_unknown_reference(case, past):
    return _claim(reference="best_ever")


def predict_a_level_of_180(case, past):
    return _claim(level=1.8)


def predict_nan(case, past):
    return _claim(point=float("nan"))


def predict_in_many_lines(case, past):
    return _claim(note="one\ntwo")


def predict_by_one_argument(case):
    return None


def predict_by_falsifying(case, past):
    for row in (case.losses.base, *case.losses.specialists.values()):
        for domain in row:
            row[domain] *= 2
    return _claim()


def predict_by_failing(case, past):
    raise IndexError("oops")


def predict_half_an_interval_without_level(case, past):
    return _claim(level=None, high=None)


# Merges -------------------------------------------------------------------------------------------


def _change(adapter, change):
    updates = {module: change(update) for module, update in adapter.updates.items()}
    return replace(adapter, updates=updates, hash="0" * 64)


def _as_dense(update, factor=1.0, rows=0):
    product = update.product() * factor
    return replace(update, a=None, b=None, scale=1.0, dense=product[rows:], bias=None)


def merge_into_nan(adapters, *, name, seed):
    return _change(adapters[0], lambda u: _as_dense(u, float("nan")))


def merge_into_another_shape(adapters, *, name, seed):
    return _change(adapters[0], lambda u: _as_dense(u, rows=1))


def merge_into_nothing(adapters, *, name, seed):
    return None


def merge_without_keywords(adapters):
    return adapters[0]


def merge_into_another_module(adapters, *, name, seed):
    first = next(iter(adapters[0].updates.values()))
    return replace(adapters[0], updates={"nowhere": first}, hash="1" * 64)


def merge_in_place(adapters, *, name, seed):
    """Harmless: it is handed adapters of its own."""
    for adapter in adapters:
        for update in adapter.updates.values():
            for tensor in update.tensors().values():
                tensor.zero_()
    return _change(adapters[0], lambda u: _as_dense(u, 0.0))


# Populations --------------------------------------------------------------------------------------


class _Gates(AdapterRouter):
    def __init__(self, num_slots, width, options):
        super().__init__(num_slots, width, options)
        self.weight = torch.nn.Parameter(torch.zeros(num_slots, width))

    @classmethod
    def build(cls, num_slots, width, options, seed):
        return cls(num_slots, width, options)

    @classmethod
    def reads(cls, options):
        return frozenset({"base_hidden"})

    def forward(self, view):
        return torch.sigmoid(view.base_hidden.float() @ self.weight.T)

    def set_progress(self, share):
        pass

    def reset_slot(self, slot, parent, seed):
        with torch.no_grad():
            self.weight[slot] = 0 if parent is None else self.weight[parent]


class FutureGates(_Gates):
    def forward(self, view):
        return torch.sigmoid(view.base_hidden.float().flip(1).cumsum(1).flip(1) @ self.weight.T)


class TripleGates(_Gates):
    def forward(self, view):
        return 3 * super().forward(view)


class UnresettableGates(_Gates):
    def reset_slot(self, slot, parent, seed):
        pass


class FrozenGates(_Gates):
    def forward(self, view):
        return super().forward(view).detach()


class CrashingGates(_Gates):
    def forward(self, view):
        raise AttributeError("no such column")


class OpenGates(_Gates):
    class Options(BaseModel):
        pass


class InPlaceOperator(LifecycleOperator):
    def apply(self, state, seed):
        for update in state.population.slots[0].updates.values():
            update.b.mul_(2)
        return state


class UndeclaredOperator(LifecycleOperator):
    def apply(self, state, seed):
        first, *others = state.population.slots
        updates = {n: replace(u, b=2 * u.b) for n, u in first.updates.items()}
        slots = (replace(first, updates=updates), *others)
        return replace(state, population=replace(state.population, slots=slots))


class LosingOperator(LifecycleOperator):
    def apply(self, state, seed):
        slots = state.population.slots[1:]
        return replace(state, population=replace(state.population, slots=slots))


class CrashingOperator(LifecycleOperator):
    def apply(self, state, seed):
        raise IndexError("oops")


class EmptyOperator(LifecycleOperator):
    def apply(self, state, seed):
        return None


def scope_of_another_name(table):
    values = table.full.mean() + 0 * table.without[:, 0]
    per_domain = values[:, None].repeat(len(table.domains), 1)
    return Fitness("another", values, values, per_domain, per_domain[0])


def scope_as_array(table):
    return table.full


def scope_by_failing(table):
    raise IndexError("oops")


# Admission, domains, kinds ------------------------------------------------------------------------


def check_true(candidate):
    return True


def check_by_failing(candidate):
    raise KeyError("licence")


def check_without_words(candidate):
    return Finding("", "", "")


def read_strings():
    yield "just text"


def read_none():
    return None


def read_surrogates():
    yield Document("a", "\ud800")


def read_by_failing():
    yield Document("a", "fine")
    raise FileNotFoundError("texts/")


def read_a_none():
    yield None


class RatelessKind(AdapterKind):
    name = "broken"

    def prepare(self, *arguments, **settings):
        raise NotImplementedError

    def export(self, *arguments, **settings):
        raise NotImplementedError

    def load(self, *arguments, **settings):
        raise NotImplementedError


class MisnamedKind(RatelessKind):
    name = "lora"
    narrow_learning_rate = 1e-3
    width_power = 1.0


# Cascades -----------------------------------------------------------------------------------------


def extract_a_number(task, text):
    return 4


def extract_by_failing(task, text):
    return text[9999]


def judge_out_of_range(request):
    from molora_fed.cascade.contract import Verdict

    return Verdict(7, "the best")


def judge_nothing(request):
    return None


def judge_with_a_text(request):
    return "the first"


class EveryonePolicy(EscalationPolicy):
    def choose(self, evidence):
        return "everyone"


class CrashingPolicy(EscalationPolicy):
    def choose(self, evidence):
        return evidence.answers[99]


class OpenPolicy(EveryonePolicy):
    class Options(BaseModel):
        pass


def draw_too_few(level, count, seed, split="test"):
    return []


def draw_strings(level, count, seed, split="test"):
    return ["task"] * count


# How each is used ---------------------------------------------------------------------------------


@dataclass
class Workshop:
    """A cooperative, and what broken things are used with.

    Attributes:
        cooperative: It.
        out: Where fusions are written.
    """

    cooperative: Cooperative
    out: Path
    base: Any = None
    contributions: Any = ()
    fused: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = self.cooperative.load_base()
        with self.cooperative.read_ledger() as ledger:
            self.contributions = load_admitted(ledger, self.cooperative.store)

    def fuse(self, plugins: Plugins | None = None, **rules: Any) -> dict[str, Any]:
        """Content of result.json."""
        charter = self.cooperative.charter
        fusion = FusionRules.model_validate({**charter.amendment.fusion.model_dump(), **rules})
        amended = charter.amendment.model_copy(update={"fusion": fusion})
        return fuse(
            self.base,
            charter.model_copy(update={"amendment": amended}),
            [collect_contributed(one) for one in self.contributions],
            self.out,
            plugins=plugins or load_plugins(),
        ).result


def register(suffix: str, entries: dict[str, Any]) -> Any:
    """A plugin that registers targets under one hook."""
    module = types.ModuleType("broken")

    def implementation(register):
        for name, target in entries.items():
            register(name, target, summary="Broken", source="own definition")

    setattr(module, f"register_{suffix}", hookimpl(implementation))
    return module


def load(suffix: str, name: str, target: Any) -> Plugins:
    return load_plugins([(ORIGIN, register(suffix, {name: target}))])


_IN_ONE_FUSION = ("compared router", "merge", "gain predictor")


def tell(workshop: Workshop, case: "Broken") -> str:
    """Use a broken thing as its hook says, and give what the user is told."""
    try:
        return _USES[case.use](workshop, case) or "nothing: harmless"
    except PluginError as error:
        return str(error)


def _publish(workshop: Workshop, case: "Broken") -> None:
    plugins = load("routers", case.name, case.target)
    workshop.fuse(plugins, router=case.name, compare=("evidence-zero",), options={})


def _compare(workshop: Workshop, case: "Broken") -> str | None:
    """All broken things that are only compared, in one fusion that goes on."""
    if not workshop.fused:
        cases = {use: [c for c in CASES if c.use == use] for use in _IN_ONE_FUSION}
        hooks = zip(("routers", "merges", "gain_predictors"), cases.values(), strict=True)
        plugins = load_plugins(
            [
                (ORIGIN.replace("broken (", f"{hook} ("), register(hook, _targets(found)))
                for hook, found in hooks
            ]
        )
        workshop.fused = workshop.fuse(
            plugins,
            compare=tuple(c.name for c in cases["compared router"]),
            merges=tuple(c.name for c in cases["merge"]),
        )
    kind = case.use.removeprefix("compared ")
    return workshop.fused["not_measured"].get(kind, {}).get(case.name)


def _targets(cases: "list[Broken]") -> dict[str, Any]:
    return {case.name: case.target for case in cases}


def _resolve(suffix: str, workshop: Workshop, case: "Broken") -> None:
    load(suffix, case.name, case.target).registries()[suffix].resolve(case.name)


def _admit(workshop: Workshop, case: "Broken") -> str | None:
    """A contribution is quarantined for it, and the reason says why."""
    charter = workshop.cooperative.charter
    checks = name_choices(case.name)
    rules = charter.amendment.admission.model_copy(update={"checks": checks})
    amended = charter.amendment.model_copy(update={"admission": rules})
    decision = admit(
        AdmissionCandidate(
            workshop.contributions[0],
            charter.model_copy(update={"amendment": amended}),
            workshop.base,
            load("admission_checks", case.name, case.target),
        )
    )
    return "; ".join(refusal.message for refusal in decision.refusals) or None


def _read(workshop: Workshop, case: "Broken") -> None:
    list(open_domain(case.name, load("domains", case.name, case.target))())


def _build_gates(workshop: Workshop, case: "Broken") -> None:
    plugins = load("adapter_routers", case.name, case.target)
    open_router(case.name, {}, base=workshop.base, num_slots=2, seed=0, plugins=plugins)


def _operate(workshop: Workshop, case: "Broken") -> str | None:
    from molora_fed.errors import PopulationError

    plugins = load("lifecycle_operators", case.name, case.target)
    steps = open_operators([(case.name, {})], plugins)
    charter = workshop.cooperative.charter
    entrants = [collect_contributed(one) for one in workshop.contributions]
    start = build_start(workshop.base, charter, entrants, plugins).population
    values = torch.zeros(start.num_slots).double().numpy()
    table = torch.zeros(start.num_slots, 1).double().numpy()
    fitness = Fitness("leave-one-out", values, values, table, table[0])
    try:
        run_lifecycle(steps, start, fitness, ("all",), generation=1, seed=0)
    except PopulationError as error:
        return str(error)
    return None


def _measure(workshop: Workshop, case: "Broken") -> None:
    table = build_loss_table(2, domains=("a", "b"), clusters=2)
    compute_fitness(case.name, table, load("fitness_scopes", case.name, case.target))


_TASK = CascadeTask("1", "echo", "say 1:", "normalised-text", "1")


def _extract(workshop: Workshop, case: "Broken") -> None:
    open_extractor(case.name, load("extractors", case.name, case.target))(_TASK, "1")


def _judge(workshop: Workshop, case: "Broken") -> None:
    judge = open_judge(case.name, load("judges", case.name, case.target))
    judge(build_judge_request(("1",), task=_TASK))


def _choose(workshop: Workshop, case: "Broken") -> None:
    plugins = load("escalation_policies", case.name, case.target)
    policy = build_policy(case.name, {}, plugins)
    policy.choose_mode(build_evidence(("1",), task=_TASK))


def _draw(workshop: Workshop, case: "Broken") -> None:
    plugins = load("task_families", case.name, case.target)
    draw_tasks([case.name], [1], count=2, seed=0, split="test", plugins=plugins)


def carry_nan(context):
    return {"gate": torch.full((2,), float("nan"))}


def carry_by_changing_the_base(context):
    next(context.base.model.parameters()).data.mul_(2)
    return {"gate": torch.ones(2)}


def carry_a_list(context):
    return [1, 2]


def _carry(workshop: Workshop, case: "Broken") -> None:
    plugins = load("carried_files", case.name, case.target)
    compute_carried(Choice(name=case.name), build_carried_context(), plugins)


def _load_whole(workshop: Workshop, case: "Broken") -> None:
    load_plugins([(ORIGIN, case.target)])


_USES: dict[str, Callable[[Workshop, "Broken"], str | None]] = {
    **dict.fromkeys(_IN_ONE_FUSION, _compare),
    "published router": _publish,
    "router class": functools.partial(_resolve, "routers"),
    "adapter kind": functools.partial(_resolve, "adapter_kinds"),
    "command": functools.partial(_resolve, "commands"),
    "admission check": _admit,
    "domain": _read,
    "adapter router": _build_gates,
    "lifecycle operator": _operate,
    "fitness scope": _measure,
    "extractor": _extract,
    "judge": _judge,
    "escalation policy": _choose,
    "task family": _draw,
    "carried file": _carry,
    "loading": _load_whole,
}


@dataclass(frozen=True)
class Broken:
    """One broken plugin.

    Attributes:
        use: How it is used: a hook, or a place in a fusion.
        name: Registered name.
        target: The broken thing.
        before: What happened at 87873ee.
        now: Part of what is said today; "harmless" where nothing has to be said.
    """

    use: str
    name: str
    target: Any
    before: str
    now: str

    @property
    def defect(self) -> str:
        """The defect in words."""
        words = self.target.__name__ if hasattr(self.target, "__name__") else self.name
        return self.name.removeprefix("b-").replace("-", " ") or words


def _misspelled() -> Any:
    module = types.ModuleType("broken")
    module.register_router = hookimpl(lambda register: None)  # type: ignore[attr-defined]
    return module


def _exiting() -> Any:
    def implementation(register):
        raise SystemExit(3)

    module = types.ModuleType("broken")
    module.register_routers = hookimpl(implementation)  # type: ignore[attr-defined]
    return module


_RAW = "raw error, no plugin named"
CASES = (
    Broken("published router", "b-sees-the-future", SeesTheFuture, "published, a false gain",
           "failed in gates: expected gates at position"),
    Broken("published router", "b-not-normalised", NotNormalised,
           "published, a loss below the token oracle", "that sum to 1 over the experts, got sums"),
    Broken("published router", "b-nan-gates", NanGates, "'Cannot score forecast ... got nan'",
           "expected finite gates, got NaN"),
    Broken("published router", "b-mutates-the-bank", MutatesTheBank,
           "blinds the guard, worsens others", "got changes of logprob"),
    Broken("published router", "b-crash-in-fit", CrashesInFit,
           "'Unexpected IndexError ... report it'",
           "failed in fit: IndexError: list index out of range, at tests/broken_plugins.py:"),
    Broken("published router", "b-reads-unknown", ReadsUnknown, "'Unexpected AttributeError'",
           "failed in reads: expected columns among"),
    Broken("published router", "b-steps-otherwise", StepsOtherwise, "slips",
           "expected step to give the gates of the full form"),
    Broken("compared router", "b-future", SeesTheFuture, "a false row",
           "failed: Router 'b-future' of"),
    Broken("compared router", "b-wide", WrongShape, "ends the run", "expected gates of shape"),
    Broken("compared router", "b-double", NotNormalised, "a false row", "sum to 1"),
    Broken("compared router", "b-negative", NegativeGates, "a false row", "that are not negative"),
    Broken("compared router", "b-nan", NanGates, "ends the run", "expected finite gates"),
    Broken("compared router", "b-none", NoGates, _RAW, "expected gates as a tensor of floats"),
    Broken("compared router", "b-integer", IntegerGates, _RAW,
           "expected gates as a tensor of floats"),
    Broken("compared router", "b-mutating", MutatesTheBank, "worsens the routers after it",
           "got changes of logprob"),
    Broken("compared router", "b-mutating-by-numpy", MutatesBehindTorch, "worsens others",
           "got changes of logprob"),
    Broken("compared router", "b-mutating-domains", MutatesDomains, "worsens others",
           "got changes of domain_of"),
    Broken("compared router", "b-mutating-views", MutatesItsView, "worsens others",
           "got changes of document_starts"),
    Broken("compared router", "b-crash", CrashesInFit, "ends the run", "failed in fit: IndexError"),
    Broken("compared router", "b-crash-in-gates", CrashesInGates, "ends the run", "KeyError"),
    Broken("compared router", "b-crash-on-held-out", CrashesOnHeldOut, "ends the run",
           "failed in evaluation: RuntimeError: only once"),
    Broken("compared router", "b-exits", Exits, "the run ends without a word", "SystemExit"),
    Broken("compared router", "b-unprintable", Unprintable, "a second error", "SilentError"),
    Broken("compared router", "b-reads", ReadsUnknown, "ends the run", "got logits"),
    Broken("compared router", "b-promise", BreaksItsPromise, "there was no promise to break",
           "as it promises, got"),
    Broken("compared router", "b-no-number", PromisesNothingFinite, "there was no promise to break",
           "a finite number of nats"),
    Broken("compared router", "b-steps", StepsOtherwise, "slips", "expected step to give"),
    Broken("compared router", "b-fits-nothing", FitsNothing, _RAW, "failed in fit"),
    Broken("compared router", "b-misnamed", NamedOtherwise, "slips", "name = 'b-misnamed'"),
    Broken("compared router", "b-unseeded", Unseeded, "runs", "harmless"),
    Broken("router class", "b-abstract", Abstract, "'ok' under --check, raw TypeError in use",
           "expected a class without abstract methods, got scores"),
    Broken("router class", "b-open-options", OpenOptions, "caught", "extra='forbid'"),
    Broken("gain predictor", "b-number", predict_a_number, "written, and the ledger bricked",
           "expected a Forecast or None, got float"),
    Broken("gain predictor", "b-outside", predict_out_of_its_interval, "recorded",
           "low 1.0, point 10.0"),
    Broken("gain predictor", "b-reference", predict_an_unknown_reference,
           "recorded; history fails for good", "reference 'best_ever'"),
    Broken("gain predictor", "b-level", predict_a_level_of_180, "'180 %'", "level 1.8"),
    Broken("gain predictor", "b-nan", predict_nan, "'not JSON compliant'", "point nan"),
    Broken("gain predictor", "b-lines", predict_in_many_lines, "recorded", "not one line"),
    Broken("gain predictor", "b-one-argument", predict_by_one_argument, "ends the run",
           "TypeError"),
    Broken("gain predictor", "b-falsifies", predict_by_falsifying, "falsifies the others",
           "harmless"),
    Broken("gain predictor", "b-raises", predict_by_failing, "ends the run", "IndexError: oops"),
    Broken("gain predictor", "b-no-level", predict_half_an_interval_without_level, "recorded",
           "an interval without a level"),
    Broken("merge", "b-nan", merge_into_nan, "blames the contributor", "expected a finite update"),
    Broken("merge", "b-shape", merge_into_another_shape, "blames the contributor",
           "expected an update ("),
    Broken("merge", "b-none", merge_into_nothing, _RAW, "expected an Adapter, got NoneType"),
    Broken("merge", "b-keywords", merge_without_keywords, _RAW, "TypeError"),
    Broken("merge", "b-module", merge_into_another_module, "blames the contributor", "got nowhere"),
    Broken("merge", "b-in-place", merge_in_place, "spoils the fused model", "harmless"),
    Broken("admission check", "b-true", check_true, "caught",
           "expected a Finding or None, got bool"),
    Broken("admission check", "b-raises", check_by_failing, "caught", "KeyError: 'licence'"),
    Broken("admission check", "b-wordless", check_without_words, "'expected , got .'",
           "expected a Finding that says"),
    Broken("domain", "b-strings", read_strings, _RAW, "expected Documents of text, got str"),
    Broken("domain", "b-nothing", read_none, _RAW, "failed in reading: TypeError"),
    Broken("domain", "b-none", read_a_none, _RAW, "got NoneType"),
    Broken("domain", "b-surrogates", read_surrogates, _RAW, "text that is not Unicode"),
    Broken("domain", "b-raises", read_by_failing, _RAW, "FileNotFoundError: texts/"),
    Broken("adapter kind", "b-rateless", RatelessKind, "dies in training", "narrow_learning_rate"),
    Broken("adapter kind", "b-misnamed", MisnamedKind, "trains, then is rejected", "got 'lora'"),
    Broken("adapter router", "b-future", FutureGates, "evolves", "expected gates at position"),
    Broken("adapter router", "b-triple", TripleGates, "evolves", "between 0 and 1"),
    Broken("adapter router", "b-unresettable", UnresettableGates, "evolves",
           "failed in reset_slot: expected a newborn's gate"),
    Broken("adapter router", "b-frozen", FrozenGates, "evolves", "with a gradient"),
    Broken("adapter router", "b-crash", CrashingGates, _RAW, "AttributeError: no such column"),
    Broken("adapter router", "b-open-options", OpenGates, "typing errors are signed",
           "extra='forbid'"),
    Broken("lifecycle operator", "b-in-place", InPlaceOperator, "slips past the guard",
           "got changed tensors of"),
    Broken("lifecycle operator", "b-undeclared", UndeclaredOperator, "slips past the guard",
           "got changed tensors of"),
    Broken("lifecycle operator", "b-losing", LosingOperator, "caught", "usable slots"),
    Broken("lifecycle operator", "b-crash", CrashingOperator, _RAW, "IndexError: oops"),
    Broken("lifecycle operator", "b-empty", EmptyOperator, _RAW, "expected a LifecycleState"),
    Broken("fitness scope", "b-renamed", scope_of_another_name, "not noticed", "got 'another'"),
    Broken("fitness scope", "b-array", scope_as_array, "raw AttributeError", "got 'ndarray'"),
    Broken("fitness scope", "b-raises", scope_by_failing, _RAW, "IndexError: oops"),
    Broken("extractor", "b-number", extract_a_number, "answered and replayed", "got int"),
    Broken("extractor", "b-raises", extract_by_failing, _RAW, "IndexError: string index"),
    Broken("judge", "b-range", judge_out_of_range, "caught",
           "expected a candidate from 0 to 0, got 7"),
    Broken("judge", "b-none", judge_nothing, _RAW, "expected a Verdict, got NoneType"),
    Broken("judge", "b-text", judge_with_a_text, _RAW, "expected a Verdict, got str"),
    Broken("escalation policy", "b-everyone", EveryonePolicy, "written into the signed trace",
           "got everyone"),
    Broken("escalation policy", "b-raises", CrashingPolicy, _RAW, "IndexError: tuple index"),
    Broken("escalation policy", "b-open-options", OpenPolicy, "typing errors pass",
           "extra='forbid'"),
    Broken("task family", "b-few", draw_too_few, "fewer tasks, no word", "expected 2 CascadeTasks"),
    Broken("task family", "b-strings", draw_strings, _RAW, "of str"),
    Broken("carried file", "b-nan", carry_nan, "no such hook", "finite"),
    Broken("carried file", "b-base", carry_by_changing_the_base, "no such hook",
           "expected a base that stays as it was"),
    Broken("carried file", "b-list", carry_a_list, "no such hook", "got list"),
    Broken("command", "b-import", "molora_no_such_module:run", "caught", "ModuleNotFoundError"),
    Broken("loading", "b-misspelled-hook", _misspelled(), "silent but in plugins list",
           "unknown hook 'register_router'"),
    Broken("loading", "b-clash", register("routers", {"evidence": SeesTheFuture}),
           "takes the place of the first-party plugin", "the name is taken by kalavai (molora-fed"),
    Broken("loading", "b-exit", _exiting(), "molora ends without a word",
           "Cannot load plugin broken"),
)  # fmt: skip
