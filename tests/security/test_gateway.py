"""The gateway: who is let through, and what too much of anything is answered with."""

import asyncio

import pytest

from molora_fed.federation.gateway import Gateway, Limits, Refusal
from molora_fed.serving.refusals import FewRefusals

BODIES = {"/v1/fleet/push-messages": 100, "/v1/fleet/push-object": 50}


class Behind:
    """Stands for the fleet's interface; notes what reaches it."""

    def __init__(self):
        self.bodies = []
        self.gate = None

    async def __call__(self, scope, receive, send):
        if self.gate is not None:
            await self.gate.wait()
        message = await receive()
        self.bodies.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def build(behind=None, *, limits=None, redeem=None, now=lambda: 0.0, on_refusal=print):
    return Gateway(
        behind or Behind(),
        bodies=BODIES,
        hosts=frozenset({"127.0.0.1", "localhost", "fed.example"}),
        identify=lambda headers: headers.get("key", ""),
        redeem=redeem,
        on_refusal=on_refusal,
        limits=limits or Limits(),
        now=now,
    )


async def ask(
    gateway, path="/v1/fleet/push-object", method="POST", pieces=(b"",), headers=None, address="a"
):
    """Status and headers of an answer."""
    head = {"host": "fed.example:443", "key": "alice", **(headers or {})}
    scope = {
        "type": "http", "method": method, "path": path, "client": (address, 1), "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in head.items()],
    }  # fmt: skip
    coming = iter(pieces)
    sent = []

    async def receive():
        try:
            piece = next(coming)
        except StopIteration:
            await asyncio.Event().wait()  # a client that says nothing more
        if callable(piece):
            return await piece()
        return {"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]}

    async def send(message):
        sent.append(message)

    await gateway(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers


def status(*args, **options):
    return asyncio.run(ask(*args, **options))[0]


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/control/start-run", "POST"),
        ("/v1/runtime/acquire-task", "POST"),
        ("/v1/fleet/register-node", "POST"),
        ("/v1/fleet/get-fab", "POST"),
        ("/v1/fleet/push-object", "GET"),
        ("/v1/fleet/push-object/", "POST"),
        ("/v1/fleet/../control/start-run", "POST"),
        ("//v1/fleet/push-object", "POST"),
        ("/v1/invitation", "POST"),  # this one takes none
        ("/docs", "GET"),
    ],
)
def test_nothing_else_is_served(path, method):
    behind = Behind()
    assert status(build(behind), path, method) == 404
    assert behind.bodies == []


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("fed.example", 200),
        ("FED.example:8080", 200),
        ("127.0.0.1:1", 200),
        ("attacker.example", 421),
        ("fed.example.attacker.example", 421),
        ("", 421),
        ("[::1", 421),
    ],
)
def test_only_the_servers_own_names_are_answered(host, expected):
    assert status(build(), "/health", "GET", headers={"host": host}) == expected


def test_a_stranger_is_turned_away_before_its_body_is_read():
    behind = Behind()

    async def never():
        raise AssertionError("the body was read")

    assert status(build(behind), pieces=(never,), headers={"key": ""}) == 401
    assert behind.bodies == []


@pytest.mark.parametrize("length", ["51", "99999999999999999999", "-1", "5e1", "\u0663"])
def test_a_body_that_announces_too_much_is_not_read(length):
    async def never():
        raise AssertionError("the body was read")

    code = status(build(), pieces=(never,), headers={"content-length": length})
    assert code == (413 if length == "51" else 400)


def test_an_endless_body_ends_at_the_limit():
    behind, taken = Behind(), []

    async def more():
        taken.append(10)
        return {"type": "http.request", "body": b"x" * 10, "more_body": True}

    code, headers = asyncio.run(ask(build(behind), pieces=(more,) * 1_000))
    assert (code, headers["connection"]) == (413, "close")
    assert sum(taken) == 60
    assert behind.bodies == []


def test_a_slow_body_ends_after_its_time():
    limits = Limits(request_seconds=0.05)
    assert status(build(limits=limits), pieces=(b"x", lambda: asyncio.Event().wait())) == 408


def test_an_invitation_may_neither_be_slow_nor_large():
    async def redeem(body):
        return {"length": len(body)}

    gateway = build(redeem=redeem, limits=Limits(stranger_seconds=0.05))
    invite = {"path": "/v1/invitation", "headers": {"key": ""}}
    assert status(gateway, pieces=(b"{}",), **invite) == 200
    assert status(gateway, pieces=(b"x" * 4_097,), **invite) == 413
    assert status(gateway, pieces=(b"x", lambda: asyncio.Event().wait()), **invite) == 408


def test_guesses_are_slowed_down_by_address_only():
    seconds = [0.0]

    async def refuse(body):
        raise Refusal(403, "no")

    gateway = build(redeem=refuse, now=lambda: seconds[0])
    invite = {"path": "/v1/invitation", "headers": {"key": ""}, "pieces": (b"{}",)}
    codes = [status(gateway, **invite) for _ in range(30)]
    assert codes == [403] * 20 + [429] * 10
    assert status(gateway, **invite, address="b") == 403
    # Members are not in the strangers' queue.
    assert status(gateway, pieces=(b"x",)) == 200
    seconds[0] += 1.0
    assert status(gateway, **invite) == 403


def test_one_member_cannot_use_up_the_others_requests():
    gateway = build(limits=Limits(member_rate=1.0, member_burst=3.0))
    codes = [status(gateway, pieces=(b"x",)) for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    assert status(gateway, pieces=(b"x",), headers={"key": "bob"}) == 200


def test_one_member_cannot_have_all_requests_under_way():
    async def run():
        behind = Behind()
        behind.gate = asyncio.Event()
        gateway = build(behind, limits=Limits(member_at_once=2))
        waiting = [asyncio.create_task(ask(gateway, pieces=(b"x",))) for _ in range(2)]
        await asyncio.sleep(0)
        assert (await ask(gateway, pieces=(b"x",)))[0] == 429
        behind.gate.set()
        assert [(await task)[0] for task in waiting] == [200, 200]
        assert (await ask(gateway, pieces=(b"x",)))[0] == 200

    asyncio.run(run())


def test_one_reply_has_a_limit_however_many_objects_it_comes_in():
    gateway = build(limits=Limits(reply_bytes=120))
    codes = [status(gateway, pieces=(b"x" * 50,)) for _ in range(3)]
    assert codes == [200, 200, 413]
    assert status(gateway, pieces=(b"x" * 50,), headers={"key": "bob"}) == 200
    # The next reply starts anew.
    assert status(gateway, "/v1/fleet/push-messages", pieces=(b"x",)) == 200
    assert status(gateway, pieces=(b"x" * 50,)) == 200


def test_ten_thousand_strange_addresses_take_no_more_memory_than_that():
    gateway = build()

    async def run():
        for number in range(10_050):
            await ask(gateway, headers={"key": ""}, address=str(number))

    asyncio.run(run())
    assert len(gateway._strangers._left) == 10_000


def test_every_refusal_is_told_with_its_reason_and_nothing_else_is():
    told = []

    async def refuse_behind(scope, receive, send):
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b'{"detail": "Not \\u001byours"}'})

    def tell(*said):
        told.append(said)

    gateway, behind = build(on_refusal=tell), build(refuse_behind, on_refusal=tell)
    slow = build(on_refusal=tell, limits=Limits(request_seconds=0.05))
    assert status(gateway, pieces=(b"x",)) == status(gateway, "/health", "GET") == 200
    assert told == []
    status(gateway, headers={"host": "attacker.example"})
    status(gateway, "/docs", "GET", address="b")
    status(gateway, headers={"key": ""})
    status(gateway, pieces=(b"x" * 51,))
    status(slow, pieces=(b"x", lambda: asyncio.Event().wait()))
    status(behind, pieces=(b"x",))
    path = "/v1/fleet/push-object"
    assert told == [
        ("a", path, 421, "Not served under this name"),
        ("b", "/docs", 404, "Not served"),
        ("a", path, 401, "Not a member"),
        ("a", path, 413, "Expected at most 50 bytes"),
        ("a", path, 408, "Too slow"),
        ("a", path, 403, "Not \N{REPLACEMENT CHARACTER}yours"),
    ]


def test_a_flood_is_told_in_a_few_lines_and_one_that_counts_the_rest():
    async def run():
        told, end = [], asyncio.Event()

        def tell(*said):
            told.append(said)
            if said[0] == "":
                end.set()

        few = FewRefusals(tell, most=5, most_of_one=3, seconds=0.1)
        for _ in range(1_000):
            few("a", "/", 401, "no")
        for _ in range(1_000):
            few("b", "/", 401, "no")
        assert [said[0] for said in told] == ["a"] * 3 + ["b"] * 2
        await end.wait()
        assert told[5:] == [("", "", 0, "1995 more in 0.1 s")]
        few("a", "/", 401, "no")  # the next minute begins
        assert len(told) == 7

    asyncio.run(run())
