"""What it costs to compare held-out text with train text that nobody shows, and what sampling does.

    python bench/private_overlap.py

Costs are of random 8-grams, in processor seconds of one core and bytes of whole messages: a set of
tags, a query, a reply and its opening are measured once each, and counted as often as a fusion of
`--members` needs them. Then the built-in cooperatives: how many 8-grams their texts have, and which
blocks are left out if only 8-grams whose hash is below a fraction of all hashes are compared. Where
`openmined-psi` can be imported (it cannot be installed beside flwr), its times stand beside. The
page is written to `--out`; corpora are kept in the cache folder.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from contamination import Cooperative, Texts, list_cooperatives, read_domain
from cryptography.hazmat.backends.openssl import backend
from numpy.typing import NDArray

from molora_fed.corpus.clusters import find_shingles, index_shingles
from molora_fed.corpus.overlap import MAX_BLOCK_OVERLAP, list_shingles, shingle_blocks
from molora_fed.privacy.intersection import Receiver, Sender
from molora_fed.privacy.messages import Query, Reply, TagSet
from molora_fed.storage.values import find_cache_folder
from molora_fed.training.builtin_base import BuiltinBaseConfig, split_domains, train_tokenizer
from molora_fed.types import Split

KNOWN = (100_000, 1_000_000)
HELD_OUT = (5_000, 20_000)
ONE_IN = (2, 4, 8, 16)
RIVAL_ITEMS = 20_000
COOPERATIVES = ("the demo", "own text (docs/results/own_text.md)", "study twenty")
MB = 1e6

Made = TypeVar("Made")


def clock(make: Callable[[], Made]) -> tuple[float, Made]:
    """Processor seconds, and what was made."""
    start = time.process_time()
    made = make()
    return time.process_time() - start, made


@dataclass(frozen=True)
class Sealed:
    """A sender's set."""

    size: int
    sender: Sender
    tags: TagSet
    seconds: float


@dataclass(frozen=True)
class Asked:
    """A receiver's query."""

    size: int
    receiver: Receiver
    seconds: float


def draw(size: int, seed: int) -> NDArray[np.uint64]:
    generator = np.random.default_rng(seed)
    return np.unique(generator.integers(0, 2**64, size=size, dtype=np.uint64))


def seal(size: int, held_out: NDArray[np.uint64]) -> Sealed:
    """A set that holds every tenth of the held-out 8-grams."""
    known = np.union1d(draw(size - held_out.size // 10, seed=size), held_out[::10])
    sender = Sender(known, secret=b"s" * 32, fusion="bench")
    seconds, tags = clock(lambda: sender.finish(sender.advance(sender.begin(), sender.total)))
    return Sealed(size, sender, tags, seconds)


def ask(size: int, items: NDArray[np.uint64]) -> Asked:
    seconds, receiver = clock(lambda: Receiver(items[:size], secret=b"r" * 32, purpose="bench"))
    return Asked(size, receiver, seconds)


def describe_cost(members: int) -> Iterator[str]:
    items = draw(max(HELD_OUT), seed=1)
    sets = [seal(size, items) for size in KNOWN]
    queries = [ask(size, items) for size in HELD_OUT]
    others = members - 1
    yield (
        "| train 8-grams | held-out 8-grams | tags, s | query, s | a reply, s | opening it, s "
        "| a member in all, s | the carrier checks in, s | set, MB | query, MB | reply, MB "
        "| a member sends, MB | receives, MB | the carrier receives, MB | sends, MB |"
    )
    yield "|" + "---:|" * 15
    for sealed in sets:
        for asked in queries:
            yield describe_pair(sealed, asked, members, others)


def describe_pair(sealed: Sealed, asked: Asked, members: int, others: int) -> str:
    receiver, sender, query = asked.receiver, sealed.sender, asked.receiver.query
    sent = query.to_bytes(), sealed.tags.to_bytes()
    committed = query.commitment
    answering, reply = clock(
        lambda: sender.answer(
            Query.read(sent[0], "ann"),
            "ann",
            committed=committed,
            admit=lambda place, question: None,
        ).to_bytes()
    )
    opening, found = clock(
        lambda: receiver.open(
            receiver.begin(),
            "bob",
            TagSet.read(sent[1], "bob"),
            Reply.read(reply, "bob", query),
        )
    )
    expected = int(found.hits.size) // 10
    if int(found.hits.sum()) != expected:
        raise SystemExit(f"expected {expected} 8-grams in common, got {int(found.hits.sum())}")
    checking, _ = clock(lambda: (Query.read(sent[0], "ann"), TagSet.read(sent[1], "bob")))
    sizes = [len(sent[1]) / MB, len(sent[0]) / MB, len(reply) / MB]
    total = sealed.seconds + asked.seconds + others * (answering + opening)
    up = sizes[0] + sizes[1] + others * sizes[2]
    down = others * sum(sizes)
    seconds = (sealed.seconds, asked.seconds, answering, opening, total, members * checking)
    cells = [f"{value:.1f}" for value in seconds]
    cells += [f"{value:.2f}" for value in (*sizes, up, down)]
    cells += [f"{members * value:,.0f}" for value in (up, down)]
    return f"| {sealed.size:,} | {asked.size:,} | " + " | ".join(cells) + " |"


def describe_rival() -> Iterator[str]:
    """Microseconds an 8-gram, beside openmined-psi where it is there."""
    items = draw(RIVAL_ITEMS, seed=3)
    sealed, asked = seal(RIVAL_ITEMS, items), ask(RIVAL_ITEMS, items)
    query = asked.receiver.query
    answering, reply = clock(
        lambda: sealed.sender.answer(
            query, "ann", committed=query.commitment, admit=lambda place, question: None
        )
    )
    opening, _ = clock(
        lambda: asked.receiver.open(asked.receiver.begin(), "bob", sealed.tags, reply)
    )
    elements = len(query.elements)
    rows = [
        (
            "this",
            sealed.seconds / RIVAL_ITEMS,
            asked.seconds / elements,
            answering / elements,
            opening / RIVAL_ITEMS,
            f"8 bytes a tag, {len(query.to_bytes()) / elements:.0f} an element",
        )
    ]
    if find_spec("private_set_intersection") is not None:
        rows.append(time_rival([f"{item:016x}" for item in items.tolist()]))
    yield "| library | a tag, µs | of a query, µs | of a reply, µs | of its opening, µs | bytes |"
    yield "|---|---:|---:|---:|---:|---|"
    for name, *seconds, size in rows:
        cells = " | ".join(f"{1e6 * value:.0f}" for value in seconds)  # type: ignore[str-bytes-safe]
        yield f"| {name} | {cells} | {size} |"


def time_rival(items: Sequence[str]) -> tuple[str, float, float, float, float, str]:
    import private_set_intersection.python as psi

    client, server = psi.client.CreateWithNewKey(True), psi.server.CreateWithNewKey(True)
    raw = psi.DataStructure.RAW
    sealing, setup = clock(lambda: server.CreateSetupMessage(1e-9, len(items), items, raw))
    asking, request = clock(lambda: client.CreateRequest(items))
    answering, response = clock(lambda: server.ProcessRequest(request))
    opening, _ = clock(lambda: client.GetIntersection(setup, response))
    count = len(items)
    sizes = [len(message.SerializeToString()) / count for message in (setup, request)]
    name = f"openmined-psi {psi.__version__}, raw"
    size = f"{sizes[0]:.0f} bytes a tag, {sizes[1]:.0f} an element"
    return name, sealing / count, asking / count, answering / count, opening / count, size


@dataclass(frozen=True)
class Sampled:
    """Decisions about blocks, from all 8-grams and from some.

    Attributes:
        totals: 8-grams of each block, by position, (N,).
        shares: Of them in known text, (N,).
        sampled: By denominator of the fraction, the same of sampled 8-grams, (N,).
        empty: By denominator, blocks with 8-grams of which none is sampled.
    """

    totals: NDArray[np.int64]
    shares: NDArray[np.float64]
    sampled: dict[int, NDArray[np.float64]]
    empty: dict[int, int]


def sample_domain(
    texts: Texts, cooperative: Cooperative, domain: str, known: NDArray[np.uint64]
) -> Sampled:
    blocks = texts.corpus(domain).blocks[Split.HELD_OUT].take(cooperative.samples.held_out)
    shingles = shingle_blocks(blocks, texts.tokenizer)
    hits = find_shingles(known, shingles.hashes)
    totals = shingles.count()
    sampled, empty = {}, {}
    for one_in in ONE_IN:
        chosen = shingles.hashes < np.uint64(2**64 // one_in)
        left = shingles.count(chosen)
        sampled[one_in] = shingles.count(chosen & hits) / np.maximum(left, 1)
        empty[one_in] = int(((left == 0) & (totals > 0)).sum())
    return Sampled(totals, shingles.count(hits) / np.maximum(totals, 1), sampled, empty)


def describe_sampling() -> Iterator[str]:
    config = BuiltinBaseConfig()
    domains = ("cpp", "python", "readme", "science")
    splits = split_domains({domain: read_domain(domain) for domain in domains}, config)
    base = index_shingles(d.text for split in splits.values() for d in split[Split.TRAIN])
    texts = Texts(train_tokenizer(splits, config), find_cache_folder() / "contamination")
    yield (
        "| cooperative | blocks | left out | train 8-grams a member | held-out 8-grams a member "
        "| one in | wrongly kept | wrongly left out | blocks without any |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for cooperative in list_cooperatives():
        if cooperative.title in COOPERATIVES:
            yield from describe_cooperative(texts, cooperative, base)


def describe_cooperative(
    texts: Texts, cooperative: Cooperative, base: NDArray[np.uint64]
) -> Iterator[str]:
    loaded = {(k.kind, k.owner): k.load() for k in texts.list_known(cooperative, base)}
    known = np.unique(np.concatenate(list(loaded.values())))
    found = [sample_domain(texts, cooperative, domain, known) for domain in cooperative.domains]
    train = [loaded["train", domain].size for domain in cooperative.domains]
    held_out = [
        list_shingles(
            texts.corpus(domain).blocks[Split.HELD_OUT].take(cooperative.samples.held_out),
            texts.tokenizer,
        ).size
        for domain in cooperative.domains
    ]
    exact = np.concatenate([one.shares for one in found]) > MAX_BLOCK_OVERLAP
    sizes = [f"{min(part):,} to {max(part):,}" for part in (train, held_out)]
    for one_in in ONE_IN:
        left_out = np.concatenate([one.sampled[one_in] for one in found]) > MAX_BLOCK_OVERLAP
        cells = (
            (exact & ~left_out).sum(),
            (left_out & ~exact).sum(),
            sum(one.empty[one_in] for one in found),
        )
        yield (
            f"| {cooperative.title} | {exact.size} | {exact.sum()} | {sizes[0]} | {sizes[1]} "
            f"| {one_in} | " + " | ".join(str(cell) for cell in cells) + " |"
        )


def describe_versions() -> str:
    names = ("cryptography", "numpy")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        f"Python {platform.python_version()}, {packages}, {backend.openssl_version_text()}; "
        f"{platform.machine()}, one core."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/results/private_overlap.md"))
    args = parser.parse_args()
    lines: list[Any] = ["# Comparing held-out text with train text that nobody shows", ""]
    lines += [f"`python bench/private_overlap.py`; {describe_versions()}", ""]
    for title, describe in (
        (f"## A fusion of {args.members} members", lambda: describe_cost(args.members)),
        ("## An 8-gram", describe_rival),
        ("## Sampling 8-grams by hash", describe_sampling),
    ):
        lines += [title, ""]
        for line in describe():
            print(line, flush=True)
            lines.append(line)
        lines.append("")
    args.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
