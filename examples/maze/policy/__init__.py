"""The network of the policy, and the shipped policies."""
