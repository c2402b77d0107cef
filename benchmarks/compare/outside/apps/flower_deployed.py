"""The app as a deployment gets it: a bundle of two files that import it from here. The task's folder is the
value of FEDSPEED_TASK; a client computes on one thread, as there are more clients than cores.
"""

import os

from benchmarks.compare.outside.apps.flower_app import client_app, server_app

FOLDER = os.environ["FEDSPEED_TASK"]
client = client_app(FOLDER, 1)
server = server_app(FOLDER)
