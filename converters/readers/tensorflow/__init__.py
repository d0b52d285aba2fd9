"""What TensorFlow writes: read without TensorFlow."""
