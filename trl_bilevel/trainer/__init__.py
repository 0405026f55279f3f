"""Thin subclasses of TRL's trainers that feed the core."""
