"""The bank: one frozen pass per expert over fixed blocks; everything downstream reads it."""

from molora_fed.bank.adapters import ExpertAdapters
from molora_fed.bank.bank import Bank, CalibrationBank, HeldOutBank
from molora_fed.bank.build import build_calibration_bank, build_held_out_bank
from molora_fed.bank.passes import Expert, estimate_bank_bytes

__all__ = [
    "Bank",
    "CalibrationBank",
    "Expert",
    "ExpertAdapters",
    "HeldOutBank",
    "build_calibration_bank",
    "build_held_out_bank",
    "estimate_bank_bytes",
]
