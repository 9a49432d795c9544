"""Another user, who takes as many connections to a rank as there are: `crowd.py ADDRESS`."""

import os
import socket
import sys
import time

os.setgid(65534)
os.setuid(65534)
held: list[socket.socket] = []
print("there", flush=True)
while len(held) < 500:
    one = socket.socket(socket.AF_UNIX)
    one.setblocking(False)
    try:
        one.connect(b"\0" + os.fsencode(sys.argv[1]))
        held.append(one)
    except OSError:
        time.sleep(0.001)
input()
