"""The update: optimizers, schedules, gradients, averages."""
