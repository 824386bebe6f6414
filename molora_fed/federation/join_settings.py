"""What a contributor joins with: checked before anything is started, then kept in its home."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora_fed.charter import load_charter
from molora_fed.errors import CharterError, ConfigError, FederationError
from molora_fed.federation.mailbox import read_json
from molora_fed.population.asked import begin_anew
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import make_home, write_json
from molora_fed.storage.keys import build_public_pem, key_fingerprint, load_or_make_key
from molora_fed.storage.names import check_name
from molora_fed.training.choices import TrainingChoices
from molora_fed.types import LossOn

if TYPE_CHECKING:
    from molora_fed.corpus.records import TextOptions
    from molora_fed.federation.homes import ContributorHome

__all__ = ["JoinSettings", "prepare_home"]


@dataclass(frozen=True)
class JoinSettings:
    """What a contributor joins with; kept in its home, read by the worker and the ClientApp.

    Attributes:
        name: Contributor's name, unique in the cooperative; lower-case letters, digits and dashes.
            Empty takes domain and start of the key.
        domain: Domain it trains on.
        data: Files and folders of text; empty takes the registered domain of that name.
        adapter: Folder of an adapter trained earlier; None trains one.
        shard: (i, n): share i of n of the domain's documents, if n contributors split it.
        base: The contributor's own copy of the base: a folder, a GGUF file, or "ID@REVISION" on the
            Hub. Empty has the server send it.
        threads: Threads of training; kept in the training record.
        text_field: Field of records that holds the text; empty finds it by name.
        loss_on: Tokens that count in the training loss: "all" or "assistant".
        compute: Where models are to run, and in which dtype; the home's settings where it says
            nothing.
        training: What it trains otherwise than the charter says.
        domain_options: Options of the registered domain.
    """

    name: str
    domain: str
    data: tuple[Path, ...] = ()
    adapter: Path | None = None
    shard: tuple[int, int] = (0, 1)
    base: str = ""
    threads: int = 1
    text_field: str = ""
    loss_on: LossOn = "all"
    compute: Compute = field(default_factory=Compute)
    training: TrainingChoices = field(default_factory=TrainingChoices)
    domain_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> "TextOptions":
        """How the text is read.

        Raises:
            ConfigError: If `loss_on` is another word.
        """
        from molora_fed.corpus.records import TextOptions

        return TextOptions(self.text_field, self.loss_on)

    def check(self) -> None:
        """Look at names, text and adapter as far as that takes no time.

        Raises:
            ConfigError: If a name is malformed or reserved, there is no adapter where one is said
                to be, no such launcher, or the domain does not know its options.
            AdapterError: If the adapter cannot be used, as far as its config and headers tell.
            CorpusError: If there is no readable text at the paths.
            UnknownNameError: If there are no paths, and nobody registers the domain.
        """
        check_name("domain", self.domain)
        # Without a name of its own, the one to come: see `prepare_home`.
        check_name("name", self.name or f"{self.domain}-123456")
        from molora_fed.corpus.documents import check_domain_options, open_domain, read_documents

        check_domain_options(self.domain, self.data, self.domain_options)
        if self.data:
            # To the end where only answers count: whether there are any is known only there.
            documents = read_documents(self.data, self.text)
            next(documents) if self.loss_on == "all" else deque(documents, maxlen=0)
        else:
            from molora_fed.plugins import get_plugins

            open_domain(self.domain, get_plugins(), self.domain_options)
        self.check_adapter()
        self.training.split_launcher()

    def check_adapter(self) -> None:
        """Look at config and headers of the adapter, if there is one.

        Raises:
            ConfigError: If there is no folder.
            AdapterError: If it cannot be used, as far as its config and headers tell.
        """
        if self.adapter and not self.adapter.is_dir():
            raise ConfigError(
                f"Cannot join with adapter '{self.adapter}': expected a folder, got nothing "
                "there. Check the path."
            )
        if self.adapter:
            from molora_fed.adapters.inspection import inspect_folder

            inner = self.adapter / "adapter"
            inspect_folder(
                inner if inner.is_dir() else self.adapter, has_base=True, name=str(self.adapter)
            )

    def to_json(self) -> dict[str, Any]:
        """Content of `join.json`, with absolute paths.

        What is as usual is left out: a training in flight is known by a hash over these values.
        """
        chosen = {
            "base": self.base,
            "compute": self.compute.model_dump(exclude_defaults=True),
            "training": self.training.model_dump(exclude_defaults=True),
            "text_field": self.text_field,
            "loss_on": "" if self.loss_on == "all" else self.loss_on,
            "domain_options": dict(self.domain_options),
        }
        return {
            "name": self.name,
            "domain": self.domain,
            "data": [_make_absolute(path) for path in self.data],
            "adapter": str(self.adapter.absolute()) if self.adapter else "",
            "shard": list(self.shard),
            "threads": self.threads,
            **{name: value for name, value in chosen.items() if value},
        }

    def save(self, path: Path) -> None:
        """Write the settings, whole or not at all.

        Raises:
            StorageError: On I/O errors.
        """
        write_json(path, self.to_json())

    @classmethod
    def from_json(cls, value: Any) -> "JoinSettings":
        """Read what `save` wrote.

        Raises:
            FederationError: If it is missing or malformed.
        """
        try:
            index, count = value["shard"]
            return cls(
                name=str(value["name"]),
                domain=str(value["domain"]),
                data=tuple(Path(str(path)) for path in value["data"]),
                adapter=Path(str(value["adapter"])) if value["adapter"] else None,
                shard=(int(index), int(count)),
                threads=int(value["threads"]),
                base=str(value.get("base", "")),
                # Homes of earlier versions say nothing of these.
                compute=Compute.model_validate(value.get("compute", {})),
                training=TrainingChoices.model_validate(value.get("training", {})),
                # Missing in homes from before there were these.
                text_field=str(value.get("text_field", "")),
                loss_on=value.get("loss_on", "all"),
                domain_options=dict(value.get("domain_options", {})),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FederationError(
                f"Cannot read the settings of a contributor: expected join.json as written by "
                f"`molora join`, got {error!r}. Run `molora join` again."
            ) from error


def _make_absolute(path: Path) -> str:
    from molora_fed.corpus.documents import is_data_set

    return str(path if is_data_set(path) else path.absolute())


def prepare_home(home: "ContributorHome", settings: JoinSettings) -> JoinSettings:
    """Make a home ready for its worker and its ClientApp: key, settings, no earlier messages.

    Args:
        home: The contributor's home; nothing is written there before the settings are checked.
        settings: What to join with.

    Returns:
        The settings with a name.

    Raises:
        ConfigError: If the home belongs to another domain, or as `JoinSettings.check` says.
        SignatureError: If the key cannot be used.
        MoloraError: What `JoinSettings.check` raises; a StorageError on I/O errors.
    """
    settings.check()
    _check_first_domain(home, settings)
    make_home(home.root)
    key = load_or_make_key(home.key)
    load_or_make_key(home.node_key)
    if not settings.name:
        fingerprint = key_fingerprint(build_public_pem(key))
        settings = replace(settings, name=f"{settings.domain}-{fingerprint[:6]}")
    settings.save(home.settings_file)
    home.board.prepare()
    home.busy.prepare()
    # A question that was refused is looked at anew: this side may run another version by now.
    for old in (home.refusal_letter, home.error_file, home.state_file, home.refused_file):
        old.unlink(missing_ok=True)
    decision = home.read_acknowledgement()
    if decision is not None and decision.state != "ADMITTED":
        home.acknowledgement_letter.unlink()  # it may be released by now: the server says it again
    if home.result_letter.exists():
        # The server says again what is published, or asks: there may be more members by now.
        if _is_private(home):
            begin_anew(home.private)
        home.result_letter.unlink()
    return home.read_settings()


def _check_first_domain(home: "ContributorHome", settings: JoinSettings) -> None:
    earlier = read_json(home.settings_file)
    if earlier is None:
        return
    domain = JoinSettings.from_json(earlier).domain
    if domain != settings.domain:
        raise ConfigError(
            f"Cannot join in '{home.root}': expected domain '{domain}' as at the first join, got "
            f"'{settings.domain}'. Use another --home for another domain."
        )


def _is_private(home: "ContributorHome") -> bool:
    """Whether the charter of an earlier join says that texts stay where they are."""
    try:
        return load_charter(home.charter).is_private
    except CharterError:
        return False  # the first join
