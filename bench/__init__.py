"""Timings of pyobserver against torch: ``pytest bench``, or ``python -m bench`` for a report."""
