"""What a mount tells of itself."""
