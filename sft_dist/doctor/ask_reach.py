"""`python -m sft_dist.doctor.ask_reach URL`: whether a server answers a HEAD request, as JSON.

It goes through the proxies of the environment, as the clients of hub and wandb do.
"""

import json
import sys
import urllib.error
import urllib.request
from typing import Any

TIMEOUT_S = 6.0
PROXY_WANTS_A_PASSWORD = 407


def reach(url: str) -> dict[str, Any]:
    """status: of the answer, whatever it is: a server that refuses has been reached. error: why there is none."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S) as answer:
            return {"status": answer.status}
    except urllib.error.HTTPError as error:
        if error.code == PROXY_WANTS_A_PASSWORD:
            return {"error": "the proxy wants a password (HTTP 407)"}
        return {"status": error.code}
    except (OSError, ValueError) as error:
        return {"error": str(getattr(error, "reason", None) or error)}


if __name__ == "__main__":
    print(json.dumps(reach(sys.argv[1])))
