"""The commands that come with `molora`, registered through the hook that plugins use.

Targets are imported when a command is invoked; `molora --help` prints the summaries.
"""

from molora_fed import hookimpl
from molora_fed.hookspecs import Register

__all__ = ["OWN", "register_commands"]

OWN = (
    ("demo", "demo:demo", "Run a whole cooperative on this machine, from training to the report"),
    ("serve", "serve:serve", "Serve a cooperative until Ctrl-C"),
    ("join", "join:join", "Train on your text, submit the adapter, receive the fused model"),
    ("train", "train:train", "Train a specialist and sign a contribution; nothing is sent"),
    (
        "contribute",
        "contribute:contribute",
        "Sign a contribution of a checkpoint trained elsewhere",
    ),
    ("fuse", "fuse:fuse", "Admit contributions and fuse them into one model, with a report"),
    ("evaluate", "evaluate:evaluate", "Measure base, specialists and the model on your own text"),
    ("generate", "generate:generate", "Continue a text with a fused or an evolved model"),
    ("report", "report:report", "Draw the page and figures of a fusion or an evolution again"),
    ("coop", "coop:app", "Create, inspect and amend cooperatives"),
    ("evolve", "evolve:app", "Evolve a population of adapters"),
    ("forecast", "forecast:app", "Forecast what fusing will be worth, before it is done"),
    ("trace", "trace:app", "Look at decision traces and check them"),
    ("cascade", "cascade:app", "Answer tasks: probe cheaply, escalate where samples disagree"),
    ("plugins", "plugins:app", "List and check what plugins register"),
)
"""Name, target in this package, summary; in the order of the help."""


@hookimpl
def register_commands(register: Register) -> None:
    """Register the commands of this package."""
    for name, target, summary in OWN:
        register(name, f"molora_cli.{target}", summary=summary, source="own definition")
