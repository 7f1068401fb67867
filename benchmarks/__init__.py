"""Built-in problems, measurements, reports and the command line: ``python -m benchmarks --help``."""
