"""Homes: tasks that arrived, and what killed processes left half-written."""

import pytest

from molora_fed.errors import FederationError
from molora_fed.federation.envelopes import parse_letter
from molora_fed.federation.homes import ContributorHome, CoordinatorHome
from molora_fed.federation.letters import Task
from molora_fed.federation.mailbox import read_json
from molora_fed.storage.files import replace_folder, stream_bytes, write_json


def leave(path):
    """What SIGKILL in the middle of writing a file leaves."""
    with stream_bytes(path) as file:
        file.write(b"half")
        (temporary,) = path.parent.glob(f".{path.name}.*.tmp")
        copy = temporary.with_name(temporary.name.replace(".tmp", "0.tmp"))
        copy.write_bytes(b"half")
    return copy


@pytest.mark.parametrize("kind", [CoordinatorHome, ContributorHome])
def test_half_written_files_go_and_whole_ones_stay(kind, tmp_path):
    home = kind(tmp_path)
    part = home.mail / "contributors" / "key" / "parts" / "a-0-4"
    left = leave(part)
    folders = tmp_path / "received" if kind is CoordinatorHome else tmp_path
    with replace_folder(folders / "alpha") as temporary:
        (temporary / "whole").write_bytes(b"whole")
        half = temporary.with_name(temporary.name.replace(".tmp", "0.tmp"))
        half.mkdir()
        (half / "half").write_bytes(b"half")
    home.remove_leftovers()
    assert not left.exists() and not half.exists()
    assert part.read_bytes() == b"half"
    assert (folders / "alpha" / "whole").read_bytes() == b"whole"


def test_what_a_running_fusion_writes_is_left_alone(tmp_path):
    home = CoordinatorHome(tmp_path)
    with replace_folder(tmp_path / "fused") as temporary:
        home.remove_leftovers()
        assert temporary.is_dir()
    home.remove_leftovers()


def test_a_task_is_kept_once_whatever_its_name_asks_for(tmp_path):
    home = ContributorHome(tmp_path)
    assert home.list_tasks() == set()
    task = parse_letter(Task, {"id": "train-0", "kind": "train"}, what="a task")
    home.keep_task(task)
    home.keep_task(task)
    assert home.list_tasks() == {"train-0"}
    assert read_json(home.tasks / "train-0.json")["kind"] == "train"
    for name in ("../train", "", "a b", ".", ".hidden"):
        with pytest.raises(FederationError, match="got id: String"):
            parse_letter(Task, {"id": name, "kind": "train"}, what="a task")


@pytest.mark.parametrize(
    "kept", ["pending/train-0.json", "claimed/train-0~2~worker.json", "done/train-0~1.json"]
)
def test_the_task_queue_of_an_earlier_version_is_read(kept, tmp_path):
    home = ContributorHome(tmp_path)
    write_json(home.mail / "tasks" / kept, {"id": "train-0", "kind": "train"})
    assert home.list_tasks() == {"train-0"}
    home.keep_task(parse_letter(Task, {"id": "train-0", "kind": "train"}, what="a task"))
    assert not home.tasks.exists()
