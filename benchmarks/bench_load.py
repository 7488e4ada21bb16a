"""Many clients at once against a running server: no error, no mixed-up answer, a bounded queue.

Start `hotneuron serve`, then: `.venv/bin/python benchmarks/bench_load.py --clients 16 --seconds 60
--name my-machine`. Each client asks greedy questions one after the other through the `openai`
package, half of them streamed, and compares every answer with the one the same question got alone
before the load began. The conversations are kept (--chats) so that `hotneuron report --data` can
compute offline what the dashboard's audit measured on the same traffic.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from openai import APIStatusError, AsyncOpenAI

RESULTS = Path(__file__).parent / "results"
QUESTIONS = tuple(
    f"{verb} {thing}."
    for verb in ("Tell me about", "Give me three facts about", "Write one sentence about")
    for thing in ("rivers", "bread", "the moon", "cats", "music", "trains", "rain", "schools")
)
ANSWER_TOKENS = 48


async def ask(client: AsyncOpenAI, model: str, question: str, stream: bool) -> str:
    arguments: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
    }
    if not stream:
        whole = await client.chat.completions.create(**arguments)
        return whole.choices[0].message.content or ""
    pieces = await client.chat.completions.create(stream=True, **arguments)
    return "".join([c.choices[0].delta.content or "" async for c in pieces if c.choices])


async def run(args: argparse.Namespace) -> dict[str, Any]:
    client = AsyncOpenAI(base_url=f"{args.url}/v1", api_key=args.api_key, max_retries=0)
    alone = {q: await ask(client, args.model, q, False) for q in QUESTIONS}
    end = time.monotonic() + args.seconds
    latencies: list[float] = []
    wrong: list[str] = []
    errors: list[str] = []
    refused = 0
    deepest_queue = most_running = 0

    async def user(number: int) -> None:
        nonlocal refused
        turn = number
        while time.monotonic() < end:
            question = QUESTIONS[turn % len(QUESTIONS)]
            start = time.monotonic()
            try:
                answer = await ask(client, args.model, question, stream=turn % 2 == 0)
            except APIStatusError as error:
                if error.status_code == 503:
                    refused += 1
                    await asyncio.sleep(0.5)
                else:
                    errors.append(str(error))
            except Exception as error:
                errors.append(repr(error))
            else:
                latencies.append(time.monotonic() - start)
                if answer != alone[question]:
                    wrong.append(question)
            turn += 7

    async def watch() -> None:
        nonlocal deepest_queue, most_running
        async with httpx.AsyncClient() as http:
            while time.monotonic() < end:
                report = await http.get(f"{args.url}/dashboard/report.json")
                queue = report.json()["queue"]
                deepest_queue = max(deepest_queue, queue["waiting"])
                most_running = max(most_running, queue["running"])
                await asyncio.sleep(1)

    start = time.monotonic()
    await asyncio.gather(watch(), *(user(i) for i in range(args.clients)))
    seconds = time.monotonic() - start
    async with httpx.AsyncClient() as http:
        report = (await http.get(f"{args.url}/dashboard/report.json")).json()
    if args.chats:
        lines = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in alone.items()
        ]
        args.chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "answers": len(latencies),
        "answers_per_s": round(len(latencies) / seconds, 2),
        "latency_p50_s": round(statistics.median(latencies), 3) if latencies else None,
        "latency_max_s": round(max(latencies), 3) if latencies else None,
        "wrong_answers": len(wrong),
        "wrong_questions": sorted(set(wrong)),
        "errors": errors[:5],
        "num_errors": len(errors),
        "refused_503": refused,
        "deepest_queue": deepest_queue,
        "most_running": most_running,
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
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--chats", type=Path, help="write the conversations here (JSONL)")
    parser.add_argument("--name", required=True, help="of the result file: results/NAME.json")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 1 if result["wrong_answers"] or result["num_errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
