"""What PyTorch writes, and what is trained with it: read without torch."""
