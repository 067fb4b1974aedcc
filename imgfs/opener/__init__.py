"""From what a person names to what is open: sources, and the disks in them."""
