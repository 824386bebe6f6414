"""The contributor's worker, its own process: corpus, training, contribution, result.

`python -m molora_fed.federation.worker HOME`. Every step is durable and found again, so the process
may be killed at any moment and started again; it ends with the same bytes.
"""

import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from molora_fed.charter import Charter, load_charter
from molora_fed.contributions.manifest import load_contribution
from molora_fed.cooperative.pins import check_pins
from molora_fed.errors import (
    AdapterError,
    AdmissionError,
    FederationError,
    MoloraError,
    PluginError,
    QuestionRefusedError,
    RoutingError,
    SignatureError,
    SumError,
)
from molora_fed.federation.answering import (
    answer_question,
    find_question,
    refuse_question,
)
from molora_fed.federation.consent import (
    has_consent,
)
from molora_fed.federation.envelopes import open_letter, set_aside
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.kept import Offer
from molora_fed.federation.letters import Acknowledgement, ResultLetter
from molora_fed.federation.logs import log, start_logging
from molora_fed.federation.mailbox import hold_lock
from molora_fed.federation.signing import build_acknowledgement_bytes
from molora_fed.federation.status import StateFile, UsageFile
from molora_fed.federation.supervise import record_errors
from molora_fed.federation.worker_mail import (
    LOOK_SECONDS,
    offer_contribution,
    receive_base,
    receive_charter,
    receive_result,
    until,
)
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.compute import read_compute
from molora_fed.storage.files import canonical_json, hash_bytes, write_json
from molora_fed.storage.keys import load_key, verify

if TYPE_CHECKING:
    from molora_fed.contributions.contributed import Entrant
    from molora_fed.cooperative.cooperative import CharterAndBase
    from molora_fed.corpus.prepare import Corpus
    from molora_fed.federation.sum_answers import SumAnswers
    from molora_fed.population.private_member import PrivateMember

__all__ = ["ContributorWorker", "main"]

_FUSION_FOLDER = "fusion"

_LEFT_OUT = ("text_field", "loss_on", "domain_options")
"""Settings that a recipe says only where they are not as usual."""
_PHASES = {
    "training": ("TRAINING", ""),
    "measuring": ("TRAINING", "measuring the adapter trained earlier"),
    "building": ("SUBMITTING", "building the contribution"),
}
"""What the worker's state says while a contribution is made."""
_NOT_ANSWERED = (
    AdapterError,
    FederationError,
    PluginError,
    QuestionRefusedError,
    RoutingError,
    SumError,
)
"""What may be wrong with a question; the disk, the charter and too little text end the worker."""


class ContributorWorker:
    """Does a contributor's work between its folders.

    Args:
        home: The contributor's home, with key and settings.
        plugins: Where domains and adapter kinds are registered.
    """

    def __init__(self, home: ContributorHome, plugins: Plugins) -> None:
        self._home = home
        self._plugins = plugins
        self._settings: JoinSettings = home.read_settings()
        self._state = StateFile(home.state_file)
        self._usage = UsageFile(home.usage_file)
        self._member: PrivateMember | None = None
        self._answers: SumAnswers | None = None
        self._decided = 0
        self._strange = ""

    def run(self) -> None:
        """Work until the result is there; raises what `steps` raises."""
        for _ in self.steps():
            time.sleep(LOOK_SECONDS)

    def steps(self) -> Iterator[None]:
        """Work until the result is there, and yield whenever something must arrive first.

        Every step is durable: dropped anywhere and begun again, here or in another process, it
        resumes where it was.

        Raises:
            AdmissionError: If the contribution was not admitted.
            FederationError: If the charter is another cooperative's, or has no use for the domain.
            PluginError: If plugins that the charter pins are not here as they are pinned.
            MoloraError: Whatever a step refuses.
        """
        home = self._home
        self._state.enter("JOINING", "waiting for the charter")
        if not home.offer_file.exists():
            # Takes seconds, like the first messages: both go on at once.
            importlib.import_module("molora_fed.cooperative.contribute")
        charter = yield from until(lambda: receive_charter(home))
        self._check_domain(charter)
        check_pins(charter, self._plugins)
        if not self._is_offered(charter):
            yield from self._contribute(charter)
        self._state.enter("SUBMITTED", "waiting for the coordinator's decision")
        yield from until(self._read_decision)
        self._state.enter("ADMITTED", "waiting for the fused model")
        yield from until(lambda: self._take_part(charter))
        self._link_base()
        self._state.enter("DONE", f"the fused model is in {home.result}")

    def _check_domain(self, charter: Charter) -> None:
        domains = charter.amendment.domains
        if domains and self._settings.domain not in domains:
            raise FederationError(
                f"Cannot join cooperative '{charter.identity.name}': expected one of the domains "
                f"{', '.join(domains)}, got '{self._settings.domain}'. Choose one of these, or "
                "ask the coordinator for an amendment."
            )

    def _is_offered(self, charter: Charter) -> bool:
        """Whether a contribution made from these settings and this amendment is offered."""
        offer = open_letter(self._home.offer_file, Offer)
        number = charter.amendment.number
        if offer is None:
            return False
        if offer.recipe == self._recipe(charter):
            return True
        # A later amendment asks nothing new of a contributor who is in: nobody retrains.
        earlier = {self._recipe(charter, amendment) for amendment in range(number)}
        return offer.recipe in earlier and self._is_admitted()

    def _is_admitted(self) -> bool:
        """Whether the coordinator has admitted what is offered."""
        try:
            return bool(self._read_decision())
        except AdmissionError:
            return False

    def _recipe(self, charter: Charter, amendment: int | None = None) -> str:
        """Hash of what a contribution is made from, under the charter's amendment or another."""
        kept = self._settings.to_json()
        return hash_bytes(
            canonical_json(
                {
                    "identity": charter.identity_hash,
                    "amendment": charter.amendment.number if amendment is None else amendment,
                    "name": kept["name"],
                    "domain": kept["domain"],
                    "data": kept["data"],
                    "adapter": kept["adapter"],
                    "shard": kept["shard"],
                    **self._settings.training.describe(),
                    **{name: kept[name] for name in _LEFT_OUT if name in kept},
                }
            )
        )

    def _contribute(self, charter: Charter) -> Iterator[None]:
        """Make the contribution and offer it, once the server's task is here; the offer ends it."""
        home = self._home
        self._state.enter("JOINING", "waiting for the base")
        yield from until(lambda: receive_base(home) or None)
        task_id = f"train-{charter.amendment.number}"
        yield from until(lambda: task_id in home.list_tasks() or None)
        with self._usage.stage("corpus"):
            under = self._load_base(charter)
            corpus = self._prepare_corpus(under)
        self._make_contribution(under, corpus)
        if not has_consent(home, charter):
            self._state.enter("SUBMITTING", "waiting for your consent to send it")
            yield from until(lambda: has_consent(home, charter) or None)
        offer_contribution(home, recipe=self._recipe(charter))

    def _load_base(self, charter: Charter) -> "CharterAndBase":
        from molora_fed.cooperative.cooperative import CharterAndBase, load_charter_base

        self._state.enter("CORPUS", "loading the base")
        compute = read_compute(self._home.root, self._settings.compute)
        base = load_charter_base(charter, self._home.base, compute, self._state.progress)
        return CharterAndBase(charter, base)

    def _prepare_corpus(self, under: "CharterAndBase") -> "Corpus":
        from molora_fed.cooperative.contribute import prepare_domain

        self._state.enter("CORPUS", "clustering, splitting and packing the text")
        settings = self._settings
        corpus = prepare_domain(
            under,
            settings.domain,
            settings.data,
            self._home.root,
            shard=settings.shard,
            text=settings.text,
            options=settings.domain_options,
            plugins=self._plugins,
            progress=self._state.progress,
        )
        files = corpus.report.files
        if files is not None and files["left_out"]:
            # The state is sent: no names of files in it.
            count = sum(row["files"] for row in files["left_out"])
            self._state.enter("CORPUS", f"{count} files left out, see corpus/corpus.json")
        return corpus

    def _make_contribution(self, under: "CharterAndBase", corpus: "Corpus") -> None:
        """Run the contributor's flow, with its phases in the worker's state and usage."""
        from molora_fed.cooperative.contribute import make_contribution
        from molora_fed.models.runtime import format_bytes

        home, settings = self._home, self._settings
        warnings: list[str] = []
        write_json(home.warnings_file, warnings)

        def warn(text: str) -> None:
            log("chat template", "warning", reason=text)
            warnings.append(text)
            write_json(home.warnings_file, warnings)

        with ExitStack() as stage:

            def enter(phase: str) -> None:
                stage.close()
                state, message = _PHASES[phase]
                stage.enter_context(
                    self._usage.stage("building" if phase == "building" else "training")
                )
                self._state.enter(state, message)

            def tell(needed: int, free: int) -> None:
                # The state is sent: what is free here is nobody else's business.
                self._state.enter("TRAINING", f"needs about {format_bytes(needed)} of memory")
                log("training starts", needs_bytes=needed, free_bytes=free)

            made = make_contribution(
                under,
                corpus,
                home.root,
                key=load_key(home.key),
                name=settings.name,
                given=settings.adapter,
                training_folder=home.training_folder(self._recipe(under.charter)),
                threads=settings.threads,
                choices=settings.training,
                plugins=self._plugins,
                on_phase=enter,
                on_memory=tell,
                on_warning=warn,
                progress=self._state.progress,
            )
            log(
                "adapter measured",
                changed=made.adapter.changed,
                modules=made.adapter.modules,
                loss_change=round(made.adapter.loss - made.adapter.base_loss, 4),
            )

    def _read_decision(self) -> bool | None:
        """True once the coordinator has admitted what is offered; None while it has not decided.

        Raises:
            AdmissionError: If it was not admitted.
            SignatureError: If the acknowledgement is not the coordinator's.
        """
        home = self._home
        letter = open_letter(home.acknowledgement_letter, Acknowledgement)
        offer = open_letter(home.offer_file, Offer)
        if letter is None or offer is None or letter.shipment != offer.id:
            return None
        try:
            verify(
                (home.charter / "coordinator.pem").read_text(encoding="utf-8"),
                build_acknowledgement_bytes(letter.to_json()),
                letter.signature,
                what="acknowledgement",
            )
        except SignatureError as error:
            set_aside(home.acknowledgement_letter, error)
            raise
        if letter.state == "ADMITTED":
            return True
        findings = letter.describe()
        self._state.enter(letter.state, findings)
        raise AdmissionError(
            findings
            or f"Cannot take part: expected an admitted contribution, got {letter.state}. "
            "Ask the coordinator."
        )

    def _take_part(self, charter: Charter) -> bool | None:
        """Answer what is asked until the result is here: True then, None before.

        Raises:
            AdmissionError: If the contribution is in no more.
        """
        letter = self._home.acknowledgement_letter
        written = letter.stat().st_mtime_ns if letter.exists() else 0
        if written != self._decided:  # said again, and maybe another thing
            self._read_decision()
            self._decided = written
        self._answer_question(charter)
        return self._receive_result()

    def _answer_question(self, charter: Charter) -> None:
        """Answer the coordinator's question, if there is one, on texts that stay here."""
        home = self._home
        if not (charter.is_private and has_consent(home, charter)):
            return
        evolves = charter.amendment.fusion.mode == "population"
        phase = "EVOLVING" if evolves else "FUSING"
        try:
            letter = find_question(home, charter)
        except (SignatureError, QuestionRefusedError) as error:
            if str(error) != self._strange:  # the same is sent again and again
                self._strange = str(error)
                self._refuse(phase, "", error)
            return
        if letter is None:
            return
        answer = self._answer_evolution if evolves else self._answer_fusion
        with self._usage.stage("evolution" if evolves else "fusion"):
            self._state.enter(phase, "answering the coordinator")
            try:
                answer_question(home, charter, letter, partial(answer, charter))
            except _NOT_ANSWERED as error:
                self._refuse(phase, letter.id, error)
                return
        self._state.enter("ADMITTED", "waiting for the next question, or the result")

    def _refuse(self, phase: str, question: str, error: MoloraError) -> None:
        """Leave a question unanswered, say so, and go on: the next one may be better."""
        said = refuse_question(self._home, question, error)
        log("question refused", "warning", question=question, reason=error)
        self._state.enter(phase, f"refused a question: {said}")

    def _progress(self, done: int, total: int, **figures: float | str) -> None:
        # Its figures would be those of a few blocks, and the state is sent.
        self._state.progress(done, total)

    def _answer_evolution(self, charter: Charter, question: Path, answer: Path) -> str:
        from molora_fed.population.asked import refusing
        from molora_fed.population.questions import load_question, save_answer

        with refusing():
            rules = charter.identity.adapters
            asked = load_question(question, rules=rules, plugins=self._plugins)
        found = self._open_member(charter).answer(asked, progress=self._progress)
        save_answer(found, charter.amendment.population.router, answer)
        return "evolution"

    def _answer_fusion(self, charter: Charter, question: Path, answer: Path) -> str:
        from molora_fed.federation.sum_answers import SumAnswers
        from molora_fed.fusion.private_answers import FusionMember

        home = self._home

        def open_member(experts: "Sequence[Entrant]", folder: Path) -> FusionMember:
            under = self._load_base(charter)
            corpus = self._prepare_corpus(under)
            self._state.enter("FUSING", "answering the coordinator")
            return FusionMember(
                under.base,
                charter,
                corpus.blocks,
                home.corpus,
                experts,
                name=self._settings.name,
                folder=folder,
                plugins=self._plugins,
            )

        if self._answers is None:
            self._answers = SumAnswers(
                charter,
                name=self._settings.name,
                contribution=load_contribution(home.contribution).id,
                key=load_key(home.key),
                folder=home.private / _FUSION_FOLDER,
                open_member=open_member,
            )
        return self._answers.answer(question, answer, self._progress)

    def _open_member(self, charter: Charter) -> "PrivateMember":
        """This contributor's blocks, carved; opened at the first question."""
        from molora_fed.population.private_member import PrivateMember

        if self._member is None:
            under = self._load_base(charter)
            self._member = PrivateMember(
                under.base,
                self._prepare_corpus(under).blocks,
                charter,
                self._home.private,
                threads=self._settings.threads,
                plugins=self._plugins,
            )
            self._state.enter("EVOLVING", "answering the coordinator")
        return self._member

    def _receive_result(self) -> bool | None:
        home = self._home
        with self._usage.stage("result"):
            is_here = receive_result(home)
        letter = open_letter(home.result_letter, ResultLetter)
        if is_here and letter is not None and (home.private / _FUSION_FOLDER).is_dir():
            from molora_fed.federation.sum_answers import end_fusion
            from molora_fed.fusion.sum_questions import name_fusion

            fusion = name_fusion(load_charter(home.charter), letter.summary.contributions)
            end_fusion(home.private / _FUSION_FOLDER, fusion)
        return is_here or None

    def _link_base(self) -> None:
        """Let a fused model find its base at the path it recorded, `../base`."""
        link = self._home.result / "base"
        if not link.exists():
            link.symlink_to(Path("..") / self._home.base.name)


def main(arguments: list[str]) -> None:
    """Run the worker of a home folder.

    Raises:
        SystemExit: With the exit code of whatever a step refused.
    """
    home = ContributorHome(Path(arguments[0]))
    start_logging("worker")
    with (
        record_errors(home.error_file),
        hold_lock(home.root / "worker.lock", what="a contributor's worker"),
    ):
        ContributorWorker(home, get_plugins()).run()


if __name__ == "__main__":
    main(sys.argv[1:])
