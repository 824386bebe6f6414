"""Judges: which candidate wins where all members answered."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import ClassVar, Literal

from pydantic import Field

from molora_acar.extractors import extract_choice
from molora_fed.cascade.contract import (
    Candidate,
    CascadeModel,
    CascadeTask,
    Judge,
    JudgeOptions,
    JudgeRequest,
    Request,
    Sample,
    Scorer,
    Verdict,
)
from molora_fed.errors import ConfigError

__all__ = [
    "LikelihoodJudge",
    "LikelihoodOptions",
    "MajorityJudge",
    "PairwiseJudge",
    "PairwiseOptions",
]

MAX_SEED = 2**63 - 1
_NO_ANSWER = "no candidate has an answer"


class LikelihoodOptions(JudgeOptions):
    """Options of the judge by likelihood.

    Attributes:
        model: Name of the model that scores; without one, the only model that can score and is no
            candidate.
        end: Put after every answer before it is scored, so that "1" does not win over "12" for
            being its beginning.
        per: "answer" compares log-likelihoods as they are, "character" divides them by the length
            of what is scored.
    """

    model: str | None = None
    end: str = "\n"
    per: Literal["answer", "character"] = "answer"


class PairwiseOptions(JudgeOptions):
    """Options of the judge by pairs.

    Attributes:
        models: Who may judge, in the order in which they are preferred; without it every model of
            the cascade, members first.
        max_new_tokens: Tokens of a judgement.
    """

    models: tuple[str, ...] | None = None
    max_new_tokens: int = Field(default=8, ge=1, le=4096)


class MajorityJudge(Judge):
    """The answer most candidates gave; of equals, the one that came first. Asks nobody.

    Candidates without an answer have no vote, but one of them wins where nobody has an answer.
    """

    def __call__(self, request: JudgeRequest) -> Verdict:
        """Count the candidates' answers."""
        votes = _count_votes(request)
        if not votes:
            return Verdict(0, _NO_ANSWER)
        winner = max(votes, key=lambda answer: votes[answer])
        reason = f"{votes[winner]} of {len(request.candidates)} agree"
        return Verdict(_find(request, winner), reason)


class LikelihoodJudge(Judge):
    """The answer that a model finds likeliest after the prompt; of equals, the first.

    What is scored is what a candidate said, without the white space around it, and the end after
    it. Of candidates with the same answer the likeliest text counts. One answer alone is not
    scored.

    Source: own definition, see docs/extractors_judges.md.
    """

    Options: ClassVar[type[JudgeOptions]] = LikelihoodOptions

    def __call__(self, request: JudgeRequest) -> Verdict:
        """Score the candidates' answers.

        Raises:
            ConfigError: If no model or more than one can score.
        """
        options = self.options
        votes = _count_votes(request)
        if len(votes) < 2:
            return _judge_unopposed(request, votes)
        scorer = _find_scorer(request, options)
        texts = list(dict.fromkeys(_said(o) for o in request.candidates if o.answer is not None))
        ended = [text + options.end for text in texts]
        scores = dict(zip(texts, scorer.score(request.task.prompt, ended), strict=True))
        if options.per == "character":
            scores = {text: scores[text] / max(1, len(text + options.end)) for text in texts}
        best: dict[str, float] = {}
        for one in request.candidates:
            if one.answer is not None:
                score = scores[_said(one)]
                best[one.answer] = max(best.get(one.answer, score), score)
        winner = max(best, key=lambda answer: best[answer])
        told = ", ".join(f"{value:.4g}" for value in best.values())
        place = list(best).index(winner) + 1
        return Verdict(_find(request, winner), f"answer {place} is likeliest of {told} nats")


class PairwiseJudge(Judge):
    """The answer that wins most pairs, each judged by a model that gave neither.

    A pair is asked about in both orders; it is won only if both judgements name the same answer,
    anything else is half a win for each. Answers with equal wins are ordered by how many
    candidates gave them, then by who came first. A pair that nobody may judge is a draw.

    Source: arXiv 2602.21231 names a judge and no method; pairs, both orders and the rule against
    self-preference are our own definition.
    """

    Options: ClassVar[type[JudgeOptions]] = PairwiseOptions

    def __call__(self, request: JudgeRequest) -> Verdict:
        """Ask about every pair of the candidates' answers.

        Raises:
            ConfigError: If the options name a model that is not there.
        """
        votes = _count_votes(request)
        if len(votes) < 2:
            return _judge_unopposed(request, votes)
        jury = _list_jury(request, self.options)
        wins = dict.fromkeys(votes, 0.0)
        asked: list[tuple[str, Sample]] = []
        skipped = 0
        for number, pair in enumerate(combinations(votes, 2)):
            authors = {one.model for one in request.candidates if one.answer in pair}
            judge = next((name for name in jury if name not in authors), None)
            if judge is None:
                skipped += 1
                shares = (0.5, 0.5)
            else:
                samples = _ask(request, request.models[judge], pair, number, self.options)
                asked.extend((judge, sample) for sample in samples)
                shares = _settle(samples)
            for answer, share in zip(pair, shares, strict=True):
                wins[answer] += share
        winner = max(votes, key=lambda answer: (wins[answer], votes[answer]))
        reason = f"{wins[winner]:g} of {len(votes) - 1} pairs won"
        if skipped:
            reason += f", {skipped} without anybody to judge"
        return Verdict(_find(request, winner), reason, tuple(asked))


def _count_votes(request: JudgeRequest) -> dict[str, int]:
    """How many candidates gave each answer, in the order in which answers came."""
    return dict(Counter(one.answer for one in request.candidates if one.answer is not None))


def _find(request: JudgeRequest, answer: str) -> int:
    return [one.answer for one in request.candidates].index(answer)


def _judge_unopposed(request: JudgeRequest, votes: Mapping[str, int]) -> Verdict:
    if not votes:
        return Verdict(0, _NO_ANSWER)
    return Verdict(_find(request, next(iter(votes))), "the only answer there is")


def _said(candidate: Candidate) -> str:
    return candidate.text.strip()


def _find_scorer(request: JudgeRequest, options: LikelihoodOptions) -> Scorer:
    members = {one.model for one in request.candidates}
    if options.model is not None:
        named = request.models.get(options.model)
        found = {options.model: named} if isinstance(named, Scorer) else {}
    else:
        found = {
            name: model
            for name, model in request.models.items()
            if isinstance(model, Scorer) and name not in members
        }
    if len(found) != 1:
        wanted = "one model" if options.model is None else f"'{options.model}'"
        raise ConfigError(
            f"Cannot judge task '{request.task.id}' by likelihood: expected {wanted} that scores "
            f"and is no candidate, got {', '.join(found) or 'none'}. Name it in judge_options."
        )
    (scorer,) = found.values()
    return scorer


def _list_jury(request: JudgeRequest, options: PairwiseOptions) -> list[str]:
    """Names of the models that may judge, the preferred first."""
    if options.models is None:
        members = [one.model for one in request.candidates if one.model in request.models]
        return list(dict.fromkeys([*members, *sorted(request.models)]))
    unknown = [name for name in options.models if name not in request.models]
    if unknown:
        raise ConfigError(
            f"Cannot judge task '{request.task.id}' by pairs: expected models of the cascade, got "
            f"{', '.join(unknown)}. The cascade has {', '.join(sorted(request.models))}."
        )
    return list(options.models)


def _ask(
    request: JudgeRequest,
    model: CascadeModel,
    pair: tuple[str, str],
    number: int,
    options: PairwiseOptions,
) -> list[Sample]:
    """Two judgements, in both orders; each is a prompt of its own."""
    first, second = (request.candidates[_find(request, answer)] for answer in pair)
    samples: list[Sample] = []
    for order, (one, other) in enumerate(((first, second), (second, first))):
        asked = Request(
            prompt=_compose(request.task, one, other),
            seed=(request.seed + 2 * number + order) % MAX_SEED,
            max_new_tokens=options.max_new_tokens,
        )
        samples.extend(model.sample([asked]))
    return samples


def _compose(task: CascadeTask, one: Candidate, other: Candidate) -> str:
    return (
        f"Task:\n{task.prompt}\n\nAnswer A:\n{_said(one)}\n\nAnswer B:\n{_said(other)}\n\n"
        "Which answer is right, A or B? Say the letter only.\nThe right answer is "
    )


def _settle(samples: Sequence[Sample]) -> tuple[float, float]:
    """Shares of the pair's win by two judgements, the second in the other order."""
    letters = [_read_letter(one) for one in samples]
    if letters == ["A", "B"]:
        return 1.0, 0.0
    if letters == ["B", "A"]:
        return 0.0, 1.0
    return 0.5, 0.5


def _read_letter(sample: Sample) -> str | None:
    if sample.failure is not None:
        return None
    return extract_choice(_LETTERS, sample.text)


_LETTERS = CascadeTask("judgement", "judgement", "", "choice-letter", details={"choices": 2})
