"""Batches: row layout, attention kernels, key-value cache.

Other folders may import:

- attention: flat_attention
- batch: Batch, Layout
- kv_cache: Cache, Taken, cached
- layout: behind, blocked, common_prefix, grouped, turn
- support: LastLayer, kernel, probe
"""
