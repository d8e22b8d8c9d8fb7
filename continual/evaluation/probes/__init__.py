"""Probes: what is measured beside the matrix, before training and after every stage, and trains
nothing.

Other folders may import:

- base: Ask, Probe, Setting
- record: record
"""
