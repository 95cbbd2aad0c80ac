"""The policy's network, and the policies that are shipped."""
