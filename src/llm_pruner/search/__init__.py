"""What is decided by trials on copies of the model."""
