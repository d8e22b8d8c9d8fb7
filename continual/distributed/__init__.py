"""Several processes at one run: collectives, and dealing out the work.

Other folders may import:

- processes: add_up, agreed, apart, compare, first, gather, joined, leads, let_first_speak, most,
  started, summed, together, wait, world
- work: deal, dealt, evenly
"""
