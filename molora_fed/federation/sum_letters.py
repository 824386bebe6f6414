"""What coordinator and members of a private fusion put into questions and answers, as folders.

Everything is parsed at the door into bounded values. An answer holds counts, or one message of a
sum; neither text nor token ids have a place in it. What compares held-out text with train text
rides along in a folder of its own (`overlap_letters`).
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from molora_fed.contributions.build import MAX_FIGURES_BYTES
from molora_fed.contributions.manifest import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Contribution,
    load_contribution,
)
from molora_fed.errors import FederationError
from molora_fed.federation.exchange import ANSWER_FILE, QUESTION_FILE
from molora_fed.federation.messages import FileEntry, Shipment
from molora_fed.fusion.sum_questions import SumQuestion, TextCounts
from molora_fed.privacy.sums.messages import Name, Names, Sha
from molora_fed.storage.files import (
    hash_file,
    make_folder,
    replace_folder,
    write_bytes,
    write_json,
)
from molora_fed.storage.settings import UntrustedModel, describe_offenders
from molora_fed.storage.untrusted import clean, parse_json

__all__ = [
    "AgainAsked",
    "ExpertsAsked",
    "PhaseAsked",
    "SumAsked",
    "build_sum_question",
    "identify_sum",
    "load_experts",
    "read_counts",
    "read_message",
    "read_question",
    "read_tensors",
    "read_vector",
    "save_again",
    "save_answer",
    "save_experts",
    "save_phase",
    "save_sum",
    "write_tensors",
]

_EXPERTS = "experts"
_STATE_FILE, _MESSAGE_FILE = "state.safetensors", "message.bin"
_MAX_TENSORS = 4_096
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_MEMBERS = 1_024


class ExpertsAsked(UntrustedModel):
    """All admitted experts; the answer is what the member has.

    Attributes:
        fusion: Id of the fusion.
    """

    kind: Literal["experts"] = "experts"
    fusion: Sha


class SumAsked(UntrustedModel):
    """One sum over members.

    Attributes:
        fusion: Id of the fusion.
        place: See `SumQuestion`.
        routers: See `SumQuestion`.
        counts: What each member said it has, by name.
        members: Who is asked, sorted; others have left.
    """

    kind: Literal["sum"] = "sum"
    fusion: Sha
    place: Annotated[str, Field(pattern=r"^(fit \d{1,3} \d{1,4}|judge \d{1,3}|losses|held-out)$")]
    routers: Annotated[list[Annotated[str, Field(max_length=80)]], Field(max_length=64)]
    counts: Annotated[dict[Name, TextCounts], Field(max_length=MAX_MEMBERS)]
    members: Names

    @model_validator(mode="after")
    def _check(self) -> "SumAsked":
        if not self.members or set(self.members) - self.counts.keys():
            raise ValueError("members without counts")
        if len(set(self.routers)) != len(self.routers):
            raise ValueError("a router twice")
        return self


Attempt = Annotated[int, Field(ge=0, le=4_096)]


class AgainAsked(UntrustedModel):
    """A masked sum once more, over some of its members.

    Attributes:
        fusion: Id of the fusion.
        question: Id of the question with `SumAsked`.
        attempt: Number of the attempt, 1 or more.
        members: Who is asked, sorted.
    """

    kind: Literal["again"] = "again"
    fusion: Sha
    question: Sha
    attempt: Annotated[int, Field(ge=1, le=4_096)]
    members: Names


class PhaseAsked(UntrustedModel):
    """The next phase of a masked sum; its message lies beside.

    Attributes:
        fusion: Id of the fusion.
        question: Id of the question with `SumAsked`.
        attempt: Number of the attempt.
    """

    kind: Literal["phase"] = "phase"
    fusion: Sha
    question: Sha
    attempt: Attempt


Asked = ExpertsAsked | SumAsked | AgainAsked | PhaseAsked
_ASKED: TypeAdapter[Asked] = TypeAdapter(Annotated[Asked, Field(discriminator="kind")])


def save_experts(asked: ExpertsAsked, contributions: Sequence[Contribution], folder: Path) -> None:
    """Write a question with all experts: manifests, adapters, published statistics; no sample.

    Raises:
        StorageError: On I/O errors.
    """
    with replace_folder(folder) as target:
        write_json(target / QUESTION_FILE, asked.model_dump(mode="json"))
        for one in contributions:
            names = [name for name in one.manifest.files if not name.startswith("samples/")]
            for name in (MANIFEST_FILE, SIGNATURE_FILE, *names):
                path = target / _EXPERTS / one.id / name
                make_folder(path.parent)
                shutil.copyfile(one.folder / name, path)


def load_experts(folder: Path) -> list[Contribution]:
    """Read the experts of a question; each is signed by its own contributor.

    Raises:
        AdapterError: If one is malformed.
        SignatureError: If a signature does not verify.
        FederationError: If there is none, too many, or a folder is not named by its expert.
    """
    places = sorted((folder / _EXPERTS).iterdir()) if (folder / _EXPERTS).is_dir() else []
    if not 0 < len(places) <= MAX_MEMBERS:
        raise _malformed("a question", f"1 to {MAX_MEMBERS} experts", f"{len(places)}")
    found = [load_contribution(place) for place in places]
    if [one.id for one in found] != [place.name for place in places]:
        raise _malformed("a question", "experts in folders of their ids", "others")
    return found


def save_sum(
    asked: SumAsked,
    state: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    riders: Mapping[str, Path] | None = None,
) -> None:
    """Write a question for a sum; equal questions give equal bytes.

    Args:
        asked: What is asked.
        state: Tensors of the routers.
        folder: Of the question.
        riders: Files that ride along, by their name in the folder; no part of the sum.

    Raises:
        StorageError: On I/O errors.
    """
    with replace_folder(folder) as target:
        write_json(target / QUESTION_FILE, asked.model_dump(mode="json"))
        write_tensors(target / _STATE_FILE, state)
        for name, source in (riders or {}).items():
            make_folder((target / name).parent)
            shutil.copyfile(source, target / name)


def identify_sum(folder: Path) -> str:
    """Id of what is summed: that of the question without what rides along, the same for all.

    Args:
        folder: Of the question, written by `save_sum`.
    """
    paths = [folder / QUESTION_FILE, folder / _STATE_FILE]
    try:
        files = [FileEntry(path.name, hash_file(path), path.stat().st_size) for path in paths]
    except OSError as error:
        raise _malformed("a question", "a state", type(error).__name__) from error
    return Shipment(tuple(files)).id


def save_again(asked: AgainAsked, folder: Path) -> None:
    """Write a question for another attempt at a sum.

    Raises:
        StorageError: On I/O errors.
    """
    with replace_folder(folder) as target:
        write_json(target / QUESTION_FILE, asked.model_dump(mode="json"))


def save_phase(asked: PhaseAsked, message: bytes, folder: Path) -> None:
    """Write a question for a phase of a masked sum.

    Raises:
        StorageError: On I/O errors.
    """
    with replace_folder(folder) as target:
        write_json(target / QUESTION_FILE, asked.model_dump(mode="json"))
        write_bytes(target / _MESSAGE_FILE, message)


def read_question(folder: Path) -> Asked:
    """Read what is asked, from outside.

    Raises:
        FederationError: If it is malformed.
    """
    try:
        return _ASKED.validate_python(_read_json(folder / QUESTION_FILE))
    except ValidationError as error:
        got = describe_offenders(error, whole="question")
        raise _malformed("a question", "one of a private fusion", got) from error


def build_sum_question(asked: SumAsked, folder: Path) -> SumQuestion:
    """What is summed, with the state that lies beside.

    Raises:
        FederationError: If the state is malformed.
    """
    return SumQuestion(asked.place, tuple(asked.routers), read_tensors(folder / _STATE_FILE))


def save_answer(
    folder: Path,
    *,
    counts: TextCounts | None = None,
    message: bytes | None = None,
    vector: NDArray[np.float64] | None = None,
    riders: Mapping[str, bytes] | None = None,
) -> None:
    """Write an answer: counts, a message of a masked sum, or a vector, (N,).

    Args:
        folder: Of the answer.
        counts: Where experts were sent.
        message: Of a masked sum.
        vector: Of a robust sum, (N,).
        riders: What rides along, by its name in the folder.

    Raises:
        StorageError: On I/O errors.
    """
    with replace_folder(folder) as target:
        content = {} if counts is None else counts.model_dump(mode="json")
        write_json(target / ANSWER_FILE, content)
        if message is not None:
            write_bytes(target / _MESSAGE_FILE, message)
        if vector is not None:
            write_tensors(target / _STATE_FILE, {"vector": torch.from_numpy(vector)})
        for name, data in (riders or {}).items():
            write_bytes(target / name, data)


def read_counts(path: Path) -> TextCounts:
    """Read counts, from outside.

    Raises:
        FederationError: If they are malformed.
    """
    try:
        return TextCounts.model_validate(_read_json(path))
    except ValidationError as error:
        got = describe_offenders(error, whole="counts")
        raise _malformed("an answer", "counts of text", got) from error


def read_message(folder: Path, *, max_bytes: int) -> bytes:
    """Read a message of a masked sum, from outside.

    Raises:
        FederationError: If there is none, or it is too long.
    """
    path = folder / _MESSAGE_FILE
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise _malformed("a message of a sum", "one", type(error).__name__) from error
    if len(data) > max_bytes:
        raise _malformed("a message of a sum", f"at most {max_bytes:,} bytes", "more")
    return data


def read_vector(folder: Path, length: int) -> NDArray[np.float64]:
    """Read a vector, (length,), from outside.

    Raises:
        FederationError: If it is malformed.
    """
    tensors = read_tensors(folder / _STATE_FILE)
    vector = tensors.get("vector")
    if vector is None or tuple(vector.shape) != (length,) or vector.dtype != torch.float64:
        raise _malformed("an answer", f"{length:,} float64 numbers", "others")
    return np.ascontiguousarray(vector.numpy())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors whole or not at all; equal ones give equal bytes.

    Raises:
        StorageError: On I/O errors.
    """
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    write_bytes(path, save(plain))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read finite float tensors from outside.

    Raises:
        FederationError: If they are malformed.
    """
    try:
        tensors = load_file(path)
    except OSError as error:  # its text names a path of this machine
        raise _malformed("tensors", "safetensors", type(error).__name__) from error
    except (SafetensorError, ValueError) as error:
        raise _malformed("tensors", "safetensors", clean(error, 100)) from error
    faults = [n for n, t in tensors.items() if t.dtype not in _FLOATS or not t.isfinite().all()]
    if faults or len(tensors) > _MAX_TENSORS:
        got = f"others in {', '.join(clean(n, 80) for n in faults[:5])}" if faults else "too many"
        raise _malformed("tensors", "finite floating-point numbers", got)
    return tensors


def _read_json(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FIGURES_BYTES + 1)
        return parse_json(data, max_bytes=MAX_FIGURES_BYTES)
    except OSError as error:  # its text names a path of this machine
        raise _malformed("a message", "JSON", type(error).__name__) from error
    except ValueError as error:
        raise _malformed("a message", "JSON", clean(error, 100)) from error


def _malformed(what: str, expected: str, got: str) -> FederationError:
    return FederationError(
        f"Cannot read {what}: expected {expected}, got {clean(got, 300)}. Run the same molora-fed "
        "version on both sides."
    )
