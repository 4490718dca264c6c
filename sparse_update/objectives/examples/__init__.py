"""Questions of tasks as rows of tokens: what a stream shows a gate, and what an objective finds beside the tokens."""
