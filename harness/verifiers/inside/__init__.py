"""What runs inside the sandbox: standard library only, and nothing of the rest of Retort.

nursery   a warm server; it starts a fresh referee and player for each program
referee   runs the tests, in a process that the program cannot reach, and decides
player    runs the program, and does what the referee asks
wire      plain data between the two
"""
