from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.tracing.merkle import (
    EMPTY_ROOT,
    MerkleTree,
    build_path,
    compute_path_root,
    compute_root,
    hash_leaf,
    hash_node,
)


def root_by_definition(leaves):
    """RFC 6962, section 2.1, word for word."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hash_node(root_by_definition(leaves[:half]), root_by_definition(leaves[half:]))


LEAVES = st.lists(st.binary(max_size=8).map(hash_leaf), max_size=40)


@given(LEAVES)
def test_the_root_is_that_of_the_definition(leaves):
    assert compute_root(leaves) == root_by_definition(leaves)


def test_known_roots_of_rfc_6962():
    """Vectors of the certificate-transparency reference: the empty tree and its first leaves."""
    data = [b"", b"\x00", b"\x10", b"\x20\x21", b"\x30\x31", b"\x40\x41\x42\x43"]
    roots = {
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        4: "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        6: "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    }
    tree = MerkleTree()
    assert tree.root() == EMPTY_ROOT
    for count, leaf in enumerate(data, start=1):
        tree.add(hash_leaf(leaf))
        assert tree.root().hex() == roots[count]


@given(LEAVES.filter(bool), st.data())
def test_a_path_leads_its_leaf_and_no_other_to_the_root(leaves, data):
    index = data.draw(st.integers(0, len(leaves) - 1))
    path = build_path(leaves, index)
    count, root = len(leaves), compute_root(leaves)
    assert compute_path_root(leaves[index], index, count, path) == root
    assert compute_path_root(hash_leaf(b"another leaf"), index, count, path) != root
    assert compute_path_root(leaves[index], index, count, [*path, root]) is None
    if path:
        assert compute_path_root(leaves[index], index, count, path[:-1]) is None
        assert compute_path_root(leaves[index], index, count, [root, *path[1:]]) != root


@pytest.mark.parametrize("index", [-1, 3])
def test_there_is_no_path_from_outside(index):
    leaves = [hash_leaf(bytes([i])) for i in range(3)]
    assert compute_path_root(leaves[0], index, 3, []) is None
    with pytest.raises(IndexError):
        build_path(leaves, index)
