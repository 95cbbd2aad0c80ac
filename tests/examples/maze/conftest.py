from maze.environment.requirements import policy_models

# procgen leaves a file open when it is imported; `requirements` imports it without the warning, before a test does.
policy_models()
