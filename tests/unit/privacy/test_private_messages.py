"""Messages from outside: one spelling of each content, everything else refused in one line."""

import random
import re
from functools import partial

import numpy as np
import pytest
from fuzz_mutators import change_bytes, mutate_safetensors

from molora_fed.errors import CorpusError, FederationError
from molora_fed.privacy import messages
from molora_fed.privacy.intersection import Found, Receiver, Sealing, Sender
from molora_fed.privacy.messages import BATCH, KEY_ID_BYTES, SET_BATCH, Query, Reply, TagSet
from molora_fed.privacy.oprf import ELEMENT_BYTES

KEY_ID = b"k" * KEY_ID_BYTES
MUTATIONS = {"query": 1_500, "reply": 1_500, "set": 400, "state": 1_000}


def number_elements(count):
    return tuple(number.to_bytes(ELEMENT_BYTES, "big") for number in range(count))


QUERY = Query(number_elements(BATCH))
REPLY = Reply(KEY_ID, bytes.fromhex(QUERY.commitment), number_elements(BATCH))
TAGS = TagSet(KEY_ID, np.arange(SET_BATCH, dtype=np.uint64) * np.uint64(2**40 + 1))

READERS = {
    "query": (QUERY, lambda data: Query.read(data, "bo\x1b[31mb")),
    "reply": (REPLY, lambda data: Reply.read(data, "bo\x1b[31mb", QUERY)),
    "set": (TAGS, lambda data: TagSet.read(data, "bo\x1b[31mb")),
}


def rearrange(data, chance, unit):
    """Change whole elements: left out, doubled, exchanged, or many times the batch."""
    start = len(data) % unit
    parts = [data[n : n + unit] for n in range(start, len(data), unit)]
    action, first, second = chance.randrange(5), *(chance.randrange(len(parts)) for _ in range(2))
    if action == 0:
        del parts[first:second]
    elif action == 1:
        parts.insert(first, parts[second])
    elif action == 2:
        parts[first], parts[second] = parts[second], parts[first]
    elif action == 3:
        parts[first] = parts[second]
    else:
        parts = parts * chance.choice((0, 2, 9))
    return data[:start] + b"".join(parts)


MUTATORS = {
    "query": [partial(rearrange, unit=ELEMENT_BYTES), change_bytes],
    "reply": [partial(rearrange, unit=ELEMENT_BYTES), change_bytes],
    "set": [partial(rearrange, unit=8), change_bytes],
}


@pytest.mark.parametrize("kind", READERS)
def test_what_was_written_is_read(kind):
    message, read = READERS[kind]
    assert read(message.to_bytes()).to_bytes() == message.to_bytes()


@pytest.mark.parametrize("kind", READERS)
def test_changed_messages_are_read_in_one_spelling_or_refused_in_one_line(kind):
    message, read = READERS[kind]
    data, chance = message.to_bytes(), random.Random(5)
    refused = 0
    for number in range(MUTATIONS[kind]):
        changed = MUTATORS[kind][number % 2](data, chance)
        try:
            found = read(changed)
        except FederationError as error:
            refused += 1
            assert "\n" not in str(error) and "\x1b" not in str(error)
            assert len(str(error)) < 400 and "expected" in str(error) and "got" in str(error)
            continue
        assert found.to_bytes() == changed
    assert refused > MUTATIONS[kind] // 3


def test_bounds(monkeypatch):
    monkeypatch.setattr(messages, "MAX_QUERY_BATCHES", 1)
    monkeypatch.setattr(messages, "MAX_SET_BATCHES", 1)
    assert Query.read(QUERY.to_bytes(), "bob") == QUERY
    with pytest.raises(FederationError, match="8,192 elements, more than 4,096"):
        Query.read(Query(number_elements(2 * BATCH)).to_bytes(), "bob")
    twice = TagSet(KEY_ID, np.arange(2 * SET_BATCH, dtype=np.uint64))
    with pytest.raises(FederationError, match="expected a multiple of 65,536 tags"):
        TagSet.read(twice.to_bytes(), "bob")


def test_sizes_that_a_carrier_checks_are_the_largest_messages():
    elements = messages.MAX_QUERY_BATCHES * BATCH * ELEMENT_BYTES
    assert len(QUERY.to_bytes()) - BATCH * ELEMENT_BYTES + elements == messages.MAX_QUERY_BYTES
    assert len(REPLY.to_bytes()) - BATCH * ELEMENT_BYTES + elements == messages.MAX_REPLY_BYTES
    tags = messages.MAX_SET_BATCHES * SET_BATCH * 8
    assert len(TAGS.to_bytes()) - SET_BATCH * 8 + tags == messages.MAX_SET_BYTES


def test_a_reply_belongs_to_its_query():
    other = Query(number_elements(BATCH + 1)[1:])
    with pytest.raises(FederationError, match="the reply to another query"):
        Reply.read(REPLY.to_bytes(), "bob", other)
    short = Reply(KEY_ID, REPLY.query_id, REPLY.elements * 2)
    with pytest.raises(FederationError, match="8,192 elements for 4,096"):
        Reply.read(short.to_bytes(), "bob", QUERY)


def test_changed_states_are_taken_up_or_refused_in_one_line():
    known = np.arange(40, dtype=np.uint64)
    receiver = Receiver(known, secret=b"s" * 32, purpose="7")
    sender = Sender(known, secret=b"t" * 32, fusion="7")
    found = Found(receiver.query.commitment, known % 2 == 0, ("ann", "bob"))
    sealing = Sealing(sender.key_id, known[:20])
    chance = random.Random(6)
    for resume, data in ((receiver.resume, found.to_bytes()), (sender.resume, sealing.to_bytes())):
        assert resume(data).to_bytes() == data
        for number in range(MUTATIONS["state"]):
            mutate = (mutate_safetensors, change_bytes)[number % 2]
            try:
                state = resume(mutate(data, chance))
            except CorpusError as error:
                assert re.fullmatch(r"Cannot go on with a comparison.*made again\.", str(error))
            else:
                assert state is None or len(state.to_bytes()) <= 2 * len(data)
