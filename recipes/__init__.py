"""Configs of `trl-bilevel sft` and `refine`, and `python -m recipes.prepare`, which makes their data."""
