"""Where models are to run, as people ask for it: options of a command, settings of a home.

What a machine has is decided in `molora_fed.models.runtime`; here nothing imports torch.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from molora_fed.errors import ComputeError
from molora_fed.storage.settings import StrictModel, describe_offenders
from molora_fed.storage.toml import parse_toml

__all__ = ["SETTINGS_FILE", "Compute", "read_compute"]

SETTINGS_FILE = "settings.toml"
MAX_SETTINGS_BYTES = 64 * 1024


class Compute(StrictModel):
    """The device and the dtype that someone asks for: `[compute]` of a home.

    Attributes:
        device: "cpu", "cuda", "cuda:1", or "auto": an accelerator where there is one.
        dtype: "float32", "bfloat16", or "auto": the dtype that losses are reported in.
    """

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @staticmethod
    def parse(device: str | None, dtype: str | None) -> "Compute":
        """What the options of a command ask for; None asks for nothing.

        Raises:
            ComputeError: If a value is unknown.
        """
        given = {"device": device, "dtype": dtype}
        return _validate({k: v for k, v in given.items() if v is not None}, "Cannot compute")

    def over(self, other: "Compute") -> "Compute":
        """These settings, and another's where these say "auto"."""
        mine = {key: value for key, value in self.model_dump().items() if value != "auto"}
        return other.model_copy(update=mine)


def _validate(values: Any, what: str) -> Compute:
    try:
        return Compute.model_validate(values)
    except ValidationError as error:
        raise ComputeError(
            f"{what}: expected device auto, cpu, cuda or cuda:N and dtype auto, float32 or "
            f"bfloat16, got {describe_offenders(error, with_values=True)}. Correct these."
        ) from error


def read_compute(home: Path, asked: Compute | None = None) -> Compute:
    """What is asked for, and where nothing is, what `[compute]` in a home's settings says.

    Args:
        home: A coordinator's or a contributor's home; `settings.toml` may be missing.
        asked: What the command was told.

    Raises:
        ComputeError: If the settings cannot be read.
    """
    asked = asked or Compute()
    path = home / SETTINGS_FILE
    what = f"Cannot read settings '{path}'"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SETTINGS_BYTES + 1).decode()
        content = parse_toml(text, max_bytes=MAX_SETTINGS_BYTES)
        if unknown := sorted(content.keys() - {"compute"}):
            raise ValueError(", ".join(unknown)[:80])
    except FileNotFoundError:
        return asked
    except (OSError, ValueError) as error:
        got = error.strerror if isinstance(error, OSError) else error
        raise ComputeError(
            f"{what}: expected TOML with a table [compute], got {got}. Correct or delete it."
        ) from error
    return asked.over(_validate(content.get("compute", {}), what))
