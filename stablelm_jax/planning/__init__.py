"""What a run needs, before it runs: targets, compiled programs, memory, time and cost."""
