"""The command line: one module per command, the heavy imports inside `main`."""
