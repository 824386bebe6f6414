"""The judge: which candidate wins where all members answered."""

from molora_fed import JudgeRequest, Verdict
from molora_fed.errors import ConfigError


def judge(request: JudgeRequest) -> Verdict:
    """Choose a candidate: the one function to fill in.

    The same request and the same answers of models give the same verdict: decisions are replayed.

    Args:
        request: `candidates` has at least one, in the order of the members, each with its
            canonical answer or None; `models` those that may be asked, `seed` of whatever is
            drawn, `options` JSON values of which unknown ones are refused.

    Returns:
        The place of the candidate that wins, and one line that says why.

    Raises:
        ConfigError: If there is an option: this judge has none.

    See docs/hooks/judges.md, and docs/extractors_judges.md.
    """
    if request.options:
        raise ConfigError(
            f"Cannot judge: expected no judge_options, got {', '.join(request.options)}. "
            "Remove these."
        )
    places = range(len(request.candidates))
    answered = [place for place in places if request.candidates[place].answer is not None]
    chosen = min(answered or places, key=lambda p: (len(request.candidates[p].text), p))
    reason = "the shortest text with an answer" if answered else "no candidate has an answer"
    return Verdict(chosen, reason)
