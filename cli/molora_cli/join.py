"""`molora join`: take part in a cooperative."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molora_cli.live import Board, watching
from molora_cli.output import build_text_tables, note, show, show_outgoing
from molora_cli.shared_options import (
    Accumulation,
    Batch,
    Checkpointing,
    CountedTokens,
    Device,
    DomainOption,
    Dtype,
    Launcher,
    LearningRate,
    ResetDocuments,
    Steps,
    TextField,
    ValidateEvery,
    ask_compute,
    ask_training,
)

if TYPE_CHECKING:
    from molora_fed.charter import Charter
    from molora_fed.federation.homes import ContributorHome

_MOST_CHARACTERS = 10_000


def join(
    invitation: Annotated[
        str | None,
        typer.Argument(help="The line `molora coop invite` printed, a file that holds it, or -."),
    ] = None,
    server: Annotated[
        str, typer.Option(help="HOST:PORT of a server on this machine that runs --insecure.")
    ] = "",
    address: Annotated[
        str, typer.Option(help="HOST or HOST:PORT to which the server has moved; kept in --home.")
    ] = "",
    domain: Annotated[
        str, typer.Option(help="Domain to train on; an invitation names it itself.")
    ] = "",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text files, folders or datasets:ID; repeatable. Without: the registered domain."
        ),
    ] = None,
    domain_option: DomainOption = None,
    text_field: TextField = "",
    loss_on: CountedTokens = "all",
    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder of an adapter trained earlier, here or by another program."),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            help="Your own copy of the base: a folder, a .gguf file, or ID@REVISION of the Hub. "
            "Without, the server sends it."
        ),
    ] = "",
    name: Annotated[
        str, typer.Option(help="Name in reports; domain and start of the key if not given.")
    ] = "",
    home: Annotated[
        Path | None, typer.Option(help="Folder for key, training and result; contributor-DOMAIN.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of training; all cores if not given.")
    ] = None,
    steps: Steps = None,
    batch: Batch = None,
    learning_rate: LearningRate = None,
    validate_every: ValidateEvery = None,
    accumulation: Accumulation = 1,
    checkpointing: Checkpointing = False,
    reset_documents: ResetDocuments = False,
    launcher: Launcher = "",
    device: Device = None,
    dtype: Dtype = None,
    shard: Annotated[
        str, typer.Option(help="I/N: share I of the documents that N contributors split.")
    ] = "1/1",
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65_535,
            help="Port of this machine for /healthz and /metrics; none if not given.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to what will be sent.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say hello, list what would be sent and what can be told from it, and stop.",
        ),
    ] = False,
) -> None:
    """Train on your text, submit the adapter and what the charter asks for, receive the model."""
    from molora_fed.charter import load_charter
    from molora_fed.corpus.prepare import load_report
    from molora_fed.errors import ConfigError
    from molora_fed.federation.acceptance import accept_invitation, follow_server, read_connection
    from molora_fed.federation.contributor import join as take_part
    from molora_fed.federation.homes import ContributorHome
    from molora_fed.federation.invitations import parse_invitation
    from molora_fed.federation.join_settings import JoinSettings
    from molora_fed.federation.worker_mail import (
        is_described,
    )
    from molora_fed.storage.values import count_cores, parse_options, parse_shard

    if not (yes or dry_run) and not sys.stdin.isatty():
        raise ConfigError(
            "Cannot ask what may be sent: expected a terminal, got none. Pass --dry-run to see "
            "what the charter asks for, and --yes to agree to it."
        )
    os.umask(0o077)
    authority = None
    if server and (invitation or not domain):
        raise ConfigError(
            f"Cannot join at {server}: expected --server with --domain, or an invitation, got "
            f"{'both' if invitation else 'no domain'}. A server that invites needs the invitation "
            "alone."
        )
    if server and address:
        raise ConfigError(
            f"Cannot follow the server to {address}: expected a home of an invitation, got "
            "--server. Leave one of them out."
        )
    if not server:
        known = read_connection(ContributorHome(home)) if home and not invitation else None
        if address:
            known = follow_server(ContributorHome(home or Path()), address)
        if known is None:
            invited = parse_invitation(_read_invitation(invitation))
            where = home or Path(f"contributor-{invited.domain}")
            _check_same(domain, invited.domain, "domain")
            _check_same(name, invited.name, "name")
            accept_invitation(invited, ContributorHome(where))
            known = read_connection(ContributorHome(where))
            assert known is not None
            home = where
        server, domain, name = known.server, known.domain, known.name
        authority = ContributorHome(home or Path()).authority_file
    settings = JoinSettings(
        name=name,
        domain=domain,
        data=tuple(data or ()),
        adapter=adapter,
        base=str(Path(base).absolute()) if base and Path(base).exists() else base,
        shard=parse_shard(shard),
        threads=threads or count_cores(),
        compute=ask_compute(device, dtype),
        training=ask_training(
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            validate_every=validate_every,
            accumulation=accumulation,
            checkpointing=checkpointing,
            reset_documents=reset_documents,
            launcher=launcher,
        ),
        text_field=text_field,
        loss_on=loss_on,
        domain_options=parse_options(domain_option or ()),
    )
    where = home or Path(f"contributor-{domain}")
    own_home = ContributorHome(where)
    ask = _show_only if dry_run else partial(_confirm, agreed=yes)
    try:
        with watching(f"Contributor for '{domain}' in {where}, server {server}") as board:
            if dry_run and is_described(own_home):
                _ask(load_charter(own_home.charter), own_home, board, ask)
            acknowledgement = take_part(
                server,
                settings,
                where,
                board,
                consent=lambda charter: _ask(charter, own_home, board, ask),
                authority=authority,
                metrics_port=metrics_port,
            )
    except _ShownOnly:
        print("Nothing of text or adapter was sent. Take part with the same command, no --dry-run.")
        return
    if data:
        show(*build_text_tables(load_report(where / "corpus").files))
    print(f"{acknowledgement['state']}  contribution {acknowledgement['contribution_id']}")
    evolved = where / "result" / "evolved"
    if evolved.is_dir():
        print(f"evolved model  {evolved}")
    else:
        print(f"fused model  {where / 'result' / 'fused'}")
    print(f"report       {where / 'result' / 'report'}")
    note("The report is a page that the coordinator made: open it as you would one from the web.")


def _read_invitation(given: str | None) -> str:
    """The invitation's line: as given, from a file or standard input, or asked for.

    Given as an argument it is in the process list while the command runs; used once, it is worth
    nothing to others a moment later.
    """
    from molora_fed.errors import ConfigError

    if given == "-":
        return sys.stdin.read(_MOST_CHARACTERS)
    if given is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                "Cannot join: expected an invitation, got none. Pass the line that `molora coop "
                "invite` printed, a file that holds it, or - for standard input; or --server and "
                "--domain on this machine."
            )
        return str(typer.prompt("Invitation", hide_input=True))
    if given.startswith("molora1."):
        return given
    try:
        with Path(given).open(encoding="ascii", errors="replace") as file:
            return file.read(_MOST_CHARACTERS)
    except OSError as error:
        raise ConfigError(
            f"Cannot read the invitation '{given[:80]}': expected its line or a file that holds "
            f"it, got {error.strerror}. Copy it again, from 'molora1.' to its end."
        ) from error


def _check_same(given: str, invited: str, what: str) -> None:
    from molora_fed.errors import ConfigError

    if given and given != invited:
        raise ConfigError(
            f"Cannot join with --{what} {given}: expected the invitation's {what} '{invited}', got "
            f"another. Leave --{what} out, or ask the coordinator for another invitation."
        )


class _ShownOnly(Exception):
    """Ends a dry run."""


def _show_only() -> bool:
    raise _ShownOnly


def _confirm(*, agreed: bool) -> bool:
    return agreed or typer.confirm("Send this once it is made?")


def _ask(
    charter: "Charter", home: "ContributorHome", board: Board, ask: Callable[[], bool]
) -> bool:
    """Show what the charter asks for, and ask whether it may be sent."""
    from molora_fed.cooperative.outgoing import describe_outgoing, read_width
    from molora_fed.cooperative.pins import check_pins
    from molora_fed.federation.worker_mail import (
        find_base_config,
    )
    from molora_fed.plugins import get_plugins

    config = find_base_config(home)
    width = None if config is None else read_width(config)
    check_pins(charter, get_plugins())  # nobody agrees to what the worker then refuses
    outgoing = describe_outgoing(charter, get_plugins(), width=width)
    with board.paused():
        show(
            f"Cooperative '{charter.identity.name}', amendment {charter.amendment.number}. "
            f"Privacy mode {charter.privacy}.",
            "It asks for what is listed here. Your name, public key, domain and progress (phase, "
            "step, loss) are sent as well; nothing else is.",
        )
        show_outgoing(outgoing)
        sys.stdout.flush()
        return ask()
