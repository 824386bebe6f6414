"""A router that learns of adapters alone, as a stranger would write it.

Source: Arrow, arXiv 2405.11157, on the state that enters block K.
"""

import torch

from molora_fed import OutputRouter, RouterOptions, hookimpl
from molora_fed.adapters import decompose_update
from molora_fed.models.block_input import InputNorm
from molora_fed.routing.summed import NoRounds


class ArrowOptions(RouterOptions):
    """How sharp gates are."""

    sharpness: float = 1.0


class ArrowRouter(OutputRouter[ArrowOptions]):
    """Experts by how well a state lies along the first direction that their adapter reads."""

    name = "arrow-like"
    readings = frozenset({"prefix_hidden"})

    @classmethod
    def shapes(cls, num_experts, options):
        """M modules read the state; the norm's form is its epsilon, and whether it is centred."""
        return {
            "directions": (num_experts, "M", "D"), "weight": ("D",), "bias": ("D",), "form": (2,),
        }  # fmt: skip

    @classmethod
    def learn(cls, bank, options, seed, progress):
        """Of pooled text nothing is read."""
        return cls(bank.num_experts, options, read_directions(bank.adapters))

    @classmethod
    def by_sums(cls, setting):
        """It ends before the first round."""
        return NoRounds(setting, setting.options, read_directions(setting.adapters))

    @classmethod
    def from_statistics(cls, statistics, setting):
        """Nor are statistics read."""
        return cls(setting.num_experts, setting.options, read_directions(setting.adapters))

    def scores(self, view):
        """The mean over modules of |<direction, what the module reads>|, (B, T, E)."""
        norm = InputNorm(self.weight, self.bias, float(self.form[0]), bool(self.form[1]))
        read = norm(view.prefix_hidden)
        along = torch.einsum("btd,emd->btem", read, self.directions.to(read.device)).abs()
        return self.options.sharpness * along.mean(-1)


def read_directions(adapters):
    """First right singular vector of each expert's change of each module, zeros where none is."""
    entry = adapters.entry
    found = []
    for adapter in adapters.values():
        updates = {} if adapter is None else adapter.updates
        found.append(
            torch.stack([
                decompose_update(updates[name]).vh[0]
                if name in updates
                else torch.zeros_like(entry.norm.weight)
                for name in entry.modules
            ])
        )  # fmt: skip
    norm = entry.norm
    form = torch.tensor([norm.epsilon, float(norm.is_centred)])
    return {
        "directions": torch.stack(found), "weight": norm.weight, "bias": norm.bias, "form": form,
    }  # fmt: skip


class Meddler(ArrowRouter):
    """Scales an adapter that it was handed."""

    name = "meddler"

    @classmethod
    def learn(cls, bank, options, seed, progress):
        """Changes what is published, if it could."""
        adapter = next(each for each in bank.adapters.values() if each is not None)
        next(iter(adapter.updates.values())).tensors().popitem()[1].mul_(100)
        return super().learn(bank, options, seed, progress)


@hookimpl
def register_routers(register):
    """Register both."""
    for router in (ArrowRouter, Meddler):
        register(router.name, router, summary="A router for tests", source="arXiv 2405.11157")
