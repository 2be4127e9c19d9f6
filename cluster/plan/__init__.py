"""Planning: from a model, a recipe and a budget of GPUs to a placement, or to a refusal. Pure functions; no Ray."""
