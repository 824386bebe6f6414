"""The bytes that every registered router learns on a made-up bank: equal before and after a change.

    python bench/router_bytes.py                     # a line a router: SHA-256 of what it learnt

Run it with two versions of the code and compare the lines; the bank, its seeds and the options
are fixed, and one thread is used.
"""

import hashlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from molora_fed.plugins import load_plugins
from molora_fed.testing import build_synthetic_bank

SEEDS = (0, 1)


def main() -> None:
    torch.set_num_threads(1)
    routers = load_plugins().routers
    for name in routers.names():
        router = routers.resolve(name)
        options = router.Options()
        bank = build_synthetic_bank(readings=router.reads(options))
        for seed in SEEDS:
            digest = hashlib.sha256()
            fitted = router.fit(bank, options, seed)
            for key, tensor in sorted(fitted.state_tensors().items()):
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
            gates = fitted.gates(bank.view(slice(0, 4)))
            digest.update(gates.detach().cpu().contiguous().numpy().tobytes())
            print(f"{name} seed {seed} {digest.hexdigest()}")


if __name__ == "__main__":
    main()
