"""What shows a run after the fact, or while it is going on: `python -m view report RUN`, `python -m view play RUN`."""
