"""Benchmarks: each file measures one claim, prints a table and can write it as JSON under `bench/results/`."""
