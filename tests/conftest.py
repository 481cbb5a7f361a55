"""What every test relies on: a CPU, no network, no window."""

from __future__ import annotations

import os

# Before anything imports these libraries. Tolerances are those of float32 on a CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
