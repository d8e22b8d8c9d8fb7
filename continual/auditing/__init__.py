"""Auditing: problems in the rows of a stream.

Other folders may import:

- audit: Audit, audit
- duplicates: learned
- lengths: Fit, fit, measure
"""
