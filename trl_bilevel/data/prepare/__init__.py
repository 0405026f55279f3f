"""The data of the recipes, made from public sets on the hub: `prepare_quality`, `prepare_safety`, `write_prepared`."""

from __future__ import annotations

from .card import LOCK_FILE, check_lock, read_lock, write_prepared
from .sets import Prepared, prepare_quality, prepare_safety
from .sources import hub_revision, hub_rows

__all__ = [
    "LOCK_FILE",
    "Prepared",
    "check_lock",
    "hub_revision",
    "hub_rows",
    "prepare_quality",
    "prepare_safety",
    "read_lock",
    "write_prepared",
]
