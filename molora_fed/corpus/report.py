"""What a prepared corpus holds: counts and contamination, per split and per domain."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from molora_fed.types import Split

__all__ = ["CorpusReport", "SplitReport", "build_contamination_report", "parse_report"]

MIN_HELD_OUT_CLUSTERS = 20
MIN_HELD_OUT_BLOCKS = 64
MAX_CONTAMINATION = 0.02


def _qualifies(clusters: int, blocks: int) -> bool:
    return clusters >= MIN_HELD_OUT_CLUSTERS and blocks >= MIN_HELD_OUT_BLOCKS


@dataclass(frozen=True)
class SplitReport:
    """What one split holds.

    Attributes:
        documents: Documents.
        clusters: Near-duplicate clusters.
        characters: Characters of the documents.
        tokens: Tokens in blocks, end-of-text tokens included; the incomplete last block is not.
        blocks: Blocks.
        contamination: Share of the split's word 8-grams that occur in the domain's train split,
            in [0, 1]; 0 for train itself.
    """

    documents: int
    clusters: int
    characters: int
    tokens: int
    blocks: int
    contamination: float


@dataclass(frozen=True)
class CorpusReport:
    """What a prepared corpus holds; of one shard where a domain is shared.

    Attributes:
        domain: Domain name.
        shard: Index of this contributor among those who share the domain, and their number.
        documents: Documents after copies were dropped and long ones cut, all splits and shards.
        duplicates: Documents dropped because another has the same words.
        clusters: Near-duplicate clusters, all splits and shards.
        largest_cluster: Share of the characters in the largest cluster, in [0, 1].
        characters: Characters, all splits and shards.
        splits: What each split of this shard holds, by split name.
        block_size: T, tokens per block.
        files: What was read of which files and what was left out, see
            `molora_fed.corpus.inventory.Inventory.to_json`; None for text that is no files.
        options: Options of the registered domain that the text is of.
    """

    domain: str
    shard: tuple[int, int]
    documents: int
    duplicates: int
    clusters: int
    largest_cluster: float
    characters: int
    splits: Mapping[str, SplitReport]
    block_size: int
    files: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def contamination(self) -> float:
        """Share of the held-out word 8-grams that occur in train, in [0, 1]."""
        return self.splits[Split.HELD_OUT].contamination

    @property
    def qualifies(self) -> bool:
        """Whether held-out is large enough for reported figures: 20 clusters and 64 blocks."""
        held_out = self.splits[Split.HELD_OUT]
        return _qualifies(held_out.clusters, held_out.blocks)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, with `contamination` and `qualifies` written out."""
        values = asdict(self)
        if self.files is None:
            del values["files"]
        if not self.options:
            del values["options"]
        return values | {
            "splits": {str(name): asdict(split) for name, split in self.splits.items()},
            "shard": list(self.shard),
            "contamination": self.contamination,
            "qualifies": self.qualifies,
        }


def parse_report(value: Mapping[str, Any]) -> CorpusReport:
    """The report that `CorpusReport.to_json` wrote.

    Raises:
        KeyError: If a field is missing.
        TypeError: If a field has the wrong form.
        ValueError: If a split is unknown.
    """
    needed = CorpusReport.__dataclass_fields__.keys() - {"files", "options"}
    fields = {name: value[name] for name in needed}
    index, num_shards = value["shard"]
    fields["shard"] = (index, num_shards)
    fields["splits"] = {
        str(Split(name)): SplitReport(**split) for name, split in value["splits"].items()
    }
    return CorpusReport(**fields, files=value.get("files"), options=dict(value.get("options", {})))


def build_contamination_report(reports: Iterable[CorpusReport]) -> dict[str, dict[str, Any]]:
    """Contamination per domain, for printing and for the run's folder.

    Args:
        reports: Reports of prepared corpora; shards of one domain count together.

    Returns:
        By domain: `contamination` (share of held-out word 8-grams found in train; the worst
        shard's), `limit`, `within_limit`, `by_split`, and the counts that say what it was
        measured on.
    """
    by_domain: dict[str, list[CorpusReport]] = {}
    for report in sorted(reports, key=lambda report: (report.domain, report.shard)):
        by_domain.setdefault(report.domain, []).append(report)
    return {domain: _summarise(shards) for domain, shards in by_domain.items()}


def _summarise(shards: Sequence[CorpusReport]) -> dict[str, Any]:
    """The contamination of one domain over its shards."""
    first = shards[0]  # what the domain holds in all is the same in every shard's report
    held_out = [shard.splits[Split.HELD_OUT] for shard in shards]
    contamination = max(split.contamination for split in held_out)
    clusters, blocks = sum(s.clusters for s in held_out), sum(s.blocks for s in held_out)
    return {
        "contamination": contamination,
        "limit": MAX_CONTAMINATION,
        "within_limit": contamination <= MAX_CONTAMINATION,
        "by_split": {
            name: max(shard.splits[name].contamination for shard in shards)
            for name in first.splits
            if name != Split.TRAIN
        },
        "documents": first.documents,
        "duplicates": first.duplicates,
        "clusters": first.clusters,
        "largest_cluster": first.largest_cluster,
        "held_out_clusters": clusters,
        "held_out_blocks": blocks,
        "held_out_tokens": sum(split.tokens for split in held_out),
        "qualifies": _qualifies(clusters, blocks),
    }
