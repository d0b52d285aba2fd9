"""What Keras writes: read without Keras, and without libhdf5."""
