"""Runs: build, validate, session, run, adapt, compare, plan, locks, signals.

Other folders may import:

- adapt: adapt
- audit_step: alone
- build: choosing, encoder, model, strategy, stream
- compare: compare
- plan: plan, show
- run: run
- signals: Stopped
- stop_if: Gated, STATUS
- validate: check
"""
