"""The contributor's side of the dialogue: answers letters from files on disk, in seconds.

Imports neither torch nor flwr, and does no heavy work: a new process starts for every message.
"""

import time
from collections.abc import Callable
from pathlib import Path

from molora_fed.errors import StorageError
from molora_fed.federation.envelopes import Envelope, keep_letter, open_letter
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.kept import Offer
from molora_fed.federation.letters import (
    HELLO_PURPOSE,
    MAX_HELD,
    MAX_TASKS,
    Acknowledgement,
    AnswerLetter,
    CharterLetter,
    Fetch,
    Greeting,
    Hello,
    Letter,
    Manifest,
    QuestionLetter,
    Refusal,
    ResultLetter,
    State,
    Task,
    Wait,
)
from molora_fed.federation.mailbox import read_json, read_parts, take_batch
from molora_fed.federation.messages import Part, Shipment, list_describing, plan_parts
from molora_fed.federation.signing import build_hello_bytes
from molora_fed.federation.worker_mail import (
    find_stranger,
    list_received,
)
from molora_fed.storage.keys import build_public_pem, load_key, sign

__all__ = ["answer"]

_LOOK_SECONDS = 0.2


def answer(
    home: ContributorHome,
    envelope: Envelope,
    *,
    is_orphan: Callable[[], bool] = lambda: False,
) -> Envelope:
    """Answer one envelope of the server; answering it twice changes nothing.

    Args:
        home: The contributor's home.
        envelope: What the server sent.
        is_orphan: True once nobody is left to take the answer; ends waiting.

    Returns:
        The reply: always the state, and whatever was asked for.

    Raises:
        FederationError: If what it asks for is not here any more.
    """
    letters: list[Letter] = []
    parts: list[Part] = []
    try:
        _store(home, envelope)
        home.board.post("")
    except StorageError as error:
        home.board.post(str(error))
    for letter in envelope.letters:
        if isinstance(letter, Greeting):
            letters += _build_hello(home, letter)
        elif isinstance(letter, Fetch):
            parts += _collect(home, letter)
        elif isinstance(letter, Wait):
            _wait(home, letter, is_orphan)
            parts += _collect_early(home, letter)
    offer = open_letter(home.offer_file, Offer)
    if offer is not None:
        letters.append(Manifest(files=offer.files))
    answered = _find_answer(home)
    if answered is not None:
        letters.append(answered)
    letters.append(_build_state(home))
    return Envelope(tuple(letters), tuple(parts))


def _store(home: ContributorHome, envelope: Envelope) -> None:
    """Put letters and parts into the inbox, where the worker finds them."""
    places: dict[type[Letter], Path] = {
        CharterLetter: home.charter_letter,
        Acknowledgement: home.acknowledgement_letter,
        ResultLetter: home.result_letter,
        QuestionLetter: home.question_letter,
        Refusal: home.refusal_letter,
    }
    for letter in envelope.letters:
        if isinstance(letter, Task):
            home.keep_task(letter)
        elif type(letter) in places:
            keep_letter(places[type(letter)], letter)
    # After the letters, which say what is expected; whatever else is sent fills no disk.
    wanted = {
        name
        for shipment, part_bytes, is_here in _list_expected(home)
        if not is_here
        for name in plan_parts(shipment, part_bytes=part_bytes)
    }
    for part in envelope.parts:
        if part.name in wanted:
            home.parts.put(part)


def _list_expected(home: ContributorHome) -> list[tuple[Shipment, int, bool]]:
    """The shipments that kept letters announce, the size of their parts, whether they are here."""
    charter = open_letter(home.charter_letter, CharterLetter)
    result = open_letter(home.result_letter, ResultLetter)
    question = open_letter(home.question_letter, QuestionLetter)
    expected = []
    if charter is not None:
        # Of a base of one's own only the server's description is wanted.
        is_own = _brings_base(home) and not _is_here(home, charter.base, home.base)
        base = list_describing(charter.base) if is_own else charter.base
        expected.append((base, charter.part_bytes, home.base))
    if result is not None:
        expected.append((result.files, result.part_bytes, home.result))
    if question is not None:
        folder = home.question_folder(question.id)
        expected.append((question.files, question.part_bytes, folder))
    return [
        (shipment, part_bytes, _is_here(home, shipment, folder))
        for shipment, part_bytes, folder in expected
    ]


def _brings_base(home: ContributorHome) -> bool:
    """Whether `molora join` named a base; not so in homes of earlier versions."""
    settings = read_json(home.settings_file)
    return isinstance(settings, dict) and bool(settings.get("base"))


def _is_here(home: ContributorHome, shipment: Shipment, folder: Path) -> bool:
    return (home.shipments / shipment.id).exists() and folder.is_dir()


def _build_hello(home: ContributorHome, greeting: Greeting) -> list[Letter]:
    """Sign who this is and whom it joins; nothing for another coordinator than the first one."""
    stranger = find_stranger(home, identity=greeting.identity, coordinator=greeting.coordinator)
    if stranger is not None:
        keep_letter(home.refusal_letter, Refusal(reason=str(stranger)))
        return []
    keep_letter(home.greeting_letter, greeting)
    settings = home.read_settings()
    key = load_key(home.key)
    signed = build_hello_bytes(
        HELLO_PURPOSE, **greeting.to_json(), name=settings.name, domain=settings.domain
    )
    return [
        Hello(
            purpose=HELLO_PURPOSE,
            public_key=build_public_pem(key),
            name=settings.name,
            domain=settings.domain,
            signature=sign(key, signed),
        )
    ]


def _build_state(home: ContributorHome) -> State:
    """Where the contributor stands: what it holds, and what its worker last reported."""
    charter = open_letter(home.charter_letter, CharterLetter)
    acknowledgement = open_letter(home.acknowledgement_letter, Acknowledgement)
    question = open_letter(home.question_letter, QuestionLetter)
    result = open_letter(home.result_letter, ResultLetter)
    refused = "" if question is None else home.read_refused(question.id)
    whole = [shipment.id for shipment, _, is_here in _list_expected(home) if is_here]
    # Whoever joins again asks for the result anew, and need not be sent what is here already.
    whole += list_received(home, home.result)
    return State(
        **home.read_state(),
        charter="" if charter is None else charter.id,
        tasks=sorted(home.list_tasks())[-MAX_TASKS:],
        acknowledged="" if acknowledgement is None else acknowledgement.shipment,
        refused=home.refusal_letter.exists(),
        question="" if question is None else question.id,
        result="" if result is None else result.id,
        received=list(dict.fromkeys(whole)),
        held=sorted(home.parts.held())[:MAX_HELD],
        problem=home.board.read() or (refused and f"refused a question: {refused}"),
        declined=question.id if question is not None and refused else None,
        own_base=_brings_base(home) or None,
    )


def _find_answer(home: ContributorHome) -> AnswerLetter | None:
    """The answer to the last question that arrived, if the worker has made it."""
    asked = open_letter(home.question_letter, QuestionLetter)
    answered = open_letter(home.answer_file, AnswerLetter)
    if asked is None or answered is None or answered.question != asked.id:
        return None
    return answered


def _list_offered(home: ContributorHome) -> list[tuple[Path, Shipment]]:
    """What may be fetched: contribution, and answer to the last question."""
    offered = []
    offer, answered = open_letter(home.offer_file, Offer), _find_answer(home)
    if offer is not None:
        offered.append((home.contribution, offer.files))
    if answered is not None:
        offered.append((home.answer_folder(answered.question), answered.files))
    return offered


def _collect(home: ContributorHome, fetch: Fetch) -> list[Part]:
    """Read the parts that are asked for, as far as they are still offered."""
    names = fetch.names
    parts: list[Part] = []
    for folder, shipment in _list_offered(home):
        known = {entry.sha256 for entry in shipment.files}
        wanted = [name for name in names if name.sha256 in known]
        names = [name for name in names if name.sha256 not in known]
        parts += read_parts(folder, shipment, take_batch(wanted))
    return parts


def _collect_early(home: ContributorHome, wait: Wait) -> list[Part]:
    """The first parts of what was waited for, sent before they are asked for: saves a round."""
    if not wait.parts_bytes or not _has_news(home, wait):
        return []
    folder, shipment = _list_offered(home)[-1 if wait.question else 0]
    names = plan_parts(shipment, part_bytes=wait.parts_bytes)
    return read_parts(folder, shipment, take_batch(names, max_bytes=wait.parts_bytes))


def _has_news(home: ContributorHome, wait: Wait) -> bool:
    """Whether there is what a wait letter waits for: a contribution, or an answer."""
    if wait.question is None:
        return home.offer_file.exists()
    answered = _find_answer(home)
    return answered is not None and answered.question == wait.question


def _wait(home: ContributorHome, wait: Wait, is_orphan: Callable[[], bool]) -> None:
    """Wait until the worker has what is waited for, or time is up."""
    deadline = time.monotonic() + wait.seconds
    while time.monotonic() < deadline and not is_orphan() and not _has_news(home, wait):
        time.sleep(_LOOK_SECONDS)
