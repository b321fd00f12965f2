"""What a card can compute at most: the one table that an MFU is quoted against."""

import re

PEAK_FLOPS = (
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100|H200|H800|GH200", 989e12),
    (r"B200", 2250e12),
    (r"A100|A800", 312e12),
    (r"A30\b", 165e12),
    (r"A10\b", 125e12),
    (r"L40S", 362e12),
    (r"L40|RTX 6000 Ada", 181e12),
    (r"L4\b", 121e12),
    (r"RTX 5090\b", 209.5e12),
    (r"RTX 4090\b(?! D)", 165.2e12),
    (r"RTX 3090\b(?! Ti)", 71e12),
)
"""Dense bf16 FLOP/s with fp32 accumulation, by the vendor's data sheets; the first pattern that is in the card's name.

Laptop cards have the name of a desktop card and less of everything, and a slice of a card has a part of it: for those
no peak is known.
"""
_NOT_WHOLE = re.compile(r"\bMIG\b|Laptop|Max-Q")


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None for one that is not in the table, such as a CPU."""
    if _NOT_WHOLE.search(device_name):
        return None
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, device_name)), None)
