"""Tests, exercises and benchmarks."""
