"""Commands, one file each; nothing heavy is imported until a command runs."""
