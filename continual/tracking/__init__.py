"""Events of a run, and external trackers.

Other folders may import:

- events: EventLog, prefixed_console, silence_libraries
- trackers: check_tracker_installed, start_tracker
"""
