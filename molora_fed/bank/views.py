"""What routers may look at: a view at position t holds only what is known after token x_t."""

from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor

__all__ = [
    "GateReading",
    "GateView",
    "RouterView",
]


@dataclass(frozen=True)
class RouterView:
    """What a router may look at; columns it does not read are None.

    Attributes:
        document_starts: True at a document's first token, (B, T) bool. State kept over a
            document (running means, accumulated evidence) is reset there.
        base_hidden: The base's hidden state that enters the output head, (B, T, D).
        prefix_hidden: What enters decoder block K, K the charter's frozen depth, before that
            block's own norm: the same for all experts, none of which changes an earlier block;
            (B, T, D). `adapters.entry` of a bank or a `FitSetting` says through which norm it goes
            into which linear layers (`molora_fed.models.block_input.BlockInput`).
        mean_hidden: Experts' average of the state that enters the head, (B, T, D).
        experts_hidden: The same of every expert, (B, T, E, D).
        evidence: `log p_e(x_t | x_<t)` in nats, (B, T, E); 0 at a document's first token.
    """

    document_starts: Tensor
    base_hidden: Tensor | None = None
    prefix_hidden: Tensor | None = None
    mean_hidden: Tensor | None = None
    experts_hidden: Tensor | None = None
    evidence: Tensor | None = None

    def at(self, start: int, stop: int) -> "RouterView":
        """The view of positions start to stop, (B, stop - start, ...)."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return RouterView(**{n: c if c is None else c[:, start:stop] for n, c in columns.items()})


GateReading = Literal["base_hidden", "embeddings"]
"""What an adapter router may read: the base's final states (causal), or its token embeddings."""


@dataclass(frozen=True)
class GateView:
    """What an adapter router may look at; columns it does not read are None.

    Attributes:
        document_starts: True at a document's first token, (B, T) bool.
        base_hidden: The base's state that enters the output head, (B, T, D).
        embeddings: The base's token embeddings, (B, T, D).
    """

    document_starts: Tensor
    base_hidden: Tensor | None = None
    embeddings: Tensor | None = None
