"""How much held-out text lies in text that was trained on, in every built-in cooperative.

    python bench/contamination.py

For every domain: the share of held-out word 8-grams in its own train text, in the train text and
samples of all domains of the cooperative, and in the base's train text; how many blocks a fusion
leaves out, and what is left. No model is trained: corpora and the base's tokenizer are enough.
Corpora are kept in the cache folder.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from molora_studies.kalavai.cross_lingual import CrossLingualOptions
from molora_studies.kalavai.scaling import ScalingOptions
from molora_studies.kalavai.twenty import TwentyOptions
from numpy.typing import NDArray
from own_text import LANGUAGES, read_pages

from molora_fed.charter import CorpusRules, SampleRules
from molora_fed.corpus.builtin import DEFAULT_DOMAINS
from molora_fed.corpus.clusters import index_shingles
from molora_fed.corpus.documents import open_domain
from molora_fed.corpus.overlap import (
    MAX_BLOCK_OVERLAP,
    KnownText,
    Overlap,
    index_blocks,
    measure_overlap,
    summarise_overlap,
)
from molora_fed.corpus.prepare import Corpus, prepare_corpus
from molora_fed.corpus.report import MAX_CONTAMINATION
from molora_fed.plugins import get_plugins
from molora_fed.storage.values import find_cache_folder
from molora_fed.training.builtin_base import BuiltinBaseConfig, split_domains, train_tokenizer
from molora_fed.types import Document, Split

OUT = Path("docs/results/contamination.md")
INTRODUCTION = f"""\
`python bench/contamination.py`. Shares are of held-out word 8-grams, by position, in the blocks
that contributors send. `own, whole split` is what a contributor's manifest states: all of its
held-out documents against its own train text. `anyone's` is the train text of all domains of the
cooperative, and the calibration and admission blocks that they send. A fusion leaves out blocks
with more than {100 * MAX_BLOCK_OVERLAP:.0f} % in any of these texts; the last column is the share
in any of them, the base's included, of the blocks that are kept. `empty` blocks have no run of
8 words and are kept: two tokens a letter leave few words a block."""
LIMITS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.5)


@dataclass(frozen=True)
class Cooperative:
    """Domains of a cooperative with the samples its contributors send."""

    title: str
    domains: tuple[str, ...]
    samples: SampleRules


def list_cooperatives() -> list[Cooperative]:
    usual, lingual, twenty = SampleRules(), CrossLingualOptions(), TwentyOptions()
    languages = tuple(f"man-{language}" for language in lingual.languages)
    return [
        Cooperative("the demo", DEFAULT_DOMAINS, usual),
        Cooperative("own text (docs/results/own_text.md)", tuple(LANGUAGES), usual),
        Cooperative("study scaling", ScalingOptions().domains, usual),
        Cooperative("study cross-lingual", (*languages, *lingual.others), usual),
        Cooperative("study twenty", (*twenty.domains, twenty.newcomer), twenty.samples),
    ]


class Texts:
    """Corpora of domains, made once, and the 8-grams of their train text."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self.tokenizer = tokenizer
        self._folder = folder
        self._corpora: dict[str, Corpus] = {}
        self._indices: dict[str, NDArray[np.uint64]] = {}

    def corpus(self, domain: str) -> Corpus:
        """The blocks of a domain."""
        if domain not in self._corpora:
            print(f"corpus {domain}", flush=True)
            self._corpora[domain] = prepare_corpus(
                domain,
                read_domain(domain),
                self.tokenizer,
                rules=CorpusRules(),
                folder=self._folder / domain,
            )
        return self._corpora[domain]

    def train(self, domain: str) -> NDArray[np.uint64]:
        """The 8-grams of a domain's train text."""
        if domain not in self._indices:
            blocks = self.corpus(domain).blocks[Split.TRAIN]
            self._indices[domain] = index_blocks(blocks, self.tokenizer)
        return self._indices[domain]

    def list_known(self, cooperative: Cooperative, base: NDArray[np.uint64]) -> Iterator[KnownText]:
        """What the parts of a fused model have read."""
        samples = cooperative.samples
        for domain in cooperative.domains:
            yield KnownText("train", domain, partial(self.train, domain))
            for split, count in (
                (Split.CALIBRATION, samples.calibration),
                (Split.ADMISSION, samples.admission),
            ):
                blocks = self.corpus(domain).blocks[split].take(count)
                yield KnownText("sample", domain, partial(index_blocks, blocks, self.tokenizer))
        yield KnownText("base", "", lambda: base)

    def measure(self, cooperative: Cooperative, base: NDArray[np.uint64]) -> Mapping[str, Overlap]:
        """Every domain's held-out sample against all of it."""
        count = cooperative.samples.held_out
        held_out = {
            domain: self.corpus(domain).blocks[Split.HELD_OUT].take(count)
            for domain in cooperative.domains
        }
        return measure_overlap(held_out, self.list_known(cooperative, base), self.tokenizer)


def read_domain(domain: str) -> list[Document]:
    if domain in LANGUAGES:
        return read_pages(domain)
    return list(open_domain(domain, get_plugins())())


def main() -> None:
    config = BuiltinBaseConfig()
    print("the base's text", flush=True)
    splits = split_domains({d: read_domain(d) for d in DEFAULT_DOMAINS}, config)
    base = index_shingles(d.text for split in splits.values() for d in split[Split.TRAIN])
    texts = Texts(train_tokenizer(splits, config), find_cache_folder() / "contamination")
    found = {
        cooperative.title: (cooperative, texts.measure(cooperative, base))
        for cooperative in list_cooperatives()
    }
    OUT.write_text("\n".join(describe(found, texts)) + "\n", encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


def describe(
    found: Mapping[str, tuple[Cooperative, Mapping[str, Overlap]]], texts: Texts
) -> Iterator[str]:
    rows = {title: summarise_overlap(o.values()) for title, (_, o) in found.items()}
    highest = max(row["after"] for by_domain in rows.values() for row in by_domain.values())
    yield "# Contamination of held-out text in the built-in cooperatives"
    yield ""
    yield from INTRODUCTION.splitlines()
    yield ""
    yield f"The highest share after exclusion is {100 * highest:.2f} %; the limit is"
    yield f"{100 * MAX_CONTAMINATION:.0f} %."
    for title, (cooperative, _) in found.items():
        yield ""
        yield f"## {title[0].upper()}{title[1:]}"
        yield ""
        yield (
            "| domain | own, whole split | own | anyone's | the base's | blocks left out | empty "
            "| after |"
        )
        yield "|---|---:|---:|---:|---:|---:|---:|---:|"
        for domain in cooperative.domains:
            row, whole = rows[title][domain], texts.corpus(domain).report.contamination
            shares = (whole, row["own"], row["union"], row["base"])
            cells = " | ".join(f"{100 * share:.2f} %" for share in shares)
            yield (
                f"| {domain} | {cells} | {row['left_out']} of {row['blocks']} | {row['empty']} "
                f"| {100 * row['after']:.2f} % |"
            )
    yield ""
    yield "## The limit for a block"
    yield ""
    yield "Blocks left out, of all of a cooperative, and the highest share in known text that any"
    yield "of its domains keeps, by the limit above which a block is left out."
    yield ""
    yield "| cooperative | blocks | " + " | ".join(f"{100 * n:.0f} %" for n in LIMITS) + " |"
    yield "|---|---:|" + "---:|" * len(LIMITS)
    for title, (_, overlaps) in found.items():
        blocks = sum(one.totals.size for one in overlaps.values())
        cells = [try_limit(list(overlaps.values()), limit) for limit in LIMITS]
        yield f"| {title} | {blocks} | " + " | ".join(cells) + " |"


def try_limit(overlaps: list[Overlap], limit: float) -> str:
    kept = [one.shares <= limit for one in overlaps]
    left_out = sum(int((~mask).sum()) for mask in kept)
    highest = max(
        one.known[mask].sum() / max(one.totals[mask].sum(), 1)
        for one, mask in zip(overlaps, kept, strict=True)
    )
    return f"{left_out}, {100 * highest:.2f} %"


if __name__ == "__main__":
    main()
