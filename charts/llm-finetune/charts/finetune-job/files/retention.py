"""Remove the RayJob objects of old runs; their directories on the storage stay.

Environment: KEEP (finished runs that stay, newest first), CURRENT (a run that always stays), INSTANCE (the Helm release whose runs these
are), NAMESPACE. Uses the pod's service account, which may list and delete RayJobs and nothing else.
"""

import json
import os
import ssl
import urllib.parse
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
FINISHED = {"Complete", "Failed", "ValidationFailed"}


def superfluous(jobs: list[dict], keep: int, current: str) -> list[str]:
    """Names of the finished runs beyond the `keep` newest; `current` and runs that have not ended are never among them."""
    finished = [job for job in jobs if job.get("status", {}).get("jobDeploymentStatus") in FINISHED]
    finished.sort(key=lambda job: (job["metadata"]["creationTimestamp"], job["metadata"]["name"]), reverse=True)
    return [name for job in finished[keep:] if (name := job["metadata"]["name"]) != current]


def main() -> None:
    address = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    jobs = f"{address}/apis/ray.io/v1/namespaces/{os.environ['NAMESPACE']}/rayjobs"
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    token = (ACCOUNT / "token").read_text(encoding="ascii")

    def call(method: str, url: str) -> dict:
        request = urllib.request.Request(url, method=method, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return json.load(answer)

    selector = urllib.parse.urlencode({"labelSelector": f"llm-finetune/run,app.kubernetes.io/instance={os.environ['INSTANCE']}"})
    for name in superfluous(call("GET", f"{jobs}?{selector}")["items"], int(os.environ["KEEP"]), os.environ["CURRENT"]):
        call("DELETE", f"{jobs}/{name}")
        print(f"removed RayJob {name}")


if __name__ == "__main__":
    main()
