"""Speed and memory against the official code: ``python -m benchmarks`` or ``make bench``."""
