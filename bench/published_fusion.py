"""Fusions whose routers are made from published statistics, beside pooled and private ones.

    python bench/private_fusion.py demo-42 demo-137 demo-2026     # first: what these are beside
    python bench/published_fusion.py demo-42 demo-137 demo-2026

Each folder is one `molora demo`, a training of its own with base, specialists and texts. Statistics
are measured on the contributions' calibration samples, as their contributors would have published
them; everything else is asked of members that each hold their own blocks, all in this process.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from private_fusion import find_loss, quote, replace_model

from molora_fed.charter import Charter
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.cooperative.known_text import read_known_text
from molora_fed.cooperative.publish import measure_statistics
from molora_fed.fusion.fuse import fuse_texts
from molora_fed.fusion.local_members import LocalMembers, drop_text
from molora_fed.fusion.private_texts import PrivateTexts
from molora_fed.options import name_choices
from molora_fed.plugins import get_plugins
from molora_fed.storage.files import write_bytes, write_json

PAIRS = ("evidence-mixed", "statistics", "evidence-zero")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demos", type=Path, nargs="+", help="folders of `molora demo`")
    parser.add_argument("--beside", type=Path, default=Path("docs/results/private_fusion.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/published_fusion.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(arguments.beside.read_bytes())["fusions"]
    beside = {row["name"]: row for row in rows}
    kept = arguments.out.with_suffix(".json")
    found = json.loads(kept.read_bytes())["fusions"] if kept.is_file() else {}
    for demo in arguments.demos:
        if demo.name not in found:  # stopped and called again, it goes on
            with tempfile.TemporaryDirectory() as folder:
                found[demo.name] = fuse_published(demo, Path(folder))
            write_json(kept, {"fusions": found})
        losses = found[demo.name]["equal_weight"]
        print(demo.name, {n: losses[f"fused:{n}"]["point"] for n in PAIRS[1:]}, flush=True)
    names = [demo.name for demo in arguments.demos]
    write_bytes(arguments.out, build_page(names, found, beside).encode())


def fuse_published(demo: Path, folder: Path) -> dict[str, Any]:
    """Fuse what a demo admitted: losses, bytes of statistics, processor seconds, rounds."""
    plugins, home = get_plugins(), demo / "cooperative"
    cooperative = open_cooperative(home)
    base, charter = cooperative.load_base(), publish(cooperative.charter)
    texts = read_known_text(home)
    with cooperative.read_ledger() as ledger:
        contributions = [
            collect_contributed(one, corpus=texts.get(one.manifest.contributor))
            for one in load_admitted(ledger, cooperative.store)
        ]
    began = time.process_time()
    experts, size = [], 0
    for one in contributions:
        assert one.calibration is not None
        path = folder / f"{one.contributor}.safetensors"
        measure_statistics(base, charter, one.calibration, folder / "states").save(path)
        experts.append(replace(drop_text(one), statistics=path))
        size = path.stat().st_size
    made = time.process_time() - began
    asked = LocalMembers.open(base, charter, contributions, experts, folder, plugins=plugins)
    result = fuse_texts(
        base, charter, PrivateTexts(experts, asked), folder / "coordinator", plugins=plugins
    )
    return {
        "equal_weight": result.result["equal_weight"],
        "bytes": size,
        "statistics_seconds": made,
        "seconds": time.process_time() - began,
        "rounds": 1 + len(asked.questions),
    }


def publish(charter: Charter) -> Charter:
    """The same charter with published statistics, and the routers that are made from them."""
    fusion = replace_model(
        charter.amendment.fusion,
        router="statistics",
        options={},
        compare=name_choices("evidence-zero"),
    )
    amendment = replace_model(charter.amendment, fusion=fusion)
    identity = replace_model(charter.identity, privacy_mode="statistics")
    return replace_model(charter, identity=identity, amendment=amendment)


def build_page(names: list[str], found: dict[str, Any], beside: dict[str, Any]) -> str:
    """The page of results."""
    lines = [
        "# Fusions by published statistics beside pooled and private ones",
        "",
        f"`python bench/published_fusion.py {' '.join(names)}`; every folder is one `molora demo` "
        "with base, specialists and texts of its own: the unit of replication. Equal-weight "
        "held-out losses in nats a token; in brackets 95 % intervals, by bootstrap over document "
        "clusters where texts are pooled, by Student's t from sums elsewhere. Pooled and private "
        "figures are those of [private_fusion.md](private_fusion.md), of the same folders.",
        "",
        "| demo | router | pooled | private, masked sums | published statistics | less private |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        for router in PAIRS:
            key = f"fused:{router}"
            pooled, private = (
                find_loss(r, key)
                for r in (beside[name]["pooled"], beside[name]["private"]["masked"])
            )
            mine = found[name]["equal_weight"].get(key)
            cells = ["-", "-"]
            if mine is not None:
                cells = [quote(mine), f"{mine['point'] - private['point']:+.5f}"]
            row = [name, f"`{router}`", quote(pooled), quote(private), *cells]
            lines.append(f"| {' | '.join(row)} |")
    lines += ["", "| demo | message rounds, private | statistics | bytes of statistics, each |"]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| {n} | {beside[n]['rounds']} | {found[n]['rounds']} | {found[n]['bytes']:,} |"
        for n in names
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
