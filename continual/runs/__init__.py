"""Runs: build, validate, session, run, adapt, compare, plan, locks, signals.

Other folders may import:

- adapt: adapt
- audit_step: run_audit
- build: choosing, encoder, model, strategy, stream
- compare: compare
- plan: plan, print_plan
- run: run
- signals: RunInterrupted
- stop_if: EXIT_STATUS, ForgettingLimitExceeded
- validate: check
"""
