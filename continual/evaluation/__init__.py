"""Evaluation: metrics, constraints, judge, scoring, probes.

Other folders may import:

- constraints: read
- demands: LEVELS
- judge: Judge
- metrics: METRICS
- row_metrics: accuracies
- scoring: PERPLEXITY, SPLITS, Test, prepare, score
- text: normalise
"""
