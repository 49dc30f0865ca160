"""What a run of a given size needs, from formulas alone: memory, disk, reading rate, steps and hours."""
