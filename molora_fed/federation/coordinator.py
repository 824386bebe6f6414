"""The coordinator's worker, its own process and the ledger's only writer: admits and fuses.

`python -m molora_fed.federation.coordinator HOME`. Nothing is acknowledged before it is committed,
and every step done again changes nothing, so the process may be killed at any moment.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora_fed.charter import load_charter, write_charter
from molora_fed.contributions.states import ContributionState, CooperativeState
from molora_fed.cooperative.cooperative import Cooperative, open_cooperative
from molora_fed.cooperative.pins import check_pins
from molora_fed.errors import (
    AdapterError,
    AdmissionError,
    FederationError,
    StorageError,
    SumError,
)
from molora_fed.federation.coordinator_mail import (
    Delivery,
    acknowledge,
    complete_deliveries,
    declines,
    publish_charter,
    publish_result,
    sign_kept_result,
)
from molora_fed.federation.deadline import Patience, count_least
from molora_fed.federation.envelopes import open_letter
from molora_fed.federation.homes import CoordinatorHome, message_bytes
from molora_fed.federation.letters import ResultLetter, Summary
from molora_fed.federation.logs import log, start_logging
from molora_fed.federation.quota import check_quota, describe_failure, discard_rejected
from molora_fed.federation.status import StateFile, UsageFile
from molora_fed.federation.strangers import list_states, measure_absence, read_limits
from molora_fed.federation.supervise import record_errors
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.keys import key_fingerprint, load_key

if TYPE_CHECKING:
    from molora_fed.contributions.ledger import Ledger
    from molora_fed.contributions.manifest import Contribution
    from molora_fed.contributions.receive import Receipt
    from molora_fed.cooperative.opened_members import PooledSource, PrivateSource
    from molora_fed.federation.exchange import Exchange
    from molora_fed.models.base import Base

__all__ = ["CoordinatorWorker", "main"]

LOOK_SECONDS = 0.3
RETRY_SECONDS = 2.0
GONE_SECONDS = 300.0
"""After this long without a message the others of a private fusion go on without a member."""
ACTOR = "server"

_S = CooperativeState


class CoordinatorWorker:
    """Does the coordinator's work between its folders.

    Args:
        home: The coordinator's home.
        cooperative: The same folder as a cooperative, with the amendment that counts.
        ledger: Its ledger, open for writing.
        plugins: Where routers, kinds, checks and predictors are registered.
    """

    def __init__(
        self,
        home: CoordinatorHome,
        cooperative: Cooperative,
        ledger: "Ledger",
        plugins: Plugins,
    ) -> None:
        self._home = home
        self._cooperative = cooperative
        self._charter = cooperative.charter
        self._ledger = ledger
        self._plugins = plugins
        self._key = load_key(cooperative.key_path)
        self._state = StateFile(home.state_file)
        self._usage = UsageFile(home.usage_file)
        self._message_bytes = message_bytes()
        self._loaded_base: Base | None = None
        self._patience = Patience(
            home.mail / "opened.json", self._charter.amendment, least=count_least(self._charter)
        )
        self._shown = ""
        self._phase = ""
        self._stuck: tuple[int, list[str]] | None = None

    def run(self) -> None:
        """Publish the charter, then take contributions and fuse for as long as the process lives.

        Raises:
            PluginError: If plugins that the charter pins are not here as they are pinned.
            MoloraError: Whatever cannot be mended by waiting for space on the disk.
        """
        check_pins(self._charter, self._plugins)
        if load_charter(self._home.charter) != self._charter:
            write_charter(self._charter, self._home.charter)
        publish_charter(
            self._home,
            self._charter,
            self._key,
            part_bytes=self._message_bytes,
            statistics_bytes=self._measure_statistics(),
        )
        sign_kept_result(self._home, self._charter, self._key)
        if self._ledger.cooperative_state == _S.CREATED:
            self._ledger.advance(_S.RECRUITING, actor=ACTOR)
        self._show()
        self._usage.add("start", time.process_time())
        self._admit_pending()
        while True:
            with self._waiting_for_space(), self._usage.stage("looking"):
                self.look()
            time.sleep(LOOK_SECONDS)

    def _measure_statistics(self) -> int:
        """Bytes of the largest statistics file; 0 where none are published."""
        if not self._charter.publishes_statistics:
            return 0
        from molora_fed.cooperative.outgoing import read_width
        from molora_fed.models.hidden_statistics import compute_statistics_bytes

        return compute_statistics_bytes(read_width(self._home.base))

    def look(self) -> None:
        """Take what is complete, and fuse if it is time."""
        self._advance_to_training()
        for delivery in list(complete_deliveries(self._home, part_bytes=self._message_bytes)):
            with self._usage.stage("admission"):
                self._take(delivery)
        if self._is_time_to_fuse():
            with self._usage.stage("fusion"):
                if self._charter.amendment.fusion.mode == "population":
                    self._evolve()
                else:
                    try:
                        self._fuse()
                    except AdmissionError as error:  # nobody is left to fuse: wait for others
                        self._show(str(error))
                    except SumError as error:  # asking the same members again would end the same
                        self._stuck = self._recipe
                        self._home.worker_board.post(str(error))
                        self._show(str(error))
        else:
            self._show_deadline()

    @property
    def _base(self) -> "Base":
        """The cooperative's base, loaded at the first use; a plain look needs no torch."""
        if self._loaded_base is None:
            with self._usage.stage("loading"):
                self._loaded_base = self._cooperative.load_base()
        return self._loaded_base

    @contextmanager
    def _waiting_for_space(self) -> Iterator[None]:
        """On a full disk say so and try again later; whatever was begun goes on."""
        try:
            yield
            self._home.worker_board.post("")
        except StorageError as error:
            self._home.worker_board.post(str(error))
            time.sleep(RETRY_SECONDS)

    def _show(self, message: str = "") -> None:
        self._shown = "" if message else self._count()
        self._state.enter(str(self._ledger.cooperative_state), message or self._shown)

    def _count(self) -> str:
        """How many contributions are in, of how many, and what is waited for."""
        admitted = len(self._ledger.contributions(ContributionState.ADMITTED))
        return self._patience.describe(admitted, is_settled=self._is_settled)

    @property
    def _is_settled(self) -> bool:
        """Whether whom to wait for was settled; now it grows, shrinks or is amended."""
        return self._ledger.cooperative_state in (_S.PUBLISHED, _S.GROWING)

    def _show_deadline(self) -> None:
        """Say that the deadline has passed without a quorum, once it has."""
        if self._shown and self._shown != self._count():
            self._show()

    def _advance_to_training(self) -> None:
        if self._ledger.cooperative_state == _S.RECRUITING and any(
            state.phase != "JOINING" for state in list_states(self._home)
        ):
            self._ledger.advance(_S.TRAINING, actor=ACTOR)
            self._show()

    def _admit_pending(self) -> None:
        """Decide what a run that was killed had stored and not decided."""
        if self._ledger.contributions(ContributionState.VERIFIED):
            from molora_fed.contributions.receive import admit_pending

            admit_pending(
                self._ledger,
                self._cooperative.store,
                charter=self._charter,
                base=self._base,
                plugins=self._plugins,
                actor=ACTOR,
                public_folder=self._cooperative.public_folder,
            )

    def _take(self, delivery: Delivery) -> None:
        """Receive one contribution and acknowledge what the ledger has committed."""
        folder = self._home.received / delivery.shipment.id[:16]
        try:
            delivery.unpack(folder, part_bytes=self._message_bytes)
        except StorageError:
            raise
        except FederationError as error:
            # The damaged parts are gone and are fetched again.
            log("upload damaged", "warning", reason=error)
            return
        try:
            receipt = self._receive(delivery, folder)
            contribution_id, state = receipt.contribution_id, str(receipt.state)
            refusals = receipt.decision.refusals if receipt.decision else ()
            findings = [refusal.message for refusal in refusals]
        except StorageError:
            raise
        except Exception as error:
            # Whatever one upload does to the checks, the others' are taken.
            contribution_id, state, findings = "", "REJECTED", [describe_failure(error)]
        acknowledge(
            delivery,
            self._key,
            contribution_id=contribution_id,
            state=state,
            findings=findings,
            part_bytes=self._message_bytes,
        )
        if state == "REJECTED":
            discard_rejected(self._ledger, self._cooperative.store, delivery.public_key)
        shutil.rmtree(folder, ignore_errors=True)
        self._show()

    def _receive(self, delivery: Delivery, folder: Path) -> "Receipt":
        from molora_fed.contributions.manifest import load_contribution
        from molora_fed.contributions.receive import receive_contribution

        manifest = load_contribution(folder).manifest
        shown, signed = key_fingerprint(delivery.public_key), key_fingerprint(manifest.public_key)
        if shown != signed or manifest.contributor != delivery.name:
            raise AdapterError(
                f"Cannot admit contribution of '{delivery.name}': expected one signed by "
                f"'{delivery.name}' with key {shown[:16]}, got '{manifest.contributor}' with key "
                f"{signed[:16]}. Submit only your own."
            )
        limits = read_limits(self._home)
        if limits is not None:
            bound = limits.contribution_bytes
            check_quota(self._ledger, manifest, contribution_bytes=bound)
        return receive_contribution(
            self._ledger,
            self._cooperative.store,
            folder,
            charter=self._charter,
            base=self._base,
            plugins=self._plugins,
            actor=ACTOR,
            public_folder=self._cooperative.public_folder,
        )

    def _is_time_to_fuse(self) -> bool:
        amendment = self._charter.amendment
        if amendment.fusion.mode != "router" and not self._charter.is_private:
            return False  # Pooled texts: `molora evolve` does it, out of what is admitted.
        admitted = [entry.id for entry in self._ledger.contributions(ContributionState.ADMITTED)]
        if not admitted or self._recipe in (self._published(), self._stuck):
            return False
        return self._is_settled or self._patience.is_enough(len(admitted))

    @property
    def _recipe(self) -> tuple[int, list[str]]:
        """What a fusion would be made of now: the amendment, and what is admitted."""
        admitted = self._ledger.contributions(ContributionState.ADMITTED)
        return self._charter.amendment.number, [entry.id for entry in admitted]

    def _published(self) -> tuple[int, list[str]] | None:
        """Amendment and contributions of the result in the outbox, None if there is none."""
        letter = open_letter(self._home.outbox / "result.json", ResultLetter)
        if letter is None:
            return None
        return letter.summary.amendment, letter.summary.contributions

    def _enter(self, name: str) -> None:
        """Report what begins, within the cooperative's state."""
        self._phase = name
        self._say(name)

    def _say(self, message: str) -> None:
        """Report more of it."""
        self._state.enter(str(self._ledger.cooperative_state), message)

    def _fuse(self) -> None:
        """Fuse what is admitted and publish it."""
        from molora_fed.contributions.receive import find_entry, load_admitted
        from molora_fed.cooperative.fuse import FusedContributions, fuse_admitted
        from molora_fed.federation.withdrawal import build_announcer
        from molora_fed.reporting.headline import list_headline

        def publish(fused: FusedContributions) -> None:
            folders = {"fused": fused.result.fused_folder, "report": fused.report.parent}
            self._publish(folders, [one.id for one in fused.contributions], fused.result.result)
            close()

        admitted = load_admitted(self._ledger, self._cooperative.store)
        source, close = self._open_source(admitted)
        fused = fuse_admitted(
            self._ledger,
            self._charter,
            self._base,
            admitted,
            self._home.root,
            actor=ACTOR,
            plugins=self._plugins,
            source=source,
            publish=publish,
            on_phase=self._enter,
            progress=self._state.progress,
        )
        announce = build_announcer(self._cooperative)
        for one in fused.left_out:
            announce(find_entry(self._ledger, one.contribution_id), one)
        headline = list_headline(fused.result.result)
        left_out = [f"'{one.contributor}' is quarantined." for one in fused.left_out]
        number = f"{len(fused.contributions)} contributions fused."
        self._show(" ".join([number, *left_out, *headline]))

    def _open_source(
        self, admitted: "Sequence[Contribution]"
    ) -> "tuple[PooledSource | PrivateSource, Callable[[], None]]":
        """Where the texts lie, here or with their contributors; and what ends asking these."""
        from molora_fed.cooperative.controls import load_controls
        from molora_fed.cooperative.known_text import read_known_text
        from molora_fed.cooperative.opened_members import PooledSource, PrivateSource
        from molora_fed.federation.remote_members import RemoteMembers

        if not self._charter.is_private:
            controls = load_controls(self._home.root, self._plugins)
            texts = read_known_text(self._home.root)
            return PooledSource(self._charter, texts, controls), lambda: None
        if self._published() != self._recipe:
            # Whoever still gets the last result leaves, and cannot be asked.
            (self._home.outbox / "result.json").unlink(missing_ok=True)
        asked = [""]

        def ask(place: str) -> None:
            asked[0] = f"{self._phase}, asking for {place}"
            self._say(asked[0])

        folder = self._home.private
        exchange = self._open_exchange(admitted, folder / "answers", lambda: asked[0])
        members = RemoteMembers(
            exchange,
            self._charter,
            admitted,
            folder / "fusion",
            is_gone=self._is_gone,
            on_place=ask,
            on_note=lambda note: log("private sum", reason=note),
        )
        return PrivateSource(members), exchange.close

    def _is_gone(self, name: str) -> bool:
        """Whether a contributor has not been heard of for long, or declines what it is asked."""
        found = [one for one in self._home.contributors() if one.name == name]
        return all(measure_absence(one) > GONE_SECONDS or declines(one) for one in found)

    def _evolve(self) -> None:
        """Evolve a population with its contributors, on their texts, and publish it."""
        from molora_fed.contributions.receive import load_admitted
        from molora_fed.cooperative.evolve import (
            EVOLVED_FOLDER,
            EvolutionResult,
            PrivateTexts,
            evolve_admitted,
        )
        from molora_fed.federation.requests import RemoteData

        phase = ["evolving"]

        def enter(name: str) -> None:
            phase[0] = name
            self._enter(name)

        def publish(result: EvolutionResult, report: Path) -> None:
            folders = {EVOLVED_FOLDER: result.model_folder, "report": report.parent}
            self._publish(folders, ids, result.result)
            exchange.close()

        admitted = load_admitted(self._ledger, self._cooperative.store)
        ids, folder = [one.id for one in admitted], self._home.evolution
        charter = hash_bytes(canonical_json(self._charter.model_dump(mode="json")))
        self._home.claim_evolution({"contributions": ids, "charter": charter})
        exchange = self._open_exchange(admitted, folder / "answers", lambda: phase[0])
        names = tuple(one.manifest.contributor for one in admitted)
        ask = RemoteData(exchange, names, charter=self._charter, plugins=self._plugins)
        evolve_admitted(
            self._ledger,
            self._charter,
            self._base,
            PrivateTexts(self._charter, admitted, ask, plugins=self._plugins),
            folder,
            actor=ACTOR,
            plugins=self._plugins,
            publish=publish,
            on_phase=enter,
            progress=self._state.progress,
        )
        self._show(f"{len(admitted)} contributions evolved")

    def _open_exchange(
        self, admitted: "Sequence[Contribution]", answers: Path, get_phase: Callable[[], str]
    ) -> "Exchange":
        from molora_fed.federation.exchange import Exchange

        return Exchange(
            self._home,
            {
                one.manifest.contributor: self._home.contributor(
                    key_fingerprint(one.manifest.public_key)
                )
                for one in admitted
            },
            answers,
            key=self._key,
            charter=self._charter,
            part_bytes=self._message_bytes,
            on_wait=lambda names: self._say(f"{get_phase()}: {', '.join(names)}"),
            on_problem=self._home.worker_board.post,
        )

    def _publish(
        self, folders: Mapping[str, Path], ids: Sequence[str], result: Mapping[str, Any]
    ) -> None:
        """Put a result's folders into the outbox."""
        summary = Summary(
            amendment=self._charter.amendment.number,
            contributions=list(ids),
            gain_percent=dict(result.get("gain_percent", {})),
        )
        publish_result(
            self._home,
            dict(folders),
            summary,
            key=self._key,
            identity=self._charter.identity_hash,
            part_bytes=self._message_bytes,
        )


def main(arguments: list[str]) -> None:
    """Run the worker of a home folder.

    Args:
        arguments: The folder; then, where somebody chose, where models are to run, as JSON.

    Raises:
        SystemExit: With the exit code of whatever a step refused.
    """
    home = CoordinatorHome(Path(arguments[0]))
    start_logging("coordinator")
    with record_errors(home.error_file):
        home.worker_board.prepare()
        compute = Compute.model_validate_json(arguments[1]) if len(arguments) > 1 else None
        cooperative = open_cooperative(home.root, compute)
        with cooperative.open_ledger() as ledger:
            CoordinatorWorker(home, cooperative, ledger, get_plugins()).run()


if __name__ == "__main__":
    main(sys.argv[1:])
