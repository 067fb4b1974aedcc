"""A mount as a process: its end, what systemd wants of it, and what the kernel knows."""
