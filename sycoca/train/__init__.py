"""One trainer for every objective: the task, the optimiser's plan, the loop, hooks, checkpoints."""
