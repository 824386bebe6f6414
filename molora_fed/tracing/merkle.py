"""Merkle trees over records: pure functions on hashes, as RFC 6962 section 2.1 defines them.

A leaf is hashed after the byte 0x00 and an inner node after 0x01, so that neither passes for the
other. A tree of n > 1 leaves splits at the largest power of two below n.
"""

from collections.abc import Sequence
from hashlib import sha256

__all__ = [
    "EMPTY_ROOT",
    "MerkleTree",
    "build_path",
    "compute_path_root",
    "compute_root",
    "hash_leaf",
    "hash_node",
]

EMPTY_ROOT = sha256(b"").digest()
"""Root of a tree without leaves."""


def hash_leaf(data: bytes) -> bytes:
    """Hash of a leaf, 32 bytes."""
    return sha256(b"\x00" + data).digest()


def hash_node(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node over its two children, 32 bytes."""
    return sha256(b"\x01" + left + right).digest()


class MerkleTree:
    """A tree that grows by a leaf at a time and keeps only what its root needs.

    Attributes:
        size: Leaves so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[bytes] = []  # Roots of the full subtrees, the largest first.

    def add(self, leaf: bytes) -> None:
        """Add a leaf by its hash; constant time on average, memory grows with log2(size)."""
        peaks, size = self._peaks, self.size
        while size & 1:
            leaf = sha256(b"\x01" + peaks.pop() + leaf).digest()
            size >>= 1
        peaks.append(leaf)
        self.size += 1

    def root(self) -> bytes:
        """Root over the leaves so far, 32 bytes."""
        if not self._peaks:
            return EMPTY_ROOT
        root = self._peaks[-1]
        for peak in reversed(self._peaks[:-1]):
            root = hash_node(peak, root)
        return root


def compute_root(leaves: Sequence[bytes]) -> bytes:
    """Root over leaf hashes."""
    tree = MerkleTree()
    for leaf in leaves:
        tree.add(leaf)
    return tree.root()


def build_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes that lead from a leaf to the root, the leaf's sibling first.

    Args:
        leaves: Leaf hashes of the whole tree.
        index: Which leaf, from 0.

    Raises:
        IndexError: If there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise IndexError(index)
    path: list[bytes] = []
    level = list(leaves)
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            path.append(level[sibling])
        # An odd node at the end moves up unchanged, which is the same tree as splitting at the
        # largest power of two.
        above = [hash_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        if len(level) & 1:
            above.append(level[-1])
        level, index = above, index >> 1
    return path


def compute_path_root(leaf: bytes, index: int, count: int, path: Sequence[bytes]) -> bytes | None:
    """The root that a leaf and its path lead to.

    Args:
        leaf: Hash of the leaf.
        index: Its place, from 0.
        count: Leaves of the whole tree.
        path: As `build_path` gives it.

    Returns:
        The root, or None if the path is not as long as such a leaf's path is.
    """
    if not 0 <= index < count:
        return None
    rest = list(path)
    last = count - 1
    while last:
        if index & 1 or index < last:
            if not rest:
                return None
            sibling = rest.pop(0)
            leaf = hash_node(sibling, leaf) if index & 1 else hash_node(leaf, sibling)
        index >>= 1
        last >>= 1
    return None if rest else leaf
