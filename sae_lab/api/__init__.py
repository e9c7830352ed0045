"""The Python door: functions for notebooks and scripts, which call what the commands call."""
