"""The commands that come with `molora`, registered through the hook that plugins use.

Targets are imported when a command is invoked; `molora --help` prints the summaries.
"""

from molora_fed import hookimpl
from molora_fed.hookspecs import Register

__all__ = ["GROUPS", "OWN", "register_commands"]

GROUPS = {
    "Newcomer": (
        ("demo", "demo:demo", "Run a whole cooperative on this machine, training to report"),
    ),
    "Contributor": (
        ("join", "join:join", "Train on your text, submit the adapter, receive the fused model"),
        ("text", "text:app", "Look at what is read of text files, and what is left out"),
        ("train", "train:train", "Train a specialist and sign a contribution; nothing is sent"),
        (
            "contribute",
            "contribute:contribute",
            "Sign a contribution of a checkpoint or an adapter made elsewhere",
        ),
        ("adapter", "adapter:app", "Check or convert an adapter that another program made"),
    ),
    "Coordinator": (
        ("coop", "coop:app", "Create, inspect and amend cooperatives"),
        ("serve", "serve:serve", "Serve a cooperative until Ctrl-C"),
        ("forecast", "forecast:app", "Forecast what fusing will be worth, before it is done"),
        ("fuse", "fuse:fuse", "Admit contributions and fuse them into one model, with a report"),
        ("evolve", "evolve:app", "Evolve a population of adapters"),
        ("report", "report:report", "Draw the page and figures of a fusion or an evolution again"),
    ),
    "Contributor and coordinator": (
        ("status", "status:status", "Show where a cooperative or a contributor stands"),
        ("doctor", "doctor:doctor", "Look for what is wrong on this machine, one line a problem"),
    ),
    "User of the result": (
        ("generate", "generate:generate", "Continue a text with a fused or an evolved model"),
        ("chat", "chat:chat", "Talk with a model in the terminal"),
        ("api", "api:api", "Serve a model and its members as an API like OpenAI's"),
        ("export", "export:export", "Write a model for PEFT, transformers or llama.cpp"),
        ("evaluate", "evaluate:evaluate", "Measure base, specialists and the model on your text"),
        (
            "cascade",
            "cascade:app",
            "Answer tasks: one model first, more where its samples differ",
        ),
        ("trace", "trace:app", "Look at decision traces and check them"),
    ),
    "Researcher and plugin author": (
        ("plugins", "plugins:app", "List, show, check and disable plugins"),
    ),
}
"""Name, target in this package and summary of each command, by who uses it, in the help's order;
commands of plugins are listed in the last group."""

OWN = tuple(command for group in GROUPS.values() for command in group)


@hookimpl
def register_commands(register: Register) -> None:
    """Register the commands of this package."""
    for name, target, summary in OWN:
        register(name, f"molora_cli.{target}", summary=summary, source="own definition")
