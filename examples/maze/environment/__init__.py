"""procgen levels as data, and as an environment."""
