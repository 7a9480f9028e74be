"""Models and what runs them side by side: torch, its compiler, other runtimes, fastffn."""
