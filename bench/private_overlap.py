"""What it costs to compare held-out text with train text that nobody shows, and what sampling does.

    molora demo --out FOLDER
    python bench/private_overlap.py --demo FOLDER

Costs are of random 8-grams, in processor seconds of one core and bytes of whole messages: tags, a
query, a reply and its opening are measured once each, and counted as often as a fusion of
`--members` needs them; the tags of 40,000 8-grams are measured, and reckoned for more. Then the
demo: which blocks are left out if only 8-grams whose hash is below a fraction of all hashes are
compared, of all its held-out blocks; and its held-out samples against a part of the train texts,
privately, every message as bytes, and with all texts in one place. Where `openmined-psi` can be
imported (it cannot be installed beside flwr), its times stand beside.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.backends.openssl import backend
from numpy.typing import NDArray

from molora_fed.charter import load_charter
from molora_fed.cooperative.known_text import read_known_text
from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.corpus.clusters import find_shingles
from molora_fed.corpus.overlap import (
    MAX_BLOCK_OVERLAP,
    KnownText,
    Overlap,
    find_base_index,
    index_blocks,
    list_shingles,
    load_index,
    measure_overlap,
    shingle_blocks,
)
from molora_fed.models.base import load_base
from molora_fed.privacy.intersection import Receiver, Sealing, Sender
from molora_fed.privacy.messages import Query, Reply, TagSet
from molora_fed.types import Split

KNOWN = (100_000, 1_000_000)
HELD_OUT = (5_000, 20_000)
ONE_IN = (2, 4, 8, 16)
PART = 8  # of the train texts is compared privately, one part
RIVAL_ITEMS = 6_000
MEASURED = 40_000  # 8-grams whose tags are made; as many as are wanted cost in proportion
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


def seal(size: int) -> Sealed:
    """A set of random 8-grams, the first of them tagged, the others as if they were."""
    sender = Sender(draw(size, seed=size), secret=b"s" * 32, fusion="bench")
    seconds, sealing = clock(lambda: sender.advance(sender.begin(), MEASURED))
    rest = draw(size - sealing.tags.size, seed=size + 1)
    filled = Sealing(sealing.key_id, np.concatenate([sealing.tags, rest]))
    return Sealed(size, sender, sender.finish(filled), seconds * size / sealing.tags.size)


def ask(size: int, items: NDArray[np.uint64]) -> Asked:
    seconds, receiver = clock(lambda: Receiver(items[:size], secret=b"r" * 32, purpose="bench"))
    return Asked(size, receiver, seconds)


def describe_cost(members: int) -> Iterator[str]:
    items = draw(max(HELD_OUT), seed=1)
    sets = [seal(size) for size in KNOWN]
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
    opening, _ = clock(
        lambda: receiver.open(
            receiver.begin(),
            "bob",
            TagSet.read(sent[1], "bob"),
            Reply.read(reply, "bob", query),
        )
    )
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
    sealed, asked = seal(RIVAL_ITEMS), ask(RIVAL_ITEMS, items)
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
            sealed.seconds / sealed.size,
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
        cells = " | ".join(f"{1e6 * value:.0f}" for value in seconds)
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
class Demo:
    """The texts of a finished demo.

    Attributes:
        held_out: All held-out blocks of each contributor.
        sent: Of them as many as its contribution has.
        home: Known text of each: train text, and samples.
        part: The same with the first eighth of its train text's blocks.
        base: Known text of the base.
        tokenizer: The base's.
    """

    held_out: Mapping[str, Blocks]
    sent: Mapping[str, Blocks]
    home: Mapping[str, Sequence[KnownText]]
    part: Mapping[str, Sequence[KnownText]]
    base: KnownText
    tokenizer: Any


def read_demo(folder: Path) -> Demo:
    cooperative = folder / "cooperative"
    base = load_base(cooperative / "base")
    index = load_index(find_base_index(base.folder), str((base.training or {})["recipe"]))
    if index is None:
        raise SystemExit(f"no index of the base's text beside '{base.folder}'")
    samples = load_charter(cooperative / "cooperative.toml").amendment.samples
    held_out, home, part = {}, {}, {}
    for name, corpus in read_known_text(cooperative).items():
        held_out[name] = load_blocks(corpus / f"{Split.HELD_OUT}.safetensors")
        train, calibration, admission = (
            load_blocks(corpus / f"{split}.safetensors")
            for split in (Split.TRAIN, Split.CALIBRATION, Split.ADMISSION)
        )
        sent = [calibration.take(samples.calibration), admission.take(samples.admission)]
        known = [index_blocks(blocks, base.tokenizer) for blocks in sent]
        for texts, blocks in ((home, train), (part, train.take(len(train) // PART))):
            texts[name] = [KnownText("train", name, partial(index_blocks, blocks, base.tokenizer))]
            texts[name] += [KnownText("sample", name, lambda one=one: one) for one in known]
    return Demo(
        held_out,
        {name: blocks.take(samples.held_out) for name, blocks in held_out.items()},
        home,
        part,
        KnownText("base", "", lambda: index),
        base.tokenizer,
    )


def join(texts: Iterable[KnownText]) -> NDArray[np.uint64]:
    return np.unique(np.concatenate([text.load() for text in texts]))


def describe_demo(demo: Demo) -> Iterator[str]:
    known = [text for texts in demo.part.values() for text in texts] + [demo.base]
    pooled = measure_overlap(demo.sent, known, demo.tokenizer)
    seconds, private = clock(lambda: compare_privately(demo))
    yield "| contributor | train 8-grams | held-out 8-grams | blocks | left out, pooled | private |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, found in private.items():
        if not np.array_equal(found.known, pooled[name].known):
            raise SystemExit(f"8-grams of {name} in known text differ")
        wanted, left_out = (int((~one.kept).sum()) for one in (pooled[name], found))
        train = join(demo.part[name]).size
        held_out = list_shingles(demo.sent[name], demo.tokenizer).size
        yield (f"| {name} | {train:,} | {held_out:,} | {found.kept.size} | {wanted} | {left_out} |")
    yield ""
    yield f"The 8-grams found in known text are the same in every block. {seconds:.0f} s in all."


def compare_privately(demo: Demo) -> dict[str, Overlap]:
    """Every member with every other, each message as bytes."""
    senders, receivers, sets, found = {}, {}, {}, {}
    for name, texts in demo.part.items():
        secret = name.encode().ljust(32)
        senders[name] = sender = Sender(join(texts), secret=secret, fusion="demo")
        sets[name] = sender.finish(sender.advance(sender.begin(), sender.total)).to_bytes()
        items = list_shingles(demo.sent[name], demo.tokenizer)
        receivers[name] = Receiver(items, secret=secret, purpose="demo")
    for name, receiver in receivers.items():
        state, query = receiver.begin(), receiver.query
        for other, sender in senders.items():
            if other != name:
                reply = sender.answer(
                    Query.read(query.to_bytes(), name),
                    name,
                    committed=query.commitment,
                    admit=lambda place, question: None,
                ).to_bytes()
                tags = TagSet.read(sets[other], other)
                state = receiver.open(state, other, tags, Reply.read(reply, other, query))
        elsewhere = KnownText("train", "", partial(receiver.list_known, state))
        known = [*demo.part[name], demo.base, elsewhere]
        found |= measure_overlap({name: demo.sent[name]}, known, demo.tokenizer)
    return found


def describe_sampling(demo: Demo) -> Iterator[str]:
    index = join([*(text for texts in demo.home.values() for text in texts), demo.base])
    shingles = [shingle_blocks(blocks, demo.tokenizer) for blocks in demo.held_out.values()]
    hits = [find_shingles(index, one.hashes) for one in shingles]
    totals = np.concatenate([one.count() for one in shingles])
    exact = _exceed(
        np.concatenate([one.count(h) for one, h in zip(shingles, hits, strict=True)]), totals
    )
    yield (
        "| one in | blocks | left out from all 8-grams | wrongly kept | wrongly left out "
        "| blocks without any |"
    )
    yield "|---:|---:|---:|---:|---:|---:|"
    for one_in in ONE_IN:
        chosen = [one.hashes < np.uint64(2**64 // one_in) for one in shingles]
        left = np.concatenate([one.count(c) for one, c in zip(shingles, chosen, strict=True)])
        known = [one.count(c & h) for one, c, h in zip(shingles, chosen, hits, strict=True)]
        sampled = _exceed(np.concatenate(known), left)
        cells = (exact & ~sampled, sampled & ~exact, (left == 0) & (totals > 0))
        yield (
            f"| {one_in} | {exact.size} | {exact.sum()} | "
            + " | ".join(str(int(cell.sum())) for cell in cells)
            + " |"
        )


def _exceed(known: NDArray[np.int64], totals: NDArray[np.int64]) -> NDArray[np.bool_]:
    return known / np.maximum(totals, 1) > MAX_BLOCK_OVERLAP


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
    parser.add_argument("--demo", type=Path, required=True, help="folder of `molora demo`")
    parser.add_argument("--out", type=Path, default=Path("docs/results/private_overlap.md"))
    args = parser.parse_args()
    demo = read_demo(args.demo)
    lines = ["# Comparing held-out text with train text that nobody shows", ""]
    lines += [f"`python bench/private_overlap.py --demo FOLDER`; {describe_versions()}", ""]
    for title, rows in (
        (f"## A fusion of {args.members} members", describe_cost(args.members)),
        ("## Microseconds an 8-gram", describe_rival()),
        ("## Sampling 8-grams by hash", describe_sampling(demo)),
        ("## The demo, privately and pooled", describe_demo(demo)),
    ):
        lines += [title, ""]
        for line in rows:
            print(line, flush=True)
            lines.append(line)
        lines.append("")
    args.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
