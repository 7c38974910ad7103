"""Benchmarks: protocols, rollouts and reports."""
