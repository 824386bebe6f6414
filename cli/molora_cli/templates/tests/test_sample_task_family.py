"""The contract of task families, and what makes this family this family."""

from molora_fed.testing import check_task_family_conformance

from molora_sample_task_family.tasks import draw


def test_keeps_the_contract():
    check_task_family_conformance(draw)


def test_asks_for_words_spelt_backwards():
    tasks = draw(level=2, count=5, seed=0)
    assert [len(task.answer) for task in tasks] == [4] * 5
    assert all(task.prompt == f"spell {task.answer[::-1]} backwards:" for task in tasks)
