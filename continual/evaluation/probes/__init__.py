"""Probes: what is measured beside the matrix, before training and after every stage, and trains
nothing.

Other folders may import:

- base: Predict, Probe, RunSetup
- record: run_probes
"""
