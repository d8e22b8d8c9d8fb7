"""Evaluation: metrics, constraints, judge, scoring, probes.

Other folders may import:

- constraints: parse_constraints
- instruction_parser: COMPOSITION_LEVELS
- judge: Judge
- metrics: REFERENCE_METRICS
- row_metrics: ifeval_accuracies
- scoring: EvalSet, PERPLEXITY, SPLITS, prepare_eval_set, score_task
- text_normalization: normalize_text
"""
