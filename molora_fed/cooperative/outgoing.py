"""Everything that leaves a contributor's machine under a charter: in rows, and in plain words.

The one list that is shown before anybody agrees, and after a contribution was made.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from molora_fed.bank import Expert
from molora_fed.bank.adapters import make_up_adapters
from molora_fed.charter import MIN_MEMBERS, Charter, FusionRules
from molora_fed.contributions.build import (
    MAX_FIGURES_BYTES,
    OutgoingRow,
    describe_contribution,
)
from molora_fed.contributions.carried import check_makers
from molora_fed.contributions.manifest import Manifest
from molora_fed.fusion.claims import MAX_MEASURERS
from molora_fed.fusion.plan import BASE_EXPERT, FusionPlan, build_routers
from molora_fed.fusion.published_rounds import plan_rounds
from molora_fed.fusion.shortlist import CHOICE_BLOCKS, COST_BLOCKS
from molora_fed.fusion.sum_questions import HELD_OUT, LOSSES, MAX_FUSIONS, TextCounts
from molora_fed.fusion.sum_rounds import SUM_BITS, SumRounds
from molora_fed.models.base_config import MAX_LAYERS, read_config
from molora_fed.models.hidden_statistics import (
    MIN_CLUSTERS,
    TOKENS_PER_WIDTH,
    compute_statistics_bytes,
    count_statistics,
)
from molora_fed.plugins import Plugins
from molora_fed.privacy.messages import (
    BATCH,
    MAX_QUERY_BATCHES,
    MAX_QUERY_BYTES,
    MAX_REPLY_BYTES,
    MAX_SET_BYTES,
)
from molora_fed.privacy.sums.messages import measure_phases
from molora_fed.storage.files import canonical_json
from molora_fed.storage.untrusted import clean

__all__ = ["Outgoing", "describe_outgoing", "read_width"]

WIDEST = 16_384
"""Width of the hidden states that is taken where the base is not known: no base in use is wider."""
_LARGEST_COUNT = 2**40
_FILE_BYTES = 256  # of an answer's small files, and the header of its tensors
_COUNTED = 10  # numbers of `TextCounts`
_SETTING = 300  # characters of a sentence about a router's or merge's options
_CLAIM_BYTES = 256  # of what is said of another member's adapter


@dataclass(frozen=True)
class Outgoing:
    """What is sent, and what can be told from it.

    Attributes:
        rows: Each thing that is sent; nothing else is, but names, keys, signatures and progress.
        told: A sentence or two each, for people.
    """

    rows: tuple[OutgoingRow, ...]
    told: tuple[str, ...]


def describe_outgoing(
    charter: Charter, plugins: Plugins, *, manifest: Manifest | None = None, width: int | None
) -> Outgoing:
    """List what a contributor sends, to be shown before anything is sent.

    Args:
        charter: The cooperative's charter.
        plugins: Where routers are registered.
        manifest: Of the contribution, for exact figures; the most that the charter allows if None.
        width: D of the base (`read_width`); None where the base is not known yet.

    Raises:
        CharterError: If options of the charter's routers are wrong.
        ConfigError: If a plugin is missing here that computes what contributions carry.
        UnknownNameError: If nobody registers one of them: this side could not answer.
        PluginError: If the plugin of the published router fails.
    """
    if manifest is None:
        check_makers(charter, plugins)
    rows = describe_contribution(charter if manifest is None else manifest)
    widest = WIDEST if width is None else width
    if charter.publishes_statistics:
        rows.append(_describe_statistics(manifest, widest))
    if charter.is_summed:
        members, domains = _expect_members(charter)
        rows += _list_sums(charter, plugins, members, domains, widest)
        told = _tell_sums(charter, members, domains, is_known=width is not None)
    elif charter.is_private:
        rows += _list_evolution(charter)
        told = _TOLD_BY_EVOLUTIONS
    else:
        told = _TOLD_BY_SAMPLES
    published = _TOLD_BY_STATISTICS if charter.publishes_statistics else ()
    carried = (_TOLD_BY_CARRIED,) if charter.amendment.fusion.carried else ()
    return Outgoing(tuple(rows), (*published, *told, _TOLD_BY_ADAPTERS, *carried))


def read_width(folder: Path) -> int:
    """D of the base whose `config.json` lies in a folder.

    Raises:
        BaseCheckpointError: If it is missing, malformed or out of bounds.
    """
    config = read_config(folder, MAX_LAYERS, f"Cannot read the config of the base in '{folder}'")
    return int(config.hidden_size)


def _describe_statistics(manifest: Manifest | None, width: int) -> OutgoingRow:
    """What is published of hidden states, once, with the adapter."""
    made = None if manifest is None else manifest.statistics_file
    return OutgoingRow(
        "statistics of the base's hidden states, calibration text",
        0, 0, compute_statistics_bytes(width) if made is None else made.bytes,
        exact=made is not None, numbers=count_statistics(width),
    )  # fmt: skip


def _expect_members(charter: Charter) -> tuple[int, int]:
    """Members and domains that figures are stated for; more join later."""
    amendment = charter.amendment
    least = MIN_MEMBERS if charter.identity.summing == "masked" else 2
    members = max(least, amendment.expected, len(amendment.domains))
    return members, len(amendment.domains) or members


def _list_sums(
    charter: Charter, plugins: Plugins, members: int, domains: int, width: int
) -> Iterator[OutgoingRow]:
    """What one fusion asks for, place by place."""
    rounds = _plan_rounds(charter, plugins, members, domains, width)
    is_masked = charter.identity.summing == "masked"
    counts = len(json.dumps(_stand_in(members, "").model_dump(mode="json"), indent=2))
    yield OutgoingRow(
        "counts of your text: tokens, blocks, word 8-grams",
        0, 0, counts + _FILE_BYTES, exact=False, numbers=_COUNTED,
    )  # fmt: skip
    yield OutgoingRow(
        f"losses of up to {MAX_MEASURERS} others' adapters and the base, each on your text",
        0, 0, MAX_MEASURERS * _CLAIM_BYTES, exact=False, numbers=3, times=MAX_MEASURERS,
    )  # fmt: skip
    yield OutgoingRow("your held-out 8-grams, blinded", 0, 0, MAX_QUERY_BYTES, exact=False)
    yield OutgoingRow("your train 8-grams, as tags under a key", 0, 0, MAX_SET_BYTES, exact=False)
    yield OutgoingRow(
        "others' blinded 8-grams under your key", 0, 0, MAX_REPLY_BYTES, exact=False,
        times=max(1, members - 1),
    )  # fmt: skip
    way = "masked sums" if is_masked else "sums"
    for what, numbers, times in _group_places(rounds.limits, rounds.count_cost()):
        size = numbers * (SUM_BITS // 8) + _FILE_BYTES
        yield OutgoingRow(f"{way}, {what}", 0, 0, size, exact=False, numbers=numbers, times=times)
    if is_masked:
        size = sum(measure_phases(members).values()) + 4 * _FILE_BYTES
        what = "keys, sealed shares and signatures of each masked sum"
        yield OutgoingRow(what, 0, 0, size, exact=False, times=len(rounds.limits))


def _group_places(limits: dict[str, int], cost: int) -> Iterator[tuple[str, int, int]]:
    """Places that follow each other and ask for equally many numbers: what, numbers, how often."""
    if LOSSES in limits:
        yield "losses of base and adapters, calibration text", limits[LOSSES], 1
    first = [(place, n) for place, n in limits.items() if place.split(" ")[1:2] == ["0"]]
    fits = [(place, n) for place, n in first if place.startswith("fit")]
    for numbers, group in groupby(fits, key=lambda one: one[1]):
        turns = [int(place.split(" ")[2]) + 1 for place, _ in group]
        each = f"rounds {turns[0]} to {turns[-1]}" if len(turns) > 1 else f"round {turns[0]}"
        also = " (and calibration losses)" if turns[0] == 1 else ""
        yield f"fit of the routers, {each}{also}", numbers, len(turns)
    for _, numbers in first[len(fits) :]:
        yield "losses of the fitted routers, calibration text", numbers, 1
    for kind, what in (("fit", "fitted again"), ("judge", "losses after it")):
        again = sorted(n for p, n in limits.items() if p.startswith(kind) and p.split()[1] != "0")
        for numbers, same in groupby(again):
            yield f"only if a router loses a domain, {what}", numbers, len(list(same))
    also = f" (and {cost} numbers: what your shortlist loses)" if cost else ""
    yield f"losses and gates, held-out text{also}", limits[HELD_OUT], 1


def _plan_rounds(
    charter: Charter, plugins: Plugins, members: int, domains: int, width: int
) -> SumRounds:
    """The rounds of a fusion of members that nobody knows yet."""
    names = [f"member-{number}" for number in range(members)]
    base = [BASE_EXPERT] if charter.amendment.fusion.base_expert else []
    failed: dict[str, str] = {}
    plan = FusionPlan(
        charter=charter,
        contributions=(),
        experts=tuple(Expert(name, None) for name in (*base, *names)),
        adapters=make_up_adapters([*base, *names], width),
        router=charter.amendment.fusion.router,
        routers=build_routers(charter, plugins, on_failed=failed.__setitem__),
        failed=failed,
        bank={"mixture": charter.amendment.fusion.mixture},
        plugins=plugins,
    )
    counts = {
        name: _stand_in(members, f"domain-{number % domains}") for number, name in enumerate(names)
    }
    return plan_rounds(plan, width, counts, seed=charter.amendment.seed)


def _stand_in(members: int, domain: str) -> TextCounts:
    """Counts as long as any can be."""
    most = _LARGEST_COUNT
    names = [f"{number:063d}" for number in range(members)]
    return TextCounts(
        domain=domain or "0" * 63, tokens=most, blocks=most, left_out=most, empty=most,
        grams=most, own=most, union=most, base=most, kept=most, after=most, compared=names,
    )  # fmt: skip


def _list_evolution(charter: Charter) -> Iterable[OutgoingRow]:
    slots = charter.amendment.population.slots or _expect_members(charter)[0]
    adapted = slots * charter.identity.adapters.max_bytes
    yield OutgoingRow("adapted population, every round", 0, 0, adapted, exact=False)
    figures = "sums over documents, every generation"
    yield OutgoingRow(figures, 0, 0, MAX_FIGURES_BYTES, exact=False)


_TOLD_BY_ADAPTERS = (
    "The adapter goes to the coordinator, and with the result to every member. What an adapter "
    "remembers of the text it was trained on can be looked for in it."
)
_TOLD_BY_CARRIED = (
    "Carried files are computed here, by plugins that you installed, from your adapter and your "
    "train and validation text. They go where the adapter goes. What is in them, and what it tells "
    "of your text, their plugins decide; nobody else looks for it."
)
_TOLD_BY_SAMPLES = (
    "The coordinator can read the samples. Train text that is not in a sample stays here.",
)
_TOLD_BY_STATISTICS = (
    "Statistics of the base's hidden states are published once, with the adapter: the coordinator "
    "and every member get them. They are the number, the mean and the covariance of the states of "
    "all your calibration tokens, and nothing of single documents. They tell what the text is "
    "about, as an average.",
    f"They are over {TOKENS_PER_WIDTH} tokens at least for each number of a hidden state, of "
    f"{MIN_CLUSTERS} documents at least: the covariance of fewer would span the states of your "
    "tokens. No noise is added, and who has them keeps them: routers can be made from them in "
    "fusions that you take no part in.",
)
_TOLD_BY_EVOLUTIONS = (
    "No text and no token ids leave. Sums are over four document clusters at least; they are your "
    "own figures, which the coordinator sees.",
    "Adapted populations are trained on your text, and may remember it as an adapter may.",
)


def _tell_settings(rules: FusionRules) -> Iterator[str]:
    """What is measured with options of the charter, as the charter has them."""
    for what, chosen in (("Router", rules.routers.values()), ("Merge", rules.merges)):
        for one in chosen:
            if not one.is_plain:
                called = f"'{one.key}'" + (f", which is '{one.name}'," if one.label else "")
                options = canonical_json(one.options).decode()
                yield clean(f"{what} {called} has the charter's options {options}.", _SETTING)


def _tell_sums(charter: Charter, members: int, domains: int, *, is_known: bool) -> Sequence[str]:
    known = "" if is_known else f", and a base of width {WIDEST:,} at most"
    ways = {
        "masked": (
            f"Your sums are masked: only totals over {MIN_MEMBERS} members at least are opened. A "
            "total says what it says of its members together: if all others worked with the "
            "coordinator, what is left is yours.",
            "Numbers that are kept by domain (losses, gates, numbers and sizes of documents) are "
            f"its members' own figures, in the total too, where fewer than {MIN_MEMBERS} share it.",
        ),
        "robust": (
            "The coordinator sees your sums by themselves, one vector each time, and can tell "
            "them from the others'. Other members see none.",
        ),
    }
    summed = "losses and of gates"
    if not charter.publishes_statistics:
        summed = "losses, of gates, and for some routers of hidden states"
    size = charter.amendment.fusion.shortlist
    shortlist: tuple[str, ...] = ()
    if size is not None:
        shortlist = (
            f"You measure {size} experts on all of your text where there are more, and choose them "
            f"at home, on {CHOICE_BLOCKS} calibration blocks. Whoever sees your losses sees which "
            "they are, for the others' are the base's. What fused models lose by it is told as "
            f"sums over {COST_BLOCKS} of your held-out blocks.",
        )
    return (
        "No text, no token ids and no value of a single document, block or token leave. Sums are "
        "over all of your calibration or held-out text, four document clusters at least: of "
        f"{summed}.",
        *_tell_settings(charter.amendment.fusion),
        *ways[charter.identity.summing],
        *shortlist,
        f"Up to {MAX_MEASURERS} times the coordinator is told the mean losses of the base and of "
        "another member's adapter on your calibration text, and its number of documents: yours "
        "alone, whatever the way of summing. You are drawn for it by a hash.",
        "To leave out held-out text that somebody trained on, members compare 8-grams without "
        "showing them. Any member may test, once a fusion, up to "
        f"{MAX_QUERY_BATCHES * BATCH:,} runs of eight words against your train and "
        "calibration text; it fixes them before it is known who takes part, and learns yes or no. "
        "The coordinator is told how many of your held-out blocks lie in known text.",
        "No noise is added: whoever has all of a sum's text but one document can compute that "
        "document's part of it.",
        f"Each sum is asked for once a fusion, held-out text too. You take part in {MAX_FUSIONS} "
        "fusions at most under one amendment, one whenever members come or go; another amendment "
        "begins a new count. What is asked beyond is refused, and noted in "
        "private/refusals.jsonl.",
        "Losses and gates by domain are in the report, which every member gets.",
        f"Sizes are for one fusion of {members} members in {domains} domains{known}; more members "
        "make larger sums.",
        "The manifest states the losses of base and adapter on your validation text.",
    )
