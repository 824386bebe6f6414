"""`molora join`: take part in a cooperative."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molora_cli.live import Board, watching
from molora_cli.output import note, show

if TYPE_CHECKING:
    from molora_fed.charter import Charter


def join(
    server: Annotated[str, typer.Option(help="HOST:PORT of the cooperative's server.")],
    domain: Annotated[str, typer.Option(help="Domain to train on.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text files or folders; repeatable. Without: the registered domain."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder of an adapter trained earlier, e.g. by molora train."),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Name in reports; domain and start of the key if not given.")
    ] = "",
    home: Annotated[
        Path | None, typer.Option(help="Folder for key, training and result; contributor-DOMAIN.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of training; all cores if not given.")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="I/N: share I of the documents that N contributors split.")
    ] = "1/1",
    yes: Annotated[bool, typer.Option("--yes", help="Agree to what will be sent.")] = False,
) -> None:
    """Train on your text, submit the adapter and the stated samples, receive the fused model."""
    from molora_fed.errors import ConfigError
    from molora_fed.federation.contributor import join as take_part
    from molora_fed.federation.join_settings import JoinSettings
    from molora_fed.storage.values import count_cores, parse_shard

    if not yes and not sys.stdin.isatty():
        raise ConfigError(
            "Cannot ask what may be sent: expected a terminal, got none. Pass --yes to agree to "
            "what the charter asks for."
        )
    settings = JoinSettings(
        name=name,
        domain=domain,
        data=tuple(data or ()),
        adapter=adapter,
        shard=parse_shard(shard),
        threads=threads or count_cores(),
    )
    where = home or Path(f"contributor-{domain}")
    with watching(f"Contributor for '{domain}' in {where}, server {server}") as board:
        acknowledgement = take_part(
            server,
            settings,
            where,
            board,
            consent=lambda charter: _ask(charter, board, agreed=yes),
        )
    print(f"{acknowledgement['state']}  contribution {acknowledgement['contribution_id']}")
    evolved = where / "result" / "evolved"
    if evolved.is_dir():
        print(f"evolved model  {evolved}")
    else:
        print(f"fused model  {where / 'result' / 'fused'}")
    print(f"report       {where / 'result' / 'report'}")
    note("The report is a page that the coordinator made: open it as you would one from the web.")


def _ask(charter: "Charter", board: Board, *, agreed: bool) -> bool:
    """Show what the charter asks for, and ask whether it may be sent."""
    from molora_fed.contributions.build import describe_outgoing
    from molora_fed.reporting.summary import build_outgoing_table

    with board.paused():
        show(
            f"Cooperative '{charter.identity.name}' asks for what is listed here. Your name, "
            "public key, domain and progress (phase, step, loss) are sent as well; nothing "
            "else is.",
            build_outgoing_table(describe_outgoing(charter)),
        )
        sys.stdout.flush()
        return agreed or typer.confirm("Send this once it is made?")
