"""The data of the recipes, made from public sets on the hub: `prepare_recipe`, then `write_prepared`."""

from .card import LOCK_FILE, read_lock, write_prepared
from .sets import Prepared, prepare_recipe

__all__ = ["LOCK_FILE", "Prepared", "prepare_recipe", "read_lock", "write_prepared"]
