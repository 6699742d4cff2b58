"""What a run needs besides the algorithm, one room a file. Nothing in here imports grpo.py."""
