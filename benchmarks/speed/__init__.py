"""Speed and memory against other implementations of the same thing."""
