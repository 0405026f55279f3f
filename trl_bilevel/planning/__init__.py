"""Memory and work of a run before it is started, by arithmetic: docs/planning.md has the formulas."""
