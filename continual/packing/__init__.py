"""Batches: row layout, attention kernels, key-value cache.

Other folders may import:

- attention: use_row_attention
- batch: Batch, Layout
- kv_cache: KVCache, PrefillDone, cached_attention
- layout: block_by_length, common_prefix_length, group_by_prefix, prepend_prefix, response_start
- support: LastLayer, detect_packing_support, select_attention
"""
