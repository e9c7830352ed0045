"""What a run or a sweep will take: memory, time and disk, before anything is loaded."""
