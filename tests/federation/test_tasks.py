import os
import threading

import pytest

from molora_fed.errors import FederationError
from molora_fed.federation.tasks import TaskQueue


def test_a_task_is_claimed_by_exactly_one_of_many(tmp_path):
    queue = TaskQueue(tmp_path)
    for n in range(20):
        queue.offer(f"train-{n}", {"id": f"train-{n}", "kind": "train"})
    claims = []

    def work(owner):
        while (claim := queue.claim(owner, lease_seconds=60)) is not None:
            claims.append(claim)
            queue.complete(claim)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claim.task_id for claim in claims) == sorted(f"train-{n}" for n in range(20))
    assert all(claim.fence == 1 for claim in claims)


def test_a_lease_that_ran_out_is_taken_over_and_fences_the_first_holder(tmp_path):
    queue = TaskQueue(tmp_path)
    queue.offer("train-0", {"kind": "train"})
    first = queue.claim("one", lease_seconds=60)
    assert queue.claim("two", lease_seconds=60) is None
    os.utime(first.path, (0, 0))
    second = queue.claim("two", lease_seconds=60)
    assert (second.fence, second.task) == (2, {"kind": "train"})
    with pytest.raises(FederationError, match="taken over"):
        queue.renew(first, lease_seconds=60)
    with pytest.raises(FederationError, match="taken over"):
        queue.complete(first)
    queue.renew(second, lease_seconds=60)
    queue.complete(second)
    assert queue.known() == {"train-0"}
    assert queue.claim("three", lease_seconds=60) is None


def test_a_worker_that_was_killed_takes_its_own_task_back_at_once(tmp_path):
    queue = TaskQueue(tmp_path)
    queue.offer("train-0", {"kind": "train"})
    queue.claim("worker", lease_seconds=3_600)
    again = queue.claim("worker", lease_seconds=3_600)
    assert again is not None and again.fence == 2


def test_offering_a_known_task_changes_nothing(tmp_path):
    queue = TaskQueue(tmp_path)
    queue.offer("train-0", {"kind": "train"})
    claim = queue.claim("worker", lease_seconds=60)
    queue.offer("train-0", {"kind": "train"})
    queue.complete(claim)
    queue.offer("train-0", {"kind": "train"})
    assert queue.claim("worker", lease_seconds=60) is None
    with pytest.raises(FederationError):
        queue.offer("../train", {})
