"""What deciding once costs in loss, on a real fused model; for bench/serve.py.

A text's first half is the prompt. Its second half is scored with teacher forcing: dense, where the
router decides at each token; with the gates it had after the prompt held; with the two experts of
the largest of these; with the one that `FusedCache.narrow` chooses, who predicted the prompt best
where the router reads evidence; and with all experts merged into one model by the gates after
the prompt, `FusedCache.merge`. The best expert in hindsight is the one with the smallest loss
on the scored half of a text: no choice of one expert is better. Its domain's expert is who was
trained on the text's domain. Texts are held-out, each of another document; those that change domain
begin with one document's half and go on with another's, so that experts are chosen at the last
token of the first.

The fused model is a demo's, or that of the first training of a study of fusions, whose specialists
are trained, its router the charter's default, fitted on the study's calibration blocks.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from molora_studies.framework.fusions import leave_out_baselines, open_fusion
from molora_studies.framework.registry import get_studies
from molora_studies.framework.results import plan_study
from molora_studies.framework.store import TaskStore
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.charter import FusionRules
from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.fusion.collapse import fit_guarded
from molora_fed.inference.fused_build import build_causal_lm, open_causal_lm
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.plugins import get_plugins
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_fed.storage.values import find_cache_folder
from molora_fed.types import Split

__all__ = [
    "BEST",
    "OWN_DOMAIN",
    "WAYS",
    "collect_texts",
    "continue_texts",
    "measure_quality",
    "open_demo",
    "open_study",
    "resample_mean",
]

BEST = "best expert in hindsight"
OWN_DOMAIN = "its domain's expert"
_RESAMPLES = 2_000
_BATCH = 8
_SEED = 42
WAYS: dict[str, Callable[[Any], None]] = {
    "dense": lambda cache: None,
    "gates held": lambda cache: cache.hold(),
    "two experts": lambda cache: cache.narrow(2),
    "one expert": lambda cache: cache.narrow(1),
    "merged": lambda cache: cache.merge(),
}


def open_demo(demo: Path) -> tuple[FusedForCausalLM, list[Blocks]]:
    """The fused model of a demo, and its contributors' held-out blocks.

    Args:
        demo: A folder of a demo, with `cooperative` and `contributors`.
    """
    files = sorted((demo / "contributors").glob("*/corpus/held-out.safetensors"))
    model = open_causal_lm(demo / "cooperative", kinds=("fused",))
    return model, [load_blocks(file) for file in files]


def open_study(name: str) -> tuple[FusedForCausalLM, list[Blocks]]:
    """The first fusion of a study, with the charter's default router; its held-out blocks.

    Args:
        name: A study with fusions by probability mixture, the first one's specialists trained.
    """
    planned = plan_study(name, get_studies().registry, find_cache_folder())
    task = next(cell.task for cell in planned.cells if cell.task.action == "fuse-members")
    store = TaskStore.in_cache(planned.cache)
    alone, needs = leave_out_baselines(task)
    fusion = open_fusion(alone, [store.read(need)[0] for need in needs], store.folder(task))
    chosen = FusionRules().router
    router = get_plugins().routers.resolve(chosen)
    options = router.Options()
    bank = fusion.build_calibration_bank(router.reads(options))
    fitted = fit_guarded(router, bank, options, fusion.settings.seed).router
    experts = tuple(
        FusedExpert(expert.name, expert.load(), fusion.own_domain.get(expert.name))
        for expert in fusion.list_experts()
    )
    mixture, depth = fusion.settings.mixture, fusion.frozen_depth
    fused = FusedModel(fusion.base, experts, fitted, chosen, mixture, depth)
    return build_causal_lm(fused), [corpus.blocks[Split.HELD_OUT] for corpus in fusion.corpora]


def collect_texts(held_out: Sequence[Blocks], most: int) -> dict[str, Tensor]:
    """The first tokens of held-out documents, one a cluster of near-duplicates.

    Args:
        held_out: Whole splits, one a domain.
        most: Documents of a domain at most.

    Returns:
        Token ids by domain, (n, T) int64: T of a block, documents at least as long, n the same for
        all domains.
    """
    texts = {}
    for part in held_out:
        blocks = part.in_text_order()
        if blocks is None:
            raise SystemExit(f"Cannot use '{part.domain}': expected a whole split, got a sample.")
        tokens, owners = blocks.tokens.reshape(-1), blocks.documents.reshape(-1)
        size = blocks.block_size
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        starts = starts[starts + size <= len(tokens)]
        starts = starts[owners[starts] == owners[starts + size - 1]]
        _, first = np.unique(blocks.clusters.reshape(-1)[starts], return_index=True)
        chosen = starts[np.sort(first)][:most]
        rows = tokens[chosen[:, None] + np.arange(size)]
        texts[blocks.domain] = torch.from_numpy(rows).long()
    count = min(map(len, texts.values()))
    return {domain: tokens[:count] for domain, tokens in texts.items()}


def splice_texts(texts: Mapping[str, Tensor]) -> Tensor:
    """Texts (n, T) whose first half is of one domain and whose second half is of another.

    Each document begins one text and ends one; all pairs of domains occur as often, but for one.
    """
    pairs = list(permutations(texts, 2))
    half = next(iter(texts.values())).shape[1] // 2
    spliced, used = [], {domain: [0, 0] for domain in texts}
    count = min(map(len, texts.values()))
    for turn in range(count * len(texts)):
        one, other = pairs[turn % len(pairs)]
        begin, end = used[one][0], used[other][1]
        if begin >= count or end >= count:
            continue
        spliced.append(torch.cat([texts[one][begin, :half], texts[other][end, half:]]))
        used[one][0] += 1
        used[other][1] += 1
    return torch.stack(spliced)


@torch.no_grad()
def continue_texts(
    model: Any, texts: Tensor, ways: Mapping[str, Callable[[Any], None]], gates: Tensor | None
) -> dict[str, Tensor]:
    """Mean loss of each text's second half by way, (n,) nats a token.

    Args:
        model: A fused model.
        texts: Token ids, (n, T).
        ways: Each is told a cache after the prompt, which all of them share.
        gates: Gates in place of the router's, (E,); None for the router's.
    """
    half = texts.shape[1] // 2
    losses: dict[str, list[Tensor]] = {way: [] for way in ways}
    for part in texts.split(_BATCH):
        read = model.make_cache()
        fixed = {} if gates is None else {"gates": gates.expand(len(part), -1)}
        first = model(part[:, :half], past_key_values=read, logits_to_keep=1, **fixed).logits
        for way, decide in ways.items():
            cache = copy.deepcopy(read)
            decide(cache)
            rest = model(part[:, half:-1], past_key_values=cache, **fixed).logits
            logprob = torch.cat([first, rest], dim=1)
            found = logprob.gather(-1, part[:, half:].unsqueeze(-1)).squeeze(-1)
            losses[way].append(-found.mean(1))
    return {way: torch.cat(parts) for way, parts in losses.items()}


def resample_mean(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of independent values and its 95 % percentile interval by the bootstrap."""
    generator = np.random.default_rng(_SEED)
    draws = generator.integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def _measure_ways(
    model: FusedForCausalLM, texts: Tensor, own: int | None
) -> dict[str, NDArray[np.float64]]:
    """Losses (n,) by way on texts (n, T); `own` is the expert of their domain, if they have one."""
    texts = texts.to(model.device)
    found = continue_texts(model, texts, WAYS, None)
    alone, dense = torch.eye(len(model.expert_names), device=model.device), {"dense": WAYS["dense"]}
    each = torch.stack([continue_texts(model, texts, dense, g)["dense"] for g in alone])  # (E, n)
    found[BEST] = each.amin(0)
    if own is not None:
        found[OWN_DOMAIN] = each[own]
    print(".", end="", flush=True)
    return {way: losses.double().cpu().numpy() for way, losses in found.items()}


def measure_quality(
    model: FusedForCausalLM, held_out: Sequence[Blocks], most: int
) -> dict[str, Any]:
    """Losses of every way on texts of one domain and on texts that change it.

    Args:
        model: A fused model.
        held_out: Whole held-out splits of the domains it was trained on.
        most: Texts of a domain at most.
    """
    texts = collect_texts(held_out, most)
    trained_on = [expert["domain"] for expert in model.config.experts]
    found = {
        f"one domain: {domain}": _measure_ways(model, tokens, trained_on.index(domain))
        for domain, tokens in texts.items()
    }
    each = list(found.values())
    whole = {way: np.concatenate([one[way] for one in each]) for way in each[0]}
    found = {**found, "one domain, all": whole}
    found["changing domain"] = _measure_ways(model, splice_texts(texts), None)
    rows: dict[str, Any] = {}
    for kind, losses in found.items():
        rows[kind] = {
            way: {
                "loss": resample_mean(one),
                "above_dense": resample_mean(one - losses["dense"]),
            }
            for way, one in losses.items()
        }
        rows[kind]["texts"] = len(losses["dense"])
    return {
        "experts": len(model.expert_names),
        "router": (model.config.router or {}).get("name"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": next(iter(texts.values())).shape[1],
        "rows": rows,
    }
