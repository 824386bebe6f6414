"""Attacks on a federation that was captured: on totals of any size, and on those it really has.

The latter are read from the coordinator's home, where a private fusion keeps what it was told: sums
over calibration documents of the losses of base and specialists, and over held-out documents of
those of all that is compared. What an attacker lacks is the figures of each document; it computes
those of candidates and of other documents of the domain itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from traffic_attack import build_features, match_tokens, try_documents, try_tokens, try_total
from traffic_capture import BLOCK, MEMBERS, SAMPLES, Captured, draw_documents
from traffic_needles import build_bank

from molora_fed.adapters.compatibility import applied
from molora_fed.bank import Bank, HeldOutBank
from molora_fed.charter import Charter, load_charter
from molora_fed.corpus.blocks import Blocks, pack_documents
from molora_fed.evaluation.bootstrap import ClusterIndex
from molora_fed.evaluation.composition import name_specialist
from molora_fed.evaluation.evaluate import evaluate
from molora_fed.evaluation.summed import Compared, name_difference
from molora_fed.federation.sum_letters import read_tensors
from molora_fed.fusion.boundary import label_merge
from molora_fed.routing.fused import FusedModel
from molora_fed.types import BASE_EXPERT, Document, Split

__all__ = ["attack"]

COUNTS = (1, 2, 4, 8, 16)
"""Documents or blocks in a total that is attacked; one is what nobody may be told."""
BLOCKS = 32
"""Of a member's held-out text, all in one total; tokens are looked for in that, too."""
REFERENCE = 600
"""Documents of a domain that an attacker is granted."""
ALONE, MOMENTS = "alone", "moments"


@dataclass(frozen=True)
class Told:
    """What a fusion told of one domain.

    Attributes:
        alone: Sums over calibration documents, see `read_told`.
        moments: Sums over held-out documents.
    """

    alone: dict[str, float]
    moments: dict[str, float]


def read_told(server: Path, charter: Charter, experts: Sequence[str]) -> dict[str, Told]:
    """Totals of each domain in a coordinator's home; empty where there are none, as in `pooled`.

    Args:
        server: The home.
        charter: The cooperative's.
        experts: The bank's experts in their order, with the base's name where it is one.

    Returns:
        By domain: "clusters", "n", "nn", and "x NAME", "xx NAME", "xn NAME" of each column.
    """
    alone = ("base", *(name_specialist(name) for name in experts if name != BASE_EXPERT))
    fusion = charter.amendment.fusion
    routers = (fusion.router, *(one.key for one in fusion.compare))
    compared = Compared(tuple(experts), routers, tuple(map(label_merge, fusion.merges)))
    columns = {ALONE: alone, MOMENTS: compared.columns}
    found: dict[str, dict[int, dict[str, float]]] = {}
    for path in sorted(server.glob("private/fusion/*/*/total.safetensors")):
        parts = read_tensors(path)
        for kind, names in columns.items():
            if f"{kind}.x" in parts:
                found[kind] = _read_total(parts, kind, names)
    domains = sorted(charter.amendment.domains)
    return {
        domain: Told(found[ALONE][row], found[MOMENTS][row])
        for row, domain in enumerate(domains)
        if found
    }


def _read_total(
    parts: Mapping[str, Any], kind: str, names: Sequence[str]
) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for row, (clusters, tokens) in enumerate(parts[f"{kind}.n"].tolist()):
        rows[row] = {"clusters": clusters, "n": tokens, "nn": float(parts[f"{kind}.nn"][row, 0])}
        for sums in ("x", "xx", "xn"):
            values = parts[f"{kind}.{sums}"][row].tolist()
            rows[row] |= {f"{sums} {n}": value for n, value in zip(names, values, strict=True)}
    return rows


def _measure(bank: Bank, fused: FusedModel, wanted: Mapping[str, float]) -> dict[str, Any]:
    """What of each document goes into a total, as far as the attacker can compute it.

    Args:
        bank: Of the documents, M.
        fused: What was published.
        wanted: The total, by name.

    Returns:
        (M,) by the same names.
    """
    index = ClusterIndex.build(bank.clusters, bank.domain_of)
    n = index.counts.astype(np.float64)
    if isinstance(bank, HeldOutBank):
        methods = evaluate(bank, {fused.router_name: fused.router}).sums
    else:
        methods = {"base": index.sum(bank.base_nll().numpy())}
        for expert, name in enumerate(bank.expert_names):
            if name != BASE_EXPERT:
                methods[name_specialist(name)] = index.sum(bank.expert_nll(expert).numpy())
    columns = {**methods}
    for one, other in permutations(methods, 2):
        columns[name_difference(one, other)] = methods[one] - methods[other]
    found = {"n": n, "nn": n**2}
    for name, x in columns.items():
        found |= {f"x {name}": x, f"xx {name}": x**2, f"xn {name}": x * n}
    return {name: values for name, values in found.items() if name in wanted}


def attack_told(
    told: Told,
    fused: FusedModel,
    blocks: Mapping[Split, Blocks],
    fresh: Blocks,
    folder: Path,
    *,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Whether the totals name a document that is in them, of ten.

    Args:
        told: Totals of the member's domain, which it is alone in.
        fused: What was published.
        blocks: The member's.
        fresh: Of documents of the domain that it does not have.
        folder: Where banks are built.
        batch: Blocks per forward pass, the charter's.
        seed: Of the draws.

    Returns:
        By split: documents and numbers of the total, how many of them the attacker can compute of
        a document, how far these are at most from the sums of the member's own documents, as a
        share, and `try_total`'s rates.
    """
    found: dict[str, Any] = {}
    totals = {Split.CALIBRATION: told.alone, Split.HELD_OUT: told.moments}
    for split, total in totals.items():

        def measure(part: Blocks, split: Split = split, total: Any = total) -> dict[str, Any]:
            same = replace(part, split=split)  # measured as the documents of the total were
            return _measure(build_bank(fused, same, folder, batch=batch), fused, total)

        inside = measure(blocks[split].take(SAMPLES[split]))
        other = next(one for one in totals if one != split)
        outside = measure(blocks[other].take(SAMPLES[other]))
        # Cut as the member's are: a sample leaves out parts of documents.
        share = min(1.0, SAMPLES[split] / len(blocks[split]))
        reference = measure(fresh.take(round(share * len(fresh))))
        said = np.array([total[name] for name in inside])
        own, away, others = (
            np.stack([one[name] for name in inside], axis=1) for one in (inside, outside, reference)
        )
        apart = np.abs(own.sum(axis=0) - said) / np.abs(own).sum(axis=0).clip(1e-9)
        found[str(split)] = {
            "documents": len(own),
            "numbers told": len(total),
            "numbers used": len(said),
            "apart": float(apart.max()),
            "which document": try_total(said, own, away, others, seed=seed),
        }
    return found


def _measure_documents(bank: Bank) -> Any:
    """Features of documents, (M, F)."""
    index = ClusterIndex.build(bank.clusters, bank.domain_of)
    columns = [index.sum(bank.expert_nll(one).numpy()) for one in range(bank.num_experts)]
    return build_features(index.counts, np.stack(columns, axis=1))


def _take_tokens(banks: Iterable[Bank]) -> tuple[Any, Any]:
    """Predicted tokens and their losses."""
    own = list(banks)
    tokens = np.concatenate([bank.tokens[:, 1:].numpy() for bank in own])
    return tokens, np.concatenate([-bank.logprob[:, 1:].numpy() for bank in own])


def attack(
    captured: Captured,
    fused: FusedModel,
    blocks: dict[str, dict[Split, Blocks]],
    banks: dict[str, dict[Split, Bank]],
    folder: Path,
    *,
    seed: int,
) -> dict[str, Any]:
    """What an attacker finds out of totals over documents and blocks, and of single figures.

    Args:
        captured: The federation.
        fused: What was published.
        blocks: Of each member.
        banks: Of each member, see `build_banks`.
        folder: Where banks are built.
        seed: Of the draws.

    Returns:
        By member that is alone in its domain: rates and areas by the size of a total, and what the
        totals tell that the coordinator really has, where texts stay with their owners.
    """
    found: dict[str, Any] = {}
    charter = load_charter(captured.server)
    batch = charter.identity.corpus.evaluation_batch
    names = [one.name for one in fused.experts]
    told = read_told(captured.server, charter, names)
    for name in (one for one in MEMBERS if list(MEMBERS.values()).count(MEMBERS[one]) == 1):
        documents = [Document(f"{n}", text) for n, text in enumerate(
            draw_documents(name, REFERENCE, fresh=True)
        )]  # fmt: skip
        others_blocks = pack_documents(
            documents, np.arange(REFERENCE, dtype=np.int32), fused.base.tokenizer,
            domain=MEMBERS[name], split=Split.CALIBRATION, block_size=BLOCK,
        )  # fmt: skip
        fresh = build_bank(fused, others_blocks, folder / "fresh", batch=batch)
        own = list(banks[name].values())
        features, others = (
            np.concatenate([*map(_measure_documents, own)]),
            _measure_documents(fresh),
        )
        texts, other_texts = _take_tokens(own), _take_tokens([fresh])
        size = int(fused.base.model.config.vocab_size)
        plain = [0, *range(2, 2 + len(names))]  # n and x, without squares and differences
        found[name] = {
            "documents": len(features),
            "columns": int(features.shape[1]),
            "which document": {
                str(count): try_documents(features, others, count, seed=seed) for count in COUNTS
            },
            "which document, sizes and losses alone": {
                str(count): try_documents(features[:, plain], others[:, plain], count, seed=seed)
                for count in COUNTS
            },
            "which tokens": {
                str(count): try_tokens(texts, other_texts, size, count, seed=seed)
                for count in (*COUNTS, BLOCKS)
            },
            "tokens by single figures": match_single(fused, own[-1]),
        }
        if told:
            found[name]["what the coordinator has"] = attack_told(
                told[MEMBERS[name]], fused, blocks[name], others_blocks, folder / "fresh",
                batch=batch, seed=seed,
            )  # fmt: skip
    return found


@torch.no_grad()
def match_single(fused: FusedModel, bank: Bank, blocks: int = 4) -> dict[str, float]:
    """Tokens found by their own losses where the text before them is known."""
    tokens = bank.tokens[:blocks].long()
    possible = []
    model = fused.base.model
    for expert in fused.experts:
        with applied(model, expert.adapter):
            possible.append(-torch.log_softmax(model(tokens).logits[:, :-1].float(), dim=-1))
    figures = -bank.logprob[:blocks, 1:].flatten(0, 1).numpy()
    table = torch.stack(possible, dim=-1).flatten(0, 1).numpy()
    truth = tokens[:, 1:].flatten().numpy()
    right = float((match_tokens(figures, table) == truth).mean())
    common = float(
        np.bincount(bank.tokens[:, 1:].flatten().numpy()).max() / bank.tokens[:, 1:].numel()
    )
    return {"rate": right, "tried": len(truth), "chance": common}
