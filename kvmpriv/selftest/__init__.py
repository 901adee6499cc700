"""The suite that holds the running kernel to the rules of private memory: run, and reported."""
