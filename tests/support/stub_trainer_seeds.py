"""What the stub trainer does, by the job's seed; any other seed trains and obeys."""

STUBBORN = 7
"""Ignores SIGTERM."""
BROKEN = 8
"""Ends with a data error."""
PARENT = 9
"""Starts a process of its own that would outlive it."""
CRASHING = 10
"""Ends with an unexpected error."""
