"""`torch.optim` made differentiable: the update half of an inner step."""
