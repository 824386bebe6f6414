"""What a shortlist of experts saves the members of a private fusion, and what it costs.

    python bench/private_shortlist.py demo --work FOLDER --out docs/results/private_shortlist.md

`demo` is a folder of `molora demo`: its base and its texts are used. Each member trains an adapter
on a share of its domain's train text, and holds a share of the domain's other blocks; blocks count
as documents. All members are in this process, of one thread. FOLDER gets adapters and columns;
stopped and called again, it goes on.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from private_cost import watch
from private_fusion import keep_private
from safetensors.torch import load_file

from molora_fed.bank import build_calibration_bank, build_held_out_bank
from molora_fed.charter import AdapterRules, Charter, FusionRules, TrainingRules
from molora_fed.contributions.contributed import Contributed, Entrant
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.evaluation.evaluate import compute_router_losses
from molora_fed.evaluation.moments import estimate, measure_moments
from molora_fed.evaluation.summed_report import SummedEvaluation
from molora_fed.fusion.fuse import fuse_texts
from molora_fed.fusion.local_members import LocalMembers, drop_text
from molora_fed.fusion.plan import FusionPlan, plan_fusion
from molora_fed.fusion.private_answers import FusionMember
from molora_fed.fusion.private_texts import Check, PrivateTexts
from molora_fed.fusion.shortlist import (
    CHOICE_BLOCKS,
    COST_BLOCKS,
    choose_blocks,
    choose_experts,
)
from molora_fed.fusion.sum_questions import HELD_OUT, SumQuestion, TextCounts
from molora_fed.fusion.sum_rounds import SumRounds
from molora_fed.models.base import Base
from molora_fed.plugins import get_plugins
from molora_fed.privacy.sums.vectors import Total
from molora_fed.routing.contract import OutputRouter
from molora_fed.storage.files import hash_bytes, write_bytes, write_json
from molora_fed.training.specialists import train_specialist
from molora_fed.types import BASE_EXPERT, Split

RULES = FusionRules(compare=("evidence", "evidence-zero"), merges=())
TRAINING = TrainingRules(kind="svd", rank=64, steps=150, batch=4, validate_every=75)
BLOCKS = {Split.CALIBRATION: 48, Split.HELD_OUT: 48}
WHOLE = {Split.CALIBRATION: 150, Split.HELD_OUT: 160}  # of the member whose seconds are taken
SIZES = (4, 8)
CHOICES = (4, 8, BLOCKS[Split.CALIBRATION])
DRAWS = 400
COSTS = (4, 8, 16, 32)
TOKENS = 127.0  # predicted in a block
Costs = dict[str, list[NDArray[np.float64]]]


class Keeping(LocalMembers):
    """Members that keep the rounds of their fusion, and compare no text."""

    rounds: SumRounds

    def _compare(self) -> dict[str, TextCounts]:
        return self._counts  # all held-out blocks count: what others trained on is not the matter

    def add_up(self, question: SumQuestion, rounds: SumRounds, check: Check) -> Total:
        """See `Members`."""
        self.rounds = rounds
        return super().add_up(question, rounds, check)


@dataclass(frozen=True, eq=False)
class Table:
    """Base, charter and everybody's blocks and adapters.

    Attributes:
        base: Of the demo.
        charter: Of a private fusion with robust sums.
        contributions: With their samples.
        folder: Gets everything that is made.
        gains: What each adapter takes off its domain's validation loss, nats.
    """

    base: Base
    charter: Charter
    contributions: Sequence[Contributed]
    folder: Path
    gains: Sequence[float]

    @property
    def experts(self) -> list[Entrant]:
        """What everybody gets."""
        return [drop_text(one) for one in self.contributions]

    def limit(self, size: int | None) -> Charter:
        """The charter with a shortlist of so many."""
        rules = self.charter.amendment.fusion.model_copy(update={"shortlist": size})
        amendment = self.charter.amendment.model_copy(update={"fusion": rules})
        return self.charter.model_copy(update={"amendment": amendment})

    def fuse(self, size: int | None) -> tuple[dict[str, Any], Keeping]:
        """A private fusion of all members."""
        charter, plugins = self.limit(size), get_plugins()
        asked = Keeping.open(
            self.base, charter, self.contributions, self.experts, self.folder / "members",
            plugins=plugins,
        )  # fmt: skip
        out = self.folder / f"fused-{size}"
        texts = PrivateTexts(self.experts, asked)
        return fuse_texts(self.base, charter, texts, out, plugins=plugins).result, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of `molora demo`")
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--work", type=Path, required=True, help="gets adapters and columns")
    parser.add_argument("--out", type=Path, default=Path("docs/results/private_shortlist.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = arguments.out.with_suffix(".json")
    found: dict[str, Any] = json.loads(kept.read_bytes()) if kept.is_file() else {}
    table = open_table(arguments.demo, arguments.members, arguments.work)
    steps: dict[str, Callable[[], Any]] = {
        "fusions": partial(compare_fusions, table),
        "seconds": partial(measure_seconds, table, arguments.demo),
        "choices": partial(compare_choices, table),
    }
    found |= {"members": arguments.members, "gains": [min(table.gains), max(table.gains)]}
    found |= {"blocks": {str(s): n for s, n in BLOCKS.items()}}
    for name, step in steps.items():
        if name not in found:
            found[name] = step()
            write_json(kept, found)
            print(name, json.dumps(found[name]), flush=True)
    write_bytes(arguments.out, build_page(found).encode())


def open_table(demo: Path, count: int, folder: Path) -> Table:
    """Train what is not trained yet, and cut everybody's blocks."""
    cooperative = open_cooperative(demo / "cooperative")
    base = cooperative.load_base()
    amendment = cooperative.charter.amendment.model_copy(update={"fusion": RULES})
    charter = cooperative.charter.model_copy(update={"amendment": amendment})
    texts = sorted((demo / "contributors").glob("*/corpus"))
    made, gains = [], []
    for number in range(count):
        corpus, share = texts[number % len(texts)], number // len(texts)
        name = f"member-{number:02d}"
        train = load_blocks(corpus / "train.safetensors")
        specialist = train_specialist(
            base,
            train.select(slice(share, None, -(-count // len(texts)))),
            load_blocks(corpus / "validation.safetensors").take(64),
            kind=TRAINING.kind,
            rules=AdapterRules(),
            training=TRAINING,
            seed=number,
            threads=1,
            folder=folder / "adapters" / name,
        )
        gains.append(specialist.base_loss - specialist.loss)
        cut = {split: take(corpus, split, share, BLOCKS[split]) for split in BLOCKS}
        made.append(
            Contributed(
                id=hash_bytes(name.encode()),
                contributor=name,
                domain=corpus.parent.name,
                adapter=specialist.adapter_folder,
                calibration=cut[Split.CALIBRATION],
                held_out=cut[Split.HELD_OUT],
            )
        )
    ordered = sorted(made, key=lambda one: one.id)
    return Table(base, keep_private(charter, "robust"), ordered, folder, gains)


def take(corpus: Path, split: Split, share: int, count: int) -> Blocks:
    """A share of a split's blocks, each a document of its own."""
    blocks = load_blocks(corpus / f"{split}.safetensors").select(
        slice(share * count, (share + 1) * count)
    )
    each = np.repeat(np.arange(len(blocks), dtype=np.int32)[:, None], blocks.block_size, axis=1)
    return replace(blocks, documents=each, clusters=each)


def compare_fusions(table: Table) -> dict[str, Any]:
    """Fusions with shortlists beside the one with all columns."""
    whole, everybody = table.fuse(None)
    rows = {"all": {"losses": read_losses(whole)}}
    for size in SIZES:
        short, asked = table.fuse(size)
        (question,) = [one for one in asked.questions if one.place == HELD_OUT]
        rows[str(size)] = {
            "losses": read_losses(short),
            # The routers of the shortlists, asked of members that have all columns.
            "true": ask_whole(everybody, question),
            "said": short["sums"]["shortlist"],
        }
    return rows


def read_losses(result: Mapping[str, Any]) -> dict[str, float]:
    """Equal-weight loss of every router, and of the base."""
    names = ["base", *(f"fused:{name}" for name in result["losses"]["fused"])]
    return {name: result["equal_weight"][name]["point"] for name in names}


def ask_whole(everybody: Keeping, question: SumQuestion) -> dict[str, float]:
    """Loss of some routers on all members' held-out blocks, all columns there."""
    total = everybody.add_up(question, everybody.rounds, lambda parts, members: None)
    said = everybody.rounds.unpack_held_out(total.parts, question.routers, total.members)
    found = SummedEvaluation.add(everybody.rounds.compare(question.routers), said)
    return {f"fused:{name}": found.equal_weight(f"fused:{name}") for name in question.routers}


def compare_choices(table: Table) -> dict[str, Any]:
    """Ways to choose a shortlist, by what the router fitted without any loses by the stand-ins."""
    plan = plan_fusion(table.base, table.charter, table.experts, get_plugins())
    kind, options = plan.routers[plan.router]
    state = load_file(table.folder / "fused-None" / "fused" / "router.safetensors")
    router = kind(len(plan.experts), options, state)
    rows: dict[str, Any] = {}
    coverage: dict[str, Any] = {}
    for size in SIZES:
        best = choose_by_blocks(table, plan, size, BLOCKS[Split.CALIBRATION])
        ways = {
            **{str(n): choose_by_blocks(table, plan, size, n) for n in CHOICES},
            "means": choose_by_means(table, plan, size),
        }
        for way, chosen in ways.items():
            costs = measure_costs(table, plan, chosen, router)
            same = [len(mine & theirs) / size for mine, theirs in zip(chosen, best, strict=True)]
            rows[f"{size} {way}"] = {"cost": average(costs), "agreeing": float(np.mean(same))}
            print(size, way, rows[f"{size} {way}"], flush=True)
            if way == str(CHOICE_BLOCKS):
                coverage[str(size)] = draw_costs(costs)
    return {"ways": rows, "coverage": coverage}


def choose_by_blocks(table: Table, plan: FusionPlan, size: int, count: int) -> list[frozenset[str]]:
    """By losses on so many calibration blocks, as members do."""
    found = []
    for one in table.contributions:
        assert one.calibration is not None
        some = choose_blocks(one.calibration, count)
        bank = build_calibration_bank(
            bank_folder(table, one), table.base, plan.experts, [some], **plan.bank
        )
        found.append(choose_experts(bank, size, one.contributor))
    return found


def choose_by_means(table: Table, plan: FusionPlan, size: int) -> list[frozenset[str]]:
    """By the distance of the means of the base's states, which everybody would publish."""
    means = []
    for one in table.contributions:
        assert one.calibration is not None
        bank = build_calibration_bank(
            bank_folder(table, one), table.base, plan.experts[:1], [one.calibration],
            **{**plan.bank, "readings": frozenset({"base_hidden"})},
        )  # fmt: skip
        assert bank.base_hidden is not None
        means.append(bank.base_hidden.double().mean(dim=(0, 1)))
    names = [one.contributor for one in table.contributions]
    found = []
    for own in range(len(names)):
        far = torch.stack([(means[own] - other).norm() for other in means])
        nearest = [names[index] for index in far.argsort(stable=True).tolist()]
        found.append(frozenset([BASE_EXPERT, *nearest][:size]))
    return found


def bank_folder(table: Table, one: Contributed) -> Path:
    """Where a member of `Table.fuse` keeps its columns."""
    return table.folder / "members" / one.contributor / "bank"


def measure_costs(
    table: Table, plan: FusionPlan, chosen: Sequence[frozenset[str]], router: OutputRouter
) -> Costs:
    """What a router loses by stand-ins on every held-out block, nats per token, by domain."""
    costs: Costs = {}
    for one, mine in zip(table.contributions, chosen, strict=True):
        others = [expert.name for expert in plan.experts if expert.name not in mine]
        more, less = (
            compute_router_losses(
                build_held_out_bank(
                    bank_folder(table, one), table.base, plan.experts, [one.held_out],
                    stand_ins=names, **plan.bank,
                ),
                router,
            ).nll
            for names in (others, ())
        )  # fmt: skip
        costs.setdefault(one.domain, []).append((more.double() - less.double()).mean(1).numpy())
    return costs


def average(costs: Costs) -> float:
    """Equal weight over domains."""
    return float(np.mean([np.mean(parts) for parts in costs.values()]))


def draw_costs(costs: Costs) -> dict[str, Any]:
    """How often the interval of a cost from a few blocks holds the cost on all of them."""
    true, draw = average(costs), np.random.default_rng(0)
    rows = {}
    for count in COSTS:
        held, widths = 0, []
        for _ in range(DRAWS):
            moments = []
            for parts in costs.values():
                some = np.concatenate([draw.choice(each, count, replace=False) for each in parts])
                moments.append(measure_moments(np.full(len(some), TOKENS), {"cost": some * TOKENS}))
            found = estimate(moments, ["cost"] * len(moments))
            held += found["low"] <= true <= found["high"]
            widths.append((found["high"] - found["low"]) / 2)
        rows[str(count)] = {"covered": held / DRAWS, "half_width": float(np.mean(widths))}
    return {"true": true, "draws": rows}


def measure_seconds(table: Table, demo: Path) -> dict[str, Any]:
    """Processor seconds of one member with as much text as members have by default."""
    first = table.contributions[0]
    corpus = demo / "contributors" / first.domain / "corpus"
    blocks = {split: take(corpus, split, 0, count) for split, count in WHOLE.items()}
    rows = {}
    for size in (None, *SIZES):
        charter, plugins = table.limit(size), get_plugins()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            member = FusionMember(
                table.base, charter, blocks, None, table.experts,
                name=first.contributor, folder=folder, plugins=plugins,
            )  # fmt: skip
            spent = {first.contributor: 0.0}
            texts = PrivateTexts(
                table.experts, Keeping(charter, watch({first.contributor: member}, spent))
            )
            fuse_texts(table.base, charter, texts, folder / "here", plugins=plugins)
        rows[str(size or "all")] = spent[first.contributor]
    return rows


def build_page(found: Mapping[str, Any]) -> str:
    """The page of results."""
    every = found["members"] + 1
    blocks, seconds = found["blocks"], found["seconds"]
    fusions, choices = found["fusions"], found["choices"]
    whole, (least, most) = fusions["all"]["losses"], found["gains"]
    lines = [
        "# Shortlists of experts in a private fusion",
        "",
        "`python bench/private_shortlist.py demo --work FOLDER`; "
        f"{found['members']} members in four domains, {every} experts: an adapter each, kind "
        f"`{TRAINING.kind}` of rank {TRAINING.rank}, {TRAINING.steps} steps on a share of its "
        f"domain's train text, which took {least:.3f} to {most:.3f} nats off "
        f"its domain's validation loss. A member holds {blocks['calibration']} calibration and "
        f"{blocks['held-out']} held-out blocks, which count as documents. Losses in nats per "
        "token, equal weight over domains; one training, so differences below some thousandths "
        "say little.",
        "",
        "## What it saves",
        "",
        f"One member with {WHOLE[Split.CALIBRATION]} calibration and {WHOLE[Split.HELD_OUT]} "
        f"held-out blocks; all experts run on {CHOICE_BLOCKS} of the ones and {COST_BLOCKS} of the "
        "others. Processor seconds of one thread, answers to all questions included.",
        "",
        "| | blocks run through an expert | of all | seconds |",
        "|---|---:|---:|---:|",
    ]
    total = sum(WHOLE.values())
    for size in ("all", *map(str, SIZES)):
        runs = every * total
        if size != "all":
            runs = int(size) * total + every * (CHOICE_BLOCKS + COST_BLOCKS)
        lines.append(
            f"| {name_size(size, every)} | {runs:,} | {runs / (every * total):.0%} | "
            f"{seconds[size]:.1f} |"
        )
    lines += [
        "",
        "## What it costs",
        "",
        f"*True*: the router that was fitted with shortlists, on all columns, as the fused model "
        f"runs; the base alone has {whole['base']:.4f}. *In the report*: the same router where "
        "the base stands in. *Said*: what the report says of their difference.",
        "",
        "| router | shortlist | true | more than without | in the report | less true "
        "| said, with its interval |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for method in (name for name in whole if name != "base"):
        router = method.removeprefix("fused:")
        lines.append(f"| `{router}` | none | {whole[method]:.4f} | | {whole[method]:.4f} | | |")
        for size in map(str, SIZES):
            row = fusions[size]
            true, said = row["true"][method], row["said"]["cost_nats"][router]
            lines.append(
                f"| | {size} | {true:.4f} | {true - whole[method]:+.4f} | "
                f"{row['losses'][method]:.4f} | {row['losses'][method] - true:+.4f} | "
                f"{said['point']:+.4f} [{said['low']:+.4f}, {said['high']:+.4f}] |"
            )
    lines += [
        "",
        "## How experts are chosen",
        "",
        "What the published router, fitted with all columns, loses where the base stands in, nats "
        "on all held-out blocks, by the way shortlists were chosen; and the share of each "
        f"shortlist that is on the one from all {blocks['calibration']} calibration blocks. "
        "*Means*: the nearest means of the base's states over calibration text, which every "
        "member would have to publish.",
        "",
        "| chosen by | " + " | ".join(f"{size}: cost | agreeing" for size in SIZES) + " |",
        "|---|" + "---:|---:|" * len(SIZES),
    ]
    for way in (*map(str, CHOICES), "means"):
        cells = [choices["ways"][f"{size} {way}"] for size in SIZES]
        text = " | ".join(f"{one['cost']:+.4f} | {one['agreeing']:.0%}" for one in cells)
        lines.append(f"| {way if way == 'means' else f'{way} blocks'} | {text} |")
    lines += [
        "",
        "## Whether the interval holds what it should",
        "",
        f"{DRAWS} draws of so many held-out blocks of each member: how often the interval of the "
        "published router's cost holds the cost on all of them, and half its width. Blocks are "
        f"drawn from {blocks['held-out']} without replacement, so that more is covered than would "
        "be of new text.",
        "",
        "| blocks a member | " + " | ".join(f"{s}: covered | half width" for s in SIZES) + " |",
        "|---|" + "---:|---:|" * len(SIZES),
    ]
    for count in map(str, COSTS):
        rows = [choices["coverage"][str(size)]["draws"][count] for size in SIZES]
        text = " | ".join(f"{one['covered']:.1%} | {one['half_width']:.4f}" for one in rows)
        lines.append(f"| {count} | {text} |")
    return "\n".join([*lines, ""])


def name_size(size: str, every: int) -> str:
    return f"all {every} experts" if size == "all" else f"shortlist of {size}"


if __name__ == "__main__":
    main()
