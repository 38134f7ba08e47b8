"""pyobserver against torch: ``python -m bench`` for a report, ``pytest bench`` for timings."""
