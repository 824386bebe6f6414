"""One segment, record by record: its chain, its Merkle tree and its signed checkpoints."""

from hashlib import sha256
from typing import Any

from molora_fed.tracing.merkle import MerkleTree
from molora_fed.tracing.records import (
    CHECKPOINT,
    GENESIS,
    HEADER,
    SEAL,
    BadLineError,
    encode_json,
    encode_line,
    parse_line,
)
from molora_fed.tracing.segments import Header, checkpoint_statement, parse_header
from molora_fed.tracing.signing import check_signature

__all__ = ["SegmentScan"]


class SegmentScan:
    """State of a segment after the lines it was given.

    Attributes:
        header: Its header; None before a good one.
        count: Records so far.
        head: Hash of the last one.
        leaf: Leaf hash of the last one.
        kind: Kind of the last one; "" where it is no record.
        tree: Merkle tree over all so far.
        covered: Records up to and with the last good checkpoint.
        roots: Root of each good checkpoint, hex, with the records it is over.
        sealing: Whether the last record is the checkpoint before a seal.
        is_whole: Whether every line that was checked was good.
    """

    def __init__(self, public_pem: str, fingerprint: str, *, head: str = GENESIS) -> None:
        """Begin a segment.

        Args:
            public_pem: Key that signed the run, PEM.
            fingerprint: Its fingerprint.
            head: Hash of the last record of the writer's segment before.
        """
        self._public = public_pem
        self._fingerprint = fingerprint
        self.header: Header | None = None
        self.count = 0
        self.head = head
        self.leaf = b""
        self.kind = ""
        self.tree = MerkleTree()
        self.covered = 0
        self.roots: dict[str, int] = {}
        self.sealing = False
        self.is_whole = True

    def check(self, line: bytes) -> str:
        """What is wrong with a line as the next one; "" if nothing is. Follow it by `add`.

        Args:
            line: Its bytes without newline.
        """
        try:
            body, self.kind, prev, seq = parse_line(line)
        except BadLineError as error:
            self.kind = ""
            reason = str(error)
        else:
            reason = self._check(line, body, prev, seq)
        if reason:
            self.is_whole = False
        return reason

    def add(self, line: bytes) -> None:
        """Go on by a line, good or not."""
        self.leaf = sha256(b"\x00" + line).digest()
        self.tree.add(self.leaf)
        self.head = sha256(line).hexdigest()
        self.count += 1

    def _check(self, line: bytes, body: dict[str, Any], prev: str, seq: int) -> str:
        if seq != self.count:
            return f"expected seq {self.count}, got {seq}: records are missing, moved or added"
        if prev != self.head:
            return (
                f"expected prev {self.head[:16]}, the hash of the record before, got {prev[:16]}: "
                "this record or the one before it was changed"
            )
        if (self.count == 0) != (self.kind == HEADER):
            return "expected a header as first record, and nowhere else"
        if self.kind == HEADER:
            return self._check_header(body)
        if self.sealing:
            return "expected nothing after the checkpoint before the seal"
        if self.kind == CHECKPOINT:
            return self._check_checkpoint(line, body)
        if self.kind == SEAL:
            return "expected a seal only at the end of the run"
        return ""

    def _check_header(self, body: dict[str, Any]) -> str:
        header = parse_header(body)
        if isinstance(header, str):
            return header
        self.header = header
        if header.key != self._fingerprint:
            return f"expected a run signed by key {self._fingerprint[:16]}, got {header.key[:16]}"
        return ""

    def _check_checkpoint(self, line: bytes, body: dict[str, Any]) -> str:
        if self.header is None or not self.is_whole:
            return ""  # What came before was wrong and told; no signature over it can fit.
        sealing = body.get("sealing") is True
        root = self.tree.root().hex()
        statement = checkpoint_statement(
            self.header, count=self.count, head=self.head, root=root, sealing=sealing
        )
        signature = body.get("signature")
        expected = {
            "count": self.count, "head": self.head, "root": root, "sealing": sealing,
            "signature": signature,
        }  # fmt: skip
        if encode_line(encode_json(expected), CHECKPOINT, self.head, self.count) != line:
            return (
                "expected a checkpoint of the records before it, got one of others: a record "
                f"since record {self.covered} was changed"
            )
        if not check_signature(self._public, CHECKPOINT, statement, signature):
            return f"expected a checkpoint signed by key {self._fingerprint[:16]}, got no such"
        self.covered = self.count + 1
        self.roots[root] = self.count
        self.sealing = sealing
        return ""
