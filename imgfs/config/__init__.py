"""What a person asks for: mount options, and the TOML file of many images."""
