"""From a torch module, a loss and an optimiser to a training bundle that a node runs without torch."""
