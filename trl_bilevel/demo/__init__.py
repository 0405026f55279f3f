"""Contaminated tasks with known truth, ways of training on them, and the comparison that the demo shows."""
