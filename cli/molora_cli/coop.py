"""`molora coop`: make cooperatives, change them, and advise on them."""

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molora_cli.output import MAX_LINE, format_time, note, print_columns
from molora_cli.progress import reporting
from molora_cli.shared_options import Device, DomainOption, Dtype, Privacy, SummingWay, ask_compute
from molora_fed.storage.untrusted import clean

if TYPE_CHECKING:
    from molora_fed.contributions.decision import AdmissionDecision

app = typer.Typer(help="Cooperatives.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Cooperatives."""


class MixtureChoice(StrEnum):
    """How experts' distributions are combined by gates."""

    PROBABILITY = "probability"
    LOGIT = "logit"


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and dashes.")],
    base: Annotated[
        str,
        typer.Option(help="builtin, a folder, a .gguf file, or ID@REVISION of the Hub."),
    ] = "builtin",
    domains: Annotated[
        str, typer.Option(help="Domains to ask for, separated by commas; any if not given.")
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(help="The coordinator's home; a folder of that NAME if not given."),
    ] = None,
    frozen_depth: Annotated[
        int, typer.Option(min=0, help="Decoder blocks that stay the base's.")
    ] = 0,
    kind: Annotated[str, typer.Option(help="Adapter kind that contributors train.")] = "svd",
    accept_kinds: Annotated[
        str | None,
        typer.Option(
            help="Adapter kinds that may be contributed, separated by commas, those of plugins "
            "among them; lora, svd and delta if not given. It never changes later."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of low-rank kinds.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a specialist.")] = 300,
    router: Annotated[
        str | None,
        typer.Option(help="The router that is published; the charter's default if not given."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Routers reported beside it, separated by commas, or empty, or a TOML list with "
            "options; the charter's default if not given."
        ),
    ] = None,
    mixture: Annotated[
        MixtureChoice, typer.Option(help="How distributions are combined.")
    ] = MixtureChoice.PROBABILITY,
    expected: Annotated[
        int, typer.Option(min=0, help="Contributions to wait for; one a domain if 0.")
    ] = 0,
    deadline: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Fuse after so many seconds if there is a quorum; 0 waits for ever.",
        ),
    ] = 0.0,
    quorum: Annotated[
        int,
        typer.Option(min=0, help="Contributions without which not even the deadline fuses."),
    ] = 0,
    privacy: Privacy = None,
    summing: SummingWay = None,
    block_size: Annotated[int, typer.Option(min=8, help="Tokens per block.")] = 128,
    base_steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of the built-in base.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of base, training, routers and bootstraps.")] = 42,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Create a cooperative: its charter, base checkpoint, key and ledger."""
    from molora_fed.charter import (
        AdapterRules,
        Amendment,
        CorpusRules,
        FusionRules,
        TrainingRules,
        choose_privacy,
    )
    from molora_fed.cooperative.amend import apply_settings
    from molora_fed.cooperative.create import found_cooperative
    from molora_fed.errors import ConfigError
    from molora_fed.models.batches import choose_batch
    from molora_fed.models.layout import decoder_blocks
    from molora_fed.models.runtime import choose_placement
    from molora_fed.storage.compute import read_compute
    from molora_fed.storage.files import make_home
    from molora_fed.storage.values import find_cache_folder, parse_names
    from molora_fed.training.freezing import recommend_frozen_depth

    if not math.isfinite(deadline):
        raise ConfigError(
            f"Cannot create '{name}': expected a deadline in seconds, got {deadline}. Give a "
            "number with --deadline, or 0 to wait for ever."
        )
    rules = choose_privacy(name, privacy, summing)
    chosen: dict[str, object] = {"router": rules.router if router is None else router}
    chosen["compare"] = rules.comparisons
    amendment = Amendment(
        domains=parse_names(domains) if domains else (),
        expected=expected,
        deadline_seconds=deadline,
        quorum=quorum,
        seed=seed,
        training=TrainingRules(kind=kind, rank=rank, steps=steps),
        fusion=FusionRules.model_validate({"mixture": mixture.value, **chosen}),
    )
    if compare is not None:
        amendment = apply_settings(amendment, [f"fusion.compare={compare}"])
    accepted = {} if accept_kinds is None else {"kinds": parse_names(accept_kinds)}
    home = folder or Path(name)
    with reporting() as progress:
        cooperative, made = found_cooperative(
            home,
            name,
            source=base,
            adapters=AdapterRules.model_validate(
                {"frozen_depth": frozen_depth, "max_rank": max(64, rank), **accepted}
            ),
            corpus=CorpusRules(block_size=block_size, evaluation_batch=choose_batch(block_size)),
            amendment=amendment,
            privacy=rules,
            base_steps=base_steps,
            placement=choose_placement(read_compute(home, ask_compute(device, dtype))),
            cache=find_cache_folder(),
            on_phase=progress.phase,
            progress=progress,
        )
    make_home(cooperative.folder)
    print(f"cooperative  {cooperative.charter.identity.name} in {cooperative.folder}")
    print(f"identity     {cooperative.charter.identity_hash}")
    print(f"privacy      {cooperative.charter.privacy}")
    for each in cooperative.charter.amendment.plugins:
        print(f"pinned       {each.title}, hash {each.hash}")
    print(f"base         {made.id} {made.revision}".rstrip())
    print(f"weights      {made.weights}")
    print(f"tokenizer    {made.tokenizer_fingerprint}")
    if made.training is not None:
        print(f"trained      {made.training['steps']} steps, {made.training['tokens']} tokens")
    if 0 < expected < rules.min_members:
        note(
            f"note: masked sums are of {rules.min_members} members at least. The server waits for "
            f"{rules.min_members} contributions, not {expected}."
        )
    advice = recommend_frozen_depth(steps, len(decoder_blocks(made.model)[1]))
    if (advice.frozen_depth == 0) != (frozen_depth == 0):
        note(f"note: {advice.describe()} This cooperative freezes {frozen_depth}.")
    print(f"Serve it with `molora serve {cooperative.folder}`, and invite contributors with")
    print(f"`molora coop invite {cooperative.folder} --name NAME --domain DOMAIN`.")


@app.command()
def invite(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
    name: Annotated[str, typer.Option(help="Name the contributor will have.")],
    domain: Annotated[str, typer.Option(help="Domain the contributor will train on.")],
    days: Annotated[float, typer.Option(help="For how long it may be used, once.")] = 7.0,
    address: Annotated[
        str, typer.Option(help="HOST:PORT of the server; the one that was served if not given.")
    ] = "",
) -> None:
    """Print an invitation for one contributor: the only line on standard output, and a secret."""
    from molora_fed.federation.homes import CoordinatorHome
    from molora_fed.federation.invitations import make_invitation, read_address

    home = CoordinatorHome(cooperative)
    server = address or read_address(home)
    invitation = make_invitation(home, name, domain, days=days, server=server)
    note(
        f"Invitation of '{name}' to {server}, good once, until {format_time(invitation.expires)}. "
        "Send it so that nobody else reads it; used with `molora join INVITATION --data PATH`."
    )
    if server.startswith(("127.", "localhost:", "[::1]:")):
        note(
            "It leads to this machine only. For others start `molora serve` with --address first, "
            "or give --address here."
        )
    print(invitation)


@app.command()
def members(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
) -> None:
    """List who may connect: members, who was turned away, and open invitations."""
    from molora_fed.federation.homes import CoordinatorHome
    from molora_fed.federation.members import Members

    known = Members(CoordinatorHome(cooperative).members)
    rows = [
        (
            member.name,
            member.domain,
            f"revoked {format_time(member.revoked)}" if member.revoked else "member",
            f"since {format_time(member.joined)}",
            member.contributor[:16],
        )
        for member in known.list_members()
    ]
    rows += [
        (each.name, each.domain, "invited", f"until {format_time(each.expires)}", "")
        for each in known.list_invitations()
    ]
    print_columns(("name", "domain", "state", "when", "key"), rows)


@app.command()
def revoke(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
    name: Annotated[str, typer.Argument(help="A member's name, or an invited one.")],
) -> None:
    """Turn a member away at once, and take back its invitations; what it gave stays.

    `molora coop withdraw` takes out what it gave.
    """
    from molora_fed.federation.homes import CoordinatorHome
    from molora_fed.federation.members import Members

    Members(CoordinatorHome(cooperative).members).revoke(name)
    print(f"revoked      {name}: it cannot connect any more, its key never again")
    print(f"What it contributed stays in; take it out with `molora coop withdraw {cooperative}`.")


@app.command()
def recommend(
    steps: Annotated[int, typer.Option(min=1, help="Planned training steps of a specialist.")],
    blocks: Annotated[
        int, typer.Option(min=1, help="Decoder blocks of the base; the built-in base has 4.")
    ] = 4,
) -> None:
    """Recommend how many blocks to freeze for a planned number of training steps."""
    from molora_fed.training.freezing import MEASURED, recommend_frozen_depth

    advice = recommend_frozen_depth(steps, blocks)
    print(advice.describe())
    print("With early stopping:", recommend_frozen_depth(steps, blocks, curve=MEASURED).describe())
    options = f"--steps {steps} --frozen-depth {advice.frozen_depth}"
    print(f"Create it with `molora coop create NAME {options}`.")


@app.command()
def admit(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
    contributions: Annotated[
        list[Path], typer.Argument(help="Folders that `molora train` wrote, or contributions.")
    ],
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Receive contributions and judge them; `molora fuse` then fuses all that are admitted."""
    from molora_fed.cooperative.admit import admit_contributions
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.errors import AdmissionError

    with reporting("admission") as progress:
        receipts = admit_contributions(
            open_cooperative(cooperative, ask_compute(device, dtype)),
            contributions,
            progress=progress,
        )
    rows = [
        (
            r.contributor,
            r.domain,
            str(r.state),
            r.contribution_id[:16],
            _describe_change(r.decision),
            _describe_effect(r.decision),
        )
        for r in receipts
    ]
    header = ("contributor", "domain", "state", "contribution", "loss change", "effect")
    print_columns(header, rows)
    decisions = [receipt.decision for receipt in receipts if receipt.decision is not None]
    for each in (text for decision in decisions for text in decision.notes):
        note(each)
    if refusals := [refusal.message for decision in decisions for refusal in decision.refusals]:
        raise AdmissionError(" ".join(refusals))


def _describe_change(decision: "AdmissionDecision | None") -> str:
    """Loss on the admission sample against the base's, nats per token, if it was measured."""
    losses = None if decision is None else decision.losses
    return "-" if losses is None else f"{losses.specialist - losses.base:+.4f}"


def _describe_effect(decision: "AdmissionDecision | None") -> str:
    """How many of its modules the adapter changes, if they were counted."""
    effect = None if decision is None else decision.effect
    return "-" if effect is None else str(effect)


@app.command()
def amend(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A key of [amendment], e.g. fusion.router=linear."
        ),
    ] = None,
    pin: Annotated[
        bool,
        typer.Option("--pin", help="Pin the plugins it names anew, as they are installed here."),
    ] = False,
) -> None:
    """Sign the next amendment: what may change of a charter, without voiding anyone's signature."""
    from molora_fed.cooperative.amend import amend_by_settings
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.errors import ConfigError

    if not setting and not pin:
        raise ConfigError(
            "Cannot amend the charter: expected --set KEY=VALUE or --pin, got neither. Say what "
            "is to change."
        )
    amended, changes = amend_by_settings(
        open_cooperative(cooperative), setting or (), renew_pins=pin
    )
    number = amended.charter.amendment.number
    if not changes:
        print(f"Nothing changes: amendment {number} says so already.")
        return
    print(f"Amendment {number} of cooperative '{amended.charter.identity.name}' is signed.")
    rows = [(each.key, str(each.before), str(each.after)) for each in changes]
    print_columns(("key", "before", "now"), rows)
    print(f"It counts from the next `molora serve {cooperative}` or `molora fuse` on.")


@app.command()
def text(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
    domain: Annotated[str, typer.Option(help="Domain of the text.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Files or folders of text; repeatable. A registered domain if none."),
    ] = None,
    domain_option: DomainOption = None,
) -> None:
    """Keep public text of a domain, on which newcomers are measured where they send none."""
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.cooperative.public_text import keep_public_text
    from molora_fed.storage.values import parse_options

    options = parse_options(domain_option or ())
    with reporting() as progress:
        progress.phase(f"reading text of {clean(domain, MAX_LINE)}")
        opened = open_cooperative(cooperative)
        blocks = keep_public_text(opened, domain, tuple(data or ()), options=options)
    print(f"kept         {len(blocks)} blocks of {blocks.block_size} tokens of {domain}")
    print("Newcomers of that domain are measured on them; they are sent to nobody.")


@app.command()
def repair(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
) -> None:
    """Decide on contributions left undecided; retract recorded forecasts that cannot be read."""
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.cooperative.judging import judge_pending
    from molora_fed.forecasting.history import retract_malformed

    opened = open_cooperative(cooperative)
    with opened.open_ledger() as ledger:
        retracted = retract_malformed(ledger, actor="molora coop repair")
        receipts = judge_pending(opened, ledger)
    for number, reason in retracted.items():
        print(f"retracted    forecast record {number}: {clean(reason, MAX_LINE)}")
    for receipt in receipts:
        print(f"decided      {receipt.contributor}, {receipt.contribution_id}: {receipt.state}")
    if not retracted and not receipts:
        print(
            "Nothing to repair: every contribution is decided, and every recorded forecast can be "
            "read or is retracted."
        )


@app.command("list")
def list_(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
) -> None:
    """Show every contribution with its state, why it is not in, and what leaves that state."""
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.cooperative.judging import LEAVES, list_standings

    with open_cooperative(cooperative).read_ledger() as ledger:
        found = list_standings(ledger)
    rows = [(one.contribution_id[:16], one.contributor, one.domain, one.state) for one in found]
    print_columns(("contribution", "contributor", "domain", "state"), rows)
    for one in found:
        if one.reason:
            print(f"{one.contribution_id[:16]}  {clean(one.reason, MAX_LINE)}")
    for state in sorted({one.state for one in found}):
        print(f"Out of {state}: {LEAVES[state]}.")


Which = Annotated[
    str, typer.Argument(metavar="WHICH", help="First digits of its id, or its contributor's name.")
]


@app.command()
def release(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
    contribution: Which,
    reason: Annotated[str, typer.Option(help="Why, for the ledger's history.")] = "",
) -> None:
    """Judge a contribution again, and grant what it was quarantined for."""
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.cooperative.judging import release as judge
    from molora_fed.federation.withdrawal import build_announcer

    opened = open_cooperative(cooperative)
    with reporting("admission") as progress:
        receipt = judge(
            opened,
            contribution,
            reason=reason,
            announce=build_announcer(opened),
            progress=progress,
        )
    print(f"{receipt.state.lower():<12} {receipt.contributor}, {receipt.contribution_id}")


@app.command()
def reject(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
    contribution: Which,
    reason: Annotated[str, typer.Option(help="Why, for the history and the contributor.")] = "",
) -> None:
    """Reject a contribution that is not in, whatever it waits for."""
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.cooperative.judging import reject as decide
    from molora_fed.federation.withdrawal import build_announcer

    opened = open_cooperative(cooperative)
    receipt = decide(opened, contribution, reason=reason, announce=build_announcer(opened))
    print(f"{receipt.state.lower():<12} {receipt.contributor}, {receipt.contribution_id}")


@app.command()
def withdraw(
    cooperative: Annotated[Path, typer.Argument(help="A cooperative's folder.")],
    contributor: Annotated[str, typer.Argument(help="The contributor's name.")],
    reason: Annotated[str, typer.Option(help="Why, for the ledger's history.")] = "",
) -> None:
    """Take a contributor out, and delete what it gave; the others fuse again without training."""
    from molora_fed.cooperative.cooperative import open_cooperative
    from molora_fed.federation.withdrawal import withdraw_contributor

    with reporting("withdrawing") as progress:
        done = withdraw_contributor(
            open_cooperative(cooperative), contributor, reason=reason, progress=progress
        )
    print(f"withdrawn    {contributor} ({done.domain}), contribution {done.contribution_id}")
    print(f"deleted      {done.freed_bytes:,} bytes of its files and of the bank")
    if done.retracted:
        print("retracted    the published model that held it; copies elsewhere stay where they are")
    print(f"still in     {', '.join(done.remaining) or 'nobody'}")
    if done.remaining:
        print(f"Fuse again with `molora fuse --cooperative {cooperative}`, or serve it.")
