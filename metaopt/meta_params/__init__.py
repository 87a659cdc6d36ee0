"""What the outer problem learns."""
