"""What growing and shrinking cost: fuse three, add one, remove one, each against from nothing.

`python bench/growth.py --out FILE.json [--contributors 3] [--routers evidence,linear]`

The base is a random GPT-NeoX of the built-in base's size, blocks are random tokens, adapters change
next to nothing: only cost is measured. Passes are counted in blocks of 128 tokens that a model ran
over to make bank columns; the weight average, a row of the report and no expert, is counted apart.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from molora_fed.adapters.files import hash_adapter_files
from molora_fed.adapters.save import save_adapter
from molora_fed.bank.passes import ColumnMaker
from molora_fed.charter import Amendment, Charter, FusionRules, PrivacyRules, SampleRules
from molora_fed.contributions.build import build_contribution
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.manifest import load_contribution
from molora_fed.cooperative.admit import admit_contributions
from molora_fed.cooperative.cooperative import Cooperative, create_cooperative
from molora_fed.cooperative.fuse import fuse_contributions
from molora_fed.corpus.blocks import Blocks
from molora_fed.federation.withdrawal import withdraw_contributor
from molora_fed.fusion.fuse import FusionResult, fuse
from molora_fed.models.base import Base, load_base
from molora_fed.storage.files import write_json
from molora_fed.storage.keys import load_or_make_key
from molora_fed.testing import build_random_adapter
from molora_fed.testing.models import build_tiny_tokenizer
from molora_fed.types import Split

SAMPLES = SampleRules(calibration=40, admission=8, held_out=40)
SIZE = 128
BELOW_SECONDS = ("calibration-bank", "held-out-bank", "routers")


class Counter:
    """Counts blocks that models ran over to make columns, by whether the model is an expert."""

    def __init__(self, experts: set[str]) -> None:
        self.experts = experts
        self.blocks = {"experts": 0, "weight_average": 0}
        run, subtract = ColumnMaker.run, ColumnMaker.subtract

        def count_run(maker: ColumnMaker, what: str, order: Any, work: Any, **more: Any) -> None:
            self._add(work.own, maker)
            run(maker, what, order, work, **more)

        def count_subtract(maker: ColumnMaker, own: str, **more: Any) -> None:
            self._add(own, maker)
            subtract(maker, own, **more)

        ColumnMaker.run = count_run  # type: ignore[method-assign]
        ColumnMaker.subtract = count_subtract  # type: ignore[method-assign]

    def _add(self, own: str, maker: ColumnMaker) -> None:
        self.blocks["experts" if own in self.experts else "weight_average"] += len(maker.blocks)

    def take(self) -> dict[str, int]:
        """Counts since the last call."""
        taken, self.blocks = self.blocks, {"experts": 0, "weight_average": 0}
        return taken


def build_base(folder: Path) -> Base:
    config = GPTNeoXConfig(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return load_base(folder)


def build_member(base: Base, charter: Charter, folder: Path, index: int) -> Path:
    name = f"member-{index}"
    adapter = build_random_adapter(base.model, seed=index, strength=1e-3)
    save_adapter(adapter, base.model, folder / name / "adapter-made")
    generator = np.random.default_rng(index)
    samples = {}
    for split, count in (
        (Split.CALIBRATION, SAMPLES.calibration),
        (Split.ADMISSION, SAMPLES.admission),
        (Split.HELD_OUT, SAMPLES.held_out),
    ):
        tokens = generator.integers(0, 257, (count, SIZE), dtype=np.int32)
        documents = np.repeat(np.arange(count, dtype=np.int32)[:, None], SIZE, axis=1)
        samples[split] = Blocks(name, split, tokens, documents, documents)
    build_contribution(
        folder / name / "contribution",
        adapter=folder / name / "adapter-made",
        kind="lora",
        samples=samples,
        key=load_or_make_key(folder / name / "key.pem"),
        charter=charter,
        contributor=name,
        domain=name,
        training={},
        base_loss=3.0,
        specialist_loss=2.9,
    )
    return folder / name


def fuse_afresh(
    base: Base, cooperative: Cooperative, members: list[Path], folder: Path
) -> FusionResult:
    made = [collect_contributed(load_contribution(path / "contribution")) for path in members]
    return fuse(base, cooperative.charter, made, folder)


def measure(root: Path, contributors: int, routers: tuple[str, ...]) -> list[dict[str, Any]]:
    base = build_base(root / "base")
    first, *others = routers
    amendment = Amendment(samples=SAMPLES, fusion=FusionRules(router=first, compare=tuple(others)))
    cooperative = create_cooperative(
        root / "home", "growth", base, amendment=amendment, privacy=PrivacyRules(mode="pooled")
    )
    made = root / "made"
    members = [
        build_member(base, cooperative.charter, made, index) for index in range(contributors + 1)
    ]
    *old, new = members
    counter = Counter({"", *(hash_adapter_files(m / "contribution" / "adapter") for m in members)})
    rows: list[dict[str, Any]] = []

    def note(step: str, seconds: dict[str, float], begun: float) -> None:
        rows.append(
            {
                "step": step,
                "blocks": counter.take(),
                "seconds": {
                    **{phase: round(seconds[phase], 2) for phase in BELOW_SECONDS},
                    "whole": round(time.monotonic() - begun, 2),
                },
            }
        )

    admit_contributions(cooperative, old)
    begun = time.monotonic()
    fused = fuse_contributions(cooperative, ())
    note(f"fuse {contributors}", fused.result.result["seconds"], begun)
    begun = time.monotonic()
    admit_contributions(cooperative, [new])
    fused = fuse_contributions(cooperative, ())
    note("add one", fused.result.result["seconds"], begun)
    begun = time.monotonic()
    result = fuse_afresh(base, cooperative, members, root / "afresh-grown")
    note(f"fuse {contributors + 1} from nothing", result.result["seconds"], begun)
    assert_same(fused.result, result)
    begun = time.monotonic()
    withdraw_contributor(cooperative, "member-0")
    fused = fuse_contributions(cooperative, ())
    note("remove one", fused.result.result["seconds"], begun)
    begun = time.monotonic()
    result = fuse_afresh(base, cooperative, members[1:], root / "afresh-shrunk")
    note(f"fuse the {contributors} left from nothing", result.result["seconds"], begun)
    assert_same(fused.result, result)
    return rows


def assert_same(one: FusionResult, other: FusionResult) -> None:
    for key in ("losses", "gates", "experts"):
        if one.result[key] != other.result[key]:
            raise SystemExit(f"'{key}' differs from a fusion from nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contributors", type=int, default=3)
    parser.add_argument("--routers", default="evidence,linear")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    routers = tuple(arguments.routers.split(","))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.contributors, routers)
    write_json(arguments.out, {"routers": list(routers), "rows": rows})
    for row in rows:
        print(row["step"], row["blocks"], row["seconds"])


if __name__ == "__main__":
    main()
