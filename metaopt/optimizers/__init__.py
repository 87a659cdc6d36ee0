"""`torch.optim` made differentiable and registered with `higher`: the update half of an inner step."""
