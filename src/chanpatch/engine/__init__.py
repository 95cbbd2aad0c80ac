"""Internals of a forward pass: hooks, root calls, tensors in nested outputs, and state that is restored afterwards."""
