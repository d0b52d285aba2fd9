"""What JAX's libraries write: read without JAX."""
