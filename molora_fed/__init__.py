"""molora-fed: post-hoc fusion of independently trained specialists.

Importing this package loads neither torch, transformers nor flwr; the folders that need them
(`molora_fed.bank`, `molora_fed.training`, `molora_fed.federation`, ...) do so themselves.
"""

from molora_fed.plugins import hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "hookimpl"]
