"""What bthooks costs, and what a user would pick instead costs: `python -m tests.benchmarks`."""
