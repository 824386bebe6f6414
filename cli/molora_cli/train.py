"""`molora train`: a specialist and a signed contribution, without a network."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import (
    build_corpus_table,
    build_text_tables,
    note,
    show,
    show_outgoing,
)
from molora_cli.progress import reporting
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


def train(
    cooperative: Annotated[
        Path, typer.Option(help="A cooperative's folder, or its cooperative.toml beside base/.")
    ],
    domain: Annotated[str, typer.Option(help="Domain to train on.")],
    out: Annotated[Path, typer.Option(help="Folder for adapter, contribution and key.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text files, folders or datasets:ID; repeatable. Without: the registered domain."
        ),
    ] = None,
    domain_option: DomainOption = None,
    text_field: TextField = "",
    loss_on: CountedTokens = "all",
    kind: Annotated[
        str | None, typer.Option(help="Adapter kind; the charter's if not given.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the kind, KEY=VALUE, e.g. precision=int8; repeatable."),
    ] = None,
    steps: Steps = None,
    batch: Batch = None,
    learning_rate: LearningRate = None,
    validate_every: ValidateEvery = None,
    accumulation: Accumulation = 1,
    checkpointing: Checkpointing = False,
    reset_documents: ResetDocuments = False,
    launcher: Launcher = "",
    seed: Annotated[int | None, typer.Option(help="Seed; the charter's if not given.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Torch threads; all cores if not given.")
    ] = None,
    name: Annotated[
        str, typer.Option(help="Contributor's name; domain and start of the key if not given.")
    ] = "",
    shard: Annotated[
        str, typer.Option(help="I/N: share I of the documents that N contributors split.")
    ] = "1/1",
    key: Annotated[
        Path | None, typer.Option(help="Private key; made in the --out folder if not given.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base, if it is elsewhere.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Train a specialist and sign a contribution made of it; nothing is sent."""
    from molora_fed.cooperative.contribute import (
        check_choices,
        make_contribution,
        open_charter_and_base,
        prepare_domain,
    )
    from molora_fed.cooperative.outgoing import describe_outgoing
    from molora_fed.corpus.records import TextOptions
    from molora_fed.models.runtime import format_bytes
    from molora_fed.plugins import get_plugins
    from molora_fed.storage.files import make_home
    from molora_fed.storage.keys import load_or_make_key
    from molora_fed.storage.values import count_cores, parse_options, parse_shard

    share = parse_shard(shard)
    options = parse_options(option) if option else None
    text = TextOptions(text_field, loss_on)
    choices = ask_training(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        validate_every=validate_every,
        accumulation=accumulation,
        checkpointing=checkpointing,
        reset_documents=reset_documents,
        launcher=launcher,
    )
    with reporting("loading the base") as progress:
        under = open_charter_and_base(
            cooperative,
            base_folder=base,
            compute=ask_compute(device, dtype),
            progress=progress,
        )
        check_choices(under, domain=domain, name=name, kind=kind)
        make_home(out)
        progress.phase("preparing the text")
        corpus = prepare_domain(
            under,
            domain,
            data or (),
            out,
            shard=share,
            text=text,
            options=parse_options(domain_option or ()),
            progress=progress,
        )
    show(*build_text_tables(corpus.report.files), build_corpus_table(corpus.report))
    with reporting("training") as progress:
        made = make_contribution(
            under,
            corpus,
            out,
            key=load_or_make_key(key or out / "key.pem"),
            name=name,
            kind=kind,
            options=options,
            choices=choices,
            seed=seed,
            threads=threads or count_cores(),
            on_warning=note,
            on_memory=lambda needed, free: note(
                f"Training needs about {format_bytes(needed)} of memory beside the base, "
                f"{format_bytes(free)} are free"
            ),
            progress=progress,
        )
    adapter, manifest = made.adapter, made.contribution.manifest
    print(
        f"Specialist '{manifest.contributor}' ({adapter.kind}): validation loss "
        f"{adapter.loss:.4f}, base {adapter.base_loss:.4f} nats per token; changes "
        f"{adapter.changed} of {adapter.modules} modules"
    )
    print("Nothing was sent. If you submit it, this is what goes:")
    width = int(under.base.model.config.hidden_size)
    show_outgoing(describe_outgoing(under.charter, get_plugins(), manifest=manifest, width=width))
    print(f"Contribution {made.contribution.id} in {made.contribution.folder}")
