"""One forward: hooks, root calls, tensors in nested outputs, regions, and state that is restored afterwards."""
