"""Results as data: matrix, variants, uncertainty, flips, run folders.

Other folders may import:

- comparison: FAILED_FILE, describe_unfinished, find_pending_runs, record_command, resume_command,
  unfinished_states
- curve: CURVE_FILE, Curve
- flips: CORRECT_THRESHOLD, Flip, count_flips, find_flips
- matrix: BASE_STAGE, Matrix, Score, forgetting, forgetting_by_stage, mean_or_none,
  performance_by_stage
- prediction: Prediction, format_predictions, load_predictions
- published: PublishedMatrix, load_published
- run_folder: Run, RunGroup, find_joint_reference, find_runs, folder_kind, group_runs, is_event,
  load_events
- stopped: STOPPED_FILE, _format_stop, _load_stop, describe_stop
- tables: PARQUET_FILE, encode_parquet, load_table
- uncertainty: CONFIDENCE_LEVEL, Interval, MEAN_TOLERANCE, PairedDifference, bootstrap_intervals,
  differences_from_baseline, interval_over_runs
- variants: VARIANTS, compute_variants
"""
