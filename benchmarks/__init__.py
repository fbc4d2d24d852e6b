"""The harness, the benchmarks that use it, and the command line."""
