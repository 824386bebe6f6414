"""Traffic test: nothing of a single document, block or token may leave a member in private mode.

    python bench/traffic_test.py --privacy pooled --out docs/results/traffic-pooled.json
    python bench/traffic_test.py --privacy private --summing masked

A federation of real processes, four contributors behind recording lines. Every member's texts,
token ids, hidden states and figures are searched for in all bytes that crossed the lines, in the
coordinator's home and in its memory, and an attacker tries to find documents and tokens in the
figures. In `pooled`, where samples are sent, the same search must find them. Ends with 1 if it
does not, or finds anything in `private`.
"""

import argparse
import base64
import gzip
import hashlib
import json
import platform
import sqlite3
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from traffic_capture import BLOCK, MEMBERS, SAMPLES, Captured, federate, list_files
from traffic_page import build_page

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from traffic_helpers import Group, Index, Needles, list_bodies, unpack  # noqa: E402
from traffic_needles import (  # noqa: E402
    ALONE,
    DECOYS,
    ONE_OF_SEVERAL,
    add_figures,
    add_texts,
    build_banks,
    list_runs,
)
from traffic_told import attack  # noqa: E402

from molora_fed.bank import Bank  # noqa: E402
from molora_fed.charter import load_charter  # noqa: E402
from molora_fed.corpus.blocks import Blocks  # noqa: E402
from molora_fed.corpus.prepare import load_corpus  # noqa: E402
from molora_fed.federation.homes import ContributorHome  # noqa: E402
from molora_fed.routing.bundle import load_fused  # noqa: E402
from molora_fed.storage.files import hash_bytes, write_bytes, write_json  # noqa: E402
from molora_fed.types import Split  # noqa: E402

LIMIT_BLOCKS = 48
"""Blocks of a split that figures are looked for of; the charter asks for fewer."""
SEED = 5
PLANTED = 12
"""Strings of a kind and form that are planted in each packing."""
LEVEL = 0.001
"""Of the test whether more figures are found than decoys."""
MEMORY = "memory"
CONTROLS = ("wire, from members", "rest of the home", MEMORY)
"""Where a pooled fusion must show every sample; its mailbox is empty once contributions are in."""
OPENED = ("rest of the home", MEMORY)
"""Where totals of masked sums are kept, which are a member's own where it is alone."""
_PAGE = 4_096
_PUBLIC = "is public"
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "raw": bytes,
    "hex": lambda data: data.hex().encode(),
    "upper hex": lambda data: data.hex().upper().encode(),
    "base64": base64.b64encode,
    "urlsafe base64": base64.urlsafe_b64encode,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zlib": zlib.compress,
    "deflate": lambda data: _deflate(data),
}

Table = dict[str, dict[str, dict[str, int]]]


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@dataclass
class Search:
    """What was found, by place.

    Attributes:
        needles: What is looked for.
        found: Strings by place and packing.
        searched: Bytes by place, as recorded.
        unpacked: Bytes that were looked through, by packing.
        aligned: Figures in double precision that lie at a multiple of eight bytes of memory.
    """

    needles: Needles
    found: dict[str, dict[str, set[bytes]]] = field(default_factory=dict)
    searched: dict[str, int] = field(default_factory=dict)
    unpacked: dict[str, int] = field(default_factory=dict)
    aligned: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._index = Index(self.needles)
        self._seen: set[str] = set()
        self._decimals, self._doubles = (
            set().union(
                *(kept for group, kept in self.needles.groups.items() if group.form == form)
            )
            for form in ("decimal", "float64")
        )

    def look(self, place: str, data: bytes, *, deep: bool = True) -> set[bytes]:
        """Search a stream; one that was seen before at the same place is counted only."""
        self.searched[place] = self.searched.get(place, 0) + len(data)
        key = place + hash_bytes(data)
        found: set[bytes] = set()
        if key in self._seen:
            return found
        self._seen.add(key)
        for how, part in unpack(data, deep=deep):
            self.unpacked[how] = self.unpacked.get(how, 0) + len(part)
            here = self._index.find(part)
            here -= {one for one in here & self._decimals if not _begins_number(part, one)}
            if place == MEMORY and how == "raw":
                doubles = {one for one in here & self._doubles if len(one) == 8}
                self.aligned |= {one for one in doubles if _is_aligned(part, one)}
            self.found.setdefault(place, {}).setdefault(how, set()).update(here)
            found |= here
        return found

    def count_aligned(self) -> dict[str, list[int]]:
        """Figures of double precision found in memory, by kind: all, and those that are aligned."""
        rows: dict[str, list[int]] = {}
        found = self.found.get(MEMORY, {}).get("raw", set())
        for group, strings in self.needles.groups.items():
            if group.form == "float64":
                few = {one for one in strings & found if len(one) == 8}
                row = rows.setdefault(group.kind, [0, 0])
                row[0] += len(few)
                row[1] += len(few & self.aligned)
        return {kind: row for kind, row in rows.items() if row[0]}

    def tabulate(self) -> dict[str, Table]:
        """Distinct strings by place, kind, form and packing."""
        tables: dict[str, Table] = {}
        for place, ways in self.found.items():
            table = tables.setdefault(place, {})
            for group, strings in self.needles.groups.items():
                for how, found in ways.items():
                    if count := len(strings & found):
                        row = table.setdefault(group.kind, {}).setdefault(group.form, {})
                        row[how] = row.get(how, 0) + count
        return tables


def _begins_number(data: bytes, string: bytes) -> bool:
    """Whether a number that begins like this occurs, not the end of another one."""
    at = data.find(string)
    while at > 0 and data[at - 1] in b"0123456789.":
        at = data.find(string, at + 1)
    return at >= 0


def _is_aligned(memory: bytes, string: bytes) -> bool:
    """Whether it lies at a multiple of eight bytes, as every double of an array or object does."""
    at = memory.find(string)
    while at % 8 and at >= 0:
        at = memory.find(string, at + 1)
    return at >= 0


def list_public(captured: Captured) -> Iterator[bytes]:
    """What everyone may know: base, tokenizer, charter, the program; and the coordinator before."""
    yield from (path.read_bytes() for path in sorted((captured.root / "tiny-base").iterdir()))
    yield (captured.server / "cooperative.toml").read_bytes()
    sources = ("molora_fed", "cli", "plugins")
    for name in sources:
        yield from (path.read_bytes() for path in sorted((REPOSITORY / name).rglob("*.py")))
    before = captured.snapshots[0]
    yield from (path.read_bytes() for path in before.memory.values())
    yield from (path.read_bytes() for path in sorted(before.home.rglob("*")) if path.is_file())


def _read_rows(ledger: Path) -> bytes:
    """Every value of every row of a database, which on its pages may lie in pieces."""
    parts: list[bytes] = []
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in names:
            for row in database.execute(f'SELECT * FROM "{name}"'):
                parts += [one if isinstance(one, bytes) else str(one).encode() for one in row]
    return b"\n".join(parts)


def _take_new_pages(data: bytes, seen: set[bytes]) -> bytes:
    """Memory without pages that an earlier snapshot had, but with those beside a new one."""
    pages = [data[at : at + _PAGE] for at in range(0, len(data), _PAGE)]
    digests = [hashlib.blake2b(page, digest_size=16).digest() for page in pages]
    new = np.zeros(len(pages), np.bool_)
    for number, digest in enumerate(digests):
        new[number] = digest not in seen
        seen.add(digest)
    near = new.copy()
    near[1:] |= new[:-1]
    near[:-1] |= new[1:]
    return b"".join(page for page, is_near in zip(pages, near, strict=True) if is_near)


def _find_place(path: Path) -> str:
    """What a file of the coordinator's home is part of."""
    first = path.parts[0]
    if first.startswith("ledger"):
        return "ledger"
    return {"mail": "mailbox", "received": "mailbox"}.get(first, "rest of the home")


def look_everywhere(captured: Captured, search: Search) -> None:
    """Search lines, home and memory."""
    for both in captured.lines.values():
        for direction, streams in both.items():
            place = f"wire, {'from' if direction == 'sent' else 'to'} members"
            for stream in streams:
                search.look(f"{place}, as it was sent", stream, deep=False)
                for body in list_bodies(stream):
                    search.look(place, body)
    homes = [(captured.server, list_files(captured.server))]
    homes += [(one.home, sorted(one.home.rglob("*"))) for one in captured.snapshots[1:]]
    for home, paths in homes:
        for path in paths:
            if path.is_file():
                search.look(_find_place(path.relative_to(home)), path.read_bytes())
    search.look("ledger", _read_rows(captured.server / "ledger.db"))
    seen: set[bytes] = set()
    for path in captured.snapshots[0].memory.values():  # nobody had sent anything
        _take_new_pages(path.read_bytes(), seen)
    for snapshot in captured.snapshots[1:]:
        for path in snapshot.memory.values():
            print(f"memory: {snapshot.when}", flush=True)
            search.look(MEMORY, _take_new_pages(path.read_bytes(), seen), deep=False)


def plant(needles: Needles) -> dict[str, dict[str, list[int]]]:
    """Strings planted among random bytes, in every packing: found and planted, by kind."""
    draw = np.random.default_rng(SEED)
    rows: dict[str, dict[str, list[int]]] = {}
    chosen: dict[str, Needles] = {}
    for group, strings in needles.groups.items():
        some = sorted(strings)[:: max(1, len(strings) // PLANTED)][:PLANTED]
        kind = group.kind.partition(",")[0]
        chosen.setdefault(kind, Needles()).add(group, some)
    for kind, few in chosen.items():
        search = Search(few)
        strings = {one for kept in few.groups.values() for one in kept}
        packed = b"\n".join(sorted(strings))
        for how, pack in PACKINGS.items():
            stream = draw.bytes(1_001) + b"{" + pack(packed) + b"}" + draw.bytes(503)
            found = search.look(how, stream, deep=how == "deflate")
            rows.setdefault(kind, {})[how] = [len(found & strings), len(strings)]
    return rows


def count_chance(needles: Needles, searched: Iterable[int]) -> float:
    """Strings that random bytes are expected to hold: places times strings by their length."""
    strings = {one for kept in needles.groups.values() for one in kept}
    return sum(searched) * sum(2.0 ** (-8 * len(one)) for one in strings)


def count_groups(needles: Needles) -> dict[str, dict[str, int]]:
    """Strings by kind and form, over all members."""
    table: dict[str, dict[str, int]] = {}
    for group, strings in needles.groups.items():
        row = table.setdefault(group.kind, {})
        row[group.form] = row.get(group.form, 0) + len(strings)
    return table


def _add_up(forms: dict[str, dict[str, int]]) -> int:
    """Strings found by the packing that shows the most of each form."""
    return sum(max(ways.values()) for ways in forms.values())


def _exceeds(own: int, decoys: int, needles: dict[str, Any], kind: str) -> bool:
    """Whether more is found than chance explains; of kinds without decoys, any at all.

    Had the figures been as unknown as their decoys, each find would be one of either by the share
    of strings that were looked for.
    """
    if DECOYS + kind not in needles:
        return True
    real, false = (sum(needles[one].values()) for one in (kind, DECOYS + kind))
    test = stats.binomtest(own, own + decoys, real / (real + false), alternative="greater")
    return bool(test.pvalue < LEVEL)


def count_samples(
    blocks: dict[str, dict[Split, Blocks]], search: Search
) -> dict[str, dict[str, list[int]]]:
    """Runs of ids inside the blocks that a pooled fusion asks for: found and looked for, by place.

    Args:
        blocks: Of each member.
        search: What was found.

    Returns:
        By place and split, over all members, in the form that a contribution has them in; and
        "beyond", runs that are found and in none of the samples, of all that are found.
    """
    rows: dict[str, dict[str, list[int]]] = {}
    ids = {
        group: kept
        for group, kept in search.needles.groups.items()
        if group.kind.startswith("token ids") and group.form == "int32"
    }
    whole = {  # a contribution has its samples one after another
        name: set().union(
            *(list_runs(own[split].take(n).tokens.reshape(1, -1)) for split, n in SAMPLES.items())
        )
        for name, own in blocks.items()
    }
    for place, ways in search.found.items():
        found = set().union(*ways.values())
        own_found = {group.owner: set[bytes]() for group in ids}
        for group, kept in ids.items():
            own_found[group.owner] |= kept & found
        beyond = sum(len(some - whole[name]) for name, some in own_found.items())
        rows[place] = {"beyond": [beyond, sum(map(len, own_found.values()))]}
        for split, count in SAMPLES.items():
            row = rows.setdefault(place, {}).setdefault(str(split), [0, 0])
            for name, own in blocks.items():
                kept = search.needles.groups[Group(name, f"token ids, {split}", "int32")]
                sent = kept & list_runs(own[split].take(count).tokens)
                row[0] += len(sent & found)
                row[1] += len(sent)
    return rows


def _list_told(summing: str, place: str) -> tuple[str, ...]:
    """Kinds of sums that a private fusion may show in a place, as the consent screen says."""
    if summing == "robust":
        return ALONE, ONE_OF_SEVERAL
    return (ALONE,) if place in OPENED else ()  # nowhere before masked vectors are added up


def find_problems(found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    problems = []
    for kind, ways in found["planted"].items():
        problems += [
            f"planted {kind} in {how}: {got}" for how, got in ways.items() if got[0] < got[1]
        ]
    said = {(place, kind) for place, table in found["found"].items() for kind in table}
    if found["privacy"] == "private":
        for place, kind in sorted(said):
            table = found["found"][place]
            own, decoys = (_add_up(table.get(one, {})) for one in (kind, DECOYS + kind))
            if kind.startswith((DECOYS, *_list_told(found["summing"], place))):
                continue
            if _exceeds(own, decoys, found["needles"], kind):
                problems.append(f"{place}: {kind}: {own} found, and {decoys} decoys")
    else:
        for place in CONTROLS:
            rows = dict(found["samples"].get(place, {"no split": [0, 1]}))
            beyond, _ = rows.pop("beyond", (0, 0))
            problems += [f"pooled: {beyond} runs of ids in {place} that are no sample's"] * (
                beyond > 0
            )
            problems += [
                f"pooled: {got} of {of} runs of ids of {split} are found in {place}"
                for split, (got, of) in rows.items()
                if got < of
            ]
    return problems


def measure(captured: Captured, folder: Path) -> dict[str, Any]:
    """Make the needles, search everywhere, attack."""
    began = time.monotonic()
    fused = load_fused(captured.server / "fused", base_folder=captured.server / "base")
    blocks: dict[str, dict[Split, Blocks]] = {}
    banks: dict[str, dict[Split, Bank]] = {}
    needles = Needles()
    batch = load_charter(captured.server).identity.corpus.evaluation_batch
    for name in MEMBERS:
        blocks[name] = dict(load_corpus(ContributorHome(captured.home(name)).corpus).blocks)
        banks[name] = build_banks(
            fused, blocks[name], folder / name, batch=batch, limit=LIMIT_BLOCKS
        )
        add_texts(needles, name, blocks[name], fused.base.tokenizer)
        is_alone = list(MEMBERS.values()).count(MEMBERS[name]) == 1
        add_figures(needles, name, banks[name], SAMPLES, is_alone=is_alone)
    print(f"{len(needles):,} strings", flush=True)
    needles.drop_shared("of several members")
    public = Search(needles)
    common: set[bytes] = set()
    for data in list_public(captured):
        common |= public.look(_PUBLIC, data, deep=False)
    needles.drop(common, _PUBLIC)
    print(f"{len(needles):,} strings that only a member has", flush=True)
    search = Search(needles)
    look_everywhere(captured, search)
    dropped: dict[str, dict[str, int]] = {}
    for (kind, why), number in needles.dropped.items():
        dropped.setdefault(kind, {})[why] = number
    return {
        "lines": {
            name: {
                "connections": len(both["sent"]),
                "sent": sum(map(len, both["sent"])),
                "received": sum(map(len, both["received"])),
            }
            for name, both in captured.lines.items()
        },
        "snapshots": [snapshot.when for snapshot in captured.snapshots],
        "searched": search.searched,
        "unpacked": search.unpacked,
        "needles": count_groups(needles),
        "dropped": dropped,
        "found": search.tabulate(),
        "aligned in memory": search.count_aligned(),
        "samples": count_samples(blocks, search),
        "by chance": count_chance(needles, search.unpacked.values()),
        "planted": plant(needles),
        "attack": attack(captured, fused, blocks, banks, folder, seed=SEED),
        "block size": BLOCK,
        "commands": captured.commands,
        "seconds": captured.seconds,
        "search seconds": time.monotonic() - began,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--privacy", choices=("pooled", "private"), default="private")
    parser.add_argument("--summing", choices=("masked", "robust"), default="masked")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each member")
    parser.add_argument(
        "--keep", type=Path, help="folder to work in; what was captured there is used again"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--page", type=Path, help="Markdown page of all JSON files beside --out")
    given = parser.parse_args()
    mode = given.privacy if given.privacy == "pooled" else f"private-{given.summing}"
    out = given.out or Path(f"docs/results/traffic-{mode}.json")
    with ExitStack() as stack:
        root = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        captured = Captured.load(root)
        if captured is None:
            captured = federate(
                root, privacy=given.privacy, summing=given.summing, steps=given.steps
            )
        found = measure(captured, root / "needles")
    command = f"python bench/traffic_test.py --privacy {given.privacy}"
    command += "" if given.privacy == "pooled" else f" --summing {given.summing}"
    found |= {
        "command": command,
        "privacy": given.privacy,
        "summing": given.summing if given.privacy == "private" else "",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("molora-fed", "torch", "flwr", "numpy")},
        },
    }
    found["problems"] = find_problems(found)
    write_json(out, found)
    if given.page:
        parts = [json.loads(path.read_text()) for path in sorted(out.parent.glob("traffic-*.json"))]
        write_bytes(given.page, build_page(parts).encode())
    print("\n".join(found["problems"]) or "as it should be")
    return int(bool(found["problems"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
