"""What a person names as a SOURCE."""
