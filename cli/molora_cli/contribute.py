"""`molora contribute`: a signed contribution of a checkpoint or an adapter made elsewhere."""

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
from molora_cli.shared_options import Device, Dtype, TextField, ask_compute


def contribute(
    cooperative: Annotated[
        Path, typer.Option(help="A cooperative's folder, or its cooperative.toml beside base/.")
    ],
    domain: Annotated[str, typer.Option(help="Domain it was fine-tuned on.")],
    data: Annotated[
        list[Path],
        typer.Option(help="Text of that domain that it was NOT trained on; repeatable."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for adapter, contribution and key.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a fine-tuned Hugging Face checkpoint.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter, e.g. as PEFT saved it.")
    ] = None,
    text_field: TextField = "",
    kind: Annotated[
        str | None, typer.Option(help="Adapter kind of a checkpoint; the charter's if not given.")
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
    """Sign a contribution of a checkpoint or an adapter made elsewhere; nothing is sent."""
    from molora_fed.adapters.inspection import report_on_base
    from molora_fed.contributions.carried import check_makers
    from molora_fed.cooperative.chat_tokens import find_chat_warnings
    from molora_fed.cooperative.checkpoints import import_checkpoint
    from molora_fed.cooperative.contribute import (
        check_choices,
        open_charter_and_base,
        prepare_domain,
        sign_adapter,
    )
    from molora_fed.cooperative.measured_adapter import MeasuredAdapter, measure_given
    from molora_fed.cooperative.outgoing import describe_outgoing
    from molora_fed.corpus.records import TextOptions
    from molora_fed.errors import ConfigError
    from molora_fed.plugins import get_plugins
    from molora_fed.storage.keys import load_or_make_key

    if (checkpoint is None) == (adapter is None):
        raise ConfigError(
            "Cannot build a contribution: expected --checkpoint or --adapter, got "
            f"{'neither' if adapter is None else 'both'}. Pass one of them."
        )
    if adapter is not None and (kind or started_from):
        raise ConfigError(
            "Cannot build a contribution of an adapter: expected no --kind and no --started-from, "
            "which are for checkpoints, got one. Leave it out."
        )
    made_of = ""
    with reporting("loading the base") as progress:
        under = open_charter_and_base(
            cooperative,
            base_folder=base,
            compute=ask_compute(device, dtype),
            progress=progress,
        )
        check_choices(under, domain=domain, name=name, kind=kind)
        check_makers(under.charter, get_plugins())
        if adapter is not None:  # takes seconds: before the text
            inner = adapter / "adapter"
            report_on_base(
                inner if inner.is_dir() else adapter,
                under.base.model,
                tokenizer=under.base.tokenizer,
                name=str(adapter),
            )
        progress.phase("preparing the text")
        text = TextOptions(text_field)
        corpus = prepare_domain(under, domain, data, out, text=text, progress=progress)
        if adapter is not None:
            for warning in find_chat_warnings(under.base, adapter):
                note(warning)
            progress.phase("measuring the adapter")
            measured = measure_given(under, corpus, adapter, out, progress=progress)
        elif checkpoint is not None:
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
            measured = MeasuredAdapter.of_specialist(imported.specialist, imported.start_loss)
            made_of = f"checkpoint {imported.checkpoint_loss:.4f}"
        # What it was trained on is not known here: no contamination is stated.
        contribution = sign_adapter(
            under,
            corpus,
            measured,
            out / "contribution",
            key=load_or_make_key(key or out / "key.pem"),
            name=name,
        )
    show(*build_text_tables(corpus.report.files), build_corpus_table(corpus.report))
    manifest = contribution.manifest
    others = [made_of] if checkpoint is not None else []
    losses = ", ".join(
        [f"validation loss {measured.loss:.4f}", *others, f"base {measured.base_loss:.4f}"]
    )
    print(f"Specialist '{manifest.contributor}' ({measured.kind}): {losses} nats per token")
    if measured.changed is not None:
        gain = measured.loss - measured.base_loss
        print(
            f"Changes {measured.changed} of {measured.modules} modules; on your text {gain:+.4f} "
            "nats per token against the base"
        )
    print("Nothing was sent. If you submit it, this is what goes:")
    width = int(under.base.model.config.hidden_size)
    show_outgoing(describe_outgoing(under.charter, get_plugins(), manifest=manifest, width=width))
    print(f"Contribution {contribution.id} in {contribution.folder}")
