"""Training: recipes, batches, back-propagation through all blocks, exact resume."""
