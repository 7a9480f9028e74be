"""Benchmarks: every case runs the same work through fastffn and its rivals, interleaved."""
