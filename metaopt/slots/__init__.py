"""What fits a stage's slots: gradient transforms, parameter groups, Muon, Adafactor, optimizers of a user's own."""
