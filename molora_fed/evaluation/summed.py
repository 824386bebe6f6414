"""A member's side of a fusion whose blocks stay with their owners: sums in place of losses.

A member evaluates at home, with the one evaluator, and says sums over its document clusters; the
calibration losses that forecasts are made of go the same way. What becomes of the sums is in
`summed_report`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from molora_fed.errors import BankError, PluginError, RoutingError, SumError
from molora_fed.evaluation.bootstrap import ClusterIndex
from molora_fed.evaluation.composition import name_fused, name_specialist
from molora_fed.evaluation.evaluate import evaluate
from molora_fed.evaluation.moments import (
    MIN_CLUSTERS,
    Moments,
    check_clusters,
    measure_moments,
)
from molora_fed.types import BASE_EXPERT, Progress

if TYPE_CHECKING:
    from molora_fed.bank import Bank, HeldOutBank
    from molora_fed.routing.contract import OutputRouter

__all__ = [
    "Compared",
    "MemberSums",
    "hide_reason",
    "measure_alone",
    "measure_sums",
    "name_difference",
]

_ROUNDING = 1e-3  # of gates that sum to 1 within their dtype's rounding, by token
_TOLERANCE = 1e-6  # of sums in double precision, relative


def name_difference(method: str, other: str) -> str:
    """The column that holds how much more one method costs than another, by cluster."""
    return f"{method} less {other}"


@dataclass(frozen=True)
class Compared:
    """What is measured: coordinator and members agree on it beforehand.

    Attributes:
        experts: The bank's experts in their order, E; the base is named "base".
        routers: Names of the routers.
        baselines: Names of models that are no experts.
    """

    experts: tuple[str, ...]
    routers: tuple[str, ...]
    baselines: tuple[str, ...] = ()

    @property
    def alone(self) -> tuple[str, ...]:
        """Methods that anyone has alone: the base, and each specialist."""
        return _list_alone(self.experts)

    @property
    def others(self) -> tuple[str, ...]:
        """Methods that are compared with each of `alone`."""
        fused = map(name_fused, self.routers)
        return (*self.baselines, "token_oracle", "uniform", *fused)

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods with a column of their own."""
        return (*self.alone, *self.others)

    @property
    def min_clusters(self) -> int:
        """Document clusters that a member must have at least.

        The products of `alone` with `others` follow from the sums. With fewer clusters than columns
        of others (the sizes and the constant are two more), they show a combination of losses that
        is 0 for each of the member's documents: a text could be tested for being one of them.
        """
        return max(MIN_CLUSTERS, len(self.others) + 3)

    @cached_property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Methods whose difference has a column: those that an interval is made of.

        Their number grows with that of the specialists times that of everything else; the
        specialists are not paired with one another.
        """
        fused = [name_fused(name) for name in self.routers]
        pairs = [(one, other) for one in self.alone for other in self.others]
        pairs += [("base", specialist) for specialist in self.alone[1:]]
        pairs += [(one, other) for one in self.baselines for other in fused]
        return tuple(pairs)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""
        return (*self.methods, *(name_difference(*pair) for pair in self.pairs))

    def count_numbers(self) -> int:
        """How many numbers leave a member."""
        return 3 + 3 * len(self.columns) + len(self.routers) * len(self.experts)


def _list_alone(experts: Sequence[str]) -> tuple[str, ...]:
    return ("base", *(name_specialist(name) for name in experts if name != BASE_EXPERT))


@dataclass(frozen=True)
class MemberSums:
    """What a member says of its held-out blocks.

    Attributes:
        domain: Its domain.
        moments: Of all columns.
        gates: Sum over predicted tokens of each expert's gate, (E,) by router.
    """

    domain: str
    moments: Moments
    gates: Mapping[str, tuple[float, ...]]

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads; the domain is known to who asked."""
        gates = {router: list(sums) for router, sums in self.gates.items()}
        return {"moments": self.moments.to_json(), "gates": gates}

    @classmethod
    def from_json(cls, value: Any, compared: Compared, *, domain: str, who: str) -> "MemberSums":
        """Read the answer of a member, who is not trusted.

        Args:
            value: JSON value.
            compared: What was asked for.
            domain: The member's domain.
            who: The member, for errors.

        Raises:
            SumError: If it is malformed, no text could have these sums, or they are of too few
                document clusters.
        """
        try:
            held, said = value["moments"], dict(value["gates"])
            if said.keys() != set(compared.routers):
                raise ValueError(f"gates of {len(said)} routers, of others than asked for")
            gates = {n: _read_gates(said[n], len(compared.experts)) for n in compared.routers}
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise _refuse(who, f"'{str(error)[:80]}'") from error
        moments = Moments.from_json(held, compared.columns, who=who)
        check_clusters(moments.clusters, least=compared.min_clusters, who=who)
        faults = [*_find_wrong_losses(moments, compared), *_find_wrong_gates(moments, gates)]
        if faults:
            raise _refuse(who, "; ".join(faults[:5]))
        return cls(domain, moments, gates)


def _read_gates(value: Any, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"gates that are no list of {count}")
    return tuple(float(gate) for gate in value)


def _find_wrong_losses(moments: Moments, compared: Compared) -> list[str]:
    """Describe columns that contradict one another."""
    columns = moments.columns
    faults = [f"a negative loss of '{m}'" for m in compared.methods if columns[m][0] < 0]
    for pair in compared.pairs:
        name = name_difference(*pair)
        one, other = columns[pair[0]], columns[pair[1]]
        for index in (0, 2):  # the plain sum and the one with the tokens are linear
            scale = abs(one[index]) + abs(other[index])
            if abs(one[index] - other[index] - columns[name][index]) > _TOLERANCE * scale:
                faults.append(f"sums of '{name}' that are not the difference's")
    return faults


def _find_wrong_gates(moments: Moments, gates: Mapping[str, tuple[float, ...]]) -> list[str]:
    slack = _ROUNDING * moments.tokens
    return [
        f"sums of gates of '{router}' that are not of {moments.tokens:.0f} tokens"
        for router, sums in gates.items()
        if not (min(sums) >= 0 and abs(sum(sums) - moments.tokens) <= slack)  # NaN is not
    ]


def _refuse(who: str, got: str) -> SumError:
    return SumError(
        f"Cannot use the evaluation of '{who}': expected sums of all methods and gates that fit "
        f"together, got {got}. Ask that contributor to run the same molora-fed version, or "
        "withdraw it."
    )


def measure_sums(
    bank: "HeldOutBank",
    routers: Mapping[str, "OutputRouter"],
    baselines: Mapping[str, Tensor] | None = None,
    *,
    who: str,
    progress: Progress | None = None,
    watch: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> MemberSums:
    """A member's side: evaluate its own held-out blocks, and say sums of them.

    Args:
        bank: Of its own blocks alone, all of its domain.
        routers: Fitted routers by name.
        baselines: Losses (N, T-1) of models that are no experts, by name.
        who: The member, for errors.
        progress: Receives routers done and in all.
        watch: Gives the context that each router, by its name, is run in.

    Returns:
        `Compared(bank.expert_names, tuple(routers), tuple(baselines)).count_numbers()` numbers.

    Raises:
        SumError: If there are too few document clusters, found before anything is measured, or
            several domains.
        BankError: If it is no held-out bank, or a baseline has another name or shape.
        RoutingError: If a router fails, or does not keep what it promises; the text says which one
            and nothing else, for the reason may hold a figure of one document. It is the cause.
    """
    baselines = baselines or {}
    compared = Compared(bank.expert_names, tuple(routers), tuple(baselines))
    (domain,) = _check_own(bank, compared.min_clusters, who)
    running = ""

    @contextmanager
    def note(name: str) -> Iterator[None]:
        nonlocal running
        running = name
        with watch(name):
            yield

    try:
        found = evaluate(bank, routers, baselines, progress=progress, watch=note)
    except BankError:
        raise
    except (PluginError, RoutingError) as error:
        raise hide_reason(running, who) from error
    losses = {name: found.sums[name] for name in compared.methods}
    more = {name_difference(a, b): losses[a] - losses[b] for a, b in compared.pairs}
    moments = measure_moments(found.clusters.counts, {**losses, **more})
    gates = {
        name: tuple(mean * moments.tokens for mean in found.gates[name][domain].values())
        for name in routers
    }
    return MemberSums(domain, moments, gates)


def hide_reason(router: str, who: str) -> RoutingError:
    """The error for a router that fails on a member's text: it names the router and no reason."""
    return RoutingError(
        f"Cannot evaluate router '{router}' on the text of '{who}': expected gates and losses "
        "as its contract says, got others. The reason may hold a figure of one document and "
        "stays with that contributor: correct the router, or leave it out."
    )


def _check_own(bank: "Bank", least: int, who: str) -> tuple[str, ...]:
    """The bank's one domain, if sums may be said of it."""
    check_clusters(len(np.unique(bank.clusters[:, 1:])), least=least, who=who)
    if len(bank.domains) != 1:
        raise SumError(
            f"Cannot say sums over documents of '{who}': expected blocks of one domain, got "
            f"{', '.join(bank.domains)}. Build the bank from this contributor's blocks alone."
        )
    return bank.domains


def measure_alone(bank: "Bank", *, who: str) -> Moments:
    """A member's side: sums of the losses of the base and of every specialist, for forecasts.

    Args:
        bank: Of its own calibration blocks alone, all of its domain.
        who: The member, for errors.

    Raises:
        SumError: If there are too few document clusters, or several domains.
    """
    _check_own(bank, MIN_CLUSTERS, who)
    index = ClusterIndex.build(bank.clusters, bank.domain_of)
    columns = {"base": index.sum(bank.base_nll().numpy())}
    for expert, name in enumerate(bank.expert_names):
        if name != BASE_EXPERT:
            columns[name_specialist(name)] = index.sum(bank.expert_nll(expert).numpy())
    return measure_moments(index.counts, columns)
