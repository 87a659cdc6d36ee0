"""What `metaopt.optimizers` is made of: torch.optim's own steps, kept in the graph."""
