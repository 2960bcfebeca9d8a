"""What both trainings use: optimizer, non-finite guard, stop signals, run log, loggers, data report."""
