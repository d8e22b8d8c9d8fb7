"""Results as data: matrix, variants, uncertainty, flips, run folders.

Other folders may import:

- comparison: FAILED, command, failures, plan, unfinished, waiting
- curve: Curve, FILE
- flips: Flip, RIGHT, counts, flips
- matrix: BASE, Matrix, Score, forgetting, forgotten, incremental, mean
- published: Told, read
- run_folder: Group, Run, find, grouped, is_event, kind, read_events, reference
- stopped: FILE, _read, _says, notice
- tables: FILE, load, parquet
- uncertainty: Interval, LEVEL, NEAR, Paired, against, intervals, marked, over_runs
- variants: VARIANTS, forms
"""
