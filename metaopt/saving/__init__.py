"""What is written so that it survives and can be read: whole files, nested states, checkpoints, text."""
