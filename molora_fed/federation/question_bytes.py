"""What is signed of questions and of answers. Imports no torch: workers start without it."""

from molora_fed.storage.files import canonical_json

__all__ = ["build_answer_bytes", "build_question_bytes"]


def build_question_bytes(identity: str, amendment: int, question: str) -> bytes:
    """What the coordinator signs of a question: the cooperative, its amendment, and the files."""
    content = {"purpose": "molora-question-1", "identity": identity, "question": question}
    return canonical_json({**content, "amendment": amendment})


def build_answer_bytes(identity: str, question: str, answer: str) -> bytes:
    """What a contributor signs of an answer: the cooperative, what was asked, and the files."""
    content = {"purpose": "molora-answer-1", "identity": identity, "question": question}
    return canonical_json({**content, "answer": answer})
