"""moto's S3 on a free port of loopback with one bucket, `tenantry`; prints its address when it answers, serves until it
is killed."""

import time
import urllib.request

from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
address = "http://%s:%d" % server.get_host_and_port()
urllib.request.urlopen(urllib.request.Request(f"{address}/tenantry", method="PUT"))
print(address, flush=True)
while True:
    time.sleep(3600)
