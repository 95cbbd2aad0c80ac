"""Training by imitation and by reward, and the evaluation of a policy."""
