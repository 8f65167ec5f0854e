"""Where the numbers of a run go: files, the console, and the trackers that people use."""
