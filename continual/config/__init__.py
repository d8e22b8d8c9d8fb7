"""Configurations: composing, overrides, instantiation, plug-ins, catalogue.

Other folders may import:

- catalogue: GROUPS, list_choices, print_catalogue
- instantiate: allowed_targets, construct, strategies_without_complete_weights, targets_by_name
- overrides: SHORT_IN, check_values, compose_config, explain_error, normalize_overrides
- quoting: quote_value
- renamed: MEMORY_FIELDS
- run_config: flatten_keys, read_config
- trust: inherit_model_and_data, unknown_strategies
"""
