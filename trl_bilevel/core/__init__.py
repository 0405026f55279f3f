"""The mathematics: pure tensor functions, no trainer, no model."""
