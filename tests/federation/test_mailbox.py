import os
import resource
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.errors import FederationError
from molora_fed.federation.mailbox import (
    Board,
    PartStore,
    hold_lock,
    read_json,
    read_parts,
    take_batch,
)
from molora_fed.federation.messages import Part, PartName, describe_folder, plan_parts


@given(
    files=st.dictionaries(
        st.sampled_from(["a", "b", "c/d", "c/e"]), st.binary(max_size=400), max_size=4
    ),
    part_bytes=st.integers(1, 150),
    order=st.randoms(use_true_random=False),
)
def test_parts_in_any_order_and_twice_give_the_folder(tmp_path_factory, files, part_bytes, order):
    root = tmp_path_factory.mktemp("parts")
    for name, data in files.items():
        path = root / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shipment = describe_folder(root / "source")
    store = PartStore(root / "store")
    names = plan_parts(shipment, part_bytes=part_bytes) * 2
    order.shuffle(names)
    for name in names:
        assert name in set(plan_parts(shipment, part_bytes=part_bytes))
        (part,) = read_parts(root / "source", shipment, [name])
        store.put(part)
    assert store.missing(shipment, part_bytes=part_bytes) == []
    store.assemble(shipment, root / "target", part_bytes=part_bytes)
    assert describe_folder(root / "target") == shipment
    store.discard(shipment, part_bytes=part_bytes)
    assert store.held() == set()


def test_a_damaged_part_is_dropped_and_asked_for_again(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(b"0123456789")
    (tmp_path / "source" / "b").write_bytes(b"good")
    shipment = describe_folder(tmp_path / "source")
    store = PartStore(tmp_path / "store")
    for part in read_parts(tmp_path / "source", shipment, plan_parts(shipment, part_bytes=5)):
        store.put(Part(part.name, b"xxxxx") if part.data == b"56789" else part)
    with pytest.raises(FederationError, match="of file 'a'"):
        store.assemble(shipment, tmp_path / "target", part_bytes=5)
    assert not (tmp_path / "target").exists()
    assert [name.length for name in store.missing(shipment, part_bytes=5)] == [5, 5]


def test_an_incomplete_shipment_is_not_assembled(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(b"0123456789")
    shipment = describe_folder(tmp_path / "source")
    with pytest.raises(FederationError, match="1 missing"):
        PartStore(tmp_path / "store").assemble(shipment, tmp_path / "target")


def test_a_batch_holds_at_least_one_part_and_no_more_than_fit():
    parts = [PartName("a" * 64, n, size) for n, size in enumerate((50, 30, 30))]
    assert take_batch(parts, max_bytes=80) == parts[:2]
    assert take_batch(parts, max_bytes=10) == parts[:1]
    assert take_batch([], max_bytes=10) == []


def test_a_lock_is_held_by_one(tmp_path):
    with (
        hold_lock(tmp_path / "lock", what="a server"),
        pytest.raises(FederationError, match="nobody else there"),
        hold_lock(tmp_path / "lock", what="a server"),
    ):
        pass
    with hold_lock(tmp_path / "lock", what="a server"):
        pass


def test_the_board_takes_news_when_no_file_may_grow(tmp_path):
    board = Board(tmp_path / "board")
    board.prepare()
    script = (
        "import resource,sys;from pathlib import Path;"
        "from molora_fed.federation.mailbox import Board,PartStore;"
        "from molora_fed.federation.messages import Part,PartName;"
        "from molora_fed.errors import StorageError\n"
        "root=Path(sys.argv[1])\n"
        "try:\n"
        "  PartStore(root/'parts').put(Part(PartName('a'*64,0,9000),bytes(9000)))\n"
        "except StorageError as error:\n"
        "  Board(root/'board').post(str(error))\n"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, 8_192))

    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60, preexec_fn=limit
    )
    message = board.read()
    assert "File too large" in message and "Free some space" in message and "\n" not in message
    assert PartStore(tmp_path / "parts").held() == set()
    assert os.listdir(tmp_path / "parts") == []
    board.post("")
    assert board.read() == ""


def test_damaged_json_says_which_file(tmp_path):
    assert read_json(tmp_path / "no.json") is None
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FederationError, match=r"bad\.json"):
        read_json(tmp_path / "bad.json")
