"""Bridges to other libraries of the field.

Other folders may import:

- avalanche: Criterion, Rows, Shown, again, apart, benchmark, examples, experiences, kept,
  tensors, the
"""
