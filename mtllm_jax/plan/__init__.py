"""What a run costs on machines that nobody here owns: memory, FLOPs, traffic, time, chip-hours."""
