"""The harness: what is trained, how it is measured, and the processes that measure it."""
