"""The strategy contract for third parties, and the toy model.

Other folders may import:

- check: check_strategy
"""
