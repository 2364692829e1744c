"""What readers of a node ask for, as `ekko hot` and GET /hot say it."""

import numpy as np

from ekko.errors import ModelError
from ekko.store import Store
from ekko.store.model_store import ModelStore


def hot_report(store: Store, model: str, table: str | None, count: int) -> dict[str, object]:
    """The share of a model in all requests, and the hottest keys of its tables, at most `count` each.

    Keys are text, since readers of JSON round large numbers.

    Raises:
        ModelError: there is no such model or table.
    """
    held = store.models.get(model)
    if held is None:
        raise ModelError(f"there is no model {model!r} here: there are {', '.join(map(repr, store.models)) or 'none'}")
    if table is not None and table not in held.heat:
        raise ModelError(f"model {model!r} has no table {table!r}: it has {', '.join(map(repr, held.heat)) or 'none'}")
    requests = sum(other.requests for other in store.models.values())
    return {
        "model": model,
        "request_share": held.requests / requests if requests else 0.0,
        "tables": {name: _table_report(held, name, count) for name in held.heat if table in (None, name)},
    }


def _table_report(model: ModelStore, table: str, count: int) -> dict[str, object]:
    heat = model.heat[table]
    stats, hottest = heat.stats(), heat.hottest(count)
    here = model.lookup(table, hottest.keys)[1] != np.uint64(0)
    entries = zip(hottest.keys.tolist(), hottest.requests.tolist(), here.tolist(), strict=True)
    return {
        "reads": {
            "lookups": stats.lookups,
            "keys": stats.keys,
            "absent": stats.misses,
            "recent_keys": round(stats.requests),
            "counted_by": stats.counted_by,
        },
        "hottest": [
            {"key": str(key), "requests": round(times, 1), "share": min(1.0, times / max(stats.requests, times)), "here": one}
            for key, times, one in entries
        ],
    }
