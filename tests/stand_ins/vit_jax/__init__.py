"""Stand-ins for Google's vit_jax, which no package index has: the functions of its papers, under its names."""
