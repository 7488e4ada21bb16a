"""Whether the server in this container is ready: the exit status."""

import os
import ssl
import sys
import urllib.request

is_tls = bool(os.environ.get("HOTNEURON_TLS_CERT"))
port = os.environ.get("HOTNEURON_PORT", "8000")
url = f"{'https' if is_tls else 'http'}://127.0.0.1:{port}/ready"
# The certificate is made out to the name that clients use, not to the container's own address.
context = ssl._create_unverified_context() if is_tls else None
try:
    urllib.request.urlopen(url, timeout=4, context=context).close()
except OSError as error:
    sys.exit(f"{url}: {error}")
