"""Repeatable benchmarks: `python -m benchmarks.NAME` prints a table and the same figures as one line of JSON."""
