"""What the machine gives: errors, checks, files, devices, signals, the hub, the screen. Imports nothing of ours."""
