"""What commands print into pipes, and what the live table says."""

from molora_cli import live, progress

from molora_fed.federation.status import FederationEvent


def test_plain_progress_prints_phases_and_rare_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.reporting("training") as report:
        report(1, 10, loss=2.5, tokens_per_second=1234.0, eta_seconds=75.0)
        now[0] = 11.0
        report(5, 10, loss=2.25, validation_loss=float("nan"), tokens_per_second=1234.0,
               eta_seconds=75.0)  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "training",
        "training 5/10 · loss 2.250 · 1,234 tokens/s · ETA 1:15",
    ]


def test_transient_progress_prints_nothing_into_a_pipe(capsys):
    with progress.reporting("generating", transient=True) as report:
        report(1, 2)
    assert capsys.readouterr().out == ""


def test_plain_board_prints_changes_only(capsys):
    with live.watching("title") as board:
        board(FederationEvent("TRAINING", message="0 of 2 contributions admitted"))
        for step in (1, 2):
            board(FederationEvent("TRAINING", "law-1", step=step, total=9, loss=2.0))
        board(FederationEvent("ADMITTED", "law-1", state="ADMITTED"))
        board(FederationEvent("STOPPED", "law-1"))
        with board.paused():
            pass
    assert capsys.readouterr().out.splitlines() == [
        "server: TRAINING · 0 of 2 contributions admitted",
        "law-1: TRAINING · 1/9 · loss 2.000",
        "law-1: ADMITTED",
    ]


def test_bars_and_table_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with progress.reporting() as report:
        report.phase("training")
        report(3, 9, loss=1.5)
        report.phase("fusing")
    with live.watching("Cooperative") as board:
        board(FederationEvent("TRAINING", "law-1", step=1, total=9, loss=2.0, eta_seconds=61))
        board(FederationEvent("TRAINING", message="disk full", problem=True))
        with board.paused():
            print("asked")
    out = capsys.readouterr().out
    for word in ("training", "fusing", "law-1", "2.000", "1:01", "disk full", "asked"):
        assert word in out
