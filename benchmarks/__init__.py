"""Run time, trace time, compile time and memory of optaxclip beside Optax: `python -m benchmarks`."""
