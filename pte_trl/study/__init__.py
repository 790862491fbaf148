"""Does it learn? Small studies with seeds and controls, each run restartable, tables and plots from their JSON files."""
