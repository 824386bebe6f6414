"""`molora text`: what would be read of files, before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer

from molora_cli.output import build_text_tables, show
from molora_cli.shared_options import CountedTokens, TextField

app = typer.Typer(help="Look at text.", no_args_is_help=True, rich_markup_mode=None)

_SHOWN_CHARACTERS = 400


@app.callback()
def _group() -> None:
    """Look at text."""


@app.command("check")
def check(
    paths: Annotated[list[Path], typer.Argument(help="Text files, folders or datasets:ID.")],
    text_field: TextField = "",
    loss_on: CountedTokens = "all",
) -> None:
    """Show what is read of files and what is left out, and how the first document begins.

    Chats are shown plainly; in training the base's template writes them.
    """
    from molora_fed.corpus.documents import read_documents
    from molora_fed.corpus.inventory import Inventory
    from molora_fed.corpus.records import TextOptions
    from molora_fed.storage.untrusted import clean_lines

    inventory = Inventory()
    documents = read_documents(paths, TextOptions(text_field, loss_on), inventory=inventory)
    first = next(documents)
    for _ in documents:
        pass  # counted as they come
    show(*build_text_tables(inventory.to_json()))
    begins = clean_lines(first.text[:_SHOWN_CHARACTERS])
    print(f"{clean_lines(first.name)} begins:\n{begins}")
