"""The coordinator's side of a masked sum: collects what members send, and ends with their total.

It believes no member: a message that is malformed, not signed, of another phase or not what was
committed to is refused in one line that names the member and the phase, and the sum goes on
without it as long as the threshold holds.
"""

from typing import Annotated, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from molora_fed.errors import SumError
from molora_fed.privacy.sums.fixed_point import word_type
from molora_fed.privacy.sums.masks import add_own_mask, add_pairwise_mask, commit, hash_names
from molora_fed.privacy.sums.messages import (
    MAX_MEMBERS,
    Agreement,
    Deliver,
    Keys,
    KeysList,
    Masked,
    MemberMessage,
    Opening,
    Revealed,
    Sealed,
    Shares,
    Survivors,
    Terms,
    describe_sender,
    max_message_bytes,
    read_message,
)
from molora_fed.privacy.sums.primitives import (
    agree_secret,
    combine_shares,
    compute_public,
)
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.settings import UntrustedModel, describe_offenders
from molora_fed.storage.untrusted import clean, parse_json

__all__ = ["Coordinator", "CoordinatorState"]

Phase = Literal["keys", "shares", "masked", "agreement", "revealed"]
_MODELS: dict[str, type[MemberMessage]] = {
    str(model.model_fields["phase"].default): model
    for model in (Keys, Shares, Masked, Agreement, Revealed)
}
_PHASES: tuple[Phase, ...] = get_args(Phase)


class CoordinatorState(UntrustedModel):
    """What a coordinator has to keep between messages, beside the running sum.

    Attributes:
        terms: The sum's.
        phase: Phase whose messages are waited for.
        received: Lines by member, of each phase so far.
    """

    terms: Terms
    phase: Phase = "keys"
    received: dict[Phase, Annotated[dict[str, str], Field(max_length=MAX_MEMBERS)]] = Field(
        default={}
    )


class Coordinator:
    """One masked sum.

    Call `receive` with every message, `advance` to end a phase, and send what it returns. A
    message may be received again at any time, and `outgoing` gives the current messages again.

    Attributes:
        state: What is known.
        running: Sum of the masked vectors that were received, (N,) modulo 2^k.
    """

    def __init__(
        self, state: CoordinatorState, running: NDArray[np.unsignedinteger] | None = None
    ) -> None:
        terms = state.terms
        self.state = state
        dtype = word_type(terms.bits)
        self.running = np.zeros(terms.length, dtype=dtype) if running is None else running
        self._context, self._places = terms.context, terms.places
        self._parsed: dict[tuple[str, str], Any] = {}

    @classmethod
    def begin(cls, terms: Terms) -> "Coordinator":
        """Begin a sum."""
        return cls(CoordinatorState(terms=terms))

    def to_bytes(self) -> bytes:
        """All that is known: a line of JSON, then the running sum; before both their hash."""
        line = canonical_json(self.state.model_dump(mode="json"))
        known = line + b"\n" + self.running.tobytes()
        return hash_bytes(known).encode() + b"\n" + known

    @classmethod
    def from_bytes(cls, data: bytes) -> "Coordinator":
        """Go on from what was kept.

        Raises:
            SumError: If it is something else.
        """
        digest, _, known = data.partition(b"\n")
        line, _, words = known.partition(b"\n")
        size = len(_PHASES) * 2 * MAX_MEMBERS * max_message_bytes(MAX_MEMBERS)
        try:
            if hash_bytes(known).encode() != digest:
                raise ValueError("bytes of another hash")
            state = CoordinatorState.model_validate(parse_json(line, max_bytes=size))
            running = np.frombuffer(words, dtype=word_type(state.terms.bits)).copy()
            if len(running) != state.terms.length:
                raise ValueError(f"{len(running):,} words")
            return cls(state, running)
        except ValidationError as error:
            got = describe_offenders(error, whole="state")
        except ValueError as error:
            got = clean(error, 100)
        raise SumError(
            f"Cannot go on with a masked sum: expected the state that was kept, got "
            f"{clean(got, 300)}. Begin another attempt."
        )

    @property
    def waiting_for(self) -> list[str]:
        """Members whose message of this phase is missing, sorted."""
        return sorted(set(self._list_askable(self.state.phase)) - set(self._said(self.state.phase)))

    @property
    def participants(self) -> list[str]:
        """Members that shared their secrets, between whom masks are made; sorted."""
        return sorted(self._said("shares"))

    @property
    def survivors(self) -> list[str]:
        """Members whose vectors are in the total, sorted."""
        return sorted(self._said("masked"))

    def receive(self, sender: str, data: bytes) -> None:
        """Take in one message.

        What was taken in before changes nothing. Where this fails nothing was taken in.

        Args:
            sender: Who sent it, as the transport knows.
            data: The message.

        Raises:
            SumError: If it cannot be used; member and phase are named.
        """
        line, newline, payload = data.partition(b"\n")
        phase = self._find_phase(sender, line)
        what = describe_sender(sender, phase)
        text = line.decode("utf-8", "replace")
        before = self._said(phase).get(sender)
        if before is not None:
            if before != text:
                raise SumError(
                    f"{what}: expected one message, got another after the first. The first counts."
                )
            return
        if phase != self.state.phase:
            raise SumError(
                f"{what}: expected messages of phase '{self.state.phase}', got that one too early "
                "or too late. The sum goes on without it."
            )
        terms = self.state.terms
        model = _MODELS[phase]
        message = read_message(line, model, sender=sender, members=len(terms.members))
        if message.member != sender or sender not in self._list_askable(phase):
            raise SumError(
                f"{what}: expected a message of its own of a member of this phase, got one of "
                f"'{message.member}'. The sum goes on without it."
            )
        if bool(newline) != isinstance(message, Masked):
            raise SumError(f"{what}: expected words after a masked vector only. Leave it out.")
        message.check_signature(terms, self._context)
        self._check(message, payload, what)
        if isinstance(message, Masked):
            words = np.frombuffer(payload, dtype=self.running.dtype)
            np.add(self.running, words, out=self.running)
        received = {**self.state.received, phase: {**self._said(phase), sender: text}}
        self.state = self.state.model_copy(update={"received": received})

    def advance(self) -> dict[str, bytes]:
        """End this phase with those that answered, and begin the next.

        Returns:
            What to send to whom; what they answer belongs to the next phase.

        Raises:
            SumError: If fewer than the threshold have answered, or it is the last phase. Nothing
                has changed then: messages may still come.
        """
        self._check_threshold()
        number = _PHASES.index(self.state.phase)
        if number + 1 == len(_PHASES):
            raise SumError(
                "Cannot go on with a masked sum: expected a phase after 'revealed', got none. "
                "Open the total."
            )
        self.state = self.state.model_copy(update={"phase": _PHASES[number + 1]})
        return self.outgoing()

    def outgoing(self) -> dict[str, bytes]:
        """What was sent to whom when this phase began; nothing in the first."""
        phase = self.state.phase
        build = {
            "shares": self._build_keys_list,
            "agreement": self._build_survivors,
            "revealed": self._build_opening,
        }
        if phase == "keys":
            return {}
        if phase == "masked":
            return {name: self._build_deliver(name) for name in self.participants}
        line = build[phase]()
        return {name: line for name in self._list_askable(phase)}

    def open_total(self) -> NDArray[np.unsignedinteger]:
        """The sum of the survivors' encoded vectors, (N,) modulo 2^k.

        Raises:
            SumError: If fewer than the threshold have revealed their shares, or some member shared
                out what does not give its secret; it is named.
        """
        if self.state.phase != "revealed":
            raise SumError(
                f"Cannot open a masked sum: expected phase 'revealed', got '{self.state.phase}'. "
                "Go on to that phase first."
            )
        self._check_threshold()
        participants, survivors = self.participants, self.survivors
        digest = hash_names(participants)
        # First all secrets, so that nothing is computed where one is missing.
        seeds = {name: self._combine(name, "self") for name in survivors}
        dropped = {n: self._combine(n, "mask") for n in participants if n not in survivors}
        total = self.running.copy()
        for name, seed in seeds.items():
            add_own_mask(total, seed, self._context, digest, owner=name, sign=-1)
        keys = {name: self._message("keys", name).mask_key for name in survivors}
        for gone, private in dropped.items():
            for name in survivors:
                secret = agree_secret(private, bytes.fromhex(keys[name]))
                add_pairwise_mask(
                    total, secret, self._context, digest, owner=name, other=gone, sign=-1
                )
        return total

    def _check(self, message: MemberMessage, payload: bytes, what: str) -> None:
        """What of a well-formed, signed message depends on the others."""
        if isinstance(message, Keys):
            self._check_keys(message, what)
        elif isinstance(message, Shares):
            names = sorted(self._said("keys"))
            others = {name for name in names if name != message.member}
            commitments = message.mask_commitments.keys(), message.self_commitments.keys()
            if message.keys != self._keys_list().digest or message.sealed.keys() != others:
                raise SumError(
                    f"{what}: expected shares for the {len(others)} others on the list of keys, "
                    f"got others. {_WITHOUT}"
                )
            if any(each != set(names) for each in commitments):
                raise SumError(
                    f"{what}: expected a commitment for each of {len(names)} members, got others. "
                    f"{_WITHOUT}"
                )
        elif isinstance(message, Masked):
            size = self.running.nbytes
            foreign = set(message.unusable) - (set(self.participants) - {message.member})
            if message.participants != hash_names(self.participants) or foreign:
                raise SumError(
                    f"{what}: expected a vector masked between the {len(self.participants)} "
                    f"participants, got another. {_WITHOUT}"
                )
            if len(payload) != size or hash_bytes(payload) != message.vector:
                raise SumError(
                    f"{what}: expected the {size:,} bytes that were signed, got {len(payload):,} "
                    f"bytes. {_WITHOUT}"
                )
        elif isinstance(message, Agreement):
            if message.survivors != self._survivors_message().digest:
                raise SumError(
                    f"{what}: expected an agreement to the {len(self.survivors)} survivors, got "
                    f"one to others. {_WITHOUT}"
                )
        elif isinstance(message, Revealed):
            self._check_revealed(message, what)

    def _check_keys(self, message: Keys, what: str) -> None:
        own = {message.mask_key, message.share_key}
        taken: set[str] = set()
        for name in self._said("keys"):
            other = self._message("keys", name)
            taken |= {other.mask_key, other.share_key}
        try:
            for public in own:  # any private key finds out keys of low order
                agree_secret(bytes(range(32)), bytes.fromhex(public))
        except ValueError as error:
            raise SumError(
                f"{what}: expected keys that agree on a secret, got one that does not. {_WITHOUT}"
            ) from error
        if len(own) < 2 or own & taken:
            raise SumError(f"{what}: expected new keys, got one that is there already. {_WITHOUT}")

    def _check_revealed(self, message: Revealed, what: str) -> None:
        survivors = set(self.survivors)
        unusable = set(self._message("masked", message.member).unusable)
        for kind, shares, owners in (
            ("self", message.self_shares, survivors),
            ("mask", message.mask_shares, set(self.participants) - survivors),
        ):
            if shares.keys() != owners - unusable:
                wrong = sorted(shares.keys() ^ (owners - unusable))
                raise SumError(
                    f"{what}: expected a share of each member whose secret it holds, got shares "
                    f"missing or too many ({', '.join(wrong[:5])}). {_WITHOUT}"
                )
            for owner, share in shares.items():
                expected = getattr(self._message("shares", owner), f"{kind}_commitments")
                own = commit(self._context, kind, owner, message.member, bytes.fromhex(share))
                if own != expected[message.member]:
                    raise SumError(
                        f"{what}: expected the share of '{owner}' that it was given, got an "
                        f"altered one. {_WITHOUT}"
                    )

    def _combine(self, owner: str, kind: str) -> bytes:
        """A member's secret from the shares of the first members that have one."""
        terms = self.state.terms
        shares: dict[int, bytes] = {}
        for holder in sorted(self._said("revealed")):
            own = getattr(self._message("revealed", holder), f"{kind}_shares")
            if owner in own and len(shares) < terms.threshold:
                shares[self._places[holder]] = bytes.fromhex(own[owner])
        what = f"Cannot open a masked sum: member '{owner}' shared its secrets in phase 'shares'"
        if len(shares) < terms.threshold:
            raise SumError(
                f"{what}: expected {terms.threshold} usable shares, got {len(shares)}. Begin "
                "another attempt without that member."
            )
        try:
            secret = combine_shares(shares)
            if kind == "self":
                seed = commit(self._context, "seed", owner, owner, secret)
                is_right = seed == self._message("shares", owner).seed_commitment
            else:
                is_right = compute_public(secret).hex() == self._message("keys", owner).mask_key
        except SumError:
            is_right = False
        if not is_right:
            raise SumError(
                f"{what}: expected shares that give the secret, got others. Begin another attempt "
                "without that member."
            )
        return secret

    def _check_threshold(self) -> None:
        phase, needed = self.state.phase, self.state.terms.threshold
        found = len(self._said(phase))
        if found < needed:
            missing = self.waiting_for
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise SumError(
                f"Cannot go on with a masked sum after phase '{phase}': expected {needed} members "
                f"or more, got {found}; missing are {', '.join(missing[:5])}{more}. Wait for them, "
                "or begin another attempt."
            )

    def _find_phase(self, sender: str, line: bytes) -> Phase:
        what = describe_sender(sender, self.state.phase)
        limit = max_message_bytes(len(self.state.terms.members))
        try:
            value = parse_json(line, max_bytes=limit)
            phase = value.get("phase") if isinstance(value, dict) else None
            found = next((known for known in _PHASES if known == phase), None)
            if found is None:
                raise ValueError(f"phase '{clean(phase, 40)}'")
            return found
        except ValueError as error:
            raise SumError(
                f"{what}: expected a message of a known phase, got {clean(error, 100)}. {_WITHOUT}"
            ) from error

    def _list_askable(self, phase: Phase) -> list[str]:
        """Who may say something in a phase: all, then those that did in the one before."""
        if phase == "keys":
            return self.state.terms.names
        if phase == "revealed":  # a member that could not agree in time may still reveal
            return self.survivors
        return sorted(self._said(_PHASES[_PHASES.index(phase) - 1]))

    def _said(self, phase: Phase) -> dict[str, str]:
        return self.state.received.get(phase, {})

    def _message(self, phase: Phase, name: str) -> Any:
        """What a member said; read once."""
        if (phase, name) not in self._parsed:
            self._parsed[phase, name] = read_message(
                self._said(phase)[name].encode(),
                _MODELS[phase],
                sender=name,
                members=len(self.state.terms.members),
            )
        return self._parsed[phase, name]

    def _keys_list(self) -> KeysList:
        return KeysList(keys=[self._message("keys", name) for name in sorted(self._said("keys"))])

    def _survivors_message(self) -> Survivors:
        survivors = self.survivors
        dropped = sorted(set(self.participants) - set(survivors))
        return Survivors(survivors=survivors, dropped=dropped)

    def _build_keys_list(self) -> bytes:
        return self._keys_list().to_bytes()

    def _build_deliver(self, name: str) -> bytes:
        sealed = []
        for other in self.participants:
            if other != name:
                shares = self._message("shares", other)
                sealed.append(
                    Sealed(
                        member=other,
                        text=shares.sealed[name],
                        mask_commitment=shares.mask_commitments[name],
                        self_commitment=shares.self_commitments[name],
                    )
                )
        return Deliver(sealed=sealed).to_bytes()

    def _build_survivors(self) -> bytes:
        return self._survivors_message().to_bytes()

    def _build_opening(self) -> bytes:
        told = self._survivors_message()
        agreements = [self._message("agreement", n) for n in sorted(self._said("agreement"))]
        return Opening(
            survivors=told.survivors, dropped=told.dropped, agreements=agreements
        ).to_bytes()


_WITHOUT = "The sum goes on without it."
