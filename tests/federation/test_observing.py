"""Logs, traffic, status, metrics and the doctor: what coordinators and contributors look at."""

import datetime
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from molora_cli.main import run
from prometheus_client.parser import text_string_to_metric_families
from transport_helpers import make_cooperative

from molora_fed.errors import ConfigError, PortTakenError
from molora_fed.federation import certificates, doctor
from molora_fed.federation.certificates import ServerCertificate
from molora_fed.federation.contributor import ContributorSupervisor
from molora_fed.federation.doctor import examine
from molora_fed.federation.envelopes import keep_letter
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.kept import HelloRecord
from molora_fed.federation.letters import Refusal, ShownState
from molora_fed.federation.logs import EventLog, LogLimit, log, shorten_log
from molora_fed.federation.mailbox import hold_lock
from molora_fed.federation.members import Members, Redemption, build_redemption_bytes
from molora_fed.federation.metrics import serve_metrics
from molora_fed.federation.overview import read_contributor, read_server
from molora_fed.federation.server_app import MailRelay
from molora_fed.federation.status import FederationEvent
from molora_fed.federation.traffic import SERVER, Traffic, read_traffic
from molora_fed.plugins import get_plugins
from molora_fed.serving.addresses import find_free_port
from molora_fed.storage.files import make_home, write_json
from molora_fed.storage.keys import build_public_pem, key_fingerprint, load_or_make_key, sign

HOSTILE = "\x1b[2J\u202e[/x]\nmolora_up 1"


@pytest.fixture
def home(tmp_path):
    """A coordinator's home: a member at work, one who never came, one who was turned away."""
    home = make_cooperative(tmp_path / "coop")
    make_home(home.root)
    home.mail.mkdir()
    home.pulse.prepare()
    members = Members(home.members)
    members.prepare()
    for name in ("alice", "bob", "carol"):
        join(home, members, tmp_path, name)
    members.revoke("carol")
    members.invite("dora", "legal", days=3)
    box = next(one for one in home.contributors() if one.name == "alice")
    keep_letter(box.state_file, ShownState(phase="TRAINING", step=120, total=300, loss=2.5))
    traffic = Traffic(home.traffic_file)
    traffic.note(box.fingerprint, received=1_000, sent=5_000)
    traffic.write()
    return home


def join(home, members, folder, name):
    """Make a member of an invitation; everybody but bob also says hello."""
    secret, _ = members.invite(name, "legal", days=3)
    own = build_public_pem(load_or_make_key(folder / f"{name}.pem"))
    node = build_public_pem(load_or_make_key(folder / f"{name}-node.pem"))
    signature = sign(load_or_make_key(folder / f"{name}.pem"), build_redemption_bytes(secret, node))
    members.redeem(
        Redemption(secret=secret, node_key=node, contributor_key=own, signature=signature)
    )
    if name != "bob":
        hello = HelloRecord(public_key=own, name=name, domain="legal")
        keep_letter(home.contributor(key_fingerprint(own)).hello_file, hello)


def serving(home):
    """As if `molora serve` ran: its lock is held, and mail is carried."""
    home.pulse.post(json.dumps({"pid": os.getpid(), "nodes": 2, "time": time.time()}))
    write_json(home.state_file, {"phase": "TRAINING", "message": "0 of 2 contributions admitted"})
    return hold_lock(home.root / "serve.lock", what="a server")


def ask(port, path, host="127.0.0.1"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_a_log_line_is_json_and_holds_nothing_that_a_terminal_obeys(tmp_path):
    path = tmp_path / "log"
    with path.open("w", encoding="utf-8") as file:
        log("refused", "warning", to=file, reason=HOSTILE, count=3, empty="", none=None)
        log("bytes", to=file, count=2**70, trace="one\ntwo\x1b[2J")
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["event"], first["level"], first["count"]) == ("refused", "warning", 3)
    assert "\x1b" not in first["reason"] and "\n" not in first["reason"]
    assert not {"empty", "none"} & set(first)
    datetime.datetime.fromisoformat(first["time"])
    assert second["trace"] == "one\ntwo\N{REPLACEMENT CHARACTER}[2J"


def test_an_error_that_nobody_catches_is_one_line_of_the_log():
    program = (
        "import threading\n"
        "from molora_fed.federation.logs import start_logging\n"
        "start_logging('link')\n"
        "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()\n"
        "raise ValueError('gone')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["type"] for line in lines] == ["ZeroDivisionError", "ValueError"]
    assert all("Traceback" in line["trace"] for line in lines)
    assert {line["process"] for line in lines} == {"link"}


def test_a_flood_of_lines_is_counted_instead_of_written():
    now = [0.0]
    limit = LogLimit(2, lambda: now[0])
    assert [limit.take() for _ in range(5)] == [0, 0, None, None, None]
    now[0] = 61.0
    assert [limit.take(), limit.take(), limit.take()] == [3, 0, None]


def test_logs_stay_bounded_while_a_process_writes_them(tmp_path):
    path = tmp_path / "link.log"
    with path.open("a", encoding="ascii") as file:
        file.write("first\n" * 100)
        file.flush()
        shorten_log(path, max_bytes=100)
        file.write("second\n")
    assert path.read_text() == "second\n"
    assert (tmp_path / "link.log.1").read_text().startswith("first\n")
    shorten_log(tmp_path / "none.log")


def test_events_of_a_supervisor_are_kept(tmp_path):
    events = EventLog(tmp_path / "logs")
    events.add(FederationEvent("TRAINING", contributor="alice", step=3, total=9, loss=1.5))
    events.add(FederationEvent("TRAINING", message=HOSTILE, problem=True))
    lines = (tmp_path / "logs" / "events.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert (first["contributor"], first["step"], first["loss"]) == ("alice", 3, 1.5)
    assert first["level"] == "info" and second["level"] == "warning"
    assert (tmp_path / "logs" / "events.jsonl").stat().st_mode & 0o077 == 0


def test_traffic_adds_up_over_restarts_and_a_damaged_file_counts_as_none(tmp_path):
    path, now = tmp_path / "traffic.json", [1_000.0]
    traffic = Traffic(path, lambda: now[0])
    traffic.note("a", received=10)
    now[0] = 2_000.0
    traffic.note("a", sent=5)  # sending is not hearing
    traffic.note(SERVER)
    traffic.write()
    again = Traffic(path, lambda: now[0])
    again.note("a", received=1, sent=1)
    again.write()
    seen = read_traffic(path)
    assert (seen["a"].received, seen["a"].sent, seen["a"].last) == (11, 6, 2_000.0)
    assert seen[SERVER].last == 2_000.0
    for damage in (b"{", b'{"keys": {"a": {"last": -1}}}', b'{"keys": 3}', b"[" * 100_000):
        path.write_bytes(damage)
        assert read_traffic(path) == {}


def test_what_was_counted_is_written_when_a_member_goes_and_when_the_server_ends(home):
    nodes = [SimpleNamespace(node_id=1, last_activated_at="", public_key=b"")]
    relay = MailRelay(home, SimpleNamespace(get_nodes=lambda: nodes), run_id=1)
    relay._round()
    for step, go in enumerate((nodes.clear, home.stop_file.touch), 1):
        relay._traffic.note("a", sent=10)
        relay._traffic.note("a", sent=10)  # sooner than anything is written again
        go()
        if step == 1:
            relay._round()
        else:
            relay.carry()
        assert read_traffic(home.traffic_file)["a"].sent == 20 * step


def test_a_server_is_shown_with_its_members_and_whom_it_waits_for(home):
    stopped = read_server(home)
    assert not stopped.is_running and stopped.list_awaited() == [
        "the server: start it with `molora serve`"
    ]
    with serving(home):
        found = read_server(home)
    assert found.is_running and found.is_carrying and found.nodes == 2 and not found.problems
    rows = {row.name: row for row in found.members}
    standings = {"alice": "member", "bob": "member", "carol": "revoked", "dora": "invited"}
    assert {name: row.standing for name, row in rows.items()} == standings
    assert (rows["alice"].seen.received, rows["alice"].seen.sent) == (1_000, 5_000)
    assert rows["alice"].is_connected(time.time()) and not rows["bob"].is_connected(time.time())
    assert found.list_awaited() == [
        "alice (training 120/300)",
        "bob, who has not said hello",
        "dora, who has not used the invitation",
    ]


def test_a_malformed_mailbox_is_shown_and_hides_nobody(home):
    box = next(one for one in home.contributors() if one.name == "alice")
    box.state_file.write_text('{"phase": "\\u001b[2J"}')
    keep_letter(box.fault_file, Refusal(reason=HOSTILE))
    home.traffic_file.write_text("[]")
    found = read_server(home)
    assert [row.name for row in found.members] == ["alice", "bob", "carol", "dora"]
    event = next(row.event for row in found.members if row.name == "alice")
    assert event.problem and "\x1b" not in event.message


def test_health_and_metrics_are_on_loopback_and_say_what_is_wrong(home):
    port = find_free_port()
    with serve_metrics(port, lambda: read_server(home)):
        status, body = ask(port, "/healthz")
        assert status == 503 and json.loads(body)["problems"] == ["the server is not running"]
        with serving(home):
            status, body = ask(port, "/healthz")
            assert status == 200 and json.loads(body)["status"] == "ok"
            status, body = ask(port, "/metrics")
        families = {family.name: family for family in text_string_to_metric_families(body)}
        assert families["molora_up"].samples[0].value == 1.0
        received = {
            sample.labels["name"]: sample.value
            for sample in families["molora_member_received_bytes"].samples
        }
        assert received == {"alice": 1_000.0, "bob": 0.0, "carol": 0.0, "dora": 0.0}
        # No page of another site reaches it, and nothing else is served.
        assert ask(port, "/metrics", host="evil.example")[0] == 421
        assert ask(port, "/")[0] == 404
        with pytest.raises(PortTakenError, match="--metrics-port"), serve_metrics(port, None):
            pass
    with pytest.raises(OSError):
        ask(port, "/healthz")


def test_labels_of_strangers_add_no_metric(home):
    box = next(one for one in home.contributors() if one.name == "alice")
    keep_letter(box.state_file, ShownState(phase="TRAINING", message=HOSTILE))
    port = find_free_port()
    with serve_metrics(port, lambda: read_server(home)):
        _, body = ask(port, "/metrics")
    samples = [s for f in text_string_to_metric_families(body) for s in f.samples]
    assert [s.value for s in samples if s.name == "molora_up"] == [0.0]


def test_a_contributor_is_shown_with_what_it_waits_for(tmp_path):
    home = ContributorHome(tmp_path / "alice")
    make_home(home.root)
    home.mail.mkdir()
    kept = {"server": "fed.example.org:8080", "invitation": "0" * 64}
    write_json(home.connection_file, {**kept, "name": "alice", "domain": "legal"})
    assert read_contributor(home).list_awaited() == ["this side: go on with `molora join`"]
    write_json(home.state_file, {"phase": "SUBMITTED", "message": "sent"})
    traffic = Traffic(home.traffic_file)
    traffic.note(SERVER, received=7)
    traffic.write()
    with hold_lock(home.root / "join.lock", what="a contributor"):
        found = read_contributor(home)
    assert (found.name, found.domain, found.server) == ("alice", "legal", "fed.example.org:8080")
    assert found.seen.received == 7 and found.list_awaited() == ["the coordinator's decision"]
    keep_letter(home.refusal_letter, Refusal(reason=HOSTILE))
    assert len(read_contributor(home).problems) == 1
    (home.result / "fused").mkdir(parents=True)
    assert read_contributor(home).list_awaited() == []


def test_warnings_of_chat_templates_reach_board_and_status(tmp_path, capsys):
    home = ContributorHome(tmp_path / "alice")
    home.mail.mkdir(parents=True)
    write_json(home.settings_file, JoinSettings(name="alice", domain="legal").to_json())
    write_json(home.state_file, {"phase": "TRAINING"})
    write_json(home.warnings_file, ["another template " + HOSTILE])
    events = []
    supervisor = ContributorSupervisor(
        "127.0.0.1:1", home.root, home.read_settings(), events.append, consent=lambda charter: True
    )
    supervisor._report()
    supervisor._report()
    (warning,) = [event for event in events if event.problem]
    assert warning.message.startswith("another template") and "\x1b" not in warning.message
    assert run(["status", str(home.root)]) == 0
    shown = capsys.readouterr().out
    assert re.search("^warning +another template", shown, re.M) and "\x1b" not in shown
    for malformed in ("{", '{"a": 1}'):
        home.warnings_file.write_text(malformed)
        assert home.read_warnings() == ()


def test_status_shows_either_side_and_refuses_any_other_folder(home, tmp_path, capsys):
    assert run(["status", str(home.root)]) == 0
    shown = capsys.readouterr().out
    for part in ("alice", "120/300", "dora", "waiting for", "not running"):
        assert part in shown
    assert re.search(r"alice +legal +member +no ", shown)  # nobody is, where no server runs
    assert run(["status", str(home.root), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["members"][0]["name"] == "alice" and value["problems"]
    assert run(["status", str(tmp_path)]) == ConfigError.exit_code
    assert capsys.readouterr().err.startswith("error: Cannot look into")


def find(home, subject):
    found = [one for one in examine(home, get_plugins()) if one.subject == subject]
    assert all("\n" not in one.message for one in found)
    return found


def test_the_doctor_names_each_problem_in_one_line(home, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 10**15)
    (disk,) = find(home, "disk")
    assert disk.is_problem and "Free some space" in disk.message
    home.root.chmod(0o755)
    (rights,) = find(home, "rights")
    assert rights.is_problem and "chmod 700" in rights.message
    write_json(home.error_file, {"type": "X", "message": HOSTILE, "code": 1})
    assert find(home, "last run")[0].is_problem
    (home.mail / "hello.json.malformed").touch()
    assert "hello.json" in find(home, "letters")[0].message
    write_json(home.root / "processes.json", [{"pid": os.getpid(), "created": 0.0}])
    assert str(os.getpid()) in find(home, "processes")[0].message
    assert find(home, "server")[0].is_problem
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1")
    (versions,) = find(home, "versions")
    assert versions.is_problem and "flwr" in versions.message and "got 0.1" in versions.message


def test_the_doctor_sees_a_certificate_that_ends(home, monkeypatch):
    assert find(home, "certificate") == []
    monkeypatch.setattr(certificates, "SERVER_DAYS", 0)
    ServerCertificate(home.root).prepare(["127.0.0.1"])
    (ended,) = find(home, "certificate")
    assert ended.is_problem and "ended 0 days ago" in ended.message
    monkeypatch.setattr(certificates, "SERVER_DAYS", 90)
    ServerCertificate(home.root).prepare(["127.0.0.1"])
    (good,) = find(home, "certificate")
    assert not good.is_problem and "valid for 90 days" in good.message


class _Server(threading.Thread):
    """Answers one request for health with a time of its own."""

    def __init__(self, date):
        super().__init__()
        import socket

        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self._date = date

    def run(self):
        connection, _ = self.socket.accept()
        with connection, self.socket:
            connection.recv(4_096)
            head = f"HTTP/1.1 200 OK\r\ndate: {self._date}\r\ncontent-length: 2\r\n\r\nok"
            connection.sendall(head.encode())


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("Mon, 01 Jan 2024 00:00:00 GMT", "ahead of"),
        ("Fri, 01 Jan 2100 00:00:00 GMT", "behind"),
        ("some day", None),
    ],
)
def test_the_doctor_sees_a_clock_that_is_off(date, expected):
    server = _Server(date)
    server.start()
    found = list(doctor._look_at_answer("server", f"127.0.0.1:{server.port}", None))
    server.join()
    assert not found[0].is_problem
    clocks = [one for one in found if one.subject == "clock"]
    if expected is None:
        assert clocks == []
    else:
        assert clocks[0].is_problem and expected in clocks[0].message


def test_the_doctor_says_why_a_server_is_not_reached(home):
    port = find_free_port()
    (silent,) = doctor._look_at_answer("server", f"127.0.0.1:{port}", None)
    assert silent.is_problem and "does not answer" in silent.message
    (unknown,) = doctor._look_at_answer("server", f"no-such-host.invalid:{port}", None)
    assert unknown.is_problem and "name" in unknown.message
    code = run(["doctor", str(home.root)])
    assert code == 1
