"""Second-order products: `u ↦ u · ∂(∂L/∂θ)/∂(θ, others)` for one inner step."""
