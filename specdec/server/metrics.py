"""Figures of a running server, in Prometheus' text format."""

from __future__ import annotations

from specdec.memory import Memory
from specdec.pool import SessionPool


def exposition(pool: SessionPool, memory: Memory | None = None) -> str:
    """The counts of docs/metrics.md, and what the pool holds now."""
    now = {
        "pool_rows": ("Requests that are being decoded.", pool.rows_in_use),
        "pool_waiting": ("Requests that wait for a row.", pool.waiting),
        "pool_cache_bytes": ("Bytes of KV rows of requests that are being answered.", pool.cache_bytes),
        "pool_kept_bytes": ("Bytes of KV rows of texts that have been answered.", pool.kept_bytes),
    }
    if memory is not None:
        now["memory_bytes"] = "Bytes of what drafters have learnt.", memory.bytes_used
    gauges = [f"# HELP specdec_{n} {text}\n# TYPE specdec_{n} gauge\nspecdec_{n} {v}\n" for n, (text, v) in now.items()]
    name = "specdec_pool_requests_total"
    outcomes = [f'{name}{{outcome="{outcome}"}} {count}\n' for outcome, count in dict(pool.outcomes).items()]
    counter = f"# HELP {name} Requests, by how they ended.\n# TYPE {name} counter\n"
    return "".join([pool.stats.prometheus(), *gauges, counter, *outcomes])
