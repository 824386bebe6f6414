"""`molora chat`: talk with a model in the terminal, or through a pipe."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molora_cli.output import note
from molora_cli.progress import reporting
from molora_cli.shared_options import Device, Dtype, Experts, ask_compute, ask_experts
from molora_fed.errors import MoloraError
from molora_fed.storage.untrusted import clean_lines

if TYPE_CHECKING:
    from molora_fed.serving.chat import Chat

_COMMANDS = "/reset forgets, /gates shows the last answer's, /model NAME chooses, /quit ends"


def chat(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a fused or evolved model, a specialist or a base.")
    ],
    model: Annotated[
        str, typer.Option(help="Who answers: the whole model if not given, a specialist, base.")
    ] = "",
    system: Annotated[str, typer.Option(help="What the model is told before the chat.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Keep tokens up to this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling; each answer has its own.")] = 0,
    experts: Experts = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base, if it is elsewhere.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Talk with a model; Ctrl-C stops an answer, twice ends."""
    from molora_fed.serving.chat import Chat
    from molora_fed.serving.models import open_served

    who_goes_on = ask_experts(experts)
    with reporting("loading the model", transient=True):
        opened = open_served(folder, base_folder=base, compute=ask_compute(device, dtype))
    talk = Chat(
        opened,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        experts_per_text=who_goes_on,
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if model:
            talk.choose(model)
        _Terminal(talk).run()
    finally:
        signal.signal(signal.SIGINT, before)
        talk.close()


class _Terminal:
    """Reads lines, and shows answers while they are written."""

    def __init__(self, talk: "Chat") -> None:
        from rich.console import Console

        self._talk = talk
        self._is_terminal = sys.stdin.isatty()
        # No markup: models write what they like, and others name them.
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

    def run(self) -> None:
        """Until /quit, the end of input, or Ctrl-C twice.

        Raises:
            typer.Exit: After Ctrl-C twice, with its exit code.
        """
        if self._is_terminal:
            import readline  # noqa: F401 - gives `input` its history

            kind = "" if self._talk.has_template else "; no chat template: your text is continued"
            note(f"{self._talk.name}{kind}. {_COMMANDS}.")
        was_pressed = False
        while True:
            try:
                line = self._read()
                if line is None:
                    return
                was_pressed = False
                if not self._obey(line):
                    return
            except KeyboardInterrupt:
                print(flush=True)
                if was_pressed:
                    raise typer.Exit(128 + signal.SIGINT) from None
                was_pressed = True
                note("stopped; Ctrl-C again ends")

    def _read(self) -> str | None:
        """The next line that is not empty; None at the end of input."""
        while True:
            try:
                line = input("> " if self._is_terminal else "")
            except EOFError:
                return None
            if line.strip():
                return line

    def _obey(self, line: str) -> bool:
        """Do what a line says; False ends."""
        command, _, rest = line.strip().partition(" ")
        match command:
            case "/quit":
                return False
            case "/reset":
                self._talk.reset()
                note("forgotten")
            case "/gates":
                self._show_gates()
            case "/model":
                self._choose(rest.strip())
            case _ if command.startswith("/"):
                note(f"unknown command; {_COMMANDS}")
            case _:
                self._answer(line)
        return True

    def _choose(self, name: str) -> None:
        try:
            if name:
                self._talk.choose(name)
            note(f"{self._talk.name} answers; there are {', '.join(self._talk.names)}")
        except MoloraError as error:
            note(str(error))

    def _show_gates(self) -> None:
        gates = sorted(self._talk.gates.items(), key=lambda item: -item[1])
        for name, gate in gates:
            self._console.print(f"{name:<20} {gate:.2f} {'█' * round(30 * gate)}")
        if not gates:
            note("no answer yet")

    def _answer(self, line: str) -> None:
        pieces = self._talk.answer(line)
        try:
            for piece in pieces:
                # A terminal obeys what it is shown; a pipe takes every character as it is.
                shown = clean_lines(piece) if self._console.is_terminal else piece
                print(shown, end="", flush=True)
        except (MoloraError, RuntimeError) as error:
            note(str(error))
        finally:
            pieces.close()
        print(flush=True)
        if self._talk.forgotten:
            note(f"the first {self._talk.forgotten} turns no longer fit and were left out")
