"""Real servers, servers that lie, and proxies; on loopback, ended by their own pids."""
