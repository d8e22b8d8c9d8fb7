"""Events of a run, and external trackers.

Other folders may import:

- events: Events, lines_of, quiet
- trackers: refuse_missing, tracker
"""
