"""Letters as typed models: what a server and a contributor say to each other, within bounds.

Whatever arrives, or lies in a mailbox, is read through these: numbers are finite and in range,
lists and texts are limited, unknown keys refused. Imports neither torch nor flwr.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator

from molora_fed.federation.messages import (
    MAX_BATCH_BYTES,
    MAX_FILE_BYTES,
    PartName,
    Shipment,
    parse_part_name,
    parse_shipment,
)
from molora_fed.federation.status import Count, WorkerState
from molora_fed.storage.names import is_name
from molora_fed.storage.settings import UntrustedModel
from molora_fed.storage.untrusted import clean
from molora_fed.types import BASE_EXPERT

__all__ = [
    "FROM_CONTRIBUTOR",
    "FROM_SERVER",
    "HELLO_PURPOSE",
    "MAX_HELD",
    "MAX_TASKS",
    "MAX_WAIT_SECONDS",
    "Acknowledgement",
    "AnswerLetter",
    "CharterLetter",
    "Fetch",
    "Greeting",
    "Hello",
    "Letter",
    "Manifest",
    "QuestionLetter",
    "Refusal",
    "ResultLetter",
    "ShownState",
    "State",
    "Summary",
    "Task",
    "Wait",
    "cut_findings",
]

MAX_HELD = 8_000
"""Parts that a state lists; their names fit into one envelope."""
MAX_TASKS = 1_000
MAX_WAIT_SECONDS = 30.0
MAX_REASON = 2_000
"""Characters of a refusal, or of what is wrong at a contributor."""
MAX_FINDING = 1_000
"""Characters of one finding of an acknowledgement that is made here."""
MAX_FINDINGS = 4_000
"""Characters of all of them."""

HELLO_PURPOSE = "molora-hello-2"


def _check_name(value: str) -> str:
    if not is_name(value):
        raise ValueError("expected lower-case letters, digits and dashes")
    return value


def _check_own_name(value: str) -> str:
    if value == BASE_EXPERT:
        raise ValueError("this is the name of the base in every report")
    return _check_name(value)


def _read_files(value: Any) -> Shipment:
    return value if isinstance(value, Shipment) else parse_shipment(value)


def _read_part_name(value: Any) -> PartName:
    return value if isinstance(value, PartName) else parse_part_name(value)


Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NoSha = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
"""A SHA-256, or nothing."""
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{0,256}$")]
PublicKey = Annotated[str, Field(max_length=4_096)]
Name = Annotated[str, AfterValidator(_check_name)]
OwnName = Annotated[str, AfterValidator(_check_own_name)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,79}$")]
ContributionId = Annotated[str, Field(pattern=r"^[A-Za-z0-9 -]{0,128}$")]
Reason = Annotated[str, AfterValidator(lambda text: clean(text, MAX_REASON))]
Bytes = Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
PartBytes = Annotated[int, Field(ge=1, le=MAX_BATCH_BYTES)]
Files = Annotated[Shipment, PlainValidator(_read_files), PlainSerializer(Shipment.to_json)]
PartNames = Annotated[
    list[Annotated[PartName, PlainValidator(_read_part_name), PlainSerializer(str)]],
    Field(max_length=MAX_HELD),
]
LedgerState = Literal["RECEIVED", "VERIFIED", "ADMITTED", "QUARANTINED", "REJECTED", "WITHDRAWN"]


class Letter(UntrustedModel):
    """One idempotent letter."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Its content, as it travels and is kept; keys that are not set are left out."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)


class Greeting(Letter):
    """Server: what to sign in order to be let in, and to whom.

    Attributes:
        nonce: Fresh for every node.
        identity: The charter's identity.
        coordinator: Fingerprint of the coordinator's key.
    """

    kind = "hello"

    nonce: Sha
    identity: Sha
    coordinator: Sha


class Hello(Letter):
    """Contributor: its public key, and its signature over what it says to whom.

    Attributes:
        purpose: Form of what is signed, see `build_hello_bytes`; earlier versions did not say it.
        public_key: PEM.
        name: Name it goes by.
        domain: Domain it joins with.
        node_key: Public key of its node, where the transport knows it; None elsewhere.
        signature: Over the greeting and all of this.
    """

    kind = "hello"

    purpose: Annotated[str, Field(max_length=40)] = "molora-hello-1"
    public_key: PublicKey
    name: OwnName
    domain: Name
    node_key: PublicKey | None = None
    signature: Signature


class Refusal(Letter):
    """Server: why this contributor cannot take part."""

    kind = "refusal"

    reason: Reason


class Task(Letter):
    """Server: work to do; done once its outcome is in the outbox."""

    kind = "task"

    id: Identifier
    work: Annotated[Literal["train"], Field(alias="kind")]


class CharterLetter(Letter):
    """Server: the charter's text, the base's files and the tasks, signed.

    Attributes:
        id: Hash of everything but key and signature.
        text: TOML.
        identity: The charter's identity.
        amendment: Number of the amendment in it.
        base: The base's files.
        tasks: Work to do under it.
        part_bytes: Largest part of a file.
        public_key: The coordinator's, PEM.
        signature: Over identity, amendment and id.
    """

    kind = "charter"

    id: Sha
    text: Annotated[str, Field(max_length=500_000)]
    identity: Sha
    amendment: Count
    base: Files
    tasks: Annotated[list[Task], Field(max_length=16)]
    part_bytes: PartBytes
    public_key: PublicKey
    signature: Signature


class Wait(Letter):
    """Server: answer once something has changed, or after some seconds.

    Attributes:
        seconds: How long.
        parts_bytes: Largest sum of parts that may come with the answer.
        question: Id of the question whose answer is awaited; None awaits a contribution.
    """

    kind = "wait"

    seconds: Annotated[float, Field(ge=0.0, le=MAX_WAIT_SECONDS)]
    parts_bytes: Annotated[int, Field(ge=0, le=MAX_BATCH_BYTES)] = 0
    question: Sha | None = None


class Fetch(Letter):
    """Server: send these parts of your contribution, or of your answer."""

    kind = "fetch"

    names: PartNames


class Acknowledgement(Letter):
    """Server: what the ledger holds of a contribution, signed.

    The findings are text that is not trusted and not cleaned, because it is signed as it is.

    Attributes:
        shipment: Id of the contribution's files.
        contribution_id: Hash of its manifest; empty if there was no readable one.
        state: State in the ledger.
        findings: What admission found.
        signature: Over all of this.
    """

    kind = "acknowledgement"

    shipment: Sha
    contribution_id: ContributionId
    state: LedgerState
    findings: Annotated[
        list[Annotated[str, Field(max_length=8 * MAX_FINDING)]], Field(max_length=64)
    ]
    signature: Signature

    def describe(self) -> str:
        """The findings as one line that can be shown."""
        return " ".join(cut_findings(self.findings))


class Summary(UntrustedModel):
    """Of what a result was made.

    Attributes:
        amendment: Number of the amendment it was made under.
        contributions: Ids of the contributions in it.
        gain_percent: Gains by router; figures that are not trusted.
    """

    amendment: Count = 0
    contributions: Annotated[list[ContributionId], Field(max_length=4_096)]
    gain_percent: dict[str, Any] = Field(default={})


class ResultLetter(Letter):
    """Server: the files of the fused model and its report, signed.

    Attributes:
        id: Id of the shipment.
        files: Its files.
        summary: Of what it was made.
        part_bytes: Largest part of a file.
        identity: The charter's identity.
        signature: Over identity, amendment, id and summary; `build_result_bytes`.
    """

    kind = "result"

    id: Sha
    files: Files
    summary: Summary
    part_bytes: PartBytes
    identity: Sha
    signature: Signature


class QuestionLetter(Letter):
    """Server: populations, and what to do with them on texts that stay where they are.

    Attributes:
        id: Id of the shipment.
        files: Its files.
        part_bytes: Largest part of a file.
        answer_bytes: Largest answer.
        amendment: Number of the amendment it is asked under.
        signature: Over identity, amendment and id.
    """

    kind = "question"

    id: Sha
    files: Files
    part_bytes: PartBytes
    answer_bytes: Bytes
    amendment: Count
    signature: Signature


class ShownState(WorkerState):
    """What the server keeps of a state, for whoever looks.

    Attributes:
        problem: What is wrong on the contributor's disk; empty if nothing is.
        declined: Id of the question that it has and does not answer; None if there is none.
    """

    problem: Reason = ""
    declined: Sha | None = None  # left out where not, for servers that do not know it


class State(ShownState, Letter):
    """Contributor: where it stands and what it holds; in every reply.

    Attributes:
        charter: Id of the charter it has.
        tasks: Ids of the tasks that ever arrived.
        acknowledged: Id of the shipment whose acknowledgement it has.
        refused: Whether it has a refusal.
        question: Id of the question it has.
        result: Id of the result it has.
        received: Ids of the shipments that it has whole.
        held: Parts of others.
        own_base: Whether it has a base of its own, and needs only what describes the server's.
    """

    kind = "state"

    charter: NoSha = ""
    tasks: Annotated[list[Identifier], Field(max_length=MAX_TASKS)] = Field(default=[])
    acknowledged: NoSha = ""
    refused: bool = False
    question: NoSha = ""
    result: NoSha = ""
    received: Annotated[list[Sha], Field(max_length=16)] = Field(default=[])
    held: PartNames = Field(default=[])
    own_base: bool | None = None  # left out where not, for servers that do not know it


class Manifest(Letter):
    """Contributor: the files of its contribution."""

    kind = "manifest"

    files: Files


class AnswerLetter(Letter):
    """Contributor: the files of its answer to the last question, signed."""

    kind = "answer"

    question: Sha
    files: Files
    signature: Signature


FROM_SERVER: dict[str, type[Letter]] = {
    model.kind: model
    for model in (
        Greeting, Refusal, CharterLetter, Task, Wait, Fetch, Acknowledgement, ResultLetter,
        QuestionLetter,
    )
}  # fmt: skip
FROM_CONTRIBUTOR: dict[str, type[Letter]] = {
    model.kind: model for model in (Hello, State, Manifest, AnswerLetter)
}


def cut_findings(findings: Sequence[str]) -> list[str]:
    """Findings that can be shown and fit into a letter, whatever they quote."""
    cut: list[str] = []
    left = MAX_FINDINGS
    for number, finding in enumerate(findings):
        if left <= 0:
            cut.append(f"And {len(findings) - number} more.")
            break
        cut.append(clean(finding, min(left, MAX_FINDING)))
        left -= len(cut[-1])
    return cut
