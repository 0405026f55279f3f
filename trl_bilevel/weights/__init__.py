"""Choosing: what each training row is worth, as a function of a model, rows and trusted rows. No trainer in here."""
