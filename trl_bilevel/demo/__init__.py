"""A real model and real text without a model hub: assets, contaminated tasks, and the demo that runs on them."""
