"""Compresses an encoder end to end: what `fastffn demo` runs."""
