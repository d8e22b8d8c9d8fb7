"""Builders of task streams: the embedded one, folders, Hub datasets; orders and arrangements."""
