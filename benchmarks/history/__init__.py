"""What the hot paths cost, kept over time: ``python -m pytest benchmarks/history`` (see ``test_hot_paths``)."""
