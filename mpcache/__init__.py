"""Run a language model once and keep its activations in a Zarr store.

The names in `__all__` are the public interface; everything else may change without notice. Each is
imported when it is first used, so that `import mpcache` is fast.
"""

import importlib
from typing import TYPE_CHECKING

from mpcache.version import __version__ as __version__

if TYPE_CHECKING:  # what type checkers see of the names below
    from mpcache.collection.catalog import list_stores as list_stores
    from mpcache.collection.collect import collect as collect
    from mpcache.config import CollectConfig as CollectConfig
    from mpcache.config import ConvertConfig as ConvertConfig
    from mpcache.config import RepairConfig as RepairConfig
    from mpcache.errors import DamagedStoreError as DamagedStoreError
    from mpcache.errors import MpcacheError as MpcacheError
    from mpcache.errors import UsageError as UsageError
    from mpcache.maintenance.convert import convert as convert
    from mpcache.maintenance.copy import copy as copy
    from mpcache.maintenance.repair import repair as repair
    from mpcache.maintenance.stats import stats as stats
    from mpcache.maintenance.verify import verify as verify
    from mpcache.model.hookpoint_report import HookpointReport as HookpointReport
    from mpcache.model.hookpoint_report import hookpoints as hookpoints
    from mpcache.parallel.config import CollectParallelConfig as CollectParallelConfig
    from mpcache.parallel.config import ParallelConfig as ParallelConfig
    from mpcache.store.reader import Store as Store
    from mpcache.store.reader import open_store as open_store

_MODULES = {
    "CollectConfig": "mpcache.config",
    "CollectParallelConfig": "mpcache.parallel.config",
    "ConvertConfig": "mpcache.config",
    "DamagedStoreError": "mpcache.errors",
    "HookpointReport": "mpcache.model.hookpoint_report",
    "MpcacheError": "mpcache.errors",
    "ParallelConfig": "mpcache.parallel.config",
    "RepairConfig": "mpcache.config",
    "Store": "mpcache.store.reader",
    "UsageError": "mpcache.errors",
    "collect": "mpcache.collection.collect",
    "convert": "mpcache.maintenance.convert",
    "copy": "mpcache.maintenance.copy",
    "hookpoints": "mpcache.model.hookpoint_report",
    "list_stores": "mpcache.collection.catalog",
    "open_store": "mpcache.store.reader",
    "repair": "mpcache.maintenance.repair",
    "stats": "mpcache.maintenance.stats",
    "verify": "mpcache.maintenance.verify",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
