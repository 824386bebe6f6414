"""Judges: which candidate wins where all members answered."""

from collections import Counter

from molora_fed.cascade.contract import JudgeRequest, Verdict

__all__ = ["judge_by_majority"]


def judge_by_majority(request: JudgeRequest) -> Verdict:
    """The answer most candidates gave; of equals, the one that came first. Asks nobody.

    Candidates without an answer have no vote, but one of them wins where nobody has an answer.

    Args:
        request: The candidates.
    """
    answers = [one.answer for one in request.candidates]
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return Verdict(0, "no candidate has an answer")
    winner, count = max(votes.items(), key=lambda item: (item[1], -answers.index(item[0])))
    return Verdict(answers.index(winner), f"{count} of {len(answers)} answers agree")
