"""Configurations: composing, overrides, instantiation, plug-ins, catalogue.

Other folders may import:

- catalogue: show
- instantiate: construct, lacking, registry, targets
- overrides: composed, explained, resolved, spelled
- quoting: quoted
- run_config: flat, read_config
- trust: foreign, take_over
"""
