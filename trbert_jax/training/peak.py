"""What accelerators can do at most, as their vendors state it."""

from __future__ import annotations

# bfloat16 TFLOP/s without sparsity; the first part of a device's name that fits.
PEAK_TFLOPS = {
    "NVIDIA B200": 2250,
    "NVIDIA H200": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA A100": 312,
    "TPU v6 lite": 918,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v4": 275,
}


def known_peak(device: str) -> float | None:
    """bfloat16 TFLOP/s of a device by its name; None for one that is not in the table, such as a CPU."""
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in device), None)
