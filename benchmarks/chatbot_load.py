"""The whole chatbot under load: people who ask one question after another over HTTP, streamed, while its memory is sampled.

    python benchmarks/chatbot_load.py --storage DIRECTORY --minutes 30 [--users 4] [--pause 10] --out benchmarks/results/chatbot-load.jsonl

The chatbot is started on a loopback port with the newest finished run of a storage. Every second question has an abstract (if the run's
format takes one), every fifth is for the base model (if it is loaded, `--base`). People think before they ask again: `--pause` seconds in
the mean. The exit code is 1 if an answer failed, or if the anonymous memory of the last third is more than 5 % (and 32 MiB) above that of
the second.

The result is one JSON object on stdout, with the memory over time; `--out` appends it to a file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from questions import ABSTRACT, TOPICS
from record import record


def memory(pid: int) -> dict[str, int]:
    """Resident and anonymous memory of a process, bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return {"resident": kilobytes["Rss"] * 1024, "anonymous": kilobytes["Anonymous"] * 1024}


async def user(client: httpx.AsyncClient, number: int, until: float, args: argparse.Namespace, seen: dict[str, Any]) -> None:
    """Asks one question after another until the time is up, thinking before each."""
    thinking = random.Random(number)
    for asked in range(sys.maxsize):
        await asyncio.sleep(min(thinking.uniform(0, 2 * args.pause), max(0.0, until - time.monotonic())))
        if time.monotonic() >= until:
            return
        topic = TOPICS[(number + asked) % len(TOPICS)]
        messages = [{"role": "user", "content": f"Does {topic} reduce admissions ({number}, {asked})?"}]
        body = {"messages": messages, "max_tokens": args.tokens, "stream": True, "stream_options": {"include_usage": True}}
        if seen["context"] and asked % 2:
            body["context"] = ABSTRACT.format(topic=topic)
        if args.base and asked % 5 == 4:
            body["model"] = "base"
        began, first, used, done = time.perf_counter(), 0.0, 0, False
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise ValueError(f"status {answer.status_code}: {(await answer.aread())[:200]!r}")
                async for line in answer.aiter_lines():
                    done = done or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if not first and any(c["delta"].get("content") for c in event["choices"]):
                            first = time.perf_counter() - began
                        used = (event.get("usage") or {}).get("completion_tokens", used)
            if not done or not used:
                raise ValueError("the stream ended early")
            seen["answers"] += 1
            seen["tokens"] += used
            seen["first"].append(first or time.perf_counter() - began)
        except (httpx.HTTPError, ValueError) as error:
            seen["errors"].append(f"{type(error).__name__}: {error}"[:300])
            await asyncio.sleep(1)


async def users(url: str, pid: int, args: argparse.Namespace, context: bool) -> dict[str, Any]:
    """All users at once, with samples of the server's memory."""
    began = time.monotonic()
    until = began + args.minutes * 60
    seen: dict[str, Any] = {"answers": 0, "tokens": 0, "first": [], "errors": [], "context": context}
    samples: list[dict[str, float]] = []
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        asking = [asyncio.create_task(user(client, n, until, args, seen)) for n in range(args.users)]
        while not all(task.done() for task in asking):
            samples.append({"seconds": time.monotonic() - began, **memory(pid)})
            await asyncio.wait(asking, timeout=max(1.0, args.minutes * 60 / 360))
        await asyncio.gather(*asking)
    third = len(samples) // 3
    middle, last = (statistics.mean(s["anonymous"] for s in part) for part in (samples[third:2 * third], samples[2 * third:]))
    first = sorted(seen["first"])
    seconds = time.monotonic() - began
    every = max(1, len(samples) // 30)
    return {"minutes": seconds / 60, "users": args.users, "pause": args.pause, "answers": seen["answers"],
            "errors": len(seen["errors"]), "first_errors": seen["errors"][:5],
            "tokens_per_second": seen["tokens"] / seconds,
            "first_token_seconds": {"median": statistics.median(first), "p95": first[int(len(first) * 0.95)],
                                    "max": first[-1]} if first else None,
            "memory_mib": {"anonymous_start": samples[0]["anonymous"] / 2**20, "anonymous_second_third": middle / 2**20,
                           "anonymous_last_third": last / 2**20, "resident_max": max(s["resident"] for s in samples) / 2**20},
            "anonymous_mib_by_minute": [[round(s["seconds"] / 60, 1), round(s["anonymous"] / 2**20, 1)] for s in samples[::every]],
            "flat": last <= max(middle * 1.05, middle + 32 * 2**20)}


def load_test(args: argparse.Namespace) -> int:
    """Start the chatbot, let people ask, stop it. Returns the exit code."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="chatbot-load-") as folder:
        work = Path(folder)
        (work / "config.yaml").write_text(yaml.safe_dump({
            "storage": str(args.storage.resolve()), "serve": {"follow": "latest", "base": args.base},
            "engine": {"device": args.device, "precision": args.precision, "threads": args.threads, "context": args.context},
            "server": {"host": "127.0.0.1", "port": port, "temporary": str(work / "tmp")}, "records": {"directory": str(work / "records")},
            "guardrails": {"checks": {name: {"enabled": False} for name in ("rate", "repetition", "gibberish")}}}))
        with (work / "log").open("w") as log:
            server = subprocess.Popen([sys.executable, "-m", "chatbot", "serve", "--config", str(work / "config.yaml")], cwd=root,
                                      env={**os.environ, "PYTHONPATH": str(root)}, stdout=log, stderr=log)
        try:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + 600
            while True:
                if server.poll() is not None or time.monotonic() > until:
                    raise SystemExit("The chatbot did not become ready:\n" + (work / "log").read_text()[-4000:])
                try:
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.5)
            run = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
            context = bool(json.loads((args.storage / "runs" / run / "model" / "prompt.json").read_text()).get("with_context"))
            result = {"run": run, "threads": args.threads, "tokens": args.tokens, **asyncio.run(users(url, server.pid, args, context))}
        finally:
            server.terminate()
            server.wait(60)
        result["tracebacks"] = (work / "log").read_text().count("Traceback")
    record(result, args.out)
    return int(bool(result["errors"] or result["tracebacks"] or not result["flat"]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, required=True, help="shared storage with runs/")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0, help="seconds that a user thinks before a question, in the mean")
    parser.add_argument("--base", action="store_true", help="load the base model beside the tuned one")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--out", default="")
    sys.exit(load_test(parser.parse_args()))


if __name__ == "__main__":
    main()
