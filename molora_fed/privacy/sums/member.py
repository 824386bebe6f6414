"""A member's side of a masked sum: answers to the coordinator's messages, phase after phase.

Nothing is drawn at random while it runs. Every key, share and mask is derived from a secret that
is kept at home, the terms and the member's own vector, so that whoever is killed answers the same
again, and no mask ever lies over two vectors, not even where the state was lost.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
CCS 2017, figure 4, with the round of consistency checks. Beside it: the masks are bound to the list
of participants, shares are committed to, and of the same vectors only totals that keep three
members together are opened.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from molora_fed.errors import SumError, SumRefusedError
from molora_fed.privacy.sums.division import check_division
from molora_fed.privacy.sums.masks import (
    add_own_mask,
    add_pairwise_mask,
    commit,
    hash_names,
    hash_words,
)
from molora_fed.privacy.sums.member_state import PHASES, MemberState
from molora_fed.privacy.sums.messages import (
    Agreement,
    Deliver,
    Keys,
    KeysList,
    Masked,
    MemberMessage,
    Message,
    Opening,
    Revealed,
    Shares,
    Survivors,
    Terms,
    max_message_bytes,
    read_message,
)
from molora_fed.privacy.sums.primitives import (
    SHARE_BYTES,
    agree_secret,
    compute_public,
    derive_key,
    open_sealed,
    seal,
    split_secret,
)
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.keys import build_public_pem, key_fingerprint
from molora_fed.storage.untrusted import clean, parse_json

__all__ = ["Member"]

Read = TypeVar("Read", bound=Message)


class Member:
    """One member of one masked sum.

    After every answer `state` has to be kept before the answer is sent.

    Attributes:
        state: What a new `Member` goes on from.
    """

    def __init__(
        self,
        name: str,
        state: MemberState,
        vector: NDArray[np.unsignedinteger],
        *,
        secret: bytes,
        key: ec.EllipticCurvePrivateKey,
    ) -> None:
        """Go on, or begin where nothing was accepted yet.

        Args:
            name: The member's.
            state: What was kept, see `begin`.
            vector: Encoded vector, (N,).
            secret: 32 random bytes, kept at home until the fusion has ended, then deleted.
            key: The contributor's signing key.

        Raises:
            SumRefusedError: If the terms do not hold this member with this key.
            SumError: If the vector is not the one of the state.
        """
        terms = state.terms
        self.name, self.state, self.key = name, state, key
        own = [member.public_key for member in terms.members if member.name == name]
        fingerprint = key_fingerprint(build_public_pem(key))
        if [key_fingerprint(public) for public in own] != [fingerprint]:
            raise SumRefusedError(
                f"Cannot take part in a masked sum as '{clean(name, 63)}': expected terms that "
                "hold this name with this contributor's key, got others. Ask the coordinator "
                "which members it has."
            )
        if hash_words(vector, terms) != state.vector or len(secret) < 32:
            raise SumError(
                "Cannot go on with a masked sum: expected the vector that was begun with and a "
                "secret of 32 bytes, got others. Ask the coordinator for another attempt."
            )
        self.vector = vector
        self._context = terms.context
        root = derive_key(secret, self._context, "root", name, state.vector)
        self._mask_key = derive_key(root, self._context, "mask-key")
        self._share_key = derive_key(root, self._context, "share-key")
        self._seed = derive_key(root, self._context, "own-mask")
        self._root = root

    @classmethod
    def begin(
        cls,
        name: str,
        terms: Terms,
        vector: NDArray[np.unsignedinteger],
        *,
        secret: bytes,
        key: ec.EllipticCurvePrivateKey,
        whole: Sequence[str] = (),
    ) -> "Member":
        """Take part in a sum.

        The caller has compared the terms with what it knows: charter, fusion, question, encoding,
        and the other members' keys where it has seen them before.

        Args:
            name: The member's.
            terms: The sum's.
            vector: Encoded vector, (N,).
            secret: See `Member`.
            key: See `Member`.
            whole: `find_whole` of the last attempt at the same question.

        Raises:
            SumRefusedError: If the terms do not hold this member with this key.
            SumError: If the vector is of another length or modulus than the terms say.
        """
        digest = hash_words(vector, terms)
        state = MemberState(terms=terms, vector=digest, whole=list(whole))
        return cls(name, state, vector, secret=secret, key=key)

    def send_keys(self) -> bytes:
        """The first message, which answers nothing."""
        return self._sign(self._own_keys).to_bytes()

    def answer(self, data: bytes) -> bytes:
        """Answer a message of the coordinator.

        The same message gets the same answer, also after a restart.

        Args:
            data: `KeysList`, `Deliver`, `Survivors` or `Opening`, in this order.

        Returns:
            `Shares`, `Masked` with its words, `Agreement` or `Revealed`.

        Raises:
            SumRefusedError: If the coordinator asks for more than a sum may show, or for
                something else than before.
            SumError: If the message is malformed or not the next one.
        """
        line = data.decode("utf-8", "replace")
        number = len(self.state.accepted)
        if line in self.state.accepted:
            number = self.state.accepted.index(line)
        elif (phase := self._peek(data)) in PHASES[:number]:
            raise SumRefusedError(
                f"Cannot answer phase '{phase}' of a masked sum: expected the message that was "
                "answered before, got another. Begin another attempt."
            )
        elif number == len(PHASES) or phase != PHASES[number]:
            expected = PHASES[number] if number < len(PHASES) else "none"
            raise SumError(
                f"Cannot answer phase '{clean(phase, 40)}' of a masked sum: expected phase "
                f"'{expected}', got that one. Send the phases in their order."
            )
        handlers = (self._share, self._mask, self._agree, self._reveal)
        answer = handlers[number](data)
        if number == len(self.state.accepted):
            accepted = [*self.state.accepted, line]
            self.state = self.state.model_copy(update={"accepted": accepted})
        return answer

    def _share(self, data: bytes) -> bytes:
        """Check all keys and share both secrets out."""
        message = self._read(data, KeysList)
        self._check_keys(message)
        context, names = self._context, [each.member for each in message.keys]
        all_places = self._terms.places
        places = {name: all_places[name] for name in names}
        shares = {
            kind: split_secret(
                secret,
                list(places.values()),
                self._terms.threshold,
                key=derive_key(self._root, context, "polynomial", kind),
                context=context,
            )
            for kind, secret in (("mask", self._mask_key), ("self", self._seed))
        }
        sealed = {
            other.member: seal(
                self._sealing_key(other.share_key, self.name, other.member),
                shares["mask"][places[other.member]] + shares["self"][places[other.member]],
            ).hex()
            for other in message.keys
            if other.member != self.name
        }
        commitments = {
            kind: {
                name: commit(context, kind, self.name, name, own[places[name]]) for name in names
            }
            for kind, own in shares.items()
        }
        answer = Shares(
            member=self.name,
            keys=message.digest,
            sealed=sealed,
            mask_commitments=commitments["mask"],
            self_commitments=commitments["self"],
            seed_commitment=commit(context, "seed", self.name, self.name, self._seed),
        )
        return self._sign(answer).to_bytes()

    def _mask(self, data: bytes) -> bytes:
        """Put the own mask and one for each other participant over the vector."""
        message = self._read(data, Deliver)
        participants = self._list_participants(message)
        keys = {each.member: each for each in self._keys_list.keys}
        foreign = [name for name in participants if name not in keys]
        if foreign or len(participants) < self._terms.threshold:
            raise SumRefusedError(
                f"Cannot answer phase 'deliver' of a masked sum: expected at least "
                f"{self._terms.threshold} participants of those that sent keys, got "
                f"{len(participants)}{_quote(foreign)}. Begin another attempt."
            )
        digest = hash_names(participants)
        words = self.vector.copy()
        add_own_mask(words, self._seed, self._context, digest, owner=self.name)
        for name in participants:
            if name != self.name:
                secret = agree_secret(self._mask_key, bytes.fromhex(keys[name].mask_key))
                add_pairwise_mask(words, secret, self._context, digest, owner=self.name, other=name)
        payload = words.tobytes()
        usable = self._open_shares(message)
        answer = Masked(
            member=self.name,
            participants=digest,
            unusable=[name for name in participants if name not in usable],
            vector=hash_bytes(payload),
        )
        return self._sign(answer).to_bytes() + b"\n" + payload

    def _agree(self, data: bytes) -> bytes:
        """Sign the list of survivors, once it is one that may be opened."""
        message = self._read(data, Survivors)
        self._check_survivors(message.survivors, message.dropped, "survivors")
        check_division(self.state.whole or message.survivors, message.survivors)
        return self._sign(Agreement(member=self.name, survivors=message.digest)).to_bytes()

    def _reveal(self, data: bytes) -> bytes:
        """Give shares of one secret of each participant, once enough agreed to the same list."""
        message = self._read(data, Opening)
        self._check_survivors(message.survivors, message.dropped, "opening")
        agreed = self._read(self.state.accepted[2].encode(), Survivors)
        asked = Survivors(survivors=message.survivors, dropped=message.dropped)
        if asked != agreed:
            raise SumRefusedError(
                "Cannot open a masked sum: expected the survivors that were agreed to, got "
                "others. Begin another attempt."
            )
        who = [each.member for each in message.agreements]
        wrong = [each.member for each in message.agreements if each.survivors != agreed.digest]
        wrong += sorted(set(who) - set(agreed.survivors))
        if wrong or len(set(who)) != len(who) or len(who) < self._terms.threshold:
            raise SumRefusedError(
                f"Cannot open a masked sum: expected {self._terms.threshold} survivors or more, "
                f"each once, that agreed to the same list, got {len(who)}{_quote(wrong)}. Wait "
                "for more members to agree."
            )
        for each in message.agreements:
            each.check_signature(self._terms, self._context)
        usable = self._open_shares(self._deliver)
        answer = Revealed(
            member=self.name,
            self_shares={n: usable[n][1].hex() for n in agreed.survivors if n in usable},
            mask_shares={n: usable[n][0].hex() for n in agreed.dropped if n in usable},
        )
        return self._sign(answer).to_bytes()

    def _check_keys(self, message: KeysList) -> None:
        names = [each.member for each in message.keys]
        what = "Cannot answer phase 'keys-list' of a masked sum"
        if names != sorted(set(names)) or len(names) < self._terms.threshold:
            raise SumRefusedError(
                f"{what}: expected the keys of at least {self._terms.threshold} members, sorted "
                f"by name, got {len(names)}. Wait for more members."
            )
        for each in message.keys:
            each.check_signature(self._terms, self._context)
            if each.member == self.name:
                continue
            try:
                for public in (each.mask_key, each.share_key):
                    agree_secret(self._share_key, bytes.fromhex(public))
            except ValueError as error:
                raise SumRefusedError(
                    f"{what}: expected keys that agree on a secret, got one of '{each.member}' "
                    "that does not. Leave that member out."
                ) from error
        own = [each for each in message.keys if each.member == self.name]
        publics = [public for each in message.keys for public in (each.mask_key, each.share_key)]
        if own != [self._sign(self._own_keys)] or len(set(publics)) != len(publics):
            raise SumRefusedError(
                f"{what}: expected this member's own keys and no key twice, got others. Begin "
                "another attempt."
            )

    def _check_survivors(self, survivors: list[str], dropped: list[str], phase: str) -> None:
        participants = self._list_participants(self._deliver)
        what = f"Cannot answer phase '{phase}' of a masked sum"
        both = sorted(set(survivors) & set(dropped))
        if both:
            raise SumRefusedError(
                f"{what}: expected each participant on one list, got both secrets of "
                f"{', '.join(both[:5])} asked for. Tell the members: the coordinator wants to see "
                "single vectors."
            )
        if sorted([*survivors, *dropped]) != participants or self.name not in survivors:
            wrong = sorted({*survivors, *dropped} ^ set(participants))
            raise SumRefusedError(
                f"{what}: expected survivors, this member among them, and dropped members to be "
                f"the {len(participants)} participants, got others{_quote(wrong)}. Begin another "
                "attempt."
            )
        if len(survivors) < self._terms.threshold:
            raise SumRefusedError(
                f"{what}: expected a total of at least {self._terms.threshold} members, got one "
                f"of {len(survivors)}. Wait for more members, or begin another attempt."
            )

    def _open_shares(self, message: Deliver) -> dict[str, tuple[bytes, bytes]]:
        """Shares of mask keys and of seeds by owner, as far as they open and are committed to."""
        keys = {each.member: each for each in self._keys_list.keys}
        usable = {self.name: self._own_shares}
        for each in message.sealed:
            key = self._sealing_key(keys[each.member].share_key, each.member, self.name)
            try:
                text = open_sealed(key, bytes.fromhex(each.text))
            except ValueError:
                continue
            shares = text[:SHARE_BYTES], text[SHARE_BYTES:]
            hashes = tuple(
                commit(self._context, kind, each.member, self.name, share)
                for kind, share in zip(("mask", "self"), shares, strict=True)
            )
            if hashes == (each.mask_commitment, each.self_commitment):
                usable[each.member] = shares
        return usable

    def _sealing_key(self, public: str, sender: str, recipient: str) -> bytes:
        secret = agree_secret(self._share_key, bytes.fromhex(public))
        return derive_key(secret, self._context, "seal", sender, recipient)

    @property
    def _own_shares(self) -> tuple[bytes, bytes]:
        place = self._terms.places[self.name]
        mask, own = (
            split_secret(
                secret,
                [place],
                self._terms.threshold,
                key=derive_key(self._root, self._context, "polynomial", kind),
                context=self._context,
            )[place]
            for kind, secret in (("mask", self._mask_key), ("self", self._seed))
        )
        return mask, own

    @property
    def _own_keys(self) -> Keys:
        return Keys(
            member=self.name,
            mask_key=compute_public(self._mask_key).hex(),
            share_key=compute_public(self._share_key).hex(),
        )

    @property
    def _terms(self) -> Terms:
        return self.state.terms

    @property
    def _keys_list(self) -> KeysList:
        return self._read(self.state.accepted[0].encode(), KeysList)

    @property
    def _deliver(self) -> Deliver:
        return self._read(self.state.accepted[1].encode(), Deliver)

    def _list_participants(self, message: Deliver) -> list[str]:
        others = [each.member for each in message.sealed]
        if others != sorted(set(others)) or self.name in others:
            raise SumError(
                "Cannot answer phase 'deliver' of a masked sum: expected what each other member "
                "sealed, once and sorted by name, got another list. Run the same molora-fed "
                "version on both sides."
            )
        return sorted([*others, self.name])

    def _sign(self, message: MemberMessage) -> MemberMessage:
        return message.signed(self._context, self.key)

    def _read(self, data: bytes, model: type[Read]) -> Read:
        return read_message(data, model, sender="the coordinator", members=len(self._terms.members))

    def _peek(self, data: bytes) -> str:
        """The phase that a line says it is of."""
        try:
            value = parse_json(data, max_bytes=max_message_bytes(len(self._terms.members)))
        except ValueError as error:
            raise SumError(
                f"Cannot answer a message of a masked sum: expected JSON, got {clean(error, 100)}. "
                "Run the same molora-fed version on both sides."
            ) from error
        return str(value.get("phase", "")) if isinstance(value, dict) else ""


def _quote(names: list[str]) -> str:
    return f" ({', '.join(names[:5])})" if names else ""
