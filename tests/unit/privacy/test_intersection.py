"""Private set intersection: exact, the same after a kill, counted at home, padded on the way."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.errors import CorpusError, FederationError, QuestionRefusedError
from molora_fed.population.asked import AskedQuestions
from molora_fed.privacy import intersection, messages
from molora_fed.privacy.intersection import Receiver, Sender, limit_queries
from molora_fed.privacy.messages import (
    BATCH,
    MAX_QUERY_BATCHES,
    SET_BATCH,
    Query,
    Reply,
    TagSet,
)
from molora_fed.privacy.oprf import Key

SECRET, OTHER = b"s" * 32, b"t" * 32


def draw(count, seed=0):
    """Distinct sorted 8-grams."""
    generator = np.random.default_rng(seed)
    return np.unique(generator.integers(0, 2**64, size=count, dtype=np.uint64))


def seal(sender, count=BATCH):
    sealing = sender.begin()
    while sealing.tags.size < sender.total:
        sealing = sender.advance(sealing, count)
    return sender.finish(sealing)


def admit_all(place, question):
    """Counts nothing."""


def answer(sender, query, **changed):
    wanted = {"committed": query.commitment, "admit": admit_all} | changed
    return sender.answer(query, "ann", **wanted)


def exchange(receiver, sender, name="bob", found=None):
    """One comparison, every message as its bytes."""
    query = Query.read(receiver.query.to_bytes(), "ann")
    tags = TagSet.read(seal(sender).to_bytes(), name)
    reply = Reply.read(answer(sender, query).to_bytes(), name, receiver.query)
    return receiver.open(found or receiver.begin(), name, tags, reply)


@pytest.fixture(scope="module")
def texts():
    """8-grams of held-out blocks, and of two texts that hold some of them."""
    all_of = draw(900)
    return all_of[:400], np.sort(all_of[300:600]), np.sort(np.r_[all_of[:7], all_of[600:]])


@pytest.fixture(scope="module")
def receiver(texts):
    return Receiver(texts[0], secret=SECRET, purpose="contribution 7")


@pytest.fixture(scope="module")
def sender(texts):
    return Sender(texts[1], secret=OTHER, fusion="fusion 3")


@settings(max_examples=12)
@given(
    held_out=st.sets(st.integers(0, 60), max_size=40),
    known=st.sets(st.integers(0, 60), max_size=40),
    top=st.sampled_from([0, 2**64 - 61]),
)
def test_the_intersection_is_exact(held_out, known, top):
    items, text = (
        np.array(sorted(part), dtype=np.uint64) + np.uint64(top) for part in (held_out, known)
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (intersection, messages):
            patch.setattr(module, "BATCH", 64)
        receiver = Receiver(items, secret=SECRET, purpose="7")
        found = exchange(receiver, Sender(text, secret=OTHER, fusion="3"))
    assert np.array_equal(receiver.list_known(found), np.intersect1d(items, text))


def test_what_several_senders_know_is_joined(texts, receiver, sender):
    held_out, first, second = texts
    found = exchange(receiver, sender)
    assert np.array_equal(receiver.list_known(found), np.intersect1d(held_out, first))
    found = exchange(receiver, Sender(second, secret=b"u" * 32, fusion="fusion 3"), "eve", found)
    assert found.senders == ("bob", "eve")
    union = np.intersect1d(held_out, np.union1d(first, second))
    assert np.array_equal(receiver.list_known(found), union)


def test_a_query_of_several_batches(sender, texts):
    items = np.union1d(draw(BATCH, seed=2), texts[1])
    receiver = Receiver(items, secret=SECRET, purpose="7")
    assert len(receiver.query.elements) == 2 * BATCH
    assert np.array_equal(receiver.list_known(exchange(receiver, sender)), texts[1])


def test_a_killed_process_sends_the_same_bytes(texts, receiver, sender):
    again = Receiver(texts[0], secret=SECRET, purpose="contribution 7")
    assert again.query.to_bytes() == receiver.query.to_bytes()
    tags, reply = seal(sender), answer(sender, receiver.query)
    for stop in (0, 1, 299, 300):
        restarted = Sender(texts[1], secret=OTHER, fusion="fusion 3")
        sealing = restarted.resume(sender.advance(sender.begin(), stop).to_bytes())
        assert sealing.tags.size == stop
        sealing = restarted.advance(restarted.advance(sealing, 100), BATCH)
        assert restarted.finish(sealing).to_bytes() == tags.to_bytes()
        assert answer(restarted, receiver.query).to_bytes() == reply.to_bytes()
    found = receiver.open(receiver.begin(), "bob", tags, reply)
    resumed = again.resume(found.to_bytes())
    assert resumed.to_bytes() == found.to_bytes()
    # An opened reply is not opened again, whatever it holds.
    assert again.open(resumed, "bob", tags, replace(reply, elements=())) is resumed


def test_a_state_of_something_else_is_not_taken_up(texts, receiver, sender):
    found = exchange(receiver, sender)
    sealing = sender.advance(sender.begin(), 10)
    for changed in ({"fusion": "fusion 4"}, {"secret": SECRET}, {"known": texts[2]}):
        settings = {"known": texts[1], "secret": OTHER, "fusion": "fusion 3"} | changed
        assert Sender(settings.pop("known"), **settings).resume(sealing.to_bytes()) is None
    other = Receiver(texts[0][1:], secret=SECRET, purpose="contribution 7")
    assert other.resume(found.to_bytes()) is None
    with pytest.raises(ValueError, match="10 of 300 tags"):
        sender.finish(sealing)


def test_sizes_are_whole_batches(receiver, sender):
    one = Receiver(draw(1), secret=SECRET, purpose="7")
    none = Receiver(draw(0), secret=SECRET, purpose="7")
    sizes = {len(each.query.to_bytes()) for each in (one, none, receiver)}
    assert len(sizes) == 1
    empty = Sender(draw(0), secret=OTHER, fusion="3")
    assert len(seal(empty).to_bytes()) == len(seal(sender).to_bytes())
    assert seal(sender).tags.size == SET_BATCH
    assert not exchange(one, empty).hits.any()


def test_other_purposes_texts_and_fusions_have_nothing_in_common(texts, receiver, sender):
    queries = [
        receiver.query,
        Receiver(texts[0], secret=SECRET, purpose="contribution 8").query,
        Receiver(texts[0], secret=OTHER, purpose="contribution 7").query,
        Receiver(texts[0][1:], secret=SECRET, purpose="contribution 7").query,
    ]
    elements = {element for query in queries for element in query.elements}
    assert len(elements) == 4 * BATCH
    sets = [
        seal(sender),
        seal(Sender(texts[1], secret=OTHER, fusion="fusion 4")),
        seal(Sender(texts[1], secret=SECRET, fusion="fusion 3")),
        seal(Sender(texts[1][1:], secret=OTHER, fusion="fusion 3")),
    ]
    assert len(np.unique(np.concatenate([one.tags for one in sets]))) == 4 * SET_BATCH
    assert len({one.key_id for one in sets}) == 4


def test_a_place_in_a_query_says_nothing_about_the_8_gram(receiver):
    places = receiver._places
    assert len(np.unique(places)) == 400 and places.max() > 0.9 * BATCH
    # Rank correlation of 8-gram and place: three standard deviations of a random order.
    assert abs(np.corrcoef(np.arange(400), places)[0, 1]) < 3 / np.sqrt(400)


def test_no_8_gram_and_no_unblinded_point_is_in_any_message(texts, receiver, sender):
    held_out, known, _ = texts
    sent = [
        receiver.query.to_bytes(), seal(sender).to_bytes(),
        answer(sender, receiver.query).to_bytes(),
    ]  # fmt: skip
    for items in (held_out[:50], known[:50]):
        for item in items:
            little, big = int(item).to_bytes(8, "little"), int(item).to_bytes(8, "big")
            [point] = Key(1).multiply_hashed([little])
            secrets = (little, big, b"%x" % int(item), point, point[::-1])
            assert not any(secret in message for secret in secrets for message in sent)


def test_a_query_that_no_manifest_states_is_refused_before_it_is_counted(receiver, sender):
    asked = []
    with pytest.raises(QuestionRefusedError, match="that its manifest states, got") as caught:
        answer(sender, receiver.query, committed="0" * 64, admit=lambda *one: asked.append(one))
    assert not asked and "\n" not in str(caught.value)


def test_each_member_has_one_query_a_fusion_counted_at_home(tmp_path, texts, receiver, sender):
    def count():
        """As after a restart: the count is on disk."""
        return AskedQuestions(tmp_path, 3, limit_queries(["ann", "eve"])).admit

    first = answer(sender, receiver.query, admit=count())
    assert answer(sender, receiver.query, admit=count()).to_bytes() == first.to_bytes()
    more = Receiver(texts[2], secret=SECRET, purpose="contribution 8").query
    with pytest.raises(QuestionRefusedError, match="'overlap of ann' 1 times"):
        answer(sender, more, admit=count())
    assert sender.answer(more, "eve", committed=more.commitment, admit=count())
    with pytest.raises(QuestionRefusedError, match="'overlap of mallory' 0 times"):
        sender.answer(more, "mallory", committed=more.commitment, admit=count())


def test_an_auditor_with_blocks_and_secret_makes_the_committed_query(texts, receiver):
    opened = Receiver(texts[0], secret=SECRET, purpose="contribution 7")
    assert opened.query.commitment == receiver.query.commitment
    # With one 8-gram exchanged for a guess it is another.
    guess = np.sort(np.r_[texts[0][1:], draw(1, seed=9)])
    changed = Receiver(guess, secret=SECRET, purpose="contribution 7")
    assert changed.query.commitment != receiver.query.commitment


def test_a_reply_and_a_set_of_two_keys_are_refused(texts, receiver, sender):
    other = Sender(texts[1], secret=OTHER, fusion="fusion 4")
    reply = answer(other, receiver.query)
    with pytest.raises(FederationError, match=r"the reply of 'bob'.*expected the key of its set"):
        receiver.open(receiver.begin(), "bob", seal(sender), reply)


def test_elements_off_the_curve_are_refused_on_both_sides(receiver, sender):
    off = (2**256 - 1).to_bytes(32, "big")  # above the field's order; and the last in rising order
    query = Query((*receiver.query.elements[:-1], off))
    with pytest.raises(FederationError, match=f"element {BATCH - 1} is no point of P-256"):
        answer(sender, query)
    reply = answer(sender, receiver.query)
    reply = replace(reply, elements=(off,) * BATCH)
    with pytest.raises(FederationError, match=r"'bob'.*points of P-256, got element 0"):
        receiver.open(receiver.begin(), "bob", seal(sender), reply)


def test_a_lying_sender_hits_no_8_gram_that_it_does_not_know(receiver, sender):
    """It chooses all points it returns and all tags; without the 8-gram it cannot match them."""
    tags, reply = seal(sender), answer(sender, receiver.query)
    turned = replace(reply, elements=reply.elements[::-1])
    constant = replace(reply, elements=reply.elements[:1] * BATCH)
    for lie in (turned, constant, replace(reply, elements=receiver.query.elements)):
        assert receiver.open(receiver.begin(), "bob", tags, lie).hits.sum() <= 1


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(CorpusError, match=r"at most 32,768 .* got 32,769\. Send fewer"):
        Receiver(
            np.arange(MAX_QUERY_BATCHES * BATCH + 1, dtype=np.uint64), secret=SECRET, purpose=""
        )
    for wrong in (np.array([2, 1], dtype=np.uint64), np.array([1, 1], dtype=np.uint64),
                  np.array([1, 2]), np.zeros((1, 1), dtype=np.uint64)):  # fmt: skip
        with pytest.raises(CorpusError, match="expected sorted distinct 64-bit hashes"):
            Sender(wrong, secret=SECRET, fusion="3")
