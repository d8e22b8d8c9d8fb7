"""Auditing: problems in the rows of a stream.

Other folders may import:

- audit: Audit, audit_stream
- duplicates: train_rows_by_task
- lengths: TokenCount, count_row_tokens, measure_lengths
"""
