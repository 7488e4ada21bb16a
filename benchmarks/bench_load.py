"""Many clients at once against a running server: no mixed-up answer, no leak, a bounded queue.

Start `hotneuron serve` in the background, then: `.venv/bin/python benchmarks/bench_load.py
--clients 1 2 4 8 16 32 64 --seconds 20 --pid $! --name my-machine`. Each client asks greedy
questions one after the other through the `openai` package, half of them streamed, and compares
every answer with the one the same question got alone before the load began. With --leave a share
of the requests is given up at a random moment: in the queue, in prefill or in the middle of the
answer. After each number of clients the server must come to rest: nothing running, nothing
waiting, no cache block in use, and no more open files and threads than at first. The
conversations are kept (--chats) so that `hotneuron report --data` can compute offline what the
dashboard's audit measured on the same traffic.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import APIStatusError, AsyncOpenAI
from results_file import write_result

QUESTIONS = tuple(
    f"{verb} {thing}."
    for verb in ("Tell me about", "Give me three facts about", "Write one sentence about")
    for thing in ("rivers", "bread", "the moon", "cats", "music", "trains", "rain", "schools")
)
ANSWER_TOKENS = 48
START_SECONDS = 120.0
REST_SECONDS = 20.0
MIB = 1 << 20
# What allocators keep and the cache's first touches take; a leak grows with the requests.
MAX_GROWTH_BYTES = 64 * MIB


@dataclass(frozen=True)
class Server:
    """A running server: how to ask it, and what it says of itself."""

    url: str
    model: str
    api_key: str
    pid: int | None

    def client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0)

    async def wait_until_ready(self, http: httpx.AsyncClient) -> None:
        """It may have been started a moment ago, and load its model."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                if (await http.get(f"{self.url}/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if time.monotonic() > end:
                raise TimeoutError(f"{self.url} is not ready: start `hotneuron serve` first")
            await asyncio.sleep(0.2)

    async def report(self, http: httpx.AsyncClient) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.api_key}"}
        reply = await http.get(f"{self.url}/dashboard/report.json", headers=headers)
        report: dict[str, Any] = reply.raise_for_status().json()
        return report

    def process(self) -> dict[str, int] | None:
        """Resident bytes, threads and open files, if it runs on this machine."""
        if self.pid is None:
            return None
        folder = Path("/proc") / str(self.pid)
        lines = (folder / "status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        return {
            "rss_bytes": int(status["VmRSS"][0]) << 10,
            "threads": int(status["Threads"][0]),
            "open_files": len(list((folder / "fd").iterdir())),
        }


@dataclass
class Tally:
    """What the clients of one run saw, and what the server said meanwhile."""

    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    num_tokens: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    refused: int = 0
    left: int = 0
    deepest_queue: int = 0
    most_running: int = 0
    rss_bytes: list[int] = field(default_factory=list)

    def row(self, clients: int, seconds: float) -> dict[str, Any]:
        return {
            "clients": clients,
            "seconds": round(seconds, 1),
            "answers": len(self.latencies),
            "answers_per_s": round(len(self.latencies) / seconds, 2),
            "tokens_per_s": round(self.num_tokens / seconds, 1),
            "first_token_p50_s": _quantile(self.first_tokens, 0.5),
            "latency_p50_s": _quantile(self.latencies, 0.5),
            "latency_p95_s": _quantile(self.latencies, 0.95),
            "left": self.left,
            "refused_503": self.refused,
            "wrong_answers": self.wrong.total(),
            "wrong_questions": sorted(self.wrong),
            "num_errors": len(self.errors),
            "errors": self.errors[:5],
            "deepest_queue": self.deepest_queue,
            "most_running": self.most_running,
        }


def _quantile(values: Sequence[float], share: float) -> float | None:
    if len(values) < 2:
        return round(values[0], 3) if values else None
    return round(statistics.quantiles(values, n=100)[round(100 * share) - 1], 3)


async def ask(
    client: AsyncOpenAI, model: str, question: str, *, stream: bool, tally: Tally | None = None
) -> str:
    """The whole answer. Its tokens, and of a stream the time to the first one, go to the tally."""
    arguments: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
    }
    start = time.monotonic()
    if not stream:
        whole = await client.chat.completions.create(**arguments)
        if tally:
            tally.num_tokens += whole.usage.completion_tokens
        return whole.choices[0].message.content or ""
    pieces = []
    options = {"include_usage": True}
    async with await client.chat.completions.create(
        stream=True, stream_options=options, **arguments
    ) as chunks:
        async for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                if tally and not pieces:
                    tally.first_tokens.append(time.monotonic() - start)
                pieces.append(chunk.choices[0].delta.content)
            elif chunk.usage and tally:
                tally.num_tokens += chunk.usage.completion_tokens
    return "".join(pieces)


async def visit(
    server: Server, clients: int, seconds: float, leave: float, alone: dict[str, str]
) -> tuple[Tally, float]:
    """`clients` users for `seconds`; each finishes the answer it waits for."""
    tally = Tally()
    start = time.monotonic()
    end = start + seconds

    async def user(number: int, client: AsyncOpenAI) -> None:
        rng, turn = random.Random(number), number
        while time.monotonic() < end:
            question, stream = QUESTIONS[turn % len(QUESTIONS)], turn % 2 == 0
            patience = rng.uniform(0, 3) if rng.random() < leave else None
            turn += 7
            began = time.monotonic()
            try:
                async with asyncio.timeout(patience):
                    answer = await ask(client, server.model, question, stream=stream, tally=tally)
            except TimeoutError:
                tally.left += 1
            except APIStatusError as error:
                if error.status_code != 503:
                    tally.errors.append(str(error))
                    continue
                tally.refused += 1
                await asyncio.sleep(float(error.response.headers["retry-after"]))
            except Exception as error:
                tally.errors.append(repr(error))
            else:
                tally.latencies.append(time.monotonic() - began)
                if answer != alone[question]:
                    tally.wrong[question] += 1

    async def watch() -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            while time.monotonic() < end:
                queue = (await server.report(http))["queue"]
                tally.deepest_queue = max(tally.deepest_queue, queue["waiting"])
                tally.most_running = max(tally.most_running, queue["running"])
                if process := server.process():
                    tally.rss_bytes.append(process["rss_bytes"])
                await asyncio.sleep(1)

    async with server.client() as client:
        await asyncio.gather(watch(), *(user(i, client) for i in range(clients)))
    return tally, time.monotonic() - start


async def rest(server: Server) -> dict[str, Any]:
    """What is still taken when nobody asks any more, after some seconds to let go of it."""
    async with httpx.AsyncClient(timeout=60) as http:
        end = time.monotonic() + REST_SECONDS
        while True:
            report = await server.report(http)
            taken = {key: report["queue"][key] for key in ("running", "waiting")}
            taken["kv_blocks"] = report["kv_blocks"]["used"]
            if not any(taken.values()) or time.monotonic() > end:
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(0.5)
    return {**taken, "process": server.process()}


def faults(row: dict[str, Any], tally: Tally, before: dict[str, Any], limit: int) -> list[str]:
    """What a server must not do; empty if all is well."""
    after = row["at_rest"]
    found = [f"{after[key]} {key} at rest" for key in ("running", "waiting", "kv_blocks")
             if after[key]]  # fmt: skip
    found += [f"{row[key]} {key}" for key in ("wrong_answers", "num_errors") if row[key]]
    if row["deepest_queue"] > limit:
        found.append(f"{row['deepest_queue']} waited, more than the {limit} allowed")
    if not row["answers"]:
        found.append("no answer at all")
    if after["process"]:
        growth = max(tally.rss_bytes) - tally.rss_bytes[len(tally.rss_bytes) // 2]
        row["rss_growth_second_half_bytes"] = growth
        if growth > MAX_GROWTH_BYTES:
            found.append(f"memory grew by {growth / MIB:.0f} MiB in the second half")
        for key, spare in (("open_files", 4), ("threads", 8)):
            if after["process"][key] > before["process"][key] + spare:
                found.append(f"{after['process'][key]} {key}, {before['process'][key]} at first")
    return found


async def run(args: argparse.Namespace) -> dict[str, Any]:
    server = Server(args.url, args.model, args.api_key, args.pid)
    async with httpx.AsyncClient() as http:
        await server.wait_until_ready(http)
    async with server.client() as client:
        alone = {q: await ask(client, args.model, q, stream=False) for q in QUESTIONS}
    before = await rest(server)
    rows = []
    async with httpx.AsyncClient(timeout=60) as http:
        for clients in args.clients:
            tally, seconds = await visit(server, clients, args.seconds, args.leave, alone)
            report = await server.report(http)
            row = tally.row(clients, seconds) | {"at_rest": await rest(server)}
            row["faults"] = faults(row, tally, before, report["queue"]["max_queue"])
            rows.append(row)
            print(f"{clients:3} clients: {row['answers_per_s']} answers/s, "
                  f"{row['tokens_per_s']} tokens/s, faults: {row['faults'] or 'none'}")  # fmt: skip
    if args.chats:
        lines = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in alone.items()
        ]
        args.chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "leave": args.leave,
        "at_first": before,
        "runs": rows,
        "queue_limits": report["queue"],
        "audit_mean": report["mean"],
        "speed": report["speed"],
        "totals": report["totals"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="default")
    parser.add_argument("--api-key", default="unused")
    parser.add_argument("--clients", type=int, nargs="+", default=[16])
    parser.add_argument("--seconds", type=float, default=60, help="for each number of clients")
    parser.add_argument("--leave", type=float, default=0.0, help="share of requests given up")
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory and files")
    parser.add_argument("--chats", type=Path, help="write the conversations here (JSONL)")
    parser.add_argument("--name", required=True, help="of the result file: results/NAME.json")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    write_result(args.name, result)
    return 1 if any(row["faults"] for row in result["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
