import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from process_helpers import find_processes, wait_until

from molora_fed.errors import (
    AdmissionError,
    CharterError,
    ConfigError,
    CorpusError,
    FederationError,
    MoloraError,
    PortTakenError,
    ServerUnreachableError,
    UnknownNameError,
)
from molora_fed.federation.contributor import join
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.mailbox import hold_lock
from molora_fed.federation.server import serve
from molora_fed.federation.supervise import (
    ProcessGroup,
    build_flower_environment,
    parse_answer,
    raise_recorded,
    record_errors,
)
from molora_fed.serving.addresses import (
    check_loopback,
    check_port_free,
    find_free_port,
    parse_server,
)

# A process with a child that is detached and deaf to SIGTERM, as Flower's can be.
FAMILY = """
import signal, subprocess, sys, time
deaf = "import signal,time;signal.signal(signal.SIGTERM,signal.SIG_IGN);time.sleep(600)"
subprocess.Popen([sys.executable, "-c", deaf, sys.argv[1]], start_new_session=True)
time.sleep(600)
"""


def start_family(root):
    group = ProcessGroup(root / "logs", root / "processes.json")
    command = [sys.executable, "-c", FAMILY, str(root)]
    group.start("family", command, dict(os.environ))
    wait_until(lambda: len(find_processes(root)) == 2, what="the child")
    group.observe()
    return group


def test_a_whole_tree_ends_even_if_a_child_is_detached_and_deaf(stage_root):
    group = start_family(stage_root)
    assert len(group.descendants("family")) == 2
    group.stop("family", grace_seconds=1.0)
    assert find_processes(stage_root) == []


def test_orphans_of_a_dead_parent_are_ended_too(stage_root):
    group = start_family(stage_root)
    os.kill(group.pid("family"), signal.SIGKILL)
    wait_until(lambda: group.exit_code("family") == -signal.SIGKILL, what="its end")
    assert len(find_processes(stage_root)) == 1
    group.stop("family", grace_seconds=1.0)
    assert find_processes(stage_root) == []


def test_what_a_killed_supervisor_left_is_ended_at_the_next_start(stage_root):
    start_family(stage_root)
    # The same files, as a new supervisor finds them.
    entries = json.loads((stage_root / "processes.json").read_text())
    entries.append({"pid": os.getpid(), "created": 1.0})  # a number used again by another
    (stage_root / "processes.json").write_text(json.dumps(entries))
    again = ProcessGroup(stage_root / "logs", stage_root / "processes.json")
    again.end_leftovers(grace_seconds=1.0)
    assert find_processes(stage_root) == []
    assert not (stage_root / "processes.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_children_end_with_a_supervisor_that_is_killed(stage_root):
    script = (
        "import os,sys,time;from pathlib import Path;"
        "from molora_fed.federation.supervise import ProcessGroup;"
        "root=Path(sys.argv[1]);group=ProcessGroup(root/'logs',root/'processes.json');"
        "group.start('sleep',['sleep','600'],{**os.environ,'STAGE':str(root)});time.sleep(600)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script, str(stage_root)])
    wait_until(
        lambda: any("sleep" in p.name() for p in find_processes(stage_root)), what="the child"
    )
    supervisor.kill()
    supervisor.wait()
    wait_until(
        lambda: not [
            p for p in find_processes(stage_root) if p.status() != psutil.STATUS_ZOMBIE
        ],
        seconds=10, what="its end",
    )  # fmt: skip


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.0.9"])
def test_loopback_hosts_are_allowed(host):
    check_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org", "::", "::1", ""])
def test_other_hosts_are_refused_with_the_reason(host):
    with pytest.raises(ConfigError, match="without TLS"):
        check_loopback(host)


def test_a_servers_address_is_parsed():
    assert parse_server("127.0.0.1:9000") == ("127.0.0.1", 9000)
    assert parse_server("http://localhost:9000/") == ("localhost", 9000)
    assert parse_server("localhost") == ("localhost", 8080)
    for wrong in ("127.0.0.1:x", "127.0.0.1:0", ":9000", ""):
        with pytest.raises(ConfigError):
            parse_server(wrong)
    assert parse_server("[2001:db8::1]:9000") == ("2001:db8::1", 9000)


def test_a_taken_port_is_one_line(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortTakenError) as caught:
            check_port_free("127.0.0.1", taken.getsockname()[1])
    assert "\n" not in str(caught.value) and "--port" in str(caught.value)
    check_port_free("127.0.0.1", find_free_port())


def test_serving_without_a_cooperative_starts_nothing(stage_root):
    with pytest.raises(CharterError, match="coop create"):
        serve(stage_root / "none", find_free_port())
    with pytest.raises(ConfigError, match="without TLS"):
        serve(stage_root / "none", find_free_port(), host="0.0.0.0")
    assert not (stage_root / "none").exists()


def agree(charter):
    return True


def test_a_server_that_does_not_answer_is_one_line(stage_root):
    (stage_root / "text.txt").write_text("some text")
    with pytest.raises(ServerUnreachableError) as caught:
        join(
            f"127.0.0.1:{find_free_port()}", JoinSettings("", "alpha", (stage_root / "text.txt",)),
            stage_root / "home", consent=agree, wait_seconds=0.0,
        )  # fmt: skip
    assert "\n" not in str(caught.value) and caught.value.exit_code == 51
    assert oct((stage_root / "home" / "key.pem").stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"domain": "pyton"}, UnknownNameError, "Did you mean 'python'"),
        ({"domain": "Alpha", "data": "text"}, ConfigError, "--domain"),
        ({"domain": "alpha", "data": "empty"}, CorpusError, "empty"),
        ({"domain": "alpha", "data": "nowhere"}, CorpusError, "nowhere"),
        ({"domain": "alpha", "data": "text", "name": "base"}, ConfigError, "--name"),
        ({"domain": "alpha", "data": "text", "adapter": "nowhere"}, ConfigError, "adapter"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(tmp_path, settings, error, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text")
    data = (tmp_path / settings["data"],) if "data" in settings else ()
    adapter = tmp_path / settings["adapter"] if "adapter" in settings else None
    with pytest.raises(error, match=words) as caught:
        join(
            "127.0.0.1:1",
            JoinSettings(settings.get("name", "me"), settings["domain"], data, adapter),
            tmp_path / "home", consent=agree, wait_seconds=0.0,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "home" / "join.json").exists()


def test_a_home_keeps_its_domain_and_is_used_once_at_a_time(tmp_path):
    (tmp_path / "a.txt").write_text("some text")

    def start(domain):
        settings = JoinSettings("", domain, (tmp_path / "a.txt",))
        join("127.0.0.1:1", settings, tmp_path / "home", consent=agree, wait_seconds=0.0)

    with pytest.raises(ServerUnreachableError):
        start("alpha")
    with pytest.raises(ConfigError, match="as at the first join"):
        start("beta")
    with (
        hold_lock(tmp_path / "home" / "join.lock", what="a contributor"),
        pytest.raises(FederationError, match="nobody else there"),
    ):
        start("alpha")


def test_a_workers_error_reaches_its_supervisor_with_type_and_exit_code(tmp_path):
    path = tmp_path / "error.json"
    for error, kind in (
        (AdmissionError("No. Try again."), AdmissionError),
        (UnknownNameError("router", "x", ["y"]), MoloraError),
    ):
        with pytest.raises(SystemExit) as ended, record_errors(path):
            raise error
        assert ended.value.code == error.exit_code
        with pytest.raises(MoloraError) as caught:
            raise_recorded(path, otherwise="nothing")
        assert str(caught.value) == str(error) and caught.value.exit_code == error.exit_code
        # An error that takes more than a message comes as the plainest one.
        assert type(caught.value) is kind
    assert AdmissionError("x").exit_code == 22
    with record_errors(path):
        pass
    with pytest.raises(FederationError, match="See the log"):
        raise_recorded(path, otherwise="See the log.")


def test_flowers_environment_calls_nobody(tmp_path):
    env = build_flower_environment(tmp_path, EXTRA="1")
    assert env["FLWR_TELEMETRY_ENABLED"] == "0" and env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["FLWR_HOME"].startswith(str(tmp_path)) and env["EXTRA"] == "1"


def test_the_answer_of_flowers_command_line_is_found():
    assert parse_answer('noise {"success": true, "run-id": "1"}\n')["run-id"] == "1"
    assert parse_answer("no json") == {} and parse_answer("") == {}


@pytest.mark.parametrize(
    "module",
    ["client_app", "server_app", "server", "contributor", "local", "coordinator", "worker"],
)
def test_no_app_and_no_supervisor_imports_torch(module):
    script = (
        f"import sys, molora_fed.federation.{module};"
        "sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
