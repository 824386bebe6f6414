"""`molora contribute`: a signed contribution of a checkpoint that was fine-tuned elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import build_corpus_table, build_text_tables, show
from molora_cli.progress import reporting
from molora_cli.shared_options import Device, Dtype, ask_compute


def contribute(
    cooperative: Annotated[
        Path, typer.Option(help="A cooperative's folder, or its cooperative.toml beside base/.")
    ],
    checkpoint: Annotated[
        Path, typer.Option(help="Folder of the fine-tuned Hugging Face checkpoint.")
    ],
    domain: Annotated[str, typer.Option(help="Domain it was fine-tuned on.")],
    data: Annotated[
        list[Path],
        typer.Option(help="Text of that domain that it was NOT trained on; repeatable."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for adapter, contribution and key.")],
    text_field: Annotated[
        str,
        typer.Option(help="Field of records that holds the text, e.g. post.body; found by name."),
    ] = "",
    kind: Annotated[
        str | None, typer.Option(help="Adapter kind; the charter's if not given.")
    ] = None,
    started_from: Annotated[
        Path | None,
        typer.Option(help="Folder of the checkpoint that the fine-tuning started from."),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Contributor's name; domain and start of the key if not given.")
    ] = "",
    key: Annotated[
        Path | None, typer.Option(help="Private key; made in the --out folder if not given.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base, if it is elsewhere.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Sign a contribution of a checkpoint fine-tuned elsewhere; nothing is sent."""
    from molora_fed.contributions.build import describe_outgoing
    from molora_fed.cooperative.checkpoints import import_checkpoint
    from molora_fed.cooperative.contribute import (
        MeasuredAdapter,
        check_choices,
        open_charter_and_base,
        prepare_domain,
        sign_adapter,
    )
    from molora_fed.corpus.records import TextOptions
    from molora_fed.reporting.summary import build_outgoing_table
    from molora_fed.storage.keys import load_or_make_key

    with reporting("loading the base") as progress:
        under = open_charter_and_base(
            cooperative, base_folder=base, compute=ask_compute(device, dtype)
        )
        check_choices(under, domain=domain, name=name, kind=kind)
        progress.phase("preparing the text")
        text = TextOptions(text_field)
        corpus = prepare_domain(under, domain, data, out, text=text, progress=progress)
        progress.phase("comparing the checkpoint with the base")
        imported = import_checkpoint(
            under.base,
            under.charter,
            corpus,
            checkpoint,
            out,
            kind=kind,
            started_from=started_from,
            progress=progress,
        )
        # What the checkpoint was trained on is not known here: no contamination is stated.
        contribution = sign_adapter(
            under,
            corpus,
            MeasuredAdapter.of_specialist(imported.specialist, imported.start_loss),
            out / "contribution",
            key=load_or_make_key(key or out / "key.pem"),
            name=name,
        )
    show(*build_text_tables(corpus.report.files), build_corpus_table(corpus.report))
    specialist, manifest = imported.specialist, contribution.manifest
    print(
        f"Specialist '{manifest.contributor}' ({specialist.kind}): validation loss "
        f"{specialist.loss:.4f}, checkpoint {imported.checkpoint_loss:.4f}, base "
        f"{specialist.base_loss:.4f} nats per token"
    )
    print("Nothing was sent. If you submit it, this is what goes:")
    show(build_outgoing_table(describe_outgoing(manifest)))
    print(f"Contribution {contribution.id} in {contribution.folder}")
